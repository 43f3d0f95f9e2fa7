"""What a person reads of each event, with a terminal to draw a bar on and without, and the closing table."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from evaluation.comparison import PerSample
from evaluation.results import ResultStore
from pretrain.checkpoints import store
from pretrain.config.load import load_plan
from pretrain.record.events import (
    CheckpointPublished,
    Evaluated,
    EvaluationFailed,
    Event,
    Failed,
    Finished,
    Metrics,
    Preparing,
    Resumed,
    Start,
    Startup,
    Taught,
    Visualizations,
    Warned,
)
from pretrain.record.journal import Journal
from pretrain.reporting.summary import TrainingSoFar, print_summary
from pretrain.reporting.terminal import Terminal, duration
from pretrain.screen import escaping_console

VALUES = {"loss": 0.5, "lr": 1e-3, "samples_per_s": 312.4, "data_wait_fraction": 0.034, "step_s": 0.2}


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (
            Taught(step=0, stage="", teacher="runs:/x/40: step 40, vit_tiny_patch16_224, 32 px, patches of 8 px"),
            "frozen teacher: runs:/x/40: step 40, vit_tiny_patch16_224, 32 px, patches of 8 px",
        ),
        (
            Taught(step=40, stage="gram", teacher="pretrain/40: what this run exports at step 40"),
            "frozen teacher of stage gram: pretrain/40: what this run exports at step 40",
        ),
        (
            Start(step=0, total_steps=9, world_size=2, device="cpu"),
            "training on 2 x cpu, steps 0 to 9\nreading the first batch",
        ),
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
        (Preparing(what="building the model"), "building the model"),
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


def scored(step: int, **metrics: float) -> Evaluated:
    return Evaluated(
        step=step, protocol="linear", data="grocery", metrics=metrics, key="", seconds=1.0, cached=False, num_test=80
    )


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """`shown(columns, act)`: all lines and states of the bar that a real terminal is sent while `act(console)` runs."""

    def show(columns: int, act: Callable[[Console], None]) -> list[str]:
        ours, theirs = pty.openpty()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm-256color")
        sent = bytearray()

        def read() -> None:
            while True:
                try:
                    sent.extend(os.read(ours, 1 << 16))
                except OSError:  # the other side was closed
                    return

        thread = threading.Thread(target=read)
        thread.start()
        with os.fdopen(theirs, "w") as screen:
            act(escaping_console(screen, soft_wrap=True))
        thread.join()
        os.close(ours)
        raw.append(bytes(sent))
        return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode())) if line]

    raw: list[bytes] = []
    show.raw = raw  # type: ignore[attr-defined]
    yield show


@pytest.mark.parametrize(
    ("waits", "said_at"),
    [((0.3, 0.04, 0.2, 0.051, 0.4), 3), ((0.06, 0.07, 0.5), 1), ((0.5, 0.05, 0.5, 0.01), None)],
)
def test_show__says_once_what_to_do_when_training_keeps_waiting_for_data(
    waits: tuple[float, ...], said_at: int | None
) -> None:
    plan, written = load_plan("demo", ["train.steps=150", "data.loader_workers=3"]), io.StringIO()
    terminal, found = Terminal(plan, Console(file=written, highlight=False, soft_wrap=True)), []
    for number, waited in enumerate(waits):
        terminal.show(Metrics(step=number + 1, values=VALUES | {"data_wait_fraction": waited}))
        found += [number] * (written.getvalue().count("training waits for data") - len(found))
    assert found == ([] if said_at is None else [said_at])
    if said_at is not None:
        advice = f"training waits for data {waits[said_at]:.0%} of the time: with cores to spare, raise "
        assert f"{advice}data.loader_workers (now 3 per worker); data.scaled_decoding=true" in written.getvalue()


def test_show__of_clouds_nothing_is_said_of_large_photos() -> None:
    plan, written = load_plan("point_mae_psb", ["data.root=x"], check_files=False), io.StringIO()
    terminal = Terminal(plan, Console(file=written, highlight=False, soft_wrap=True))
    for step in (1, 2):
        terminal.show(Metrics(step=step, values=VALUES | {"data_wait_fraction": 0.5}))
    assert "training waits for data 50%" in written.getvalue() and "photos" not in written.getvalue()


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        (40, ""),
        (80, "loss 0.5000  lr 1.0e-03  312 samples/s"),
        (160, "loss 0.5000  lr 1.0e-03  312 samples/s  waiting for data 3%  linear/grocery 33.8% (step 50)"),
    ],
)
def test_bar__step_and_eta_stay_and_fields_go_by_priority(
    columns: int, fields: str, shown: Callable[..., list[str]]
) -> None:
    def act(console: Console) -> None:
        with Terminal(load_plan("demo", ["train.steps=150"]), console) as terminal:
            terminal.wait_for("starting Ray")
            terminal.show(Preparing(what="building the model"))
            terminal.show(Start(step=0, total_steps=150, world_size=2, device="cpu"))
            terminal.show(scored(50, top1=0.3375, top1_ci_low=0.24, top1_ci_high=0.45))
            terminal.show(Metrics(step=100, values=VALUES))

    lines = shown(columns, act)
    assert max(map(len, (line for line in lines if "━" in line))) <= columns
    for waited in ("starting Ray", "building the model", "reading the first batch"):
        assert any(line.startswith(waited) and "00:00" in line for line in lines), (waited, lines)
    last = lines[-1].rstrip()
    assert re.fullmatch(rf"training [━╸╺ ]+ 100/150 ETA 00:10 ?{re.escape(fields)}", last), last


def test_bar__no_color_where_it_is_not_wanted(shown: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def act(console: Console) -> None:
        with Terminal(load_plan("demo", ["train.steps=150"]), console) as terminal:
            terminal.show(Metrics(step=100, values=VALUES))

    colors = re.compile(rb"\x1b\[(?:[0-9]+;)*(?:3[0-8]|9[0-7])[;m]")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown(80, act)
    monkeypatch.setenv("NO_COLOR", "1")
    shown(80, act)
    with_color, without = shown.raw  # type: ignore[attr-defined]
    assert colors.search(with_color) and not colors.search(without)


def test_show__names_the_stage_and_the_place_of_a_checkpoint_elsewhere(tmp_path: Path) -> None:
    recipe = tmp_path / "staged.yaml"
    recipe.write_text(
        "objective: {name: mae}\nbackbone: {name: vit_tiny_patch16_224}\n"
        "data: {train: 'package:demo_data/grocery/train-*.tar'}\noptimizer: {lr: 1.0e-3}\n"
        "train: {steps: 5, global_batch_size: 8, checkpoint_every: 5, workers: 1}\n"
        "checkpoints: {storage: 's3://bucket/checkpoints'}\n"
        "stages: [{name: small}, {name: large}]\n"
    )
    run_dir = tmp_path / "run-1"
    store.place(run_dir, "s3://bucket/checkpoints")
    written = io.StringIO()
    terminal = Terminal(load_plan(recipe), Console(file=written, highlight=False, soft_wrap=True), run_dir)
    for step in (5, 6):
        terminal.show(Metrics(step=step, values={"loss": 0.5}))
    terminal.show(CheckpointPublished(step=5, path="checkpoints/step-00000005"))
    assert written.getvalue().splitlines() == [
        "step 5/10 (small)  loss 0.5000",
        "step 6/10 (large)  loss 0.5000",
        "checkpoint at step 5: s3://bucket/checkpoints/run-1/step-00000005",
    ]


def test_summary__intervals_fit_80_columns_and_only_what_failed_is_called_so(
    tmp_path: Path, shown: Callable[..., list[str]]
) -> None:
    run_dir = tmp_path / "demo-20260101-000000-abcd"
    run_dir.mkdir()
    with Journal(run_dir / "evaluations.jsonl") as journal:
        journal.write(EvaluationFailed(step=4, protocol="knn", data="grocery", error="out of memory"))
    bounds = {"top1_ci_low": 0.221, "top1_ci_high": 0.4207}
    scores = [scored(step, top1=0.3125, **bounds) for step in (0, 1000, 100000)]
    trained = TrainingSoFar(launched=1000.0)
    for began in (900.0, 1028.0, 1060.0):  # before a resume, after it, and again when a worker had died
        trained.add(Start(time=began, step=0, total_steps=4, world_size=1, device="cpu"))
    trained.add(Finished(time=1090.0, step=4))

    def closing(*overrides: str) -> list[str]:
        recipe = load_plan("demo", overrides).recipe
        return shown(
            80, lambda console: print_summary(console, recipe, run_dir, trained, scores, run_dir / "report.html")
        )

    lines = closing()
    table = [line for line in lines if line.startswith(("│", "┏", "┡"))]
    assert max(map(len, table)) <= 80
    assert any(
        re.fullmatch(r"time +start 00:28, training 01:02, evaluations after it \S+( days)?", line) for line in lines
    )
    assert "evaluations after it" not in "\n".join(closing("evaluation.enabled=false"))
    said = "\n".join(table)
    assert "31.2% (step 100000)" in said and "22.1-42.1%" in said and "95 % CI, n = 80" in said
    assert re.search(r"knn/grocery +│ +failed", said) and re.search(r"segmentation/chair +│ +not run", said)
    assert not re.search("failed|not run|linear", "\n".join(closing("evaluation.enabled=false")))


@pytest.mark.parametrize(
    ("gained", "said"),
    [
        (20, r"  over random +│ +│ +│ +\+25\.0 points \[\+1\d\.\d, \+3\d\.\d\]"),
        (
            1,
            r"WARNING +linear/grocery: step 8 is not better, beyond noise, than what the run began with: \+1\.2 points",
        ),
        (
            -20,
            r"WARNING +linear/grocery: step 8 is worse than what the run began with: -25\.0 points \[-3\d\.\d, -1",
        ),
    ],
)
def test_summary__says_whether_the_run_has_learned_anything(
    tmp_path: Path, shown: Callable[..., list[str]], gained: int, said: str
) -> None:
    """Scores of the same 80 samples before and after: 40 are right before, `gained` more afterwards."""
    store = ResultStore(tmp_path)
    scores = []
    for step, right in ((0, 40), (8, 40 + gained)):
        store.keep(f"of-{step}", PerSample(np.arange(80) < right))
        scores.append(replace(scored(step, top1=right / 80), key=f"of-{step}"))
    run_dir = tmp_path / "demo-20260101-000000-abcd"
    run_dir.mkdir()
    recipe = load_plan("demo", [f"storage={tmp_path}"]).recipe
    lines = shown(
        120, lambda console: print_summary(console, recipe, run_dir, TrainingSoFar(), scores, run_dir / "report.html")
    )
    text = "\n".join(lines)
    assert re.search(said, text)
    assert ("WARNING" in text) == (gained < 20)


def test_summary__a_position_prior_stands_beside_what_images_are_looked_at_for(
    tmp_path: Path, shown: Callable[..., list[str]]
) -> None:
    run_dir = tmp_path / "demo-20260101-000000-abcd"
    run_dir.mkdir()
    tasks = "evaluation.tasks=[{protocol: patch_knn, data: grocery}]"
    recipe = load_plan("demo", [f"storage={tmp_path}", tasks, "evaluation.select=null"]).recipe
    scores = [replace(scored(8, miou=0.15, miou_position_prior=0.17), protocol="patch_knn", described=())]
    lines = shown(
        120, lambda console: print_summary(console, recipe, run_dir, TrainingSoFar(), scores, run_dir / "report.html")
    )
    text = "\n".join(lines)
    assert re.search(r"  position prior +│ +17.0% ", text)
    assert "patch_knn/grocery: step 8 does not beat position prior: 17.0%" in text


@pytest.mark.parametrize("pixels", [0.25, 0.5])
def test_summary__raw_pixels_stand_beside_the_scores(
    tmp_path: Path, shown: Callable[..., list[str]], pixels: float
) -> None:
    run_dir = tmp_path / "demo-20260101-000000-abcd"
    run_dir.mkdir()
    recipe = load_plan("demo", [f"storage={tmp_path}"]).recipe
    scores = [scored(step, top1=0.25 + step / 100, top1_pixels=pixels) for step in (0, 8)]
    lines = shown(
        120, lambda console: print_summary(console, recipe, run_dir, TrainingSoFar(), scores, run_dir / "report.html")
    )
    text = "\n".join(lines)
    assert re.search(rf"  raw pixels +│ +{pixels:.1%} ", text)
    assert ("linear/grocery: step 8 does not beat raw pixels: 50.0%" in text) == (pixels == 0.5)


@pytest.mark.parametrize("digest", ["same", "other"])
def test_summary__a_student_stands_beside_its_teacher(
    tmp_path: Path, shown: Callable[..., list[str]], make_checkpoint: Callable[[Path, int], Path], digest: str
) -> None:
    """Its scores on the same data, by whatever name, with the difference; or that there are none."""
    store = ResultStore(tmp_path)
    teacher, run_dir = tmp_path / "teacher-20260101-000000-abcd", tmp_path / "student-20260101-000000-abcd"
    run_dir.mkdir()
    make_checkpoint(teacher, 4)
    (teacher / "recipe.yaml").touch()
    for key, right in (("teacher", 60), ("student", 40)):
        store.keep(key, PerSample(np.arange(80) < right))
    best, earlier = (replace(scored(step, top1=step / 5.3), data="photos") for step in (4, 2))
    with Journal(teacher / "evaluations.jsonl") as journal:
        for event in (best, earlier):
            journal.write(replace(event, key="teacher", data_digest=digest))
    recipe = load_plan("demo", [f"storage={tmp_path}", "objective.name=distillation"], check_files=False).recipe
    recipe = replace(recipe, teacher_from=f"runs:/{teacher.name}/4")
    scores = [replace(scored(8, top1=0.5), key="student", data_digest="same")]
    text = "\n".join(
        shown(120, lambda console: print_summary(console, recipe, run_dir, TrainingSoFar(), scores, run_dir / "page"))
    )
    rows = re.search(r"  teacher +│ +│ +│ +75\.5% \(step 4\) │\n│   over teacher +│ +│ +│ +-25\.0 points \[-3", text)
    assert bool(rows) == (digest == "same")
    said = f"teacher     runs:/{teacher.name}/4: no scores of the same data, by the run that it is of, to compare with"
    assert (said in text) == (digest == "other")
