"""Selection splits and the choice of a grid cell."""

from __future__ import annotations

import torch

from evaluation.selection import blocks_of, choose_cell, random_folds, sequence_folds, stratified_folds


def test_stratified_folds__spread_every_class_evenly() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 5)
    fold = stratified_folds(labels, num_folds=5, seed=0)
    for label, count in ((0, 10), (1, 2), (2, 1)):
        assert torch.bincount(fold[labels == label], minlength=5).tolist() == [count] * 5
    assert not torch.equal(fold, stratified_folds(labels, num_folds=5, seed=1))


def test_random_folds__differ_in_size_by_one_at_most() -> None:
    assert sorted(torch.bincount(random_folds(11, num_folds=3, seed=0)).tolist()) == [3, 4, 4]


def test_sequence_folds__keep_sequences_whole_and_balance() -> None:
    sequences = ["a"] * 60 + ["b"] * 100 + ["c"] * 30 + ["d"] * 10
    fold = sequence_folds(sequences, num_folds=2)
    homes = {name: {int(f) for f, s in zip(fold, sequences, strict=True) if s == name} for name in "abcd"}
    assert all(len(home) == 1 for home in homes.values())
    assert torch.bincount(fold).tolist() == [100, 100]
    assert int(sequence_folds(["a", "b", "a"], num_folds=5).max()) == 1


def test_choose_cell__best_score_then_lowest_loss() -> None:
    assert choose_cell(torch.tensor([3, 7, 7]), torch.tensor([1.0, 2.0, 1.0])) == (2, False)


def test_choose_cell__says_when_the_grid_ends_too_early() -> None:
    assert choose_cell(torch.tensor([1, 2, 3]), torch.ones(3)) == (2, True)
    assert choose_cell(torch.tensor([3, 2, 1]), torch.ones(3)) == (0, True)
    assert choose_cell(torch.tensor([1, 3, 2]), torch.ones(3)) == (1, False)
    assert choose_cell(torch.tensor([1]), torch.ones(1)) == (0, False)


def test_blocks_of__sequences_or_runs_of_frames_that_follow_each_other() -> None:
    assert blocks_of([None, None]) is None
    many = [f"drive {number}" for number in range(12) for _ in range(3)]
    assert blocks_of(many).tolist() == [number for number in range(12) for _ in range(3)]  # type: ignore[union-attr]
    few = blocks_of(["a", "b"] * 20)  # frames of two drives, stored in turn
    assert few is not None and few.unique().tolist() == list(range(10))
    assert few[::2].tolist() == [block for block in range(5) for _ in range(4)]
    assert set(few[::2].tolist()).isdisjoint(few[1::2].tolist())
    assert len(blocks_of(["a", None, "a", None]).unique()) == 4  # type: ignore[union-attr]
