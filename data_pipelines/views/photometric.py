"""Color jitter, grayscale, blur and solarization: drawn per crop in the loader worker, applied to whole batches.

Two modes, which are two different augmentations:

* `linear` (default). The worker draws one row of numbers per crop; `apply` changes all pixels of a batch on the
  device that it is on, in a fixed order: brightness, contrast, saturation, hue, gray, clamp, blur, solarize. All but
  the last three are linear in the pixels, hence one 3 x 3 matrix per crop. Hue turns the color plane of YIQ, which
  keeps brightness. Against torchvision on float images, single steps agree to 2e-5 as long as nothing leaves [0, 1];
  hue differs (there it is a shift in HSV), and so does the order (there it is random).
* `reference`. torchvision's own functions on one image, in the worker: the same drawn amounts, in an order drawn like
  that of its ColorJitter, rounded to 8 bits after each step. Several times slower.

Blur is a Gaussian of 9 taps that is cut off at 4 pixels and reflected at the border, as in DINOv2 and DINOv3; DINO and
BYOL used that of PIL. Not here: crops and flips (`crops`), normalization (the backbone's).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.errors import DataError, suggest
from data_pipelines.randomness import ViewRandom
from data_pipelines.views.base import View

__all__ = ["NUM_PARAMS", "PARAMS_SUFFIX", "Photometric", "apply", "finish", "reference"]

NUM_PARAMS = 7  # brightness, contrast, saturation, hue, is_gray, blur sigma, solarize level
PARAMS_SUFFIX = ".photometric"  # the rows of view "x" are the entry "x.photometric" of a batch
MODES = ("linear", "reference")

_UNTOUCHED = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation, hue that change nothing
_NEVER = 256.0  # a solarize level that no pixel reaches
_RADIUS = 4  # pixels the blur looks to each side
_STRIP = 48  # rows of a blur matrix multiplied at once, so that most of its zeros are left out
_PIECE_BYTES = 1 << 19  # float pixels changed together on a CPU: they and a copy fit its level-2 cache

# Columns of the table that goes to the device, see `_Plan`.
_OWN, _MEAN, _TAPS = slice(0, 9), slice(9, 18), slice(18, 18 + _RADIUS + 1)
_LEVEL, _BLURRED, _SOLARIZED = range(_TAPS.stop, _TAPS.stop + 3)
_NUM_SETTINGS = _SOLARIZED + 1

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's grayscale
_YIQ = (_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class Photometric:
    """What may happen to the pixels of a crop; by default nothing.

    DINO's setting for its crops: `jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray_p=0.2`, and
    `blur_p` of 1.0, 0.1, 0.5 with `solarize_p` of 0, 0.2, 0 for the first global, the second global and local crops.

    Attributes:
        jitter_p: probability of the color jitter, that is of the next four together.
        brightness, contrast, saturation: the factor is uniform in `[max(0, 1 - x), 1 + x]`.
        hue: the turn is uniform in `[-hue, hue]`, in whole turns of the color circle; at most 0.5.
        gray_p: probability of grayscale.
        blur_p: probability of Gaussian blur.
        blur_sigma: least and greatest standard deviation in pixels, drawn uniformly.
        solarize_p: probability of inverting the bright pixels.
        solarize_level: first inverted value, 0 .. 255.
        mode: `linear` or `reference`, see above.
    """

    jitter_p: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_level: int = 128
    mode: str = "linear"

    def __post_init__(self) -> None:
        for name in ("jitter_p", "gray_p", "blur_p", "solarize_p"):
            self._require_range(name, 1.0, "a probability in 0..1")
        for name in ("brightness", "contrast", "saturation"):
            self._require_range(name, math.inf, "a number from 0")
        self._require_range("hue", 0.5, "a number in 0..0.5")
        self._require_range("solarize_level", 255, "an integer in 0..255")
        if not isinstance(self.solarize_level, int):
            raise self._error("solarize_level", "an integer in 0..255")
        pair = self.blur_sigma
        if not _is_pair(pair) or not 0 < pair[0] <= pair[1] < math.inf:
            raise self._error("blur_sigma", "[low, high] with 0 < low <= high, in pixels")
        if self.mode not in MODES:
            raise self._error("mode", " or ".join(MODES) + suggest(str(self.mode), MODES))

    @classmethod
    def from_mapping(cls, spec: Mapping[str, Any]) -> Photometric:
        """From the plain data an objective states.

        Raises:
            DataError: not a mapping, an unknown key, or a value out of range.
        """
        if not isinstance(spec, Mapping):
            raise DataError(f"photometric: {spec!r} is not allowed; it is a mapping such as {{'blur_p': 0.5}}")
        allowed = [field.name for field in fields(cls)]
        for name in spec:
            if name not in allowed:
                raise DataError(
                    f"photometric: unknown key {name!r}; allowed: {', '.join(allowed)}{suggest(str(name), allowed)}"
                )
        sigma = spec.get("blur_sigma")
        return cls(**{**spec, "blur_sigma": tuple(sigma)} if isinstance(sigma, list) else spec)

    def draw(self, rng: ViewRandom) -> list[float]:
        """One crop's row of `NUM_PARAMS` numbers; always the same count of draws, whatever the probabilities."""
        is_jittered, is_gray, is_blurred, is_solarized = (
            rng.uniform(0.0, 1.0) < p for p in (self.jitter_p, self.gray_p, self.blur_p, self.solarize_p)
        )
        factors = [rng.uniform(max(0.0, 1 - x), 1 + x) for x in (self.brightness, self.contrast, self.saturation)]
        color = [*factors, rng.uniform(-self.hue, self.hue)]
        sigma = rng.uniform(*self.blur_sigma)
        return [
            *(color if is_jittered else _UNTOUCHED),
            float(is_gray),
            sigma if is_blurred else 0.0,
            float(self.solarize_level) if is_solarized else _NEVER,
        ]

    def _require_range(self, name: str, high: float, allowed: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not 0 <= value <= high or math.isinf(value):
            raise self._error(name, allowed)

    def _error(self, name: str, allowed: str) -> DataError:
        return DataError(f"photometric: {name}={getattr(self, name)!r} is not allowed; it is {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


def finish(batch: Mapping[str, Tensor], views: Sequence[View]) -> dict[str, Tensor]:
    """Apply the drawn rows of all views, on the device that their images are on, and drop them.

    Args:
        batch: a view's images at its name, uint8 (..., 3, H, W); its rows at `name + PARAMS_SUFFIX`, float32
            (..., NUM_PARAMS), which may stay in host memory.
        views: those with a `photometric` of mode `linear` are changed.

    Returns:
        The batch without rows; changed views are float32 (..., 3, H, W) in [0, 1], everything else is as it was.
    """
    settings = {view.name: getattr(view, "photometric", None) for view in views}
    names = [name for name, setting in settings.items() if setting is not None and setting.mode == "linear"]
    images = {name: batch[name].flatten(0, -4) for name in names}  # (B, 3, H, W)
    # All rows come to the host before any work is queued: at most one wait for the device, none if they never left.
    plans = {name: _Plan.of(images[name], batch[name + PARAMS_SUFFIX].flatten(0, -2).cpu()) for name in names}
    tables = _on_device([plan.table for plan in plans.values()], [x.device for x in images.values()])
    finished = {name: value for name, value in batch.items() if name.removesuffix(PARAMS_SUFFIX) not in names}
    for name, table in zip(names, tables, strict=True):
        finished[name] = _changed(images[name], plans[name], table).view(batch[name].shape)
    return finished


def apply(images: Tensor, params: Tensor) -> Tensor:
    """Change each image by its row, in mode `linear`.

    On a CPU the batch goes through in pieces that stay in the cache; elsewhere in one piece and, given `params` in
    host memory, without waiting for the device. An image's result depends on the others at most by the rounding of
    matrix products, 1e-6; on a GPU too, where TF32 stays out of them.

    Args:
        images: (B, 3, H, W) uint8.
        params: (B, NUM_PARAMS), rows of `Photometric.draw`.

    Returns:
        (B, 3, H, W) float32 in [0, 1]; rows that change nothing give `images / 255`, beside others to the last bit.

    Raises:
        DataError: another shape or type.
    """
    plan = _Plan.of(images, params.cpu())
    (table,) = _on_device([plan.table], [images.device])
    return _changed(images, plan, table)


class _Plan(NamedTuple):
    """What is to be done to the images of a view.

    Attributes:
        is_colored: which images get other colors.
        num_blurred, num_solarized: how many go through these steps.
        table: (B, _NUM_SETTINGS) float32, for the device. Settings of image i are in row i; `_BLURRED` and `_SOLARIZED`
            list the places of the images that go through these steps, in its first rows.
    """

    is_colored: list[bool]
    num_blurred: int
    num_solarized: int
    table: Tensor

    @classmethod
    def of(cls, images: Tensor, params: Tensor) -> _Plan:
        """For images (B, 3, H, W) uint8 on any device, by rows (B, NUM_PARAMS) in host memory.

        Raises:
            DataError: another shape or type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise DataError(
                f"photometric: images of shape {tuple(images.shape)} and type {images.dtype} are not (B, 3, H, W) "
                "uint8; colors need three channels of 8 bits"
            )
        if params.shape != (len(images), NUM_PARAMS):
            raise DataError(
                f"photometric: parameters of shape {tuple(params.shape)} are not ({len(images)}, {NUM_PARAMS})"
            )
        params = params.double()
        sigma, level = params[:, 5], params[:, 6]
        is_colored = (params[:, :4] != params.new_tensor(_UNTOUCHED)).any(1) | (params[:, 4] > 0)
        table = torch.zeros(len(params), _NUM_SETTINGS)
        for columns, matrices in zip((_OWN, _MEAN), _color_matrices(params), strict=True):
            table[:, columns] = (matrices / 255).flatten(1).float()  # of bytes
        table[:, _TAPS] = _blur_taps(sigma).float()
        table[:, _LEVEL] = (level / 255).float()
        num_chosen = []
        for column, is_chosen in ((_BLURRED, sigma > 0), (_SOLARIZED, level < _NEVER)):
            places = is_chosen.nonzero().squeeze(1)
            table[: len(places), column] = places.float()  # exact up to 2^24 images
            num_chosen.append(len(places))
        num_blurred, num_solarized = num_chosen
        return cls(is_colored.tolist(), num_blurred, num_solarized, table)


def _on_device(tables: list[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Tables (b, _NUM_SETTINGS) on the device of all images, by one copy for which the host does not wait.

    It starts in a page-locked buffer, whose memory torch's allocator keeps and does not give to others before its end.
    """
    if not tables or devices[0].type == "cpu":
        return tables
    buffer = torch.empty(sum(map(len, tables)), _NUM_SETTINGS, pin_memory=devices[0].type == "cuda")
    together = torch.cat(tables, out=buffer).to(devices[0], non_blocking=True)
    return list(together.split([len(table) for table in tables]))


@torch.no_grad()
def _changed(images: Tensor, plan: _Plan, table: Tensor) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1]: images (B, 3, H, W) uint8 by their plan, whose table is on their device."""
    finished = torch.empty(images.shape, device=images.device)
    piece = max(1, _PIECE_BYTES // (4 * images.shape[1:].numel()) if images.device.type == "cpu" else len(images))
    with torch.autocast(images.device.type, enabled=False), _whole_float32(images.device):
        for first in range(0, len(images), piece):
            part = slice(first, first + piece)
            if any(plan.is_colored[part]):  # the rows of others hold the identity
                _recolor(images[part], table[part], out=finished[part])
            else:
                finished[part].copy_(images[part]).div_(255)
        _change(finished, plan.num_blurred, _blur, table, _BLURRED, piece)
        _change(finished, plan.num_solarized, _solarize, table, _SOLARIZED, piece)
    return finished


@contextmanager
def _whole_float32(device: torch.device) -> Iterator[None]:
    """Without TF32 on CUDA: products of colors are no place to save in, and its 10 bits are hardly those of a pixel."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


def _change(
    pixels: Tensor, count: int, step: Callable[[Tensor, Tensor], None], table: Tensor, column: int, piece: int
) -> None:
    """Put the images that a step is drawn for through it, in place: `count`, whose places are in that column."""
    for first in range(0, count, piece):
        part = slice(first, min(first + piece, count))
        if count == len(pixels):
            step(pixels[part], table[part])
        else:
            places = table[part, column].long()
            some = pixels.index_select(0, places)
            step(some, table.index_select(0, places))
            pixels.index_copy_(0, places, some)


def _color_matrices(params: Tensor) -> tuple[Tensor, Tensor]:
    """The jitter and gray of each row as `own @ pixel + mean @ mean_pixel`, both (B, 3, 3).

    With luma weights w, brightness b and contrast c: contrast gives c b x + (1 - c) b (w . mean x) (1, 1, 1), and
    what comes after it multiplies by a matrix. Differences from the identity are what is scaled, so neutral amounts
    give exactly the identity.
    """
    brightness, contrast, saturation, hue, is_gray = (x.view(-1, 1, 1) for x in params[:, :5].unbind(1))
    eye, to_yiq = torch.eye(3, dtype=params.dtype), params.new_tensor(_YIQ)
    gray = to_yiq[0].expand(3, 3)  # every channel becomes w . pixel
    to_rgb, angle = torch.linalg.inv(to_yiq), 2 * math.pi * hue
    in_plane = to_rgb @ torch.diag(params.new_tensor([0.0, 1.0, 1.0])) @ to_yiq
    quarter_turn = to_rgb @ params.new_tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]) @ to_yiq
    turn = eye + (angle.cos() - 1) * in_plane + angle.sin() * quarter_turn
    mix = (eye + is_gray * (gray - eye)) @ turn @ (eye + (1 - saturation) * (gray - eye))
    return brightness * contrast * mix, brightness * (1 - contrast) * mix @ gray


