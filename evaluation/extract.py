"""What plug-ins import the features of a head from: `from evaluation.extract import Pooled, Dense`."""

from __future__ import annotations

from evaluation.extraction.forward import Dense, Pooled

__all__ = ["Dense", "Pooled"]
