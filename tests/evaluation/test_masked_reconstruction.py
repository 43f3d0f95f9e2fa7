"""Hidden blocks filled in: what is hidden, the figures by loops, identity, and what is refused."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from backbones.io import save_backbone, save_heads
from backbones.registry import create_backbone
from backbones.voxels.reconstruction import Reconstruction
from data_pipelines.shards.dataset import open_dataset
from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.extraction.decoding import Decoded, hidden_blocks
from evaluation.extraction.recipe import feature_recipe
from evaluation.extraction.voxels import VOXELS
from evaluation.protocols.masked_reconstruction.score import neighbor_mean, score
from evaluation.registry import PROTOCOLS
from evaluation.threads import Threads
from objectives.nerf_mae.config import NeRFMAEConfig
from objectives.nerf_mae.objective import NeRFMAE
from objectives.volume_mae.config import VolumeMAEConfig
from objectives.volume_mae.objective import VolumeMAE
from pretrain.evaluations import evaluate as evaluate_by_hand
from pretrain.evaluations import leaderboard

SIZE = [16, 16, 16]  # of which blocks have an edge of 4
SWIN: dict[str, Any] = {"size": SIZE, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}
VIT: dict[str, Any] = {"size": SIZE, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
SPEC = PROTOCOLS["masked_reconstruction"]
CPU = torch.device("cpu")


def _npy(values: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _grids(number: int, seed: int = 0) -> list[npt.NDArray[np.float32]]:
    """Balls of one color each; some are shorter than the size."""
    rng = np.random.default_rng(seed)
    grids = []
    for idx in range(number):
        sides = (16, 16 - idx % 3, 16)
        place = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"))
        distance = np.sqrt(((place - rng.uniform(5, 10, (3, 1, 1, 1))) ** 2).sum(axis=0))
        alpha = np.clip(1.5 - distance / 4, 0, 1)
        grids.append(np.concatenate([rng.random((3, 1, 1, 1)) * (alpha > 0), alpha[None]]).astype(np.float32))
    return grids


@pytest.fixture
def scenes(tmp_path: Path, write_shards: Callable[..., None]) -> EvaluationData:
    """Held-out grids alone: nothing is fitted, so that there need be no others."""
    write_shards(tmp_path / "scenes", "test", [{"grid.npy": _npy(grid)} for grid in _grids(6)])
    return EvaluationData("scenes", tmp_path / "scenes")


def _published(folder: Path, objective: NeRFMAE | VolumeMAE) -> Path:
    folder.mkdir()
    save_backbone(folder / "backbone.safetensors", objective.exported.weights(), objective.exported.spec)
    if (heads := objective.exported_heads()) is not None:
        save_heads(folder / "heads.safetensors", heads.tensors, heads.spec)
    return folder


def _nerf_mae(seed: int = 0, **backbone: Any) -> NeRFMAE:
    torch.manual_seed(seed)
    return NeRFMAE(create_backbone("voxel_swin", kind="voxels", **SWIN | backbone), NeRFMAEConfig(mask_block=1))


def _volume_mae(backbone: dict[str, Any] | None = None, **settings: Any) -> VolumeMAE:
    torch.manual_seed(0)
    sizes = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "norm_pix_loss": False}
    return VolumeMAE(
        create_backbone("voxel_vit", kind="voxels", **VIT | (backbone or {})), VolumeMAEConfig(**sizes | settings)
    )


class _Says(Reconstruction):
    """Says the same of every voxel, and remembers what was hidden."""

    is_radiance: ClassVar[bool] = True

    def __init__(self, constant: list[float]) -> None:
        super().__init__()
        self.encoder: Any = create_backbone("voxel_swin", kind="voxels", **SWIN)
        self.cube, self.constant = 4, torch.tensor(constant)
        self.hidden: list[Tensor] = []

    def forward(self, values: Tensor, is_hidden: Tensor) -> Tensor:
        self.hidden.append(is_hidden)
        return self.constant.view(1, -1, 1, 1, 1).expand_as(values)


def _decoded(model: Reconstruction, data: EvaluationData, seed: int = 0, batch_size: int = 4) -> Decoded:
    recipe = feature_recipe(VOXELS, SPEC, model.encoder.spec, None)
    samples = open_dataset(str(data.root / "test-*.tar"))
    return Decoded(samples, model, VOXELS, recipe, seed, batch_size, CPU, Threads(1))


def test_hidden_blocks__follow_from_seed_and_number_alone() -> None:
    first = hidden_blocks(0, range(0, 6), (4, 5, 4), 0.75)
    assert first.shape == (6, 4, 5, 4) and first.flatten(1).sum(1).tolist() == [60] * 6
    assert torch.equal(hidden_blocks(0, range(2, 4), (4, 5, 4), 0.75), first[2:4])
    assert not torch.equal(first[0], first[1]) and not torch.equal(hidden_blocks(1, range(6), (4, 5, 4), 0.75), first)


def test_neighbor_mean__by_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 8, 10, 8, generator=rng)
    is_known = torch.rand(2, 8, 10, 8, generator=rng) < 0.3
    is_known[:, 0:4, 0:6] = False  # so that some blocks have no known neighbor
    is_known[1] = False
    found = neighbor_mean(values, is_known, 2)
    for b, x, y, z in (
        (b, x, y, z) for b in range(2) for x in range(0, 8, 3) for y in range(10) for z in range(0, 8, 3)
    ):
        parts = [slice(max(0, (at // 2 - 1) * 2), (at // 2 + 2) * 2) for at in (x, y, z)]
        known = is_known[(b, *parts)]
        near = values[(b, slice(None), *parts)][:, known]
        if not known.any():
            near = values[b][:, is_known[b]]
        expected = near.mean(1) if near.shape[1] else torch.zeros(3)
        torch.testing.assert_close(found[b, :, x, y, z], expected)


def test_score__by_loops_over_what_was_hidden(scenes: EvaluationData) -> None:
    model = _Says([0.3, 0.5, 0.6, 0.2])
    outcome = score(_decoded(model, scenes), params=SPEC.params, seed=0)
    hidden = torch.cat(model.hidden).repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3).numpy()
    color: dict[bool, list[float]] = {True: [], False: []}  # whether the sample chooses
    alpha: dict[bool, list[float]] = {True: [], False: []}
    true_colors, true_alphas, empty = [], [], []
    for idx, grid in enumerate(_grids(6)):
        chooses, is_scored = idx % 2 == 1, hidden[idx][:, : grid.shape[2]]
        occupied = is_scored & (grid[3] > 0.01)
        color[chooses] += ((grid[:3, occupied].T - [0.3, 0.5, 0.6]) ** 2).mean(1).tolist()
        alpha[chooses] += ((grid[3, is_scored] - 0.2) ** 2).tolist()
        if not chooses:
            true_colors.append(grid[:3, occupied])
            true_alphas.append(grid[3, is_scored])
            empty += ((grid[3, is_scored & ~occupied] - 0.2) ** 2).tolist()
    metrics = outcome.metrics
    assert metrics["psnr"] == pytest.approx(-10 * math.log10(np.mean(color[False])), rel=1e-6)
    assert metrics["val_psnr"] == pytest.approx(-10 * math.log10(np.mean(color[True])), rel=1e-6)
    assert metrics["alpha_error"] == pytest.approx(np.mean(alpha[False]), rel=1e-6)
    assert metrics["val_alpha_error"] == pytest.approx(np.mean(alpha[True]), rel=1e-6)
    assert metrics["alpha_error_empty"] == pytest.approx(np.mean(empty), rel=1e-6)
    spread = np.concatenate(true_colors, axis=1).var(axis=1).mean()
    assert metrics["psnr_constant"] == pytest.approx(-10 * math.log10(spread), rel=1e-5)
    assert metrics["alpha_error_constant"] == pytest.approx(np.concatenate(true_alphas).var(), rel=1e-5)
    assert metrics["psnr_ci_low"] < metrics["psnr"] < metrics["psnr_ci_high"]
    assert metrics["alpha_error_ci_low"] < metrics["alpha_error"] < metrics["alpha_error_ci_high"]
    assert outcome.details["block"] == 4 and outcome.details["num_scored"] == outcome.details["num_val"] == 3


def test_score__the_best_constant_is_no_better_than_it_says(scenes: EvaluationData) -> None:
    floor = score(_decoded(_Says([0.5, 0.5, 0.5, 0.5]), scenes), params=SPEC.params, seed=0).metrics
    for constant in ([0.4, 0.4, 0.4, 0.1], [0.6, 0.5, 0.5, 0.2], [0.5, 0.5, 0.4, 0.3]):
        metrics = score(_decoded(_Says(constant), scenes), params=SPEC.params, seed=0).metrics
        assert metrics["psnr"] <= metrics["psnr_constant"] == floor["psnr_constant"]
        assert metrics["alpha_error"] >= metrics["alpha_error_constant"] == floor["alpha_error_constant"]


def test_score__batches_decide_nothing(scenes: EvaluationData) -> None:
    one, six = (score(_decoded(_Says([0.1] * 4), scenes, batch_size=n), params=SPEC.params, seed=0) for n in (1, 6))
    assert one.metrics == pytest.approx(six.metrics, rel=1e-12)


def test_evaluate__heads_are_part_of_what_a_result_is_found_by(tmp_path: Path, scenes: EvaluationData) -> None:
    objective = _nerf_mae()
    first = evaluate(_published(tmp_path / "a", objective), SPEC.name, scenes, store=tmp_path)
    again = evaluate(_published(tmp_path / "b", objective), SPEC.name, scenes, store=tmp_path)
    with torch.no_grad():
        objective.decoder.predict.bias += 1
    other = evaluate(_published(tmp_path / "c", objective), SPEC.name, scenes, store=tmp_path)
    assert again.cached and again.key == first.key
    assert not other.cached and other.weights_digest == first.weights_digest and other.key != first.key
    assert other.metrics["psnr"] != first.metrics["psnr"]
    assert other.metrics["psnr_neighbors"] == first.metrics["psnr_neighbors"]  # the same was hidden
    places = [place for place in leaderboard(tmp_path) if place.protocol == SPEC.name]
    assert first.details["num_test"] == 6 and first.details["num_scored"] == 3  # as of every other protocol
    assert len(places) == 2 and places[0].score > places[1].score
    assert places[0].num_test == 3 and "dB" in places[0].interval


def test_evaluate__volumes_have_psnr_alone(tmp_path: Path, write_shards: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    volumes = [rng.integers(0, 255, (16, 14, 18), np.uint8) for _ in range(4)]
    write_shards(tmp_path / "volumes", "test", [{"volume.npy": _npy(volume)} for volume in volumes])
    data = EvaluationData("volumes", tmp_path / "volumes")
    bytes_ = evaluate(_published(tmp_path / "a", _volume_mae()), SPEC.name, data, store=tmp_path)
    assert not any("alpha" in name for name in bytes_.metrics) and bytes_.details["peak"] == 1.0
    assert bytes_.metrics["psnr_constant"] == pytest.approx(-10 * math.log10(1 / 12), abs=0.25)  # of uniform noise
    assert bytes_.metrics["psnr"] < bytes_.metrics["psnr_constant"]  # which nobody can fill in
    write_shards(tmp_path / "units", "test", [{"volume.npy": _npy(volume * np.float32(10))} for volume in volumes])
    units = evaluate(tmp_path / "a", SPEC.name, EvaluationData("units", tmp_path / "units"), store=tmp_path)
    assert units.details["peak"] == 2540.0
    assert units.metrics["psnr_constant"] == pytest.approx(bytes_.metrics["psnr_constant"], abs=0.1)


def test_evaluate__values_are_those_of_the_window_as_in_training(
    tmp_path: Path, write_shards: Callable[..., None]
) -> None:
    """The same volumes in units of a scanner, of which the window makes them again; shorter ones are padded."""
    volumes = [grid[3:] for grid in _grids(4)]
    window, results = [-160.0, 240.0], []
    outside = np.where(np.random.default_rng(0).random((1, 16, 16, 16)) < 0.5, -900, 0)
    for name, stored, backbone in (
        ("plain", volumes, {}),
        ("units", [np.where(v == 0, outside[:, :, : v.shape[2]], 0) + v * 400 - 160 for v in volumes], window),
    ):
        shards = [{"volume.npy": _npy(volume.astype(np.float32))} for volume in stored]
        write_shards(tmp_path / name, "test", shards)
        model = _volume_mae({"voxel_window": backbone or []})
        data = EvaluationData(name, tmp_path / name)
        results.append(evaluate(_published(tmp_path / f"of {name}", model), SPEC.name, data, store=tmp_path))
    assert results[1].details["peak"] == 1.0
    assert results[1].metrics == pytest.approx(results[0].metrics, rel=1e-4)


def test_evaluate__one_sample_is_reported_and_chooses_nothing(
    tmp_path: Path, write_shards: Callable[..., None]
) -> None:
    write_shards(tmp_path / "one", "test", [{"grid.npy": _npy(_grids(1)[0])}])
    folder = _published(tmp_path / "a", _nerf_mae())
    result = evaluate(folder, SPEC.name, EvaluationData("one", tmp_path / "one"), store=tmp_path)
    assert {"psnr", "alpha_error", "psnr_constant"} <= result.metrics.keys()
    assert not [name for name in result.metrics if name.startswith("val_") or "_ci_" in name]


def test_evaluate__nothing_to_score_is_one_line(tmp_path: Path, write_shards: Callable[..., None]) -> None:
    write_shards(tmp_path / "empty", "test", [{"grid.npy": _npy(np.zeros((4, 16, 16, 16), np.float32))}] * 2)
    folder = _published(tmp_path / "a", _nerf_mae())
    with pytest.raises(EvaluationError, match=r"no hidden voxel of the 1 samples .* is occupied \(alpha above 0.01\)"):
        evaluate(folder, SPEC.name, EvaluationData("empty", tmp_path / "empty"), store=tmp_path)


def test_evaluate__a_checkpoint_without_the_decoder_is_one_line(tmp_path: Path, scenes: EvaluationData) -> None:
    folder = _published(tmp_path / "a", _volume_mae(norm_pix_loss=True))
    with pytest.raises(EvaluationError, match=r"needs a decoder of hidden voxels .*, and .*a has none"):
        evaluate(folder, SPEC.name, scenes, store=tmp_path)


def test_evaluate__damaged_heads_are_refused(tmp_path: Path, scenes: EvaluationData) -> None:
    folder = _published(tmp_path / "a", _nerf_mae())
    facts = {"files": {name: {"sha256": "0" * 64} for name in ("backbone.safetensors", "heads.safetensors")}}
    (folder / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="digest mismatch"):
        evaluate(folder, SPEC.name, scenes, store=tmp_path)


def test_recipe__patches_that_do_not_tile_blocks_are_refused() -> None:
    architecture = {"name": "x", "settings": {"size": [48, 48, 48], "patch_size": 6}}
    with pytest.raises(EvaluationError, match=r"blocks of 8 voxels .* patches of 6 voxels .* divides 8"):
        feature_recipe(VOXELS, SPEC, architecture, None)
    with pytest.raises(EvaluationError, match="needs volumes of two blocks of 16 voxels"):
        feature_recipe(VOXELS, SPEC, {"name": "x", "settings": {"size": [16, 12, 160], "patch_size": 4}}, None)
    for side, block in ((160, 16), (96, 16), (64, 8), (32, 8), (16, 4)):
        recipe = feature_recipe(VOXELS, SPEC, {"name": "x", "settings": {"size": [side] * 3, "patch_size": 4}}, None)
        assert recipe["block"] == block


def test_by_hand__it_is_usual_where_there_is_a_decoder(
    tmp_path: Path, scenes: EvaluationData, write_shards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.checkpoints.references.resolve", lambda reference, storage: Path(reference))
    write_shards(scenes.root, "train", [{"grid.npy": _npy(grid)} for grid in _grids(2, seed=1)])
    folder = _published(tmp_path / "a", _nerf_mae())
    results = evaluate_by_hand(folder, data={"scenes": scenes.root}, storage=tmp_path / "runs")
    assert [result.protocol for result in results] == [SPEC.name]
    (folder / "heads.safetensors").unlink()
    with pytest.raises(Exception, match="no protocol is usual for this backbone and the labels of the data"):
        evaluate_by_hand(folder, data={"scenes": scenes.root}, storage=tmp_path / "runs")
