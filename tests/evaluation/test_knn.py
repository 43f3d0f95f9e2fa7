"""Nearest-neighbour vote: golden block A, ties, clamping, degenerate features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipelines.decode import decode_image
from data_pipelines.shards.dataset import open_dataset
from evaluation.extraction.images import Pooled
from evaluation.metrics import mean_class_accuracy, top_k_accuracy
from evaluation.protocols.knn.score import nearest, score, vote
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
PARAMS = PROTOCOLS["knn"].params


def test_golden_inputs__match_their_checksums(golden: dict[str, Any], golden_splits: tuple[Pooled, Pooled]) -> None:
    block, (train, test) = golden["A_features"], golden_splits
    assert train.labels.tolist() == block["ytr"]
    assert test.labels.tolist() == block["yte"]
    assert float(train.patch_mean.sum()) == pytest.approx(block["Xtr_sum"], rel=1e-9)
    assert test.patch_mean[23, 13:].tolist() == pytest.approx(block["Xte_23_13_16"], abs=1e-9)


@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_vote__golden(golden: dict[str, Any], golden_splits: tuple[Pooled, Pooled], k: int) -> None:
    train, test = golden_splits
    shares = vote(train.patch_mean, train.labels, test.patch_mean, num_classes=4, ks=[k, 60], temperature=0.07)[k]
    block = golden["A_knn"]["by_k"][str(k)]
    predicted = shares.argmax(dim=1)
    assert predicted.tolist() == block["pred"]
    assert int((predicted == test.labels).sum()) == block["n_correct"]
    assert shares[0].tolist() == pytest.approx(block["probs_row0"], abs=1e-5)
    assert shares[5].tolist() == pytest.approx(block["probs_row5"], abs=1e-5)
    if k == 5:
        traps = golden["A_knn"]["by_k"]["traps"]
        assert all(predicted.tolist() != trap["pred"] for trap in traps.values())
        assert top_k_accuracy(shares, test.labels, 1) == golden["A_topk"]["micro_top1"]
        assert top_k_accuracy(shares, test.labels, 2) == golden["A_topk"]["micro_top2"]
        assert mean_class_accuracy(predicted, test.labels, 4) == golden["A_topk"]["macro_top1"]


def test_vote__order_of_the_bank_and_chunks_decide_nothing(
    golden_splits: tuple[Pooled, Pooled], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = golden_splits
    bank = train.patch_mean.float().repeat(2, 1)  # every row twice, so that ranks tie
    labels = torch.cat((train.labels, (train.labels + 1) % 4))
    expected = vote(bank, labels, test.patch_mean, num_classes=4, ks=[3, 7], temperature=0.07)
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("evaluation.protocols.knn.score.CHUNK_ELEMENTS", 1)
    shuffled = vote(bank[order], labels[order], test.patch_mean, num_classes=4, ks=[3, 7], temperature=0.07)
    for k in (3, 7):
        assert torch.equal(expected[k].argmax(dim=1), shuffled[k].argmax(dim=1))
        assert torch.allclose(expected[k], shuffled[k], atol=1e-6)


def test_vote__k_beyond_the_bank_is_clamped(golden_splits: tuple[Pooled, Pooled]) -> None:
    train, test = golden_splits
    shares = vote(train.patch_mean, train.labels, test.patch_mean, num_classes=4, ks=[60, 500], temperature=0.07)
    assert torch.equal(shares[60], shares[500])


def test_vote__tied_classes_go_to_the_lowest() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    shares = vote(bank, torch.tensor([2, 1]), torch.tensor([[1.0, 1.0]]), num_classes=3, ks=[2], temperature=0.07)[2]
    assert shares.tolist() == [[0.0, 0.5, 0.5]]
    assert int(shares.argmax()) == 1


def test_score__constant_features_give_the_majority_class() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2] * 10)
    split = Pooled(cls=torch.ones(50, 8), patch_mean=torch.zeros(50, 8), labels=labels)
    outcome = score(split, split, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert outcome.metrics["top1"] == outcome.metrics["top1_patch_mean"] == 0.6
    assert {*outcome.metrics, "top1_pixels", "top1_distances"} == {metric.name for metric in PROTOCOLS["knn"].metrics}


def test_score__headline_is_both_tokens_standardised() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    leak = F.one_hot(labels, 6).float() + 0.05 * torch.randn(60, 6, generator=generator)
    noise = torch.randn(60, 6, generator=generator)
    split = Pooled(cls=leak, patch_mean=noise, labels=labels)
    unseen = Pooled(cls=leak + 0.01, patch_mean=torch.randn(60, 6, generator=generator), labels=labels)
    outcome = score(split, unseen, num_classes=6, params={**PARAMS, "k": 5}, seed=0, device=CPU)
    assert outcome.metrics["top1_cls"] == 1.0
    assert outcome.metrics["top1_patch_mean"] < 0.6 < outcome.metrics["top1"]
    scale = torch.tensor([1e3, 1.0, 1e-3, 1.0, 1.0, 1.0])  # of features, not of what they say
    scaled = [replace(one, cls=one.cls * scale + 7) for one in (split, unseen)]
    other = score(*scaled, num_classes=6, params={**PARAMS, "k": 5}, seed=0, device=CPU)
    assert other.metrics["top1"] == outcome.metrics["top1"] and other.metrics["top1_cls"] < 0.6


def test_score__shows_the_neighbors_that_brute_force_finds(golden_splits: tuple[Pooled, Pooled]) -> None:
    train, test = (replace(split, patch_mean=split.patch_mean.float()) for split in golden_splits)
    outcome = score(train, test, num_classes=4, params=PARAMS, seed=0, device=CPU)
    shown = {name: array.tolist() for name, array in outcome.shown.items()}
    assert len(shown["asked"]) == len(set(shown["asked"])) == 6
    mean, deviation = train.patch_mean.mean(dim=0), train.patch_mean.std(dim=0, correction=0)
    bank, queries = ((split.patch_mean - mean) / deviation for split in (train, test))
    for asked, neighbors in zip(shown["asked"], shown["neighbors"], strict=True):
        cosines = [float(F.cosine_similarity(queries[asked], row, dim=0)) for row in bank]
        assert neighbors == sorted(range(len(bank)), key=lambda row: -cosines[row])[:5]
    right = torch.tensor(shown["predicted"]) == torch.tensor(shown["labels"])
    assert shown["labels"] == test.labels.tolist() and float(right.double().mean()) == outcome.metrics["top1"]


def test_nearest__of_a_small_bank_are_all() -> None:
    assert nearest(torch.eye(3), torch.tensor([[1.0, 3.0, 2.0]]), 5).tolist() == [[1, 2, 0]]


@pytest.mark.long
def test_vote__raw_pixels_of_cifar10_are_the_known_floor(shared_data: Path) -> None:
    """T2: the figures of specs/evaluation.md 12.1, of the first 500 and 200 photos of each class by name."""
    splits = []
    for split, count, total in (("train", 500, 1_849_123_137), ("test", 200, 752_091_612)):
        dataset = open_dataset(str(shared_data / "cifar10" / f"{split}-*.tar"))
        of_class: dict[int, list[tuple[str, Any]]] = {}
        for number in range(dataset.num_samples):
            sample = dataset.read(number)
            of_class.setdefault(int(sample["cls"]), []).append((sample["__key__"], sample["jpg"]))
        photos = [decode_image(content) for label in range(10) for _, content in sorted(of_class[label])[:count]]
        assert sum(int(photo.sum()) for photo in photos) == total
        labels = torch.arange(10).repeat_interleave(count)
        splits.append((torch.from_numpy(np.stack(photos)).flatten(1).float() / 255, labels))
    (bank, bank_labels), (queries, labels) = splits
    for mean, wanted in ((0.0, 0.2875), (bank.mean(dim=0), 0.3635)):
        shares = vote(bank - mean, bank_labels, queries - mean, num_classes=10, ks=[20], temperature=0.07)[20]
        assert float((shares.argmax(dim=1) == labels).double().mean()) == pytest.approx(wanted, abs=0.002)
