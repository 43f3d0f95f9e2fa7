"""From a sample to the views of it that an objective asks for.

Only what has to happen before samples are stacked happens here: images stay 8 bits, colours and blur are drawn here
and applied to whole batches (`photometric`).

Everything random comes from `ViewRandom`s keyed by (seed, epoch, sample id, view), so views do not depend on ranks or
workers. Crops and colours have keys of their own: asking for one of them does not change the others.

Not here: what views there are (`specs`), geometry (`crops`, `points`, `volumes`), decoders (`decode`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode import IMAGE_FIELDS, Photo, chosen_decoder, decode_array, decode_label, decode_mask
from data_pipelines.errors import CorruptSampleError, DataError, suggest
from data_pipelines.order import key
from data_pipelines.purposes import ViewPurpose
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import require_choice
from data_pipelines.views.crops import (
    ArrayPicture,
    Crop,
    ImageLike,
    PhotoPicture,
    Picture,
    ValuePicture,
    draw_box,
    eval_view,
    photo_crop,
    rgb_image,
)
from data_pipelines.views.photometric import PARAMS_SUFFIX, reference
from data_pipelines.views.points import PointsView
from data_pipelines.views.specs import KINDS, AnyView, ArrayView, LabelView, View, require_distinct, views_from
from data_pipelines.views.volumes import Placement, VolumeView, as_volume

__all__ = [
    "AnyView",
    "ArrayView",
    "LabelView",
    "PointsView",
    "View",
    "ViewMaker",
    "VolumeView",
    "eval_view",
    "random_resized_crop",
    "require_distinct",
    "views_from",
]

RESAMPLERS = ("pil", "torch")

_ARRAY_FIELDS = ("npy", "npz")
_DEFAULT_FIELDS = {
    "image": IMAGE_FIELDS + _ARRAY_FIELDS,
    "points": ("points.npy", "points.npz", *_ARRAY_FIELDS),
    "volume": ("volume.npy", "volume.npz", *_ARRAY_FIELDS),
    "label": ("cls",),
}


class _Source(NamedTuple):
    """What is decoded once per sample and shared by the views that read it alike."""

    field: str
    holds: str  # photo, numbers, values, volume, array or label
    array: str | None = None
    channels: tuple[int, ...] | None = None


class ViewMaker:
    """Makes the views of samples; picklable, holds no state of its own.

    Args:
        views: see `views_from`.
        fields: names that every sample has.
        decoder: of JPEGs: `pil`, `simplejpeg`, or `auto` for simplejpeg where it is installed. The same pixels, see
            `decode`.
        scaled: decode a JPEG at half the size (or a quarter, an eighth) when every crop of it is still shrunk after
            that: faster on large photos, changes the pixels.
        resampler: of photos: `pil`, or `torch`, three times as fast; other pixels, see `crops`.

    Attributes:
        views: as given.
        reads: fields that the views are made of.
        decoder: the decoder in use.

    Raises:
        DataError: a field is missing or does not suit its view; names the fields there are.
    """

    def __init__(
        self,
        views: Sequence[AnyView],
        fields: frozenset[str],
        *,
        decoder: str = "auto",
        scaled: bool = False,
        resampler: str = "pil",
    ) -> None:
        require_distinct(views)
        require_choice("data", "resampler", resampler, RESAMPLERS)
        self.decoder, self.scaled, self.resampler = chosen_decoder(decoder), scaled, resampler
        self.views = tuple(views)
        self._plan = [(view, _source(view, fields)) for view in views]
        self.reads = frozenset(source.field for _, source in self._plan)
        self._stack_dim = {view.name: 1 if view.count > 1 else 0 for view in views}

    def __call__(self, sample: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
        """The views of one sample.

        Args:
            sample: bytes by field.
            seed: 64-bit key of the sample, see `sample_seed`; view i draws from keys made of it and i.

        Returns:
            Per view its entries, each with a first dimension `count` when that is more than 1.

        Raises:
            CorruptSampleError: a field does not decode, or is not what a view can use; begins with the field.
        """
        opened: dict[_Source, Any] = {}
        shown: dict[str, Any] = {}  # crops or placements by view
        for number, (view, source) in enumerate(self._plan):
            with _naming(source.field):
                if source not in opened:
                    opened[source] = self._open(source, sample[source.field])
                rng = ViewRandom(key(number, base=seed))
                if isinstance(view, View):
                    picture = opened[source]
                    shown[view.name] = view.draw_crops((picture.width, picture.height), rng, shown)
                elif isinstance(view, VolumeView):
                    shown[view.name] = _placements(view, opened[source].shape[1:], rng, shown)
        if self.scaled:
            self._reduce(opened, shown)
        entries: dict[str, Tensor] = {}
        for number, (view, source) in enumerate(self._plan):
            with _naming(source.field):
                entries |= _entries(view, opened[source], shown.get(view.name), key(number, base=seed))
        return entries

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack what `__call__` made of several samples: (b, ...), or (count, b, ...) for views that count more.

        Raises:
            DataError: an entry has not the same shape and type in all samples.
        """
        batch = {}
        for name in samples[0]:
            parts = [sample[name] for sample in samples]
            if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
                kinds = sorted({f"{tuple(part.shape)} {part.dtype}" for part in parts})
                raise DataError(
                    f"view {name!r} cannot be stacked: the samples have {' and '.join(kinds)}; all data of a stream "
                    "must agree in type, channels, and the shape of plain arrays"
                )
            batch[name] = torch.stack(parts, self._stack_dim[name.split(".")[0]])
        return batch

    def _open(self, source: _Source, data: bytes) -> Any:
        if source.holds == "photo":
            return PhotoPicture(Photo(data, self.decoder), self.resampler)
        if source.holds == "label":
            return decode_label(data)
        if source.holds == "values" and source.field.endswith("png"):
            return ValuePicture(decode_mask(data)[None])
        values = decode_array(data, source.array)
        if source.holds == "volume":
            return as_volume(values)
        if source.holds == "array":
            return values
        return (ValuePicture if source.holds == "values" else ArrayPicture)(_as_channels(values, source.channels))

    def _reduce(self, opened: Mapping[_Source, Any], shown: Mapping[str, Any]) -> None:
        """Let each photo be decoded at the smallest size at which none of its crops has to be enlarged."""
        for source, picture in opened.items():
            if not isinstance(picture, PhotoPicture):
                continue
            with _naming(source.field):
                room = min(
                    min(crop.box_in(picture.width, picture.height)[2:]) / view.size
                    for view, own in self._plan
                    if isinstance(view, View) and own == source
                    for crop in shown[view.name]
                )
            picture.reduce(max(factor for factor in (1, 2, 4, 8) if factor <= max(1, room)))


