"""What plug-ins import the input of a head from: `from evaluation.extract import Pooled, Dense, Decoded`."""

from __future__ import annotations

from evaluation.extraction.decoding import Decoded
from evaluation.extraction.forward import Dense, Pooled

__all__ = ["Decoded", "Dense", "Pooled"]
