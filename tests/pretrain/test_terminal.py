"""What a person reads of each event, where there is no terminal to draw a bar on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pretrain.config.load import load_plan
from pretrain.record.events import (
    CheckpointPublished,
    EvaluationFailed,
    Event,
    Failed,
    Finished,
    Metrics,
    Resumed,
    Start,
    Startup,
    Visualizations,
    Warned,
)
from pretrain.reporting.terminal import Terminal, duration

VALUES = {"loss": 0.5, "lr": 1e-3, "samples_per_s": 312.4, "data_wait_fraction": 0.034, "step_s": 0.2}


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Start(step=0, total_steps=9, world_size=2, device="cpu"), "training on 2 x cpu, steps 0 to 9"),
        (
            Startup(
                total_s=9.5,
                placed_s=4,
                imported_s=2,
                joined_s=1,
                built_s=0.5,
                first_batch_s=1.5,
                first_step_s=0.5,
                worker_cpu_s=3,
            ),
            "first step after 9.5 s: placed 4.0, imported 2.0, joined 1.0, built 0.5, first_batch 1.5, first_step 0.5",
        ),
        (
            Resumed(
                step=4,
                tensors=30,
                tensors_total=30,
                optimizer_step=4,
                rng_states=0,
                saved_world_size=2,
                samples_seen=128,
                epoch=0,
                position=128,
            ),
            "resumed at step 4: backbone tensors 30/30 equal, optimizer at step 4, resharded from 2 ranks, which begin "
            "new RNGs, stream at sample 128 (epoch 0, position 128)",
        ),
        (
            Metrics(step=100, values=VALUES),
            "step 100/150  loss 0.5000  lr 1.0e-03  312 samples/s  waiting for data 3%  ETA 00:10",
        ),
        (CheckpointPublished(step=4, path="checkpoints/step-4"), "checkpoint at step 4: checkpoints/step-4"),
        (Warned(step=3, about="collapse", text="collapsed: [flat]"), "WARNING at step 3: collapsed: [flat]"),
        (
            EvaluationFailed(step=4, protocol="knn", data="photos", error="out of [memory]"),
            "evaluation knn/photos of step 4 failed: out of [memory]",
        ),
        (Visualizations(step=4, path="visualizations/step-4.png"), None),
        (Finished(step=9), None),  # the summary says it
        (Failed(error="worker 1 was killed"), None),  # the command says it
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Event) else "",
)
def test_show__one_line_for_what_a_person_wants_to_know(event: Event, said: str | None) -> None:
    written = io.StringIO()
    terminal = Terminal(load_plan("demo", ["train.steps=150"]), Console(file=written, highlight=False, soft_wrap=True))
    terminal.show(event)
    assert written.getvalue() == ("" if said is None else f"{said}\n")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "00:00"), (75, "01:15"), (3600, "01:00:00"), (-1, "00:00"), (2 * 86400, "2.0 days")]
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
