"""Crops of photos, and of masks, depth and arrays of any number of channels.

Only what has to happen before samples are stacked happens here: photos stay 8 bits, colors and blur are drawn here and
applied to whole batches (`photometric`).

Not here: rectangles and pixels (`crops`), decoders (`decode`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode import Photo, decode_array, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.field_kinds import INPUT_FIELDS
from data_pipelines.purposes import ViewPurpose
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import (
    is_range,
    refuse,
    require_choice,
    require_count,
    require_integers,
    require_probabilities,
)
from data_pipelines.views.base import ARRAY_FIELDS, Decoding, Reading, View
from data_pipelines.views.crops import (
    ArrayPicture,
    Crop,
    ImageLike,
    PhotoPicture,
    Picture,
    ValuePicture,
    draw_box,
    draw_overlapping_box,
    photo_crop,
    rgb_image,
)
from data_pipelines.views.photometric import PARAMS_SUFFIX, Photometric, reference

__all__ = ["ImageView", "random_resized_crop"]

_RESIZERS = ("bicubic", "nearest")
_READABLE = INPUT_FIELDS["image"]


@dataclass(frozen=True)
class PhotoReading(Reading):
    """An RGB photo."""

    def decode(self, data: bytes, decoding: Decoding) -> PhotoPicture:
        photo = Photo(data, decoding.decoder, exif_rotation=decoding.exif_rotation)
        return PhotoPicture(photo, decoding.resampler, scaled=decoding.scaled)


@dataclass(frozen=True)
class MaskReading(Reading):
    """A PNG whose values must not mix."""

    def decode(self, data: bytes, decoding: Decoding) -> ValuePicture:
        return ValuePicture(decode_mask(data, exif_rotation=decoding.exif_rotation)[None])


@dataclass(frozen=True)
class NumbersReading(Reading):
    """An array (H, W) or (C, H, W); its channels are resized smoothly, or keep their values."""

    array: str | None
    channels: tuple[int, ...] | None
    is_smooth: bool

    def decode(self, data: bytes, decoding: Decoding) -> Picture:
        values = self._as_channels(decode_array(data, self.array))
        return ArrayPicture(values) if self.is_smooth else ValuePicture(values)

    def _as_channels(self, values: Any) -> Any:
        """(C, H, W) of the channels asked for."""
        if values.ndim not in (2, 3):
            raise DataError(f"array of shape {values.shape} is no picture (H, W) or (C, H, W)")
        if values.ndim == 2:
            values = values[None]
        if self.channels is None:
            return values
        if max(self.channels) >= len(values):
            raise DataError(f"there is no channel {max(self.channels)}; the array has {len(values)}")
        return values[list(self.channels)]


@dataclass(frozen=True)
class ImageView(View):
    """One kind of crop: the batch entry `name`, (C, size, size), uint8 for photos.

    Attributes:
        name: entry of the batch.
        size: side in pixels.
        count: crops of this kind per sample, which get a first dimension; without it there is one crop and none.
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
        photometric: colors and blur; `finish` applies what is drawn here.
    """

    kind: ClassVar[str] = "image"
    relations: ClassVar[tuple[str, ...]] = ("same_crop_as", "overlap_with")
    led_keys: ClassVar[tuple[str, ...]] = ("count", "scale", "ratio", "hflip")

    size: int
    count: int | None = None
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

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        if spec.get("photometric") is None:
            return super().from_spec(spec)
        try:
            photometric = Photometric.from_mapping(spec["photometric"])
        except DataError as error:
            raise DataError(f"view {spec.get('name')!r}, {error}") from None
        return super().from_spec({**spec, "photometric": photometric})

    @property
    def extent(self) -> str:
        return f"{self.size} px"

    def reads(self, fields: frozenset[str]) -> Reading:
        is_smooth = self.resize == "bicubic"
        if not is_smooth and self.field is None:
            raise DataError(f"view {self.name!r}: resize='nearest' needs field, the mask or depth map to read")
        field = self.chosen_field(self.field, _READABLE, fields)
        suffix = self.require_suffix(field, _READABLE if is_smooth else ("png", *ARRAY_FIELDS))
        if suffix in ARRAY_FIELDS:
            if self.photometric is not None:
                raise DataError(
                    f"view {self.name!r}: photometric is for RGB photos, and field {field!r} holds an array"
                )
            return NumbersReading(field, self.array, self.channels, is_smooth)
        if self.channels is not None or self.array is not None:
            raise DataError(f"view {self.name!r}: channels and array are for npy and npz fields; field is {field!r}")
        return PhotoReading(field) if is_smooth else MaskReading(field)

    def shapes(self, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Photos are bytes, unless their colors change on the device; other channels are taken for bytes, too."""
        is_changed = self.photometric is not None and self.photometric.mode == "linear"
        dtype = torch.float32 if is_changed else torch.uint8
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {self.name: ((channels, self.size, self.size), dtype)}
        return shapes | ({f"{self.name}.box": ((5,), torch.float32)} if self.return_box else {})

    def draw(self, content: Picture, rng: ViewRandom, led: Mapping[str, Any]) -> list[Crop]:
        crops = self._crops((content.width, content.height), rng, led)
        content.announce(crops, self.size)
        return crops

    def entries(self, content: Picture, rng: ViewRandom, drawn: Sequence[Crop]) -> dict[str, Tensor]:
        pixels = np.empty((len(drawn), content.num_channels, self.size, self.size), content.dtype)
        for crop, out in zip(drawn, pixels, strict=True):
            content.cut(crop, out)
        entries = {self.name: self.stacked(pixels)}
        if self.return_box:
            entries[f"{self.name}.box"] = self.stacked(np.array([crop.as_row() for crop in drawn], np.float32))
        if self.photometric is not None:
            rng = rng.fork(ViewPurpose.COLORS)
            if self.photometric.mode == "reference":
                changed = [reference(torch.from_numpy(crop), self.photometric, rng).numpy() for crop in pixels]
                entries[self.name] = self.stacked(changed)
            else:
                rows = np.array([self.photometric.draw(rng) for _ in drawn], np.float32)
                entries[self.name + PARAMS_SUFFIX] = self.stacked(rows)
        return entries

    def _crops(self, frame: tuple[int, int], rng: ViewRandom, led: Mapping[str, Any]) -> list[Crop]:
        if self.same_crop_as is not None:
            return list(led[self.same_crop_as])
        others: Sequence[Crop] = led[self.overlap_with] if self.overlap_with is not None else ()
        crops = []
        for k in range(self.count or 1):
            if others:
                other = others[k % len(others)].box_in(*frame)
                share = self.min_overlap or 0.0
                box = draw_overlapping_box(*frame, self.scale, self.ratio, rng, other=other, share=share)
            else:
                box = draw_box(*frame, self.scale, self.ratio, rng)
            crops.append(Crop(box, rng.uniform(0.0, 1.0) < self.hflip, frame))
        return crops

    def _check(self, where: str) -> None:
        require_integers(where, 1, size=self.size)
        require_count(where, self.count)
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
            raise DataError(f"{where}: photometric changes colors, and resize='nearest' says that there are none")


def random_resized_crop(image: ImageLike, view: ImageView, rng: ViewRandom) -> Tensor:
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