def _recolor(images: Tensor, table: Tensor, out: Tensor) -> None:
    """Images (n, 3, H, W) uint8 to `out` in [0, 1]; what scales them to it is in their matrices."""
    flat = images.flatten(2).float()  # (n, 3, H W)
    own, mean = (table[:, columns].unflatten(1, (3, 3)) for columns in (_OWN, _MEAN))
    torch.baddbmm(mean @ flat.mean(2, keepdim=True), own, flat, out=out.flatten(2)).clamp_(0, 1)


def _blur_taps(sigma: Tensor) -> Tensor:
    """(B, _RADIUS + 1) weights of the pixels at distance 0, 1, ...; both sides together sum to 1."""
    distance = torch.arange(_RADIUS + 1, dtype=sigma.dtype)
    taps = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3).unsqueeze(1)).square())
    taps[taps < 1e-9] = 0.0  # far below the rounding of float32, and products of such small numbers are slow
    return taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])


def _blur(pixels: Tensor, table: Tensor) -> None:
    """Rows, then columns, as products with banded matrices: cheaper than convolutions on a CPU and at home on a GPU."""
    taps = table[:, _TAPS]
    blurred = torch.empty_like(pixels)
    lines, blurred_lines = pixels.flatten(1, 2), blurred.flatten(1, 2)  # (n, 3 H, W)
    for strip, near, band in _bands(pixels.shape[3], taps):
        torch.bmm(lines[..., near], band.mT, out=blurred_lines[..., strip])
    planes, blurred_planes = pixels.flatten(0, 1), blurred.flatten(0, 1)  # (3 n, H, W)
    for strip, near, band in _bands(pixels.shape[2], taps):
        torch.bmm(band.repeat_interleave(3, 0), blurred_planes[:, near], out=planes[:, strip])


