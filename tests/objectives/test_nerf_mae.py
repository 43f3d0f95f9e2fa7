from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.registry import create_backbone
from data_pipelines.views.specs import views_from
from objectives import contract
from objectives.base import Progress
from objectives.errors import ObjectiveError
from objectives.nerf_mae.config import NeRFMAEConfig
from objectives.nerf_mae.objective import NeRFMAE, voxel_loss
from objectives.parts.voxel_pictures import front_views, grid_slices

SMALL = {"size": [16, 24, 16], "embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2]}
PROGRESS = Progress(1, 4)


def objective(backbone: dict[str, Any] | None = None, **settings: Any) -> NeRFMAE:
    torch.manual_seed(0)
    encoder = create_backbone("voxel_swin", kind="voxels", **SMALL | (backbone or {}))
    return NeRFMAE(encoder, NeRFMAEConfig(**{"mask_block": 2} | settings))


def batch(num: int = 4, *, full: bool = False) -> dict[str, Tensor]:
    """Balls of a color of their own, in grids of different sizes."""
    generator = torch.Generator().manual_seed(3)
    sides = torch.tensor(SMALL["size"])
    size = sides.expand(num, 3).clone()
    if not full:
        size[1:] -= torch.randint(0, 5, (num - 1, 3), generator=generator)
    axes = torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")
    center = torch.rand(num, 3, generator=generator) * 6 + 4
    squares = [(axes[axis] - center[:, axis].view(-1, 1, 1, 1)).square() for axis in range(3)]
    alpha = (1.5 - (squares[0] + squares[1] + squares[2]).sqrt() / 4).clamp(0, 1)  # (num, X, Y, Z)
    colors = torch.rand(num, 3, 1, 1, 1, generator=generator).expand(-1, -1, *sides) * (alpha > 0).unsqueeze(1)
    grid = torch.cat([colors, alpha.unsqueeze(1)], dim=1)
    for number, (x, y, z) in enumerate(size.tolist()):
        grid[number, :, x:], grid[number, :, :, y:], grid[number, :, :, :, z:] = 0, 0, 0
    return {"grid": grid, "grid.size": size, "seed": torch.arange(num) + 10, "sample_id": torch.arange(num)}


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("reduction", ["voxel", "sample"])
def test_contract__public_checks_pass(check: Any, reduction: str) -> None:
    check(objective({"drop_path": 0.0}, reduction=reduction), batch())


def test_loss__is_the_papers_over_a_micro_batch_by_loops() -> None:
    target = batch(2)["grid"]
    prediction = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    is_scored = torch.rand(2, 16, 24, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    rgb, occupied, alpha, scored = 0.0, 0, 0.0, 0
    for b, x, y, z in ((b, x, y, z) for b in range(2) for x in range(16) for y in range(24) for z in range(16)):
        p, t = prediction[b, :, x, y, z].tolist(), target[b, :, x, y, z].tolist()
        if t[3] > 0.01:
            rgb, occupied = rgb + sum((p[c] - t[c]) ** 2 for c in range(3)), occupied + 1
        if is_scored[b, x, y, z]:
            alpha, scored = alpha + (1 / (1 + math.exp(-p[3])) - t[3]) ** 2, scored + 1
    parts = voxel_loss(prediction, target, is_scored)
    assert parts.rgb_error.sum().item() == pytest.approx(rgb, rel=1e-5)
    assert parts.alpha_error.sum().item() == pytest.approx(alpha, rel=1e-5)
    assert (parts.num_occupied.sum(), parts.num_scored.sum()) == (occupied, scored)


def test_loss__of_samples_is_the_same_however_they_are_spread() -> None:
    model, whole = objective({"drop_path": 0.3}, reduction="sample"), batch(4)
    halves = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 1), slice(1, 4))]
    loss = model(whole, PROGRESS).loss
    parts = [model(half, PROGRESS).loss for half in halves]
    torch.testing.assert_close(loss, (parts[0] + 3 * parts[1]) / 4)
    assert not model.compares_images


def test_loss__of_voxels_counts_each_of_the_micro_batch_alike() -> None:
    model, whole = objective(reduction="voxel"), batch(4)
    assert model.compares_images
    result = model._reconstruct(whole)
    parts = voxel_loss(result.prediction, result.target, result.is_scored)
    wanted = parts.rgb_error.sum() / parts.num_occupied.sum() + parts.alpha_error.sum() / parts.num_scored.sum()
    torch.testing.assert_close(model(whole, PROGRESS).loss, wanted)


def test_loss__weights_scale_the_terms() -> None:
    metrics = objective(rgb_weight=2.0, alpha_weight=0.5)(batch(), PROGRESS).metrics
    assert metrics["loss"].item() == pytest.approx(2 * metrics["rgb_loss"].item() + 0.5 * metrics["alpha_loss"].item())