def random_resized_crop(image: ImageLike, view: View, rng: ViewRandom) -> Tensor:
    """Cut a random rectangle, resize it to a square and maybe flip it; by PIL, as `ViewMaker` does unless told else.

    Args:
        image: (H, W, 3) uint8 array, or an RGB PIL image (which saves a copy).
        view: which rectangles; `count` is the caller's business.
        rng: advanced by the draws made.

    Returns:
        (3, size, size) uint8.
    """
    photo = rgb_image(image)
    box = draw_box(photo.width, photo.height, view.scale, view.ratio, rng)
    is_flipped = rng.uniform(0.0, 1.0) < view.hflip
    return torch.from_numpy(np.ascontiguousarray(photo_crop(photo, box, view.size, is_flipped)))


@contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise CorruptSampleError(f"field {field}: {error}") from None


def _entries(view: AnyView, content: Any, shown: Any, base: int) -> dict[str, Tensor]:
    """All entries of a view of one sample; `base` is the key of the view."""
    if isinstance(view, View):
        return _image_entries(view, content, shown, base)
    if isinstance(view, LabelView):
        return {view.name: torch.tensor(content)}
    if isinstance(view, ArrayView):
        return {view.name: torch.from_numpy(np.array(content))}
    if isinstance(view, PointsView):
        rng = ViewRandom(base)
        return {view.name: _counted(np.stack([view.make(content, rng) for _ in range(view.count)]))}
    entries = {view.name: _counted(np.stack([view.cut(content, placement) for placement in shown]))}
    if view.return_size:
        entries[f"{view.name}.size"] = _counted(np.array([view.shown_size(placement) for placement in shown]))
    return entries