def _bands(size: int, taps: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The blur along a line of `size` pixels in strips: which pixels result, from which, and the (n, to, from) weights.

    A strip leaves out most of the zeros of the (size, size) matrix.
    """
    for strip, near, spread in _spread(size, taps.device):
        yield strip, near, (taps @ spread.flatten(1)).view(-1, *spread.shape[1:])


@functools.lru_cache(maxsize=16)
def _spread(size: int, device: torch.device) -> list[tuple[slice, slice, Tensor]]:
    """Per strip (_RADIUS + 1, to, from): where the weight of each distance goes; reflected at the border."""
    spread, here = torch.zeros(_RADIUS + 1, size, size), torch.arange(size)
    period = max(1, 2 * (size - 1))
    for offset in range(-_RADIUS, _RADIUS + 1):
        there = (here + offset) % period
        spread[abs(offset)].index_put_((here, torch.minimum(there, period - there)), torch.ones(()), accumulate=True)
    strips = [
        (slice(first, first + _STRIP), slice(max(0, first - _RADIUS), first + _STRIP + _RADIUS))
        for first in range(0, size, _STRIP)
    ]
    return [(strip, near, spread[:, strip, near].contiguous().to(device)) for strip, near in strips]


def _solarize(pixels: Tensor, table: Tensor) -> None:
    is_bright = pixels.clone().ge_(table[:, _LEVEL].view(-1, 1, 1, 1))  # 1.0 or 0.0
    torch.sub(is_bright, pixels, out=pixels).abs_()  # exactly 1 - pixel or pixel; torch.where is slow on a CPU


def reference(image: Image.Image | Tensor, spec: Photometric, rng: ViewRandom) -> Tensor:
    """Change one image by torchvision's own functions, in mode `reference`.

    Args:
        image: an RGB PIL image or (3, H, W) uint8; torchvision rounds the two a little differently.
        spec: what to draw; first a row as in `Photometric.draw`, then the order of the four parts of the jitter.
        rng: advanced by the draws made.

    Returns:
        (3, H, W) uint8.
    """
    from torchvision.transforms import functional as tv  # here, since `linear` needs no torchvision

    *jitter, is_gray, sigma, level = spec.draw(rng)
    parts = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    todo = [(part, x) for part, x, same in zip(parts, jitter, _UNTOUCHED, strict=True) if x != same]
    while todo:
        part, amount = todo.pop(rng.below(len(todo)))
        image = part(image, amount)
    if is_gray:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if sigma:
        image = tv.gaussian_blur(image, 2 * _RADIUS + 1, sigma)
    if level != _NEVER:
        image = tv.solarize(image, level)
    return image if isinstance(image, Tensor) else tv.pil_to_tensor(image)
