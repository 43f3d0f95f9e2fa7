"""Images and volumes in one encoder: the authors' loss and patches, and what follows from the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from torch import Tensor

from backbones.errors import BackboneError
from backbones.io import load_backbone, save_backbone
from backbones.registry import create_backbone
from backbones.voxels.patches import to_patches
from backbones.voxels.unified import UnifiedVit, image_patches
from objectives.base import Progress
from objectives.errors import ObjectiveError
from objectives.mae.objective import patchify
from objectives.uni4eye.config import Uni4EyeConfig
from objectives.uni4eye.gradient_map import gradient_map
from objectives.uni4eye.objective import Uni4Eye, masked_error
from tests.golden_streams import uniform

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "uni4eye.json").read_text())
START = Progress(0, 1)
SIZES = {"size": [8, 16, 8], "patch_size": 4, "image_size": 16, "image_patch_size": 4, "embed_dim": 24, "depth": 2}
LIGHT = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def encoder(**settings: Any) -> UnifiedVit:
    torch.manual_seed(0)
    made = create_backbone("unified_vit", kind="voxels", **SIZES | {"num_heads": 2} | settings)
    assert isinstance(made, UnifiedVit)
    return made


def batch_of(num: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(0, 256, (num, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "volume": torch.rand(num, 1, 8, 16, 8, generator=generator),
        "volume.size": torch.tensor([[8, 16, 8], [8, 11, 8], [5, 16, 6]])[:num],
        "seed": torch.arange(num),
    }


def small(**config: Any) -> Uni4Eye:
    return Uni4Eye(encoder(), Uni4EyeConfig(**LIGHT | config))


def test_golden__patches_of_a_volume():
    golden = GOLDEN["patchify_3d"]
    patches = to_patches(uniform((1, 1, 8, 4, 8), 84), 4)
    assert list(patches.shape) == golden["shape"]
    assert patches[0, 0, :4].tolist() == pytest.approx(golden["row0_first4"], rel=1e-8)
    assert patches[0, 1, :4].tolist() == pytest.approx(golden["row1_first4"], rel=1e-8)


def test_golden__loss_of_both_branches():
    golden = GOLDEN["dual_loss_2d"]
    images, gradients = uniform((2, 3, 8, 8), 80), uniform((2, 1, 8, 8), 81) * 255
    predictions = uniform((2, 4, 48), 82), uniform((2, 4, 16), 83)
    masked = torch.tensor(golden["mask"], dtype=torch.bool)
    loss = torch.zeros((), dtype=torch.float64)
    for values, prediction in zip((images, gradients), predictions, strict=True):
        target = patchify(values, golden["patch"])
        target, prediction = (tokens[masked].view(2, 3, -1) for tokens in (target, prediction))
        loss += masked_error(prediction, target, torch.ones_like(target))
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (2, 1, 6, 7, 5)])
def test_gradient_map__is_the_mean_of_absolute_sobel_derivatives(shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for ours, sample in zip(gradient_map(values), values.mean(1).numpy(), strict=True):
        gain = 4 ** (sample.ndim - 1)  # of the smoothing along the other axes, and 1 of the derivative itself
        theirs = np.mean([np.abs(sobel(sample, axis, mode="nearest")) / gain for axis in range(sample.ndim)], axis=0)
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-10)


def test_gradient_map__of_a_step_is_its_height():
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1.0
    edges = gradient_map(step)
    assert edges.max().item() == 0.5 and edges[..., :3].abs().max() == 0  # of two axes one sees it
    assert edges.min() >= 0 and gradient_map(torch.rand(2, 3, 16, 16)).max() <= 1


def test_unified_vit__volumes_and_images_share_all_but_their_embedding(tmp_path):
    made, batch = encoder(), batch_of()
    images, volumes = made.tokens(batch["image"]), made.tokens(batch["volume"])
    assert images.grid == (4, 4) and images.tokens.shape == (3, 16, 24)
    assert volumes.grid == (2, 4, 2) and volumes.tokens.shape == (3, 16, 24)
    assert made.grid_of((3, 16, 16)) == (4, 4) and made.grid_of((1, 8, 16, 8)) == (2, 4, 2)
    own = {name for name, _ in made.named_parameters() if "embed" in name}
    assert own == {"patch_embed.weight", "patch_embed.bias", "image_embed.weight", "image_embed.bias"}
    assert made.tokens(batch["image"].repeat(1, 1, 2, 2)).grid == (8, 8)
    keep = torch.tensor([[0, 5], [3, 1], [15, 2]])
    x = made.normalized_images(batch["image"])
    changed = x.clone()
    changed[0, :, :4, 4:8] += 1.0  # patch 1 of the first image, which is left out
    assert torch.equal(made.image_features(x, keep).tokens, made.image_features(changed, keep).tokens)
    save_backbone(tmp_path / "backbone.safetensors", made.weights(), made.spec)
    loaded = load_backbone(tmp_path)
    assert torch.equal(loaded.tokens(batch["image"]).tokens, made.eval().tokens(batch["image"]).tokens)
    assert made.layer_ids().keys() == dict(made.named_parameters()).keys()
    assert made.layer_ids()["image_embed.weight"] == 0 and made.layer_ids()["norm.weight"] == 2


def test_image_patches__are_the_channel_first():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = image_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], images[1, :, 2:4, 2:4].flatten())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 18}, r"images of 18 x 18 pixels are not tiled by patches of 4"),
        ({"pixel_mean": [0.5]}, r"pixel_mean \[0\.5\] must hold 3 numbers"),
        ({"embed_dim": 22}, r"multiple of 4, not 22"),
    ],
)
def test_unified_vit__wrong_settings_are_one_line(settings, message):
    with pytest.raises(BackboneError, match=message):
        encoder(**settings)


def test_loss__is_the_weighted_sum_of_its_four_parts():
    objective, batch = small(gradient_weight=3.0, volume_weight=0.25), batch_of()
    output = objective(batch, START)
    parts = {name: output.metrics[name].item() for name in output.metrics if name.endswith(("_content", "_gradient"))}
    wanted = 0.75 * (parts["image_content"] + 3 * parts["image_gradient"])
    wanted += 0.25 * (parts["volume_content"] + 3 * parts["volume_gradient"])
    assert len(parts) == 4 and output.loss.item() == pytest.approx(wanted, rel=1e-6)


def test_loss__padding_is_not_scored_and_samples_are_alone():
    objective, batch = small(), batch_of()
    whole = objective(batch, START)
    losses = [objective({k: v[i : i + 1] for k, v in batch.items()}, START).loss for i in range(3)]
    assert whole.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    target = objective._reconstruct("volume", batch, 1).is_scored["content"]
    assert target[0].all() and not target[1].all() and not target[2].all()


def test_pictures__show_both_kinds_and_their_edges():
    pictures = small().pictures(batch_of())
    assert set(pictures) == {
        f"{kind}{branch}{what}"
        for kind in ("image", "volume")
        for branch in ("", " gradient")
        for what in ("", ", predicted")
    }
    assert "image, predicted" not in small(norm_pix_loss=True).pictures(batch_of())


def test_uni4eye__other_encoders_and_settings_are_refused():
    with pytest.raises(ObjectiveError, match=r"needs a backbone of images and volumes; .* backbone\.name=unified_vit"):
        Uni4Eye(create_backbone("voxel_vit", kind="voxels", size=[8, 8, 8], patch_size=4), Uni4EyeConfig())
    with pytest.raises(ObjectiveError, match=r"objective\.mask_ratio 0\.97"):
        small(mask_ratio=0.97)
    with pytest.raises(BackboneError, match="decoder_dim 16 is not a multiple of decoder_heads 3"):
        small(decoder_heads=3)
    assert set(small(gradient_weight=0.0).decoder.branches) == {"content"}
