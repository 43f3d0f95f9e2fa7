"""What `preprocess` takes: the same numbers for one picture in every form, one line for everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.errors import BackboneError
from backbones.images.base import ImageEncoder
from backbones.registry import create_backbone

SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2}
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)  # (H, W, C)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1)


def backbone(in_chans: int = 3, **settings: Any) -> ImageEncoder:
    settings.setdefault("pixel_mean", [0.25] * in_chans)
    settings.setdefault("pixel_std", [0.5] * in_chans)
    options = {"image_size": 16, "patch_size": 8, "options": SMALL, "in_chans": in_chans, **settings}
    return create_backbone("vit_tiny_patch16_224", **options).eval()


@pytest.mark.parametrize(
    "images",
    [
        CHW[None],
        CHW,
        CHW[None].permute(0, 2, 3, 1),
        torch.from_numpy(PIXELS),
        PIXELS,
        PIXELS[None],
        PIXELS.transpose(2, 0, 1),
        Image.fromarray(PIXELS),
        [Image.fromarray(PIXELS)],
        [PIXELS],
        (CHW,),
        CHW / 255,
        PIXELS.astype(np.float32) / 255,
        (PIXELS / 255).astype(np.float32)[None],
    ],
)
def test_preprocess__one_picture_in_every_form_has_the_same_numbers(images: Any) -> None:
    expected = (CHW[None].float() / 255 - 0.25) / 0.5
    found = backbone().preprocess(images)
    assert found.shape == (1, 3, 16, 24) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_preprocess__batches_of_what_worked_before_are_bit_equal() -> None:
    encoder, batch = backbone(), torch.rand(4, 3, 16, 16)
    for images in (batch, batch.double(), batch.bfloat16(), (batch * 255).byte()):
        assert torch.equal(encoder.preprocess(images), encoder.normalized(images))
    both = encoder.preprocess([Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)])
    torch.testing.assert_close(both[0] + both[1], torch.ones(3, 16, 24))


def test_preprocess__pil_images_are_seen_as_training_sees_them() -> None:
    encoder = backbone()
    grey = Image.fromarray(PIXELS[..., 0])
    assert torch.equal(encoder.preprocess(grey), encoder.preprocess(np.repeat(PIXELS[..., :1], 3, axis=2)))
    clear = Image.fromarray(np.dstack([PIXELS, np.zeros((16, 24), np.uint8)]), "RGBA")
    assert torch.equal(encoder.preprocess(clear), encoder.preprocess(np.full((16, 24, 3), 255, np.uint8)))
    turned = Image.fromarray(PIXELS)
    turned.getexif()[0x0112] = 6
    assert torch.equal(encoder.preprocess(turned), encoder.preprocess(np.rot90(PIXELS, -1)))
    assert backbone(1).preprocess(grey).shape == backbone(1).preprocess(PIXELS[..., 0]).shape == (1, 1, 16, 24)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (CHW.float(), r"floating-point images from 0 to 255: expected values in \[0, 1\]; divide by 255"),
        (PIXELS.astype(np.float64), r"from 0 to 255: expected values in \[0, 1\]; divide by 255, or give uint8"),
        ((CHW / 255 - 0.5) / 0.25, r"from -2 to 2: expected values in \[0, 1\]; do not normalize them before"),
        (torch.full((3, 8, 8), torch.nan), r"expected values in \[0, 1\]; they hold NaN"),
        (CHW.long(), "images of type int64 are not taken"),
        (PIXELS.astype(np.uint16), "images of type uint16 are not taken"),
        (PIXELS > 9, "images of type bool are not taken"),
        (CHW.to(torch.complex64), "images of type complex64 are not taken"),
        (CHW[:1], r"images of shape \(1, 16, 24\) are not taken; give 3 channels, first or last"),
        (PIXELS[..., 0], r"images of shape \(16, 24\) are not taken"),
        (np.dstack([PIXELS, PIXELS]), r"images of shape \(16, 24, 6\) are not taken"),
        (CHW[None, None], r"images of shape \(1, 1, 3, 16, 24\) are not taken"),
        (Image.new("I;16", (8, 8)), "a PIL image of mode I;16 is not taken for 3 channels"),
        ([PIXELS, PIXELS[:8]], r"the images differ in size or type \(8 x 24 uint8, 16 x 24 uint8\)"),
        ([], "no images were given"),
        ("photo.jpg", "images of type str are not taken"),
        ([[0.0, 1.0]], "images of type float are not taken"),
    ],
)
def test_preprocess__refuses_the_rest_in_one_line(images: Any, said: str) -> None:
    with pytest.raises(BackboneError, match=said) as caught:
        backbone().preprocess(images)
    assert "\n" not in str(caught.value)


def test_preprocess__overshoot_of_a_resizer_is_taken_and_other_units_where_the_backbone_has_them() -> None:
    images = torch.linspace(-0.1, 1.1, 3 * 8 * 8).view(1, 3, 8, 8)
    encoder = backbone()
    assert torch.equal(encoder.preprocess(images), encoder.normalized(images))
    heights = backbone(1, pixel_mean=[1200.0], pixel_std=[300.0])
    assert torch.equal(heights.preprocess(torch.full((1, 1, 8, 8), 1500.0)), torch.ones(1, 1, 8, 8))
    with pytest.raises(BackboneError, match="has colors, and the backbone takes 1 channel"):
        backbone(1).preprocess(Image.fromarray(PIXELS))
