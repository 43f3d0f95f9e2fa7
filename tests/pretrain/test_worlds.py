"""A run may go on with fewer workers where the global batch can be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.load import load_for_resume, load_plan, load_recipe
from pretrain.config.stages import Plan, plan_yaml
from pretrain.config.worlds import with_workers, worlds
from pretrain.errors import RequestError


def _plan(*overrides: str) -> Plan:
    return Plan.single(load_recipe("mae_cifar10", ["data.root=.", *overrides], check_files=False))


def test_worlds__each_worker_gets_whole_micro_batches_of_the_same_global_batch() -> None:
    plan = _plan("train.workers=[1,6]", "train.global_batch_size=48", "train.micro_batch_size=4")
    assert (plan.recipe.train.min_workers, plan.recipe.train.workers) == (1, 6)
    assert worlds(plan) == (6, 4, 3, 2, 1)  # 12 micro-batches cannot be divided among 5
    for workers in worlds(plan):
        train = with_workers(plan, workers).recipe.train
        assert train.workers * (train.accumulation or 0) * (train.micro_batch_size or 0) == 48
        assert train.micro_batch_size == 4
    assert worlds(_plan("train.workers=4")) == (4,)


def test_worlds__hold_in_all_stages() -> None:
    plan = load_plan("dinov3_cifar10", ["data.root=.", "train.workers=[1,4]"], check_files=False)
    assert len(plan.stages) == 3 and worlds(plan)[0] == 4
    for stage in with_workers(plan, 1).stages:
        train = stage.recipe.train
        assert train.global_batch_size == (train.micro_batch_size or 0) * (train.accumulation or 0)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.workers=[5,4]"], ["line: train.workers=[5,4]: FEWEST=5: the most", "nearest: train.workers=[4,5]"]),
        (["train.min_workers=5", "train.workers=4"], ["line: train.min_workers=5: the most workers are 4"]),
        (["train.workers=[5,4]", "train.min_workers=6"], ["line: train.min_workers=6: the most workers are 4"]),
        (
            ["train.workers=[3,4]", "train.global_batch_size=64"],
            ["line: train.workers=[3,4]: FEWEST=3: the", "nearest: train.workers=[2,4]"],
        ),
        (["train.workers=[0,4]"], ["line: train.workers=[0,4]: FEWEST=0: expected a whole number"]),
        (["train.workers=[1,2,3]"], ["line: train.workers=[1,2,3]: expected"]),
        (["train.workers=[one,4]"], ["line: train.workers=[one,4]: FEWEST=one: expected a whole number"]),
        (["train.workers=[1,many]"], ["line: train.workers=[1,many]: MOST=many: expected a whole number"]),
        (
            ["train.workers=[1,4]", "train.zero_stage=3", "optimizer.name=lion"],
            ["line: train.workers=[1,4]: ", "cannot be cut anew", "adamw"],
        ),
    ],
)
def test_worlds__a_range_that_cannot_be_is_refused(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        _plan(*overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_worlds__a_number_takes_back_a_range_and_a_run_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x" / "recipe.yaml"
    path.parent.mkdir(parents=True)
    (tmp_path / "train-0.tar").touch()
    plan = _plan("train.workers=[1,4]", f"data.train={tmp_path}/train-0.tar", "evaluation.enabled=false")
    path.write_text(plan_yaml(plan))
    assert worlds(load_for_resume(path, [])) == (4, 2, 1)
    assert worlds(load_for_resume(path, ["train.workers=2"])) == (2,)
    again = load_for_resume(path, ["train.workers=[1,2]"])
    assert worlds(again) == (2, 1) and again.recipe.train.micro_batch_size == plan.recipe.train.micro_batch_size
