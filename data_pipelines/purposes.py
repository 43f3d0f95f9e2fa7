"""What random keys are for: the numbers that keep two uses of one seed from drawing the same.

`order.key` hashes one of them with the numbers that name the place: `key(seed, epoch, purpose, sample_id)`.
A changed number changes whatever is drawn under it, and so the order or the pixels of every recorded run.
"""

from __future__ import annotations

from enum import IntEnum, unique

__all__ = ["Purpose", "ViewPurpose"]


@unique
class Purpose(IntEnum):
    """Below the seed of a run; the comment names the file that draws."""

    BLOCKS = 1  # order: blocks of an epoch
    WINDOW = 2  # order: samples of a window
    SAMPLE = 3  # randomness: everything about one sample in one epoch
    SUBSTITUTE = 4  # streaming/stream: what stands in for a damaged sample
    PART = 5  # streaming/mixture: the seed of one of several data sets
    MIX = 6  # streaming/unindexed: what leaves the shuffle buffer
    SHARDS = 7  # streaming/unindexed: shards of a pass
    SIZES = 8  # streaming/stream: which of several sets of views a step has
    SIDE = 9  # streaming/joined: the seed of one of several data sets side by side


@unique
class ViewPurpose(IntEnum):
    """Below the key of one view of one sample, which itself draws the crops."""

    COLORS = 1  # views: photometric amounts
