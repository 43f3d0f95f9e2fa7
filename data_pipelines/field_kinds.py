"""Of which kind the fields of a sample are: image, label, mask and so on.

A `dataset.json` written by `pack` names the kinds; for shards of other origin the name of the field decides. Kinds that
need code to be read (pickles) are known by name and never opened. Nothing heavy is imported.

A picture may lie under `jpg` in one sample and under `png` in the next, as photos are collected: these are names of one
field (`picture_names`), which all samples have under one of them (`shared_names`). Codecs are chosen by content.

Not here: the value of a field (`fields`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = [
    "ARRAY_KINDS",
    "FIELD_KINDS",
    "INPUT_FIELDS",
    "LABEL_ARRAYS",
    "cut_names",
    "field_kind",
    "has_channels",
    "input_array",
    "is_never_read",
    "is_radiance_grid",
    "kind_of_field",
    "picture_names",
    "shared_names",
    "under_shared_names",
]

FIELD_KINDS = ("image", "label", "json", "text", "mask", "depth", "array", "points", "volume")
ARRAY_KINDS = ("array", "points", "volume")
LABEL_ARRAYS = ("label", "labels", "seg")  # of an npz, that hold the classes of the voxels of another one

_IMAGES = ("jpg", "jpeg", "png", "webp")
# What a view of each kind reads where it is not told, the first of these that every sample has.
INPUT_FIELDS = {
    "image": (*_IMAGES, "npy", "npz"),
    "points": ("points.npy", "points.npz", "npy", "npz"),
    "volume": ("volume.npy", "volume.npz", "grid.npy", "npy", "npz"),
}
_CUT = re.compile(r"[0-9]+\.(?:.*\.)?(?:jpg|jpeg|png|webp)")
_NEVER_READ = frozenset({"pickle", "pkl", "pt", "pth", "pyd"})  # reading one of these runs code
_KIND_OF_EXTENSION = {
    **dict.fromkeys(_IMAGES, "image"),
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
    ("grid", "npy"): "volume",
    **dict.fromkeys((("seg", "npy"), ("labels", "npy")), "mask"),
}


def field_kind(name: str) -> str | None:
    """What a field of this name holds, one of `FIELD_KINDS`; None for names that say nothing.

    `seg.png` is a mask and `depth.png` a depth map, neither of which may pass through RGB; any other png is an image.
    `seg.npy` and `labels.npy` are masks, too, of volumes as a rule.
    """
    prefix, _, extension = name.lower().rpartition(".")
    return _KIND_OF_PREFIX.get((prefix.rpartition(".")[2], extension)) or _KIND_OF_EXTENSION.get(extension)


def is_never_read(field: str) -> bool:
    """True for fields whose name says pickle, also below a compression (`pkl.gz`)."""
    return not _NEVER_READ.isdisjoint(field.lower().split("."))


def is_radiance_grid(field: str) -> bool:
    """True for fields whose name says that their volume is colors and alpha (`grid.npy`)."""
    return field.lower().split(".")[-2:] == ["grid", "npy"]


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


def picture_names(name: str) -> tuple[str, ...]:
    """The names of the field that holds the same picture: of `left.png` left.jpg, left.jpeg, left.png, left.webp.

    Empty for what is no picture, such as `seg.png`.
    """
    if field_kind(name) != "image":
        return ()
    prefix = name[: name.rfind(".") + 1]
    return tuple(f"{prefix}{extension}" for extension in _IMAGES)


def shared_names(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    """Names under which each of several samples, shards or data sets has a field.

    Where all have a picture, each under one name and not all under the same, the first of these names stands for it;
    `under_shared_names` puts it there.
    """
    distinct = set(sets)
    common = frozenset.intersection(*distinct) if distinct else frozenset[str]()
    shared = set(common)
    for names in {picture_names(name) for one in distinct for name in one - common} - {()}:
        if common.isdisjoint(names) and all(len(one.intersection(names)) == 1 for one in distinct):
            shared.add(next(name for name in names if any(name in one for one in distinct)))
    return frozenset(shared)


def under_shared_names(sample: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The sample with its pictures under the names that `fields` has for them; changed in place."""
    for name in fields:
        if name not in sample:
            found = next((other for other in picture_names(name) if other in sample), None)
            if found is not None:
                sample[name] = sample.pop(found)
    return sample


def input_array(names: Iterable[str], wanted: str | None = None) -> str | None:
    """Which array of an npz is the volume: the one that is wanted, else "image", or the only one beside labels.

    Args:
        names: of its arrays.
        wanted: the name that settings give it; None: they give none.

    Returns:
        None where that does not tell.
    """
    found = list(names)
    if (preferred := wanted or "image") in found:
        return preferred
    others = [name for name in found if name not in LABEL_ARRAYS] or found
    return others[0] if len(others) == 1 else None


def cut_names(fields: Iterable[str]) -> list[str]:
    """Fields such as `0.jpg` and `25.jpg`, which the names cat.0.jpg and img_0.25.jpg give: a key ends at a dot."""
    return sorted(name for name in fields if _CUT.fullmatch(name))


def has_channels(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether an array looks like (C, H, W), an image of several bands, and not like a volume."""
    return kind == "array" and len(shape) == 3 and 2 * shape[0] <= min(shape[1:])
