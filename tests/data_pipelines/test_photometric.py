"""Photometric changes: single steps equal torchvision's, samples do not mix, draws have the stated distribution."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom
from data_pipelines.views import photometric
from data_pipelines.views.photometric import NUM_PARAMS, PARAMS_SUFFIX, Photometric, apply, finish, reference

tv: Any = pytest.importorskip("torchvision.transforms.functional")

NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "gray": 0.0, "sigma": 0.0, "level": 256.0}
JITTER: dict[str, Any] = {"jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
DINO: dict[str, Any] = {**JITTER, "gray_p": 0.2, "blur_p": 0.5, "solarize_p": 0.2}


def noise(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    """uint8 images of independent pixels, the hardest to blur."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def row(**changes: float) -> list[float]:
    return list((NEUTRAL | changes).values())


def rows(spec: dict[str, Any], count: int) -> Tensor:
    drawn_from = Photometric.from_mapping(spec)
    return torch.tensor([drawn_from.draw(ViewRandom(k)) for k in range(count)]).view(count, NUM_PARAMS)


def change(images: Tensor, **changes: float) -> Tensor:
    return apply(images, torch.tensor(row(**changes)).expand(len(images), NUM_PARAMS))


@pytest.mark.parametrize("shape", [(3, 3, 224, 224), (5, 3, 32, 32), (2, 3, 7, 130), (1, 3, 1, 1), (0, 3, 8, 8)])
def test_apply__neutral_rows_give_the_pixels_exactly(shape: tuple[int, ...]) -> None:
    images = noise(*shape)
    assert torch.equal(change(images), images.float() / 255)
    assert torch.equal(apply(images, rows({}, len(images))), images.float() / 255)


@pytest.mark.parametrize(
    ("name", "function", "amounts"),
    [
        ("brightness", "adjust_brightness", (0.0, 0.6, 1.4)),
        ("contrast", "adjust_contrast", (0.0, 0.6, 1.4)),
        ("saturation", "adjust_saturation", (0.0, 0.8, 1.2)),
    ],
)
def test_apply__one_factor_equals_torchvision(name: str, function: str, amounts: tuple[float, ...]) -> None:
    images = noise(4, 3, 40, 56)
    for amount in amounts:
        expected = getattr(tv, function)(images.float() / 255, amount)
        torch.testing.assert_close(change(images, **{name: amount}), expected, rtol=0, atol=2e-5)


def test_apply__grey_equals_torchvision() -> None:
    images = noise(4, 3, 40, 56)
    expected = tv.rgb_to_grayscale(images.float() / 255, num_output_channels=3)
    torch.testing.assert_close(change(images, gray=1.0), expected, rtol=0, atol=2e-5)


def test_apply__chain_equals_torchvision_in_the_fixed_order() -> None:
    """Mid-gray images, so that no step leaves [0, 1]."""
    images = noise(4, 3, 40, 56, low=90, high=150)
    expected = tv.adjust_brightness(images.float() / 255, 1.2)
    expected = tv.adjust_contrast(expected, 0.7)
    expected = tv.adjust_saturation(expected, 1.3)
    torch.testing.assert_close(
        change(images, brightness=1.2, contrast=0.7, saturation=1.3), expected, rtol=0, atol=2e-5
    )
    expected = tv.solarize(tv.gaussian_blur(tv.rgb_to_grayscale(expected, num_output_channels=3), 9, 1.3), 0.5)
    changed = change(images, brightness=1.2, contrast=0.7, saturation=1.3, gray=1.0, sigma=1.3, level=127.5)
    assert (changed - expected).abs().quantile(0.999) < 5e-5  # a pixel at the solarize level may fall to either side


