"""A run in two stages, MAE at 64 and then at 96 pixels: resumed inside either stage it loses nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pretrain.config.load import load_plan
from pretrain.config.stages import plan_yaml
from pretrain.record.events import CheckpointPublished, Resumed, StageBegan, Start
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir
from pretrain.reporting.page import write_report

pytestmark = pytest.mark.integration

Launch = Callable[..., Any]
Losses = Callable[[Path], dict[int, float]]
STAGED = """
name: staged
objective: {name: mae, decoder_dim: 48, decoder_depth: 1, decoder_heads: 3}
backbone: {name: vit_tiny_patch16_224, patch_size: 16, image_size: 64, options: {depth: 2, embed_dim: 48, num_heads: 3}}
data: {train: "package:demo_data/grocery/train-*.tar", loader_workers: 1}
optimizer: {base_lr: 2.0e-3, warmup_steps: 2, clip_grad: 1.0}
train: {steps: 8, global_batch_size: 16, workers: 1, log_every: 1, checkpoint_every: 3, keep_last: 9}
checkpoints: {asynchronous: false}  # so that a run that is killed after a step goes on from a known one
evaluation: {enabled: false, baseline: false}
stages:
  - {name: small}
  - {name: large, init_from: small, backbone: {image_size: 96}, train: {steps: 6}}
"""
SAME_SIZE = ("stages[1].backbone.image_size=64", "stages[1].reset_optimizer=false")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED)
    return path


@pytest.fixture
def events() -> Callable[[Path], list[Any]]:
    return lambda run_dir: read_events(RunDir(run_dir).journal)[0]


def test_stages__a_later_one_begins_with_the_weights_of_the_one_before(
    recipe: Path, launch: Launch, losses: Losses, events: Callable[[Path], list[Any]]
) -> None:
    """Killed inside the first stage and inside the second, the losses are those of the run that nobody disturbed."""
    whole = launch("whole", ranks=1)
    whole.wait()
    expected = losses(whole.run_dir)
    assert sorted(expected) == list(range(1, 15))

    happened = events(whole.run_dir)
    assert [event.step for event in happened if isinstance(event, CheckpointPublished)] == [3, 6, 8, 11, 14]
    (began,) = [event for event in happened if isinstance(event, StageBegan)]
    assert (began.step, began.stage, began.moments) == (8, "large", False)
    # Positions of MAE are fixed sin-cos ones: those of another grid are computed and not resampled.
    assert began.fresh == ("backbone.vit.pos_embed",)
    assert began.loaded == began.total - 1 and not began.resampled
    RunDir(whole.run_dir).recipe.write_text(plan_yaml(load_plan(recipe)))  # as the driver does
    page = write_report(whole.run_dir).read_text()
    assert "14 of 14" in page and "small (8 steps), large (6 steps)" in page
    small, large = (
        load_file(whole.run_dir / "checkpoints" / f"step-{step:08d}" / "backbone.safetensors") for step in (8, 14)
    )
    assert small.keys() == large.keys()
    assert (small["pos_embed"].shape[1], large["pos_embed"].shape[1]) == (4 * 4 + 1, 6 * 6 + 1)
    assert (small["blocks.0.mlp.fc1.weight"] - large["blocks.0.mlp.fc1.weight"]).abs().max() < 0.02  # it went on

    broken = launch("broken", ranks=1)
    broken.kill_after_step(5)
    launch("broken", ranks=1).kill_after_step(12)
    launch("broken", ranks=1).wait()
    assert losses(broken.run_dir) == expected  # bit for bit
    resumed = [(event.step, event.optimizer_step) for event in events(broken.run_dir) if isinstance(event, Resumed)]
    assert resumed == [(3, 3), (11, 3)]  # the second stage has an optimizer of its own
    last = "checkpoints/step-00000014/backbone.safetensors"
    assert (broken.run_dir / last).read_bytes() == (whole.run_dir / last).read_bytes()

    _goes_on_at_the_border(launch, whole.run_dir, events)
    assert losses(whole.run_dir) == expected
    _without_training_states_there_is_no_going_on(launch, whole.run_dir)
    state_of_the_second = f"resume_from={broken.run_dir / 'checkpoints/step-00000014'}"
    loop = launch("later", "train.steps=20", state_of_the_second, ranks=1)
    assert loop.exit_codes() == [2]
    assert "is of stage 'large', which began at step 8 of its run" in loop.log.read_text()


def _goes_on_at_the_border(launch: Launch, run_dir: Path, events: Callable[[Path], list[Any]]) -> None:
    """The newest checkpoint is the last of the first stage: the second begins, and says at which step."""
    for step in (11, 14):
        shutil.rmtree(run_dir / f"checkpoints/step-{step:08d}")
    launch(run_dir.name, ranks=1).wait()
    assert [event.step for event in events(run_dir) if isinstance(event, Start)] == [0, 8]
    assert [event.step for event in events(run_dir) if isinstance(event, StageBegan)] == [8, 8]


def _without_training_states_there_is_no_going_on(launch: Launch, run_dir: Path) -> None:
    for state in run_dir.glob("checkpoints/step-*/training_state"):
        shutil.rmtree(state)
    loop = launch(run_dir.name, ranks=1)
    assert loop.exit_codes() == [1]
    assert "have no training state any more, so that the run cannot go on" in loop.log.read_text()
    shutil.rmtree(run_dir / "checkpoints")
    loop = launch(run_dir.name, ranks=1)
    assert loop.exit_codes() == [1]
    assert "step-00000014, which this run published, is not there, nor one before it" in loop.log.read_text()


def test_stages__may_carry_the_moments_of_the_optimizer_over(
    launch: Launch, losses: Losses, events: Callable[[Path], list[Any]]
) -> None:
    options = (*SAME_SIZE, "optimizer.warmup_steps=0")
    kept = launch("kept", *options, ranks=1)
    kept.wait()
    (began,) = [event for event in events(kept.run_dir) if isinstance(event, StageBegan)]
    assert began.moments and began.loaded == began.total

    broken = launch("broken", *options, ranks=1)
    broken.kill_after_step(12)
    launch("broken", *options, ranks=1).wait()
    assert losses(broken.run_dir) == losses(kept.run_dir)
    (resumed,) = [event for event in events(broken.run_dir) if isinstance(event, Resumed)]
    assert (resumed.step, resumed.optimizer_step) == (11, 11)


def test_stages__moments_do_not_fit_another_model(launch: Launch) -> None:
    loop = launch("other", *SAME_SIZE, "stages[1].objective.decoder_dim=96", ranks=1)
    assert loop.exit_codes() == [1]
    assert "stage 'large' keeps the optimizer, but decoder." in loop.log.read_text()
    assert "set reset_optimizer: true" in loop.log.read_text()
