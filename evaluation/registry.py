"""Names and fixed facts of the evaluation protocols, readable without torch.

A `Protocol` states everything that decides a score besides weights and data: version, tokens, labels and head
parameters. All of it enters the evaluation key, so a changed number here is a new result, never a silent reuse; a
change of the code behind `target` raises `version`. Other packages add protocols through the entry-point group
`pretrain.evaluations`, whose entries load to `Protocol` objects. The heads themselves are not here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any, Literal

from backbones.plugins import by_name, entry_points, load_entry, origin

__all__ = ["PROTOCOLS", "EvaluationError", "Protocol", "image_size_px", "load_head", "names", "protocol"]

ENTRY_POINT_GROUP = "pretrain.evaluations"


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked, in one line: what, where, what is allowed."""


@dataclass(frozen=True)
class Protocol:
    """One way to grade a frozen backbone.

    Attributes:
        target: "module:function" of the head, called as
            `score(train, test, *, num_classes, params, seed, device) -> Outcome`.
        version: raised whenever the code behind `target` changes what it computes.
        tokens: "pooled" gives the head `extract.Pooled` (CLS and mean of patches), "patches" gives `extract.Dense`.
        label: sample field that holds the target, "cls" or "seg.png".
        metrics: names reported, fractions in [0, 1]; the first is the headline.
        params: every number the head depends on.
    """

    name: str
    summary: str
    target: str
    version: int
    tokens: Literal["pooled", "patches"]
    label: Literal["cls", "seg.png"]
    metrics: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def headline(self) -> str:
        return self.metrics[0]

    @property
    def fields(self) -> tuple[str, ...]:
        """Sample fields the data must have; "image" stands for one of `data.IMAGE_FIELDS`."""
        return ("image", self.label)


PROTOCOLS: dict[str, Protocol] = {
    entry.name: entry
    for entry in (
        Protocol(
            name="linear",
            summary="linear classifier on frozen [CLS, mean of patches], learning rate chosen on held-out train images",
            target="evaluation.protocols.linear.score:score",
            version=1,
            tokens="pooled",
            label="cls",
            metrics=("top1", "top1_ci_low", "top1_ci_high", "mean_class_top1", "val_top1", "top1_best_on_test"),
            params=MappingProxyType(
                {
                    "lrs": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
                    "momentum": 0.9,
                    "batch_size": 256,
                    "min_steps": 300,
                    "epochs": 30,
                    "folds": 5,  # below `holdout_from` training images; one held-out fifth above
                    "holdout_from": 2000,
                }
            ),
        ),
        Protocol(
            name="knn",
            summary="weighted vote of the 20 nearest training images by cosine, temperature 0.07, on the CLS token",
            target="evaluation.protocols.knn.score:score",
            version=1,
            tokens="pooled",
            label="cls",
            metrics=("top1", "top1_ci_low", "top1_ci_high", "mean_class_top1", "top1_patch_mean"),
            params=MappingProxyType({"k": 20, "temperature": 0.07, "diagnostic_ks": (1, 5, 10, 20, 50, 100, 200)}),
        ),
        Protocol(
            name="segmentation",
            summary="standardisation and one linear layer on frozen patch tokens, logits upsampled to the label map",
            target="evaluation.protocols.segmentation.score:score",
            version=1,
            tokens="patches",
            label="seg.png",
            metrics=("miou", "miou_ci_low", "miou_ci_high", "pixel_accuracy", "val_miou", "miou_position_prior"),
            params=MappingProxyType(
                {
                    "lrs": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
                    "weight_decay": 1e-3,
                    "betas": (0.9, 0.999),
                    "batch_size": 8,
                    "min_steps": 200,
                    "epochs": 8,
                    "warmup": 0.05,
                    "pixels_per_image": 4096,  # label pixels drawn once per training image
                    "pixels_per_step": 1024,  # of these, per image and step
                    "folds": 3,
                    "holdout_from": 2000,
                }
            ),
        ),
    )
}


def _plugins() -> dict[str, EntryPoint]:
    built_in = {name: entry.target for name, entry in PROTOCOLS.items()}
    return by_name(entry_points(group=ENTRY_POINT_GROUP), "protocol", built_in, EvaluationError)


def names() -> tuple[str, ...]:
    """Sorted names of all known protocols, plug-ins included (these are not imported)."""
    return tuple(sorted({*PROTOCOLS, *_plugins()}))


def protocol(name: str) -> Protocol:
    """Returns the protocol called `name`.

    Raises:
        EvaluationError: unknown name (the nearest known ones are named), or a plug-in that cannot be imported or is no
            `Protocol` of that name.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    plugins = _plugins()
    if name not in plugins:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EvaluationError(f"unknown evaluation protocol {name!r}; known: {', '.join(names())}{hint}")
    found = load_entry(plugins[name], "protocol", EvaluationError)
    if not isinstance(found, Protocol) or found.name != name:
        raise EvaluationError(f"entry point {origin(plugins[name])} must be a Protocol named {name!r}, got {found!r}")
    return found


def load_head(spec: Protocol) -> Any:
    """Imports and returns the function behind `spec.target`.

    Raises:
        EvaluationError: it cannot be imported.
    """
    return load_entry(EntryPoint(spec.name, spec.target, ENTRY_POINT_GROUP), "protocol", EvaluationError)


def image_size_px(
    requested: int | tuple[int, int] | None, trained: int | tuple[int, int], patch_size: int | tuple[int, int]
) -> tuple[int, int]:
    """Returns the (height, width) images are brought to, in pixels.

    Args:
        requested: one number for a square, (height, width), or None for the size the backbone was built for.
    """
    height, width = _pair(trained if requested is None else requested)
    for side, patch, name in ((height, _pair(patch_size)[0], "height"), (width, _pair(patch_size)[1], "width")):
        if side < patch or side % patch:
            below = max(patch, side // patch * patch)
            raise EvaluationError(
                f"image_size {name} {side} is not a multiple of the backbone's patch size {patch}; "
                f"nearest allowed: {below} or {below + patch}"
            )
    return height, width


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    rows, cols = size
    return int(rows), int(cols)
