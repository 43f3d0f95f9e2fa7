"""What protocols can ask for beside pooled features with class labels and maps: the encoder, layers, distances."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.errors import DataError
from evaluation import EvaluationData, EvaluationError, EvaluationResult, evaluate
from evaluation.data import DepthMaps
from evaluation.extraction.forward import Dense, Pooled
from evaluation.extraction.frozen import Frozen
from evaluation.metrics import Outcome
from evaluation.protocol import LABELS, Metric, Protocol
from evaluation.registry import PROTOCOLS

Seen = dict[str, Any]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Seen, EvaluationResult]]:
    """`run(data, head, options of the backbone, **fields of the protocol)`: what the head was given, and the result."""

    def evaluated(
        data: EvaluationData, head: Callable[[Any, Any], float], options: dict[str, Any] | None = None, **fields: Any
    ) -> tuple[Seen, EvaluationResult]:
        seen: Seen = {}

        def score(train: Any, test: Any, *, num_classes: int, **_: Any) -> Outcome:
            seen.update(train=train, test=test, num_classes=num_classes)
            return Outcome({"value": head(train, test)}, {})

        module = types.ModuleType("a_protocol")
        module.score = score  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "a_protocol", module)
        spec = Protocol("mine", "", "a_protocol:score", 1, metrics=(Metric("value", ""),), **fields)
        monkeypatch.setitem(PROTOCOLS, "mine", spec)
        backbone = checkpoint(**(options or {}))
        return seen, evaluate(backbone, "mine", data, store=tmp_path / "runs")

    return evaluated


def test_encoder__a_protocol_runs_it_over_samples_in_their_order(
    run: Callable[..., tuple[Seen, EvaluationResult]], colours: EvaluationData
) -> None:
    def mean_color(train: Frozen, test: Frozen) -> float:
        assert torch.is_inference_mode_enabled() is False
        with pytest.raises(EvaluationError, match="not finite"):
            test.measure(lambda batch, numbers: {"broken": torch.full((len(numbers), 1), torch.nan)})
        found = test.measure(lambda batch, numbers: {
            "number": torch.tensor(numbers), "tokens": test.encoder.tokens(batch).tokens,
            "brightest": batch.float().mean(dim=(2, 3)).argmax(dim=1),
        })  # fmt: skip
        assert found["number"].tolist() == list(range(len(test)))
        assert found["tokens"].shape[:2] == (23, 4)
        return float((found["brightest"] == test.labels).double().mean())

    seen, result = run(colours, mean_color, tokens="encoder", label="cls")
    assert (result.metrics["value"], seen["num_classes"], len(seen["train"])) == (1.0, 3, 60)
    assert (result.details["num_train"], result.details["num_test"]) == (60, 23)


def test_label_none__unlabelled_samples_are_enough(
    run: Callable[..., tuple[Seen, EvaluationResult]], halves: EvaluationData
) -> None:
    def spread(train: Pooled, test: Pooled) -> float:
        assert train.labels.tolist() == [0] * 12
        return float(test.patch_mean.std())

    _, result = run(halves, spread, tokens="pooled", label=None)
    assert result.metrics["value"] > 0


def test_patches__with_class_labels(run: Callable[..., tuple[Seen, EvaluationResult]], colours: EvaluationData) -> None:
    seen, _ = run(colours, lambda train, test: 0.5, tokens="patches", label="cls")
    dense: Dense[torch.Tensor] = seen["test"]
    assert dense.patches.shape[:3] == (23, 2, 2)
    assert dense.labels.tolist() == [number % 3 for number in range(23)]
    assert seen["num_classes"] == 3


def test_num_layers__last_layers_after_the_final_norm_and_the_last_one_is_that_of_others(
    run: Callable[..., tuple[Seen, EvaluationResult]], colours: EvaluationData
) -> None:
    one, _ = run(colours, lambda train, test: 0.0, {"depth": 3}, tokens="pooled", label="cls")
    several, _ = run(colours, lambda train, test: 0.0, {"depth": 3}, tokens="pooled", label="cls", num_layers=5)
    pooled: Pooled = several["test"]
    assert len(pooled.inner) == 2  # there are no more
    assert torch.equal(pooled.patch_mean, one["test"].patch_mean)
    last, before, first = (layer.patch_mean for layer in pooled.layers)
    assert not torch.allclose(last, before) and not torch.allclose(before, first)
    # The final norm makes every token of the weights' initial gain 1 and shift 0 of mean 0 and, so, their mean.
    assert before.mean(dim=1).abs().max() < 1e-5


def test_depth__meters_with_nan_where_nothing_was_measured(
    run: Callable[..., tuple[Seen, EvaluationResult]],
    tmp_path: Path,
    png: Callable[..., bytes],
    write_shards: Callable[..., None],
) -> None:
    root = tmp_path / "rooms"
    depth = np.array([[0, 1500], [2000, 65535]], np.uint16)
    picture = png(np.zeros((16, 16, 3), np.uint8))
    for split in ("train", "test"):
        write_shards(root, split, [{"png": picture, "depth.png": png(depth)}] * 3)
    (root / "dataset.json").write_text("{}")
    seen, _ = run(EvaluationData("rooms", root), lambda train, test: 0.0, tokens="patches", label="depth.png")
    meters, sequence = seen["test"].labels.read(1)
    assert np.allclose(meters, [[np.nan, 1.5], [2.0, 65.535]], equal_nan=True)
    assert (sequence, seen["num_classes"], len(seen["test"].labels)) == (None, 0, 3)
    (root / "dataset.json").write_text(json.dumps({"depth_scale": 0}))
    with pytest.raises(EvaluationError, match=r"depth_scale 0 in dataset\.json must be meters per unit"):
        run(EvaluationData("rooms", root), lambda train, test: 0.0, tokens="patches", label="depth.png")


def test_depth__a_map_of_colors_is_refused_by_sample(tmp_path: Path, write_shards: Callable[..., None]) -> None:
    import io

    from data_pipelines.shards.dataset import open_dataset

    content = io.BytesIO()
    np.save(content, np.zeros((4, 4, 3), np.float32))
    write_shards(tmp_path, "test", [{"depth.npy": content.getvalue()}])
    maps = DepthMaps(open_dataset(str(tmp_path / "test-*.tar")), label=LABELS["depth.png"], scale=1.0, sequences={})
    with pytest.raises(DataError, match=r"test0000.*depth\.npy.*must be numbers \(H, W\)"):
        maps.read(0)
