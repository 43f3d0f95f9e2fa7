"""Attentive probe and GGeM: golden poolings, a class that one token tells, what chooses the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.extraction.forward import Dense
from evaluation.protocols.attentive.score import Attention
from evaluation.protocols.ggem.score import ggem
from evaluation.protocols.token_probes import num_groups
from evaluation.registry import PROTOCOLS, load_head

NAMES = ["attentive", "ggem"]
QUICK = {"lrs": (1e-3, 3e-2), "min_steps": 60, "epochs": 1, "folds": 2}


def _marked(num_images: int, seed: int, strength: float = 3.0) -> Dense[Tensor]:
    """Of 16 tokens one, anywhere, has the class in one of 4 channels and a mark in the fifth; all else is noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 4
    patches = rng.standard_normal((num_images, 16, 12))
    place = rng.integers(0, 16, num_images)
    patches[np.arange(num_images), place, labels] += strength
    patches[np.arange(num_images), place, 4] += 2 * strength
    return Dense(patches.reshape(num_images, 4, 4, 12).astype(np.float16), torch.from_numpy(labels))


def _score(name: str, train: Dense[Tensor], test: Dense[Tensor], **params: Any) -> Any:
    spec = PROTOCOLS[name]
    settings = {"num_classes": 4, "params": {**spec.params, **QUICK, **params}, "seed": 0}
    return load_head(spec)(train, test, **settings, device=torch.device("cpu"))


def test_ggem__golden(golden: dict[str, Any]) -> None:
    block = golden["F_ggem"]
    n, c = np.meshgrid(np.arange(9), np.arange(8), indexing="ij")
    tokens = torch.from_numpy(0.6 + 0.5 * np.sin(0.7 * (n + 1) * (c + 1)))
    p = torch.tensor([1, 2, 3, 4.5], dtype=torch.float64, requires_grad=True)
    pooled = ggem(tokens, p)
    assert pooled.tolist() == pytest.approx(block["out"], abs=1e-9)
    pooled.sum().backward()
    assert p.grad is not None and p.grad.tolist() == pytest.approx(block["dL_dp_for_L_sum"], abs=1e-9)
    three = torch.full((4,), 3.0, dtype=torch.float64)
    assert ggem(tokens, three).tolist() == pytest.approx(block["out_gem_p3"], abs=1e-9)
    assert ggem(tokens - 0.6, p.detach()).tolist() == pytest.approx(block["out_on_X_minus_0p6_clamped"], abs=1e-9)


def test_attention__is_cross_attention_of_one_query() -> None:
    """Beside torch's own, whose projection of keys is the identity and whose query is the vector of the head."""
    generator = torch.Generator().manual_seed(0)
    dim, heads = 128, 2
    parameters, width = Attention().start(dim, generator)
    assert (width, num_groups(dim)) == (dim, heads)
    tokens = torch.randn(3, 7, dim, generator=generator)
    for head in range(heads):
        weights = (tokens @ parameters["query"][head]).softmax(1)
        by_hand = torch.einsum("bn,bne->be", weights, tokens @ parameters["value"][head])
        found = Attention()(tokens, parameters)[:, head * 64 : head * 64 + 64]
        assert torch.allclose(found, by_hand, atol=1e-5)


def test_num_groups__divide_the_width() -> None:
    assert [num_groups(dim) for dim in (24, 192, 768, 200, 130)] == [1, 3, 12, 2, 2]


def test_score__attention_finds_the_token_that_tells_the_class() -> None:
    train, test = _marked(160, 0), _marked(80, 1)
    attentive = _score("attentive", train, test, lrs=(3e-2,), min_steps=100)
    assert attentive.metrics["top1"] > 0.85
    assert set(attentive.metrics) == {metric.name for metric in PROTOCOLS["attentive"].metrics}
    assert attentive.per_sample.double().mean() == pytest.approx(attentive.metrics["top1"])
    mean = _score("ggem", train, test, first_p=1.0, p_rate=0.0, lrs=(3e-2,), min_steps=100)
    assert mean.metrics["top1"] < attentive.metrics["top1"] - 0.15
    assert mean.details["p"] == [1.0]
    learned = _score("ggem", train, test, lrs=(3e-2,), min_steps=100)
    assert learned.metrics["top1"] > mean.metrics["top1"] and learned.details["p"][0] > 3.3


@pytest.mark.parametrize("name", NAMES)
def test_score__test_labels_choose_nothing(name: str) -> None:
    train, test, lrs = _marked(80, 0), _marked(60, 1), (3e-2, 1e-6)
    honest = _score(name, train, test, lrs=lrs)
    wrong = _score(name, train, dataclasses.replace(test, labels=test.labels.roll(1)), lrs=lrs)
    assert honest.details["lr"] == 3e-2
    for detail in ("lr", "at_grid_edge", "val_top1_by_lr", "selection"):
        assert wrong.details[detail] == honest.details[detail]
    assert wrong.metrics["top1"] != honest.metrics["top1"]
    assert honest.details["selection"] == "2-fold"


@pytest.mark.parametrize("name", NAMES)
def test_score__rows_of_a_fold_do_not_train_the_probe_that_judges_them(name: str) -> None:
    """Labels that nothing tells are not known on held-out images, though each image can be learned by heart."""
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((60, 2, 2, 40)).astype(np.float16)
    split = Dense(patches, torch.from_numpy(rng.permutation(60) % 4))
    outcome = _score(name, split, split, lrs=(3e-2,), min_steps=150)
    assert outcome.metrics["top1"] > 0.95 and outcome.metrics["val_top1"] < 0.55


@pytest.mark.parametrize("name", NAMES)
def test_score__constant_tokens_give_the_majority_class(name: str) -> None:
    labels = torch.tensor([0, 1, 1, 1, 2] * 8)
    split = Dense(np.full((40, 2, 2, 12), 7, np.float16), labels)
    assert _score(name, split, split).metrics["top1"] == 0.6


def test_score__one_training_image_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least 2 training images, got 1"):
        _score("attentive", _marked(1, 0), _marked(4, 1))


def test_evaluate__colors_are_told(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        quick = dataclasses.replace(PROTOCOLS[name], params={**PROTOCOLS[name].params, **QUICK})
        monkeypatch.setitem(PROTOCOLS, name, quick)
        assert evaluate(checkpoint(), name, colours, store=tmp_path / "runs").metrics["top1"] > 0.9