def test_apply__hue_keeps_luma_and_turns_the_same_way_as_torchvision() -> None:
    images = noise(4, 3, 40, 56, low=90, high=150)
    pixels = images.float() / 255
    turned = change(images, hue=0.1)
    luma = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close((turned * luma).sum(1), (pixels * luma).sum(1), rtol=0, atol=1e-6)
    shifted = tv.adjust_hue(pixels, 0.1)
    similarity = torch.cosine_similarity((turned - pixels).flatten(), (shifted - pixels).flatten(), dim=0)
    assert similarity > 0.6
    torch.testing.assert_close(change(images, hue=1.0), pixels, rtol=0, atol=1e-6)  # once round


def test_apply__colours_are_clamped_once() -> None:
    changed = change(noise(2, 3, 32, 32), brightness=1.4, contrast=1.4)
    assert changed.min() == 0 and changed.max() == 1
    dark = apply(noise(1, 3, 32, 32), torch.tensor([row(brightness=2.0, contrast=0.5)]))
    assert dark.max() > 0.99  # 2 x 0.5 is back in range; clamping in between would have lost it


@pytest.mark.parametrize("shape", [(224, 224), (96, 96), (32, 32), (40, 131), (5, 9)])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_apply__blur_equals_torchvision(shape: tuple[int, int], sigma: float) -> None:
    images = noise(2, 3, *shape)
    expected = tv.gaussian_blur(images.float() / 255, [9, 9], [sigma, sigma])
    torch.testing.assert_close(change(images, sigma=sigma), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_apply__blur_reflects_in_images_smaller_than_itself(size: int) -> None:
    images = noise(1, 3, size, size)
    tiled = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), "reflect" if size > 1 else "edge")
    expected = tv.gaussian_blur(torch.from_numpy(tiled).float() / 255, [9, 9], [1.5, 1.5])[..., 4:-4, 4:-4]
    torch.testing.assert_close(change(images, sigma=1.5), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_apply__solarize_equals_torchvision_for_every_value(level: int) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = tv.solarize(images.float() / 255, level / 255)
    assert torch.equal(change(images, level=level), expected)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_apply__a_result_does_not_depend_on_batch_mates(size: int) -> None:
    images, params = noise(13, 3, size, size), rows(DINO, 13)
    together = apply(images, params)
    assert torch.equal(together, apply(images, params))
    for i in range(13):
        torch.testing.assert_close(together[i : i + 1], apply(images[i : i + 1], params[i : i + 1]), rtol=0, atol=1e-6)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply(images[order], params[order]), together[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 96), (130, 224)])
def test_apply__one_piece_as_on_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch, height: int, width: int) -> None:
    images, params = noise(9, 3, height, width), rows(DINO, 9)
    results = []
    for piece_bytes in (1, 1 << 30):  # every image alone, all at once
        monkeypatch.setattr(photometric, "_PIECE_BYTES", piece_bytes)
        results.append(apply(images, params))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_apply__stays_in_range_and_leaves_its_input_alone() -> None:
    images, params = noise(64, 3, 24, 24), rows(DINO, 64)
    before = images.clone()
    changed = apply(images, params)
    assert changed.dtype == torch.float32 and changed.shape == images.shape
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-6
    assert torch.equal(images, before)


def test_apply__gives_float32_under_autocast() -> None:
    images, params = noise(2, 3, 24, 24), torch.tensor([row(sigma=1.0, hue=0.1, brightness=1.2)] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply(images, params), apply(images, params))
        changed = apply(images, params)
    assert torch.equal(changed, apply(images, params))


