"""Learning objectives, one file each: what they need from data, their heads, their loss.

`objectives.registry` finds them by name and `objectives.configs` holds their settings; neither imports torch.
"""

from __future__ import annotations