@pytest.mark.parametrize("reduction", ["voxel", "sample"])
def test_loss__is_finite_where_nothing_is_and_nothing_is_covered(reduction: str) -> None:
    model = objective(reduction=reduction)
    empty = batch() | {"noise": torch.ones(4, 12)}
    empty["grid"] = torch.zeros_like(empty["grid"])
    output = model(empty, PROGRESS)
    output.loss.backward()
    assert output.loss == 0 and all(value.isfinite() for value in output.metrics.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_loss__padding_is_never_scored_and_always_empty() -> None:
    model, padded = objective(), batch()
    changed = {**padded, "grid": padded["grid"].clone()}
    for number, (x, y, z) in enumerate(padded["grid.size"].tolist()):
        changed["grid"][number, :, x:], changed["grid"][number, :, :, y:] = 0.7, 0.7
        changed["grid"][number, :, :, :, z:] = 0.7
    assert torch.equal(model(padded, PROGRESS).loss, model(changed, PROGRESS).loss)
    result = model._reconstruct(padded)
    assert not (result.is_scored & ~result.is_inside).any() and result.is_scored.any()


def test_loss__what_is_covered_does_not_reach_the_encoder() -> None:
    model, seen = objective(), batch(full=True)
    result = model._reconstruct(seen)
    hidden = result.is_covered.unsqueeze(1)
    changed = {**seen, "grid": torch.where(hidden, 0.25, seen["grid"])}
    assert torch.equal(model._reconstruct(changed).prediction, result.prediction)


def test_mask__each_grid_has_its_own_or_all_share_one() -> None:
    same = {**batch(), "noise": torch.rand(4, 24, generator=torch.Generator().manual_seed(0))}
    seeds = {"seed": torch.tensor([5, 6, 5, 7])}
    own = objective()._mask(seeds)
    assert torch.equal(own[0], own[2]) and not torch.equal(own[0], own[1])
    assert torch.equal(objective()._mask({"seed": torch.tensor([6])})[0], own[1])
    shared = objective(mask_per="batch")._mask(seeds)
    assert all(torch.equal(shared[0], mask) for mask in shared)
    given = objective(mask_ratio=0.5)._mask({**same, "noise": same["noise"][:, :12]})
    assert given.shape == (4, 4, 6, 4)


def test_mask__the_ratio_is_a_probability() -> None:
    masks = objective(mask_block=1, mask_ratio=0.6)._mask({"seed": torch.arange(200)})
    assert masks.float().mean().item() == pytest.approx(0.6, abs=0.01)


def test_param_groups__everything_decays() -> None:
    model = objective()
    groups = model.param_groups(0.1, 0.5)
    assert all(group["weight_decay"] == 0.1 and group["wd_scale"] == 1.0 for group in groups)
    assert len({group["group_name"] for group in groups}) == len(groups)
    assert {group["lr_scale"] for group in groups} == {0.125, 0.25, 0.5, 1.0}


def test_views__are_what_the_paper_shows() -> None:
    (view,) = views_from(objective(volume_array="rgba").views())
    assert (view.size, view.flip, view.turn, view.array, view.return_size) == (
        (16, 24, 16),
        (0.5, 0.5, 0.0),
        0.5,
        "rgba",
        True,
    )


REFUSED = {
    "plain": (
        "voxel_vit",
        {"size": [16] * 3, "in_chans": 4, "embed_dim": 12, "num_heads": 2},
        {},
        "use backbone.name=voxel_swin",
    ),
    "scalars": ("voxel_swin", SMALL | {"in_chans": 1}, {}, "backbone.in_chans is 1: set it to 4"),
    "blocks": ("voxel_swin", SMALL, {"mask_block": 5}, "mask_block 5 is more than the 4 tokens along an axis"),
}


@pytest.mark.parametrize(("name", "backbone", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals__are_one_line(name: str, backbone: dict, settings: dict, message: str) -> None:
    encoder = create_backbone(name, kind="voxels", **backbone)
    with pytest.raises(ObjectiveError, match=message.replace(".", r"\.")):
        NeRFMAE(encoder, NeRFMAEConfig(**settings))


def test_refusals__encoders_of_images_are_of_another_kind() -> None:
    encoder = create_backbone("vit_tiny_patch16_224", options={"depth": 1})
    with pytest.raises(ObjectiveError, match=r"needs voxels; .* use backbone\.kind=voxels"):
        NeRFMAE(encoder, NeRFMAEConfig())


def test_learns__shapes_and_colors_of_balls() -> None:
    model, seen = objective(mask_ratio=0.5), batch(8)
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=3e-3)
    metrics = []
    for step in range(60):
        output = model({**seen, "seed": seen["seed"] + 100 * step}, Progress(step, 60))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        metrics.append(output.metrics)
    assert metrics[-1]["loss"] < 0.3 * metrics[0]["loss"]
    assert metrics[-1]["alpha_loss"] < 0.6 * metrics[0]["alpha_loss"]
    assert metrics[-1]["occupied_psnr_db"] > metrics[0]["occupied_psnr_db"] + 5


def test_diagnose__names_a_run_that_predicts_a_constant() -> None:
    metrics = {"explained": 0.0, "effective_rank": 5.0, "patch_cosine": 0.5}
    assert "their mean opacity" in str(objective().diagnose(metrics, Progress(500, 1000)))
    assert objective().diagnose(metrics, Progress(5, 1000)) is None


def test_bf16__norms_and_losses_stay_wide() -> None:
    model = objective().to(torch.bfloat16)
    output = model(batch(), PROGRESS)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and model.mask_token.grad.isfinite().all()
    assert output.loss.item() == pytest.approx(objective()(batch(), PROGRESS).loss.item(), rel=0.1)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_front_view__composites_along_rays() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(1, 4, 96, 3, 2, generator=generator)
    view = front_views(grid)
    assert view.shape == (1, 3, 2, 96)
    x, z, through, color = 5, 1, 1.0, torch.zeros(3)
    for y in range(3):
        alpha = grid[0, 3, x, y, z].item()
        color += through * alpha * grid[0, :3, x, y, z]
        through *= 1 - alpha
    torch.testing.assert_close(view[0, :, 1 - z, x], color + through)  # z up, white behind


def test_slices__are_on_white_and_enlarged() -> None:
    grid = torch.rand(2, 4, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    shown = grid_slices(grid, torch.tensor([1, 4]))
    assert shown.shape == (2, 3, 72, 96)
    color, alpha = grid[1, :3, 2, 5, 4], grid[1, 3, 2, 5, 4]
    torch.testing.assert_close(shown[1, :, 0, 2 * 12 + 3], color * alpha + 1 - alpha)  # the second axis up
