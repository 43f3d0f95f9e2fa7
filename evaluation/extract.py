"""What plug-ins import the input of a head from: `from evaluation.extract import Pooled, Dense, Frozen, Decoded`."""

from __future__ import annotations

from evaluation.extraction.decoding import Decoded
from evaluation.extraction.forward import Dense, Pooled
from evaluation.extraction.frozen import Frozen

__all__ = ["Decoded", "Dense", "Frozen", "Pooled"]
