"""Of which kind the fields of a sample are: image, label, mask and so on.

A `dataset.json` written by `pack` names the kinds; for shards of other origin the name of the field decides. Kinds that
need code to be read (pickles) are known by name and never opened. Nothing heavy is imported.

Not here: the value of a field (`fields`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ARRAY_KINDS", "FIELD_KINDS", "field_kind", "has_channels", "is_never_read", "kind_of_field"]

FIELD_KINDS = ("image", "label", "json", "text", "mask", "depth", "array", "points", "volume")
ARRAY_KINDS = ("array", "points", "volume")

_NEVER_READ = frozenset({"pickle", "pkl", "pt", "pth", "pyd"})  # reading one of these runs code
_KIND_OF_EXTENSION = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    **dict.fromkeys(("npy", "npz"), "array"),
    "cls": "label",
    "json": "json",
    "txt": "text",
}
_KIND_OF_PREFIX = {
    **dict.fromkeys((("seg", "png"), ("mask", "png"), ("label", "png")), "mask"),
    ("depth", "png"): "depth",
    ("points", "npy"): "points",
    ("volume", "npy"): "volume",
}


def field_kind(name: str) -> str | None:
    """What a field of this name holds, one of `FIELD_KINDS`; None for names that say nothing.

    `seg.png` is a mask and `depth.png` a depth map, neither of which may pass through RGB; any other png is an image.
    """
    prefix, _, extension = name.lower().rpartition(".")
    return _KIND_OF_PREFIX.get((prefix.rpartition(".")[2], extension)) or _KIND_OF_EXTENSION.get(extension)


def is_never_read(field: str) -> bool:
    """True for fields whose name says pickle, also below a compression (`pkl.gz`)."""
    return not _NEVER_READ.isdisjoint(field.lower().split("."))


def kind_of_field(field: str, declared: Any) -> str | None:
    """The kind of a field, one of `FIELD_KINDS`; None when it is unknown or never read.

    Args:
        field: everything behind the first dot of a member's name, such as `seg.png`.
        declared: `fields` of a `dataset.json`, whoever wrote it; what is no kind there is passed over.
    """
    if is_never_read(field):
        return None
    kind = declared.get(field) if isinstance(declared, Mapping) else None
    return kind if kind in FIELD_KINDS else field_kind(field)


def has_channels(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether an array looks like (C, H, W), an image of several bands, and not like a volume."""
    return kind == "array" and len(shape) == 3 and 2 * shape[0] <= min(shape[1:])
