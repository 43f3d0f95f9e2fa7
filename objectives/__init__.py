"""Learning objectives, one folder each: what they need from data, their heads, their loss.

`objectives.registry` finds them by name; it and the `config.py` of each folder import no torch. `objectives.parts` is
what several of them share.
"""

from __future__ import annotations
