"""How a backbone of one kind is given the samples of evaluation data, and which kinds there are.

`Extraction` holds what is peculiar to a kind: the sample fields that it reads, the facts that decide its features, how
a field becomes network input, and how tokens become one vector. The kind is that of `Encoder.kind`, which a backbone's
file names. Another package adds a kind through the entry-point group `pretrain.extractions`, whose entries are named
for the kind and load to an `Extraction`.

Not here: the forward pass (`evaluation.extraction.forward`), the kinds themselves (one file each beside this one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, NamedTuple

from backbones.plugins import by_name, entry_points, load_entry, origin
from evaluation.protocol import EvaluationError, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from backbones.encoder import Encoder

__all__ = [
    "EXTRACTIONS",
    "BuiltIn",
    "Extraction",
    "Reads",
    "Size",
    "extraction_of",
    "feature_facts",
    "feature_recipe",
    "fits",
]

ENTRY_POINT_GROUP = "pretrain.extractions"
EXTRACTOR_VERSION = 2  # 2: photos and masks as EXIF turns them, masks of 2 and 4 bits as stored


class BuiltIn(NamedTuple):
    """Where an `Extraction` of this package is, and what of it is to be known without torch."""

    place: str
    tokens: tuple[str, ...]
    axes: int


# by kind of backbone
EXTRACTIONS: dict[str, BuiltIn] = {
    "image": BuiltIn("evaluation.extraction.images:IMAGES", ("pooled", "patches", "encoder"), 2),
    "points": BuiltIn("evaluation.extraction.points:POINTS", ("pooled", "encoder"), 0),
    "voxels": BuiltIn("evaluation.extraction.voxels:VOXELS", ("pooled", "patches", "encoder", "decoded"), 3),
}

Size = int | tuple[int, int]


class Reads(NamedTuple):
    """What of its samples a backbone was trained on; None: not known, and what is usual for its kind is read.

    Attributes:
        field: the field that was read, which takes the place of `Extraction.inputs`.
        array: which array of an npz.
    """

    field: str | None = None
    array: str | None = None


@dataclass(frozen=True)
class Extraction:
    """What is peculiar to one kind of backbone.

    Attributes:
        inputs: Sample fields of which one holds the input, the preferred first.
        tokens: Values of `Protocol.tokens` that such backbones can give.
        recipe: `recipe(spec, architecture, size)` returns plain facts that decide the features besides weights and
            data, from the protocol, the backbone's architecture as its file has it, and the size asked for or None.
            Raises `EvaluationError` where these do not go together.
        prepare: `prepare(content, recipe)` turns the content of the input field into one sample, a tensor or a dict of
            tensors. Samples are stacked along a new first axis and given to `Encoder.tokens`.
        axes: Of the grid of tokens that "patches" are.
        pooling: What pooled features have of all tokens beside a class token: "mean", and "max" where the greatest
            value of each channel tells more.
        lay: `lay(labels, content, recipe)` brings a map of labels to where `prepare` put the content that they belong
            to, `evaluation.data.IGNORED` where nothing is. None: labels of any size lie over the whole input.
        maps: `maps(encoder, batch)` gives what "patches" are of a batch as `prepare` made it: maps of tokens
            (B, s..., D) over the same extent, the finest first. None: one, of the tokens.
    """

    inputs: tuple[str, ...]
    tokens: tuple[str, ...]
    recipe: Callable[[Protocol, Mapping[str, Any], Size | None], dict[str, Any]]
    prepare: Callable[[Any, Mapping[str, Any]], Tensor | dict[str, Tensor]]
    axes: int = 2
    pooling: tuple[str, ...] = ("mean",)
    lay: Callable[[npt.NDArray[np.int64], Any, Mapping[str, Any]], npt.NDArray[np.int64]] | None = None
    maps: Callable[[Encoder, Any], Sequence[Tensor]] | None = None

    def reading(self, reads: Reads) -> Extraction:
        """The same of samples whose input lies in the field that `reads` names."""
        return self if reads.field is None else replace(self, inputs=(reads.field,))


def extraction_of(kind: str) -> Extraction:
    """The extraction for backbones of a kind.

    Raises:
        EvaluationError: There is none, or a plug-in's cannot be imported or is no `Extraction`.
    """
    entry = _all().get(kind)
    if entry is None:
        raise EvaluationError(
            f"backbones of kind {kind!r} cannot be evaluated here; known kinds: {', '.join(sorted(_all()))}; others "
            f"come with a package that has an entry point {kind!r} in the group {ENTRY_POINT_GROUP}"
        )
    found = load_entry(entry, "extraction", EvaluationError)
    if not isinstance(found, Extraction):
        raise EvaluationError(f"entry point {origin(entry)} must be an Extraction, got {found!r}")
    return found


def _all() -> dict[str, EntryPoint]:
    places = {kind: built_in.place for kind, built_in in EXTRACTIONS.items()}
    built_in = {kind: EntryPoint(kind, place, ENTRY_POINT_GROUP) for kind, place in places.items()}
    return built_in | by_name(entry_points(group=ENTRY_POINT_GROUP), "extraction", places, EvaluationError)


def fits(spec: Protocol, kind: str, tokens: tuple[str, ...], axes: int) -> bool:
    """Whether a protocol can use what a kind of backbone gives: these sorts of features, maps of so many axes."""
    label = spec.target_label
    is_for = spec.kinds is None or kind in spec.kinds
    return is_for and spec.tokens in tokens and (label is None or label.axes in (0, axes))


def feature_recipe(
    extraction: Extraction,
    spec: Protocol,
    architecture: Mapping[str, Any],
    size: Size | None,
    reads: Reads = Reads(),  # noqa: B008 - it cannot be changed
    *,
    in_half: bool = False,
) -> dict[str, Any]:
    """Everything besides weights and data that decides the features; normalisation is part of the architecture.

    Maps of patches are stored in half precision, vectors of samples if `in_half` says so. Where it is known which
    "field" and "array" the backbone was trained on, these are in it under these names.

    Raises:
        EvaluationError: The protocol, the backbone and the size do not go together.
    """
    kind = architecture.get("kind", "image")
    if spec.kinds is not None and kind not in spec.kinds:
        raise EvaluationError(
            f"protocol {spec.name!r} is for backbones of kind {' and '.join(spec.kinds)}; "
            f"backbone {architecture.get('name')!r} is of kind {kind}"
        )
    if not fits(spec, kind, extraction.tokens, extraction.axes):
        maps, label = spec.tokens in extraction.tokens, spec.target_label
        needs = f"maps of {label.axes} axes" if maps and label else f"{spec.tokens!r} features"
        gives = f"{extraction.axes}" if maps else " and ".join(map(repr, extraction.tokens))
        raise EvaluationError(
            f"protocol {spec.name!r} needs {needs}; backbone {architecture.get('name')!r} gives {gives}"
        )
    facts: dict[str, Any] = {"version": EXTRACTOR_VERSION, "tokens": spec.tokens, "norm": "final"}
    if spec.tokens == "pooled":
        facts |= {"labels": "cls", "storage": "float16" if in_half else "float32"}
        facts |= {} if extraction.pooling == ("mean",) else {"pooling": list(extraction.pooling)}
        facts |= {} if spec.num_layers == 1 else {"layers": spec.num_layers}
    elif spec.tokens == "patches":
        facts |= {"storage": "float16"}
    read = {name: value for name, value in reads._asdict().items() if value is not None}
    return {**facts, **extraction.recipe(spec, architecture, size), **read}


def feature_facts(weights: str, recipe: Mapping[str, Any], data: str) -> dict[str, Any]:
    """What features are found by, see `evaluation.keys`.

    Args:
        weights: `backbones.io.weights_digest` of the backbone.
        recipe: As `feature_recipe` makes it.
        data: `OpenedData.digest`.
    """
    return {"weights": weights, "features": dict(recipe), "data": data}