@pytest.mark.parametrize(
    ("images", "params", "message"),
    [
        (noise(2, 4, 8, 8), torch.zeros(2, NUM_PARAMS), "images of shape (2, 4, 8, 8) and type torch.uint8 are not"),
        (noise(2, 3, 8, 8).float(), torch.zeros(2, NUM_PARAMS), "type torch.float32 are not (B, 3, H, W) uint8"),
        (noise(3, 8, 8), torch.zeros(3, NUM_PARAMS), "images of shape (3, 8, 8)"),
        (
            noise(2, 3, 8, 8),
            torch.zeros(3, NUM_PARAMS),
            f"parameters of shape (3, {NUM_PARAMS}) are not (2, {NUM_PARAMS})",
        ),
    ],
)
def test_apply__refuses_other_shapes(images: Tensor, params: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        apply(images, params)


@pytest.mark.gpu
def test_apply__a_gpu_agrees_with_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, params = noise(40, 3, 96, 96), rows(DINO, 40)
    expected = apply(images, params)
    for where in ("cpu", "cuda"):
        on_gpu = apply(images.cuda(), params.to(where))
        assert on_gpu.is_cuda
        # A pixel at the solarize level may fall to either side of it.
        assert (on_gpu.cpu() - expected).abs().quantile(0.9999) < 1e-5


def test_draw__row_has_fixed_length_and_the_stated_distribution() -> None:
    spec = {**DINO, "blur_sigma": [0.5, 1.5], "solarize_level": 100}
    drawn = rows(spec, 4000).double()
    assert drawn.shape == (4000, NUM_PARAMS)
    is_jittered = drawn[:, 0] != 1
    shares = {
        "jitter": (is_jittered, 0.8),
        "gray": (drawn[:, 4] == 1, 0.2),
        "blur": (drawn[:, 5] > 0, 0.5),
        "solarize": (drawn[:, 6] == 100, 0.2),
    }
    for name, (happened, share) in shares.items():
        assert abs(happened.double().mean() - share) < 0.03, name
    assert torch.corrcoef(torch.stack([x.double() for x, _ in shares.values()])).fill_diagonal_(0).abs().max() < 0.06
    assert torch.equal(drawn[~is_jittered, :4].unique(dim=0), torch.tensor([[1.0, 1.0, 1.0, 0.0]]).double())
    assert set(drawn[:, 4].tolist()) == {0.0, 1.0} and set(drawn[:, 6].tolist()) == {100.0, 256.0}
    ranges = ((is_jittered, 0, 0.6, 1.4), (is_jittered, 1, 0.6, 1.4), (is_jittered, 2, 0.8, 1.2))
    for chosen, column, low, high in (*ranges, (is_jittered, 3, -0.1, 0.1), (drawn[:, 5] > 0, 5, 0.5, 1.5)):
        amounts = drawn[chosen, column]
        assert low <= amounts.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < amounts.max() <= high
        assert abs(amounts.mean() - (low + high) / 2) < 0.03 * (high - low)


def test_draw__is_reproducible_and_one_probability_does_not_move_the_other_draws() -> None:
    spec, other = Photometric(**DINO), Photometric(**DINO | {"blur_p": 0.0})
    assert spec.draw(ViewRandom(5)) == spec.draw(ViewRandom(5)) != spec.draw(ViewRandom(6))
    for k in range(50):
        first, second = ViewRandom(k), ViewRandom(k)
        drawn, fewer = spec.draw(first), other.draw(second)
        assert fewer == [*drawn[:5], 0.0, drawn[6]] and first.below(1 << 64) == second.below(1 << 64)


def test_draw__a_wide_range_is_cut_at_zero() -> None:
    amounts = rows({"brightness": 3.0}, 500)[:, 0]
    assert 0 <= amounts.min() < 0.05 and 3.9 < amounts.max() <= 4


@dataclass(frozen=True)
class FakeView:
    name: str
    photometric: Photometric | None = None


def test_finish__changes_the_asked_views_and_drops_their_rows() -> None:
    linear = Photometric(**DINO)
    views = [
        FakeView("global", linear), FakeView("local", linear), FakeView("plain"),
        FakeView("exact", Photometric(mode="reference")),
    ]  # fmt: skip
    batch = {
        "global": noise(4, 3, 16, 16), "local": noise(5, 4, 3, 8, 8), "plain": noise(4, 3, 16, 16),
        "exact": noise(4, 3, 16, 16), "seed": torch.arange(4),
        "global" + PARAMS_SUFFIX: rows(DINO, 4), "local" + PARAMS_SUFFIX: rows(DINO, 20).view(5, 4, NUM_PARAMS),
    }  # fmt: skip
    finished = finish(batch, views)
    assert set(finished) == {"global", "local", "plain", "exact", "seed"}
    assert torch.equal(finished["global"], apply(batch["global"], batch["global.photometric"]))
    local = torch.stack([apply(x, p) for x, p in zip(batch["local"], batch["local.photometric"], strict=True)])
    torch.testing.assert_close(finished["local"], local, rtol=0, atol=1e-6)
    for name in ("plain", "exact", "seed"):
        assert finished[name] is batch[name]
    assert "global.photometric" in batch  # the given batch is as it was


class CopiesToDevice(TorchDispatchMode):
    """Counts operations that bring numbers of the host to another device, or the other way."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.count += len(given | made) > 1
        else:
            assert len(given) < 2, func
        return result


def test_finish__settings_of_all_views_go_to_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device without memory, where whatever would wait for a number of it raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know that device
    views = [FakeView(name, Photometric(**DINO)) for name in ("global_1", "global_2", "local")]
    batch = {"global_1": noise(16, 3, 32, 32), "global_2": noise(16, 3, 32, 32), "local": noise(4, 16, 3, 24, 24)}
    params = {name + PARAMS_SUFFIX: rows(DINO, x[..., 0, 0, 0].numel()) for name, x in batch.items()}
    params["local" + PARAMS_SUFFIX] = params["local" + PARAMS_SUFFIX].view(4, 16, NUM_PARAMS)
    on_device = {name: x.to("meta") for name, x in batch.items()}
    finish(on_device | params, views)  # the patterns of blur are there from now on
    with CopiesToDevice() as copies:
        finished = finish(on_device | params, views)
    assert copies.count == 1
    assert all(x.is_meta and x.dtype == torch.float32 for x in finished.values())
    assert {name: x.shape for name, x in finished.items()} == {name: x.shape for name, x in batch.items()}


@pytest.mark.gpu
def test_finish__a_gpu_is_not_waited_for() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    views = [FakeView("global", Photometric(**DINO)), FakeView("local", Photometric(**DINO))]
    batch = {"global": noise(16, 3, 32, 32).cuda(), "local": noise(16, 3, 24, 24).cuda()}
    batch |= {name + PARAMS_SUFFIX: rows(DINO, 16) for name in ("global", "local")}
    expected = finish(batch, views)
    torch.cuda.set_sync_debug_mode("error")
    try:
        finished = finish(batch, views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, images in expected.items():
        torch.testing.assert_close(finished[name], images)


def photo() -> Image.Image:
    small = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("spec", "function", "column"),
    [
        ({"brightness": 0.4}, "adjust_brightness", 0),
        ({"contrast": 0.4}, "adjust_contrast", 1),
        ({"saturation": 0.4}, "adjust_saturation", 2),
        ({"hue": 0.2}, "adjust_hue", 3),
        ({"blur_p": 1.0}, "gaussian_blur", 5),
        ({"solarize_p": 1.0}, "solarize", 6),
        ({"gray_p": 1.0}, "rgb_to_grayscale", None),
    ],
)
@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_reference__one_step_is_torchvisions(
    spec: dict[str, Any], function: str, column: int | None, kind: str
) -> None:
    image = photo() if kind == "pil" else tv.pil_to_tensor(photo())
    for k in range(5):
        drawn = Photometric.from_mapping(spec).draw(ViewRandom(k))
        amount = [3] if column is None else [drawn[column]]
        expected = getattr(tv, function)(image, *([9] if function == "gaussian_blur" else []), *amount)
        expected = expected if isinstance(expected, Tensor) else tv.pil_to_tensor(expected)
        changed = reference(image, Photometric.from_mapping(spec), ViewRandom(k))
        assert changed.dtype == torch.uint8 and torch.equal(changed, expected)


def test_reference__jitter_comes_in_every_order() -> None:
    spec = Photometric(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    image, orders = tv.pil_to_tensor(photo()), set()
    for k in range(300):
        rng, parts, pixels = ViewRandom(k), list(range(4)), image
        drawn = spec.draw(rng)
        order = [parts.pop(rng.below(len(parts))) for _ in range(4)]
        for part in order:
            step = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[part]
            pixels = step(pixels, drawn[part])
        if k < 10:
            assert torch.equal(reference(image, spec, ViewRandom(k)), pixels)
        orders.add(tuple(order))
    assert len(orders) == 24


def test_reference__nothing_asked_nothing_done() -> None:
    assert torch.equal(reference(photo(), Photometric(), ViewRandom(0)), tv.pil_to_tensor(photo()))


def test_modes__differ_by_rounding_without_hue_and_clamps() -> None:
    """Brightness, contrast and saturation commute, so on mid-gray images the order does not matter."""
    spec = Photometric(**DINO | {"hue": 0.0, "solarize_p": 0.0})
    image = 90 + tv.pil_to_tensor(photo()) // 5
    for k in range(20):
        linear = apply(image[None], torch.tensor([spec.draw(ViewRandom(k))]))[0]
        exact = reference(image, spec, ViewRandom(k)).float() / 255
        assert (linear - exact).abs().max() < 4 / 255


def test_photometric__plain_data() -> None:
    assert Photometric.from_mapping({"blur_p": 0.5, "blur_sigma": [0.2, 1]}) == Photometric(
        blur_p=0.5, blur_sigma=(0.2, 1)
    )
    assert Photometric.from_mapping({}).draw(ViewRandom(0)) == row()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"blurp": 1}, "photometric: unknown key 'blurp'; allowed: jitter_p, brightness"),
        ({"blurp": 1}, "mode; did you mean 'blur_p'?"),
        ({"solarise_p": 0.2}, "mode; did you mean 'solarize_p'?"),
        ({"solarise_level": 9}, "mode; did you mean 'solarize_level'?"),
        ({"grey_p": 0.2}, "mode; did you mean 'gray_p'?"),
        ({7: 1}, "unknown key 7"),
        ("dino", "photometric: 'dino' is not allowed; it is a mapping"),
        ({"gray_p": 1.1}, "photometric: gray_p=1.1 is not allowed; it is a probability in 0..1"),
        ({"jitter_p": -0.1}, "jitter_p=-0.1 is not allowed"),
        ({"jitter_p": float("nan")}, "jitter_p=nan is not allowed"),
        ({"solarize_p": True}, "solarize_p=True is not allowed"),
        ({"blur_p": "0.5"}, "blur_p='0.5' is not allowed"),
        ({"brightness": -1}, "brightness=-1 is not allowed; it is a number from 0"),
        ({"contrast": float("inf")}, "contrast=inf is not allowed"),
        ({"saturation": [0.6, 1.4]}, "saturation=[0.6, 1.4] is not allowed"),
        ({"hue": 0.6}, "hue=0.6 is not allowed; it is a number in 0..0.5"),
        ({"blur_sigma": 1.0}, "blur_sigma=1.0 is not allowed; it is [low, high] with 0 < low <= high, in pixels"),
        ({"blur_sigma": [0, 1]}, "blur_sigma=(0, 1) is not allowed"),
        ({"blur_sigma": [2, 1]}, "blur_sigma=(2, 1) is not allowed"),
        ({"blur_sigma": [1, float("inf")]}, "blur_sigma=(1, inf) is not allowed"),
        ({"blur_sigma": [1, 2, 3]}, "blur_sigma=(1, 2, 3) is not allowed"),
        ({"solarize_level": 256}, "solarize_level=256 is not allowed; it is an integer in 0..255"),
        ({"solarize_level": 0.5}, "solarize_level=0.5 is not allowed"),
        ({"mode": "liner"}, "mode='liner' is not allowed; it is linear or reference; did you mean 'linear'?"),
        ({"mode": None}, "mode=None is not allowed; it is linear or reference"),
    ],
)
def test_photometric__refuses(spec: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Photometric.from_mapping(spec)
