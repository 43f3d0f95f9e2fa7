"""Objects by a normalized cut: golden cut and boxes, planted objects, degenerate inputs, keys of a ViT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from backbones.features import ImageFeatures
from backbones.registry import create_backbone
from evaluation import EvaluationData, evaluate
from evaluation.data import LabelMaps
from evaluation.extraction.frozen import Frozen
from evaluation.extraction.images import IMAGES
from evaluation.protocol import EvaluationError
from evaluation.protocols.discovery.cut import normalized_cut
from evaluation.protocols.discovery.score import box_iou, box_of, object_boxes, score
from evaluation.registry import PROTOCOLS
from evaluation.threads import Threads

CPU = torch.device("cpu")
SPEC = PROTOCOLS["discovery"]


def test_normalized_cut__golden(golden: dict[str, Any], golden_patches: tuple[npt.NDArray[Any], Any]) -> None:
    block, (patches, _) = golden["E_ncut"], golden_patches
    assert patches.sum() == pytest.approx(block["P_sum"], rel=1e-8)
    cut = normalized_cut(patches.reshape(48, 10), (6, 8), tau=0.2, eps=1e-5)
    assert cut.edge_density == block["edges_above_tau"] / 48**2
    assert cut.eigenvalue == pytest.approx(block["eigenvalues_0_3"][1], rel=1e-7)
    assert cut.side.astype(int).tolist() == block["bipartition"]
    assert cut.found.astype(int).tolist() == block["component_mask"]
    assert (16 * box_of(cut.found)).tolist() == block["box_xyxy"]


def test_box_iou__golden_boxes(golden: dict[str, Any]) -> None:
    hits = []
    for case in golden["E_corloc"]["cases"]:
        found = box_iou(np.array(case["pred"]), np.array(case["gt"]))
        assert found.tolist() == pytest.approx(case["iou"], abs=1e-6)
        hits.append(found.max() >= SPEC.params["least_iou"])
    assert np.mean(hits) == 0.75  # 0.5 upstream, where the third, exactly one half, is a miss


def test_normalized_cut__is_that_of_the_definition() -> None:
    """The second eigenvector of (D - W) v = lambda D v, split at its mean, of random patches."""
    from scipy.linalg import eigh

    rng = np.random.default_rng(0)
    for _ in range(12):
        tokens = rng.standard_normal((15, 3)) + 0.3
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        weights = np.where(unit @ unit.T > 0.2, 1.0, 1e-5)
        degrees = np.diag(weights.sum(axis=1))
        values, vectors = eigh(degrees - weights, degrees)
        second = vectors[:, 1]
        is_above = second > second.mean()
        side = is_above == is_above[np.abs(second).argmax()]
        cut = normalized_cut(tokens, (3, 5), tau=0.2, eps=1e-5)
        assert cut.eigenvalue == pytest.approx(values[1], rel=1e-9)
        assert (cut.side.ravel() == side).all()


@pytest.mark.parametrize("num_patches", [1, 2, 9])
def test_normalized_cut__patches_that_are_all_alike_are_one_object(num_patches: int) -> None:
    cut = normalized_cut(np.ones((num_patches, 5)), (1, num_patches), tau=0.2, eps=1e-5)
    assert cut.found.all() and cut.edge_density == 1
    nothing = normalized_cut(np.zeros((num_patches, 5)), (1, num_patches), tau=0.2, eps=1e-5)
    assert nothing.found.shape == (1, num_patches) and nothing.edge_density == 0
    assert normalized_cut(np.eye(2), (1, 2), tau=0.2, eps=1e-5).found.all()  # two patches are no graph to cut


def test_normalized_cut__the_same_each_time_and_without_convergence(
    monkeypatch: pytest.MonkeyPatch, golden_patches: tuple[npt.NDArray[Any], Any]
) -> None:
    import scipy.sparse.linalg as sparse

    tokens = golden_patches[0].reshape(48, 10)
    cuts = [normalized_cut(tokens, (6, 8), tau=0.2, eps=1e-5) for _ in range(2)]
    assert cuts[0].eigenvalue == cuts[1].eigenvalue

    def fails(*_: Any, **__: Any) -> None:
        raise sparse.ArpackNoConvergence("%s", np.zeros(0), np.zeros((48, 0)))

    monkeypatch.setattr(sparse, "eigsh", fails)
    dense = normalized_cut(tokens, (6, 8), tau=0.2, eps=1e-5)
    assert dense.eigenvalue == pytest.approx(cuts[0].eigenvalue, rel=1e-9)
    assert (dense.found == cuts[0].found).all()


def test_object_boxes__of_each_region_of_each_class_but_the_ground() -> None:
    labels = np.array([[1, 0, 0, 1], [0, 1, 0, 2], [-1, 0, 0, 2]])
    assert object_boxes(labels).tolist() == [[0, 0, 2, 2], [3, 0, 4, 1], [3, 1, 4, 3]]
    assert object_boxes(np.zeros((3, 3), np.int64)).shape == (0, 4)


class Colors(torch.nn.Module):
    """An encoder whose tokens are the mean colors of patches, without keys."""

    def __init__(self, grid: tuple[int, int], black: float = -0.5) -> None:
        super().__init__()
        self.grid, self.black = grid, black

    def tokens(self, batch: Tensor) -> ImageFeatures:
        means = torch.nn.functional.adaptive_avg_pool2d(batch.float() / 255 + self.black, self.grid)  # (B, 3, h, w)
        return ImageFeatures(means.flatten(2).transpose(1, 2), None, None, self.grid)


class Pictures:
    """Stands in for a `Dataset` of pictures and masks that were never written to disk."""

    def __init__(self, fields: list[dict[str, bytes]]) -> None:
        self.fields, self.num_samples = fields, len(fields)

    def require_field(self, *candidates: str) -> str:
        return next(name for name in candidates if name in self.fields[0])

    def read(self, sample_idx: int) -> dict[str, Any]:
        return {"__key__": f"k{sample_idx}", **self.fields[sample_idx]}

    def where(self, sample_idx: int) -> str:
        return f"sample {sample_idx}"


@pytest.fixture
def frozen(png: Callable[[npt.NDArray[Any]], bytes]) -> Callable[..., Frozen]:
    """`frozen(pictures, masks)`: a split of 32 px pictures before an encoder of colors on a grid of 8 x 8."""

    def make(
        pictures: list[npt.NDArray[np.uint8]],
        masks: list[npt.NDArray[np.uint8]],
        sequences: dict[str, str] | None = None,
    ) -> Frozen:
        fields = [{"png": png(image), "seg.png": png(mask)} for image, mask in zip(pictures, masks, strict=True)]
        samples: Any = Pictures(fields)
        labels = LabelMaps(samples, num_classes=3, ignore_index=255, sequences=sequences or {})
        recipe = {"tokens": "encoder", "size": [32, 32]}
        encoder: Any = Colors((8, 8))
        return Frozen(samples, encoder, labels, IMAGES, recipe, batch_size=3, device=CPU, threads=Threads(1))

    return make


def _pictures(count: int, seed: int) -> tuple[list[npt.NDArray[np.uint8]], list[npt.NDArray[np.uint8]]]:
    """Bright rectangles on dark ground and their masks at 64 x 48 pixels."""
    rng = np.random.default_rng(seed)
    pictures, masks = [], []
    for number in range(count):
        row, column = rng.integers(0, 5, 2)
        at = np.zeros((8, 8), np.uint8)
        at[row : row + 3, column : column + 3] = 1 + number % 2
        light = np.kron(at > 0, np.ones((4, 4)))[..., None] * 180 + rng.integers(0, 60, (32, 32, 3))
        pictures.append(light.astype(np.uint8))
        masks.append(np.kron(at, np.ones((8, 6))).astype(np.uint8))
    return pictures, masks


def _score(test: Frozen) -> Any:
    return score(test, test, num_classes=3, params=SPEC.params, seed=0, device=CPU)


def test_score__bright_objects_are_found(frozen: Callable[..., Frozen]) -> None:
    outcome = _score(frozen(*_pictures(7, 0)))
    assert outcome.metrics["corloc"] == outcome.metrics["mask_iou"] == 1
    assert 0.6 < outcome.metrics["corloc_ci_low"] < outcome.metrics["corloc_ci_high"] == 1  # Wilson's of 7
    assert outcome.metrics["corloc_whole_image"] == 0
    assert outcome.metrics["mask_iou_whole_image"] == pytest.approx(9 / 64)
    assert outcome.metrics["edge_density"] == pytest.approx((9**2 + 55**2) / 64**2)
    assert outcome.details["features"] == "patch tokens" and "corloc_tokens" not in outcome.metrics
    assert outcome.per_sample.tolist() == [True] * 7


def test_score__what_all_patches_share_is_told_of_and_taken_away(frozen: Callable[..., Frozen]) -> None:
    test = frozen(*_pictures(4, 0))
    bright: Any = Colors((8, 8), black=0.3)
    outcome = _score(replace(test, encoder=bright))
    assert outcome.metrics["edge_density"] == 1
    assert outcome.metrics["corloc"] == outcome.metrics["corloc_whole_image"] == 0
    assert outcome.metrics["corloc_centered"] == 1 and outcome.details["edge_density_centered"] < 0.8


def test_score__half_of_one_of_the_objects_is_a_hit(frozen: Callable[..., Frozen]) -> None:
    picture, mask = np.full((32, 32, 3), 20, np.uint8), np.zeros((8, 8), np.uint8)
    picture[4:16, 4:16] = 230
    mask[1:4, 1:7], mask[6, 7] = 1, 2
    outcome = _score(frozen([picture], [mask]))
    assert outcome.metrics["corloc"] == 1 and outcome.metrics["mask_iou"] == 9 / 19
    precision, recall = 1.0, 9 / 19
    assert outcome.metrics["mask_accuracy"] == 54 / 64
    assert outcome.metrics["mask_f"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))


def test_score__images_without_objects_are_not_scored(frozen: Callable[..., Frozen]) -> None:
    pictures, masks = _pictures(5, 0)
    masks[1] = np.where(masks[1] > 0, 255, 0).astype(np.uint8)
    names = {f"k{number}": "ab"[number % 2] for number in range(5)}
    outcome = _score(frozen(pictures, masks, names))
    assert outcome.details["num_scored"] == 4 and outcome.metrics["corloc"] == 1
    assert outcome.details["interval_over"] == "4 blocks of frames"
    with pytest.raises(EvaluationError, match="no test image has an object"):
        _score(frozen(pictures[1:2], masks[1:2]))


def test_score__ignored_pixels_count_nowhere(frozen: Callable[..., Frozen]) -> None:
    pictures, masks = _pictures(4, 0)
    for mask in masks:
        mask[mask == 0] = 255
    outcome = _score(frozen(pictures, masks))
    assert outcome.metrics["mask_iou_whole_image"] == outcome.metrics["mask_accuracy_whole_image"] == 1
    assert outcome.metrics["mask_f_whole_image"] == 1


def test_last_keys__are_what_the_last_layer_compares_patches_by() -> None:
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 2}
    encoder = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=options).eval()
    seen: list[Tensor] = []
    encoder.vit.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
    x = torch.randn(3, 3, 16, 16)
    encoder.features(x)
    keys = encoder.last_keys(x)
    assert keys is not None and keys.shape == (3, 4, 24)
    torch.testing.assert_close(keys, seen[0][:, 3:, 24:48])


def test_evaluate__of_a_vit_by_its_keys(
    checkpoint: Callable[..., Path], halves: EvaluationData, tmp_path: Path
) -> None:
    result = evaluate(checkpoint(), SPEC.name, halves, store=tmp_path / "runs", image_size=32)
    assert set(result.metrics) == {metric.name for metric in SPEC.metrics}
    assert result.details["features"] == "keys of the last attention layer"


def test_score__camvid_by_colors(pixel_patches: Callable[..., Any]) -> None:
    labels = pixel_patches("camvid", "test", range(0, 230, 40), (12, 16)).labels
    encoder: Any = Colors((12, 16))
    recipe = {"tokens": "encoder", "size": [192, 256]}
    test = Frozen(labels._dataset, encoder, labels, IMAGES, recipe, batch_size=4, device=CPU, threads=Threads(1))
    outcome = _score(test)
    assert outcome.details["num_scored"] == 6
    assert 0 < outcome.metrics["mask_iou"] < outcome.metrics["mask_iou_whole_image"] < 1
    assert 0.1 < outcome.metrics["edge_density"] < 0.9
