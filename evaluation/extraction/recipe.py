"""How a backbone of one kind is given the samples of evaluation data, and which kinds there are.

`Extraction` holds what is peculiar to a kind: the sample fields that it reads, the facts that decide its features, and
how a field becomes network input. The kind is that of `Encoder.kind`, which a backbone's file names. Another
package adds a kind through the entry-point group `pretrain.extractions`, whose entries are named for the kind and load
to an `Extraction`.

Not here: the forward pass (`evaluation.extraction.forward`), images (`evaluation.extraction.images`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from backbones.plugins import by_name, entry_points, load_entry, origin
from evaluation.protocol import EvaluationError, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EXTRACTIONS", "Extraction", "Size", "extraction_of", "feature_facts", "feature_recipe"]

ENTRY_POINT_GROUP = "pretrain.extractions"
EXTRACTOR_VERSION = 2  # 2: photos and masks as EXIF turns them, masks of 2 and 4 bits as stored

# kind of backbone -> where its `Extraction` is
EXTRACTIONS: dict[str, str] = {"image": "evaluation.extraction.images:IMAGES"}

Size = int | tuple[int, int]


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
    """

    inputs: tuple[str, ...]
    tokens: tuple[str, ...]
    recipe: Callable[[Protocol, Mapping[str, Any], Size | None], dict[str, Any]]
    prepare: Callable[[Any, Mapping[str, Any]], Tensor | dict[str, Tensor]]


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
    built_in = {kind: EntryPoint(kind, value, ENTRY_POINT_GROUP) for kind, value in EXTRACTIONS.items()}
    return built_in | by_name(entry_points(group=ENTRY_POINT_GROUP), "extraction", EXTRACTIONS, EvaluationError)


def feature_recipe(
    extraction: Extraction, spec: Protocol, architecture: Mapping[str, Any], size: Size | None
) -> dict[str, Any]:
    """Everything besides weights and data that decides the features; normalisation is part of the architecture.

    Raises:
        EvaluationError: The protocol, the backbone and the size do not go together.
    """
    if spec.tokens not in extraction.tokens:
        raise EvaluationError(
            f"protocol {spec.name!r} needs {spec.tokens!r} features; backbone {architecture.get('name')!r} gives "
            f"{' and '.join(map(repr, extraction.tokens))}"
        )
    shared = {"version": EXTRACTOR_VERSION, "tokens": spec.tokens, "norm": "final"}
    labels = {"labels": "cls", "storage": "float32"} if spec.tokens == "pooled" else {"storage": "float16"}
    return {**shared, **labels, **extraction.recipe(spec, architecture, size)}


def feature_facts(weights: str, recipe: Mapping[str, Any], data: str) -> dict[str, Any]:
    """What features are found by, see `evaluation.keys`.

    Args:
        weights: `backbones.io.weights_digest` of the backbone.
        recipe: As `feature_recipe` makes it.
        data: `OpenedData.digest`.
    """
    return {"weights": weights, "features": dict(recipe), "data": data}