def _image_entries(view: View, picture: Picture, crops: Sequence[Crop], base: int) -> dict[str, Tensor]:
    pixels = np.empty((len(crops), picture.num_channels, view.size, view.size), picture.dtype)
    for crop, out in zip(crops, pixels, strict=True):
        picture.cut(crop, out)
    entries = {view.name: _counted(pixels)}
    if view.return_box:
        entries[f"{view.name}.box"] = _counted(np.array([crop.as_row() for crop in crops], np.float32))
    if view.photometric is not None:
        rng = ViewRandom(key(ViewPurpose.COLORS, base=base))
        if view.photometric.mode == "reference":
            changed = [reference(torch.from_numpy(crop), view.photometric, rng).numpy() for crop in pixels]
            entries[view.name] = _counted(np.stack(changed))
        else:
            rows = np.array([view.photometric.draw(rng) for _ in crops], np.float32)
            entries[view.name + PARAMS_SUFFIX] = _counted(rows)
    return entries


def _placements(
    view: VolumeView, shape: tuple[int, ...], rng: ViewRandom, shown: Mapping[str, Any]
) -> Sequence[Placement]:
    if view.same_crop_as is not None:
        placements: Sequence[Placement] = shown[view.same_crop_as]
        return placements
    return [view.place(shape, rng) for _ in range(view.count)]


def _counted(values: Any) -> Tensor:
    """(count, ...) to a tensor, without the dimension when the count is 1."""
    return torch.from_numpy(values[0] if len(values) == 1 else values)


def _as_channels(values: Any, channels: tuple[int, ...] | None) -> Any:
    """(C, H, W) of (H, W) or (C, H, W), of the channels asked for."""
    if values.ndim not in (2, 3):
        raise DataError(f"array of shape {values.shape} is no picture (H, W) or (C, H, W)")
    if values.ndim == 2:
        values = values[None]
    if channels is None:
        return values
    if max(channels) >= len(values):
        raise DataError(f"there is no channel {max(channels)}; the array has {len(values)}")
    return values[list(channels)]


def _source(view: AnyView, fields: frozenset[str]) -> _Source:
    """Where a view reads, and as what.

    Raises:
        DataError: not every sample has the field, or its name says that it holds something else.
    """
    kind = next(name for name, cls in KINDS.items() if isinstance(view, cls))
    field = _field(view, kind, fields)
    if isinstance(view, LabelView):
        return _Source(field, "label")
    suffix = field.rsplit(".", 1)[-1]
    if not isinstance(view, View):
        _require_suffix(view, field, suffix, _ARRAY_FIELDS)
        return _Source(field, "volume" if kind == "volume" else "array", view.array)
    wants_values = view.resize == "nearest"
    _require_suffix(view, field, suffix, ("png", *_ARRAY_FIELDS) if wants_values else _DEFAULT_FIELDS["image"])
    if suffix in _ARRAY_FIELDS:
        if view.photometric is not None:
            raise DataError(f"view {view.name!r}: photometric is for RGB photos, and field {field!r} holds an array")
        return _Source(field, "values" if wants_values else "numbers", view.array, view.channels)
    if view.channels is not None or view.array is not None:
        raise DataError(f"view {view.name!r}: channels and array are for npy and npz fields; field is {field!r}")
    return _Source(field, "values" if wants_values else "photo")


def _field(view: AnyView, kind: str, fields: frozenset[str]) -> str:
    if isinstance(view, View) and view.resize == "nearest" and view.field is None:
        raise DataError(f"view {view.name!r}: resize='nearest' needs field, the mask or depth map to read")
    candidates = (view.field,) if view.field is not None else _DEFAULT_FIELDS[kind]
    for name in candidates:
        if name in fields:
            return name
    raise DataError(
        f"view {view.name!r}: no field {' or '.join(candidates)} in every sample; every sample has "
        f"{', '.join(sorted(fields)) or 'none'}{suggest(candidates[0], fields)}"
    )


def _require_suffix(view: AnyView, field: str, suffix: str, readable: Sequence[str]) -> None:
    if suffix not in readable:
        raise DataError(f"view {view.name!r}: field {field!r} does not end in {', '.join(readable)}")
