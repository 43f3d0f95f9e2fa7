"""What views there are, stated as plain data: the kinds, their keys, and how they refer to each other.

An objective states its views as mappings, so it needs nothing of this package. `kind` says what a view is: `image`
(crops, the default; also of masks, depth and arrays of any number of channels), `points`, `volume`, `array` (as
stored) or `label`.

Not here: making views (`views`), geometry and pixels (`crops`, `points`, `volumes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import (
    is_range,
    read_spec,
    refuse,
    require_choice,
    require_integers,
    require_name,
    require_probabilities,
)
from data_pipelines.views.crops import Crop, draw_box, draw_overlapping_box
from data_pipelines.views.photometric import Photometric
from data_pipelines.views.points import PointsView
from data_pipelines.views.volumes import VolumeView

__all__ = ["KINDS", "AnyView", "ArrayView", "LabelView", "View", "require_distinct", "views_from"]

_RESIZERS = ("bicubic", "nearest")


@dataclass(frozen=True)
class View:
    """One kind of crop: the batch entry `name`, (C, size, size), uint8 for photos.

    Attributes:
        name: entry of the batch.
        size: side in pixels.
        count: crops of this kind per sample.
        scale: least and greatest share of the image area, in (0, 1].
        ratio: least and greatest width / height.
        hflip: probability of a horizontal flip.
        field: what to read: a photo, or an array (H, W) or (C, H, W); by default the first of jpg, jpeg, png, webp,
            npy, npz that every sample has.
        array: which array of an npz.
        channels: of an array field, in this order; all unless given.
        resize: `bicubic`, or `nearest` for values that must not mix (class ids, depth): never RGB, type as stored.
        same_crop_as: an earlier image view whose rectangles and flips this one shows too, of another field or at
            another size; its count, scale, ratio and hflip hold.
        overlap_with: an earlier image view; crop k overlaps its crop k (or its only one).
        min_overlap: share of the smaller of the two rectangles that lies in the other, at least.
        return_box: also give `<name>.box`, float32 (5,): left, top, width, height as shares of the picture, flipped.
        photometric: colours and blur; `finish` applies what is drawn here.
    """

    name: str
    size: int
    count: int = 1
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    field: str | None = None
    array: str | None = None
    channels: tuple[int, ...] | None = None
    resize: str = "bicubic"
    same_crop_as: str | None = None
    overlap_with: str | None = None
    min_overlap: float | None = None
    return_box: bool = False
    photometric: Photometric | None = None

    def __post_init__(self) -> None:
        where = require_name(self.name)
        require_integers(where, 1, size=self.size, count=self.count)
        for key, pair, high in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not is_range(pair, high=high) or pair[0] <= 0:
                refuse(where, key, pair, f"[low, high] with 0 < low <= high{' <= 1' if high == 1.0 else ''}")
        require_probabilities(where, hflip=self.hflip)
        require_choice(where, "resize", self.resize, _RESIZERS)
        if self.channels is not None:
            if not isinstance(self.channels, tuple) or not self.channels:
                refuse(where, "channels", self.channels, "a list of channel numbers from 0")
            for number in self.channels:
                require_integers(where, 0, channels=number)
        if (self.overlap_with is None) != (self.min_overlap is None):
            raise DataError(f"{where}: overlap_with and min_overlap belong together; give both or neither")
        if self.min_overlap is not None:
            require_probabilities(where, min_overlap=self.min_overlap)
        if self.photometric is not None and self.resize == "nearest":
            raise DataError(f"{where}: photometric changes colours, and resize='nearest' says that there are none")

    def draw_crops(self, frame: tuple[int, int], rng: ViewRandom, drawn: Mapping[str, Sequence[Crop]]) -> list[Crop]:
        """The `count` crops of a sample.

        Args:
            frame: (width, height) of the picture.
            rng: advanced by the draws made.
            drawn: crops of the earlier views of the sample.

        Raises:
            DataError: a view to overlap with shows another frame.
        """
        if self.same_crop_as is not None:
            return list(drawn[self.same_crop_as])
        others = drawn[self.overlap_with] if self.overlap_with is not None else ()
        crops = []
        for k in range(self.count):
            if others:
                other = others[k % len(others)].box_in(*frame)
                share = self.min_overlap or 0.0
                box = draw_overlapping_box(*frame, self.scale, self.ratio, rng, other=other, share=share)
            else:
                box = draw_box(*frame, self.scale, self.ratio, rng)
            crops.append(Crop(box, rng.uniform(0.0, 1.0) < self.hflip, frame))
        return crops


@dataclass(frozen=True)
class ArrayView:
    """A small array as it is stored, of the same shape in every sample: a camera pose, say.

    Attributes:
        name: entry of the batch.
        field: npy or npz to read.
        array: which array of an npz.
    """

    name: str
    field: str
    array: str | None = None

    count: ClassVar[int] = 1
    photometric: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_name(self.name)


@dataclass(frozen=True)
class LabelView:
    """A class index, int64: `name` is the entry of the batch, `field` holds ASCII digits (`cls` unless given)."""

    name: str
    field: str | None = None

    count: ClassVar[int] = 1
    array: ClassVar[None] = None
    photometric: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_name(self.name)


AnyView = View | PointsView | VolumeView | ArrayView | LabelView
KINDS: dict[str, type[AnyView]] = {
    "image": View,
    "points": PointsView,
    "volume": VolumeView,
    "array": ArrayView,
    "label": LabelView,
}
_LED_KEYS: dict[type[AnyView], tuple[str, ...]] = {  # what a view takes from the one whose crops it shows
    View: ("count", "scale", "ratio", "hflip"),
    VolumeView: ("count", "flip", "turn", "plane"),
}


def views_from(specs: Sequence[Mapping[str, Any]]) -> tuple[AnyView, ...]:
    """Views from the plain data an objective states; see the class of each kind for its keys.

    Raises:
        DataError: a key is unknown or missing, a value out of range, a name used twice, or no view at all.
    """
    views: list[AnyView] = []
    for spec in specs:
        view = _view_from(spec)
        leader = _leader(view, views, "same_crop_as")
        if leader is not None:
            led = _LED_KEYS[type(view)]
            for name in led:
                if name in spec:
                    raise DataError(
                        f"view {view.name!r}: {name}={spec[name]!r} has no effect, the crops are those of "
                        f"{leader.name!r}; leave it out"
                    )
            view = replace(view, **{name: getattr(leader, name) for name in led})
        views.append(view)
    require_distinct(views)
    return tuple(views)


def _view_from(spec: Mapping[str, Any]) -> AnyView:
    label = f"view {dict(spec)!r}"
    parsed = dict(spec)
    if spec.get("kind", "image") == "image":
        name = spec.get("name")
        if spec.get("photometric") is not None:
            try:
                parsed["photometric"] = Photometric.from_mapping(spec["photometric"])
            except DataError as error:
                raise DataError(f"view {name!r}, {error}") from None
    return read_spec(KINDS, parsed, label, default="image")


def require_distinct(views: Sequence[AnyView]) -> None:
    """Refuse an empty list, a name used twice, and a reference to what is no earlier view of the kind."""
    names = [view.name for view in views]
    if not names:
        raise DataError("no view is asked for; a stream needs at least one")
    for number, view in enumerate(views):
        if names.count(view.name) > 1:
            raise DataError(f"view name {view.name!r} is used twice; names are the entries of a batch")
        for relation in ("same_crop_as", "overlap_with"):
            leader = _leader(view, views[:number], relation)
            if leader is None:
                continue
            if leader.count != view.count and (relation == "same_crop_as" or leader.count != 1):
                counts = f"count={view.count} differs from {leader.count}"
                raise DataError(f"view {view.name!r}: {counts} of {leader.name!r}")
            if isinstance(view, VolumeView) and view.size != leader.size:
                raise DataError(f"view {view.name!r}: size={view.size} differs from {leader.size} of {leader.name!r}")


def _leader(view: AnyView, earlier: Sequence[AnyView], relation: str) -> Any:
    """The earlier view of the same kind that `view` names in `relation`; None when it names none."""
    name = getattr(view, relation, None)
    if name is None:
        return None
    candidates = {other.name: other for other in earlier if type(other) is type(view)}
    require_choice(f"view {view.name!r}", relation, name, candidates)
    return candidates[name]
