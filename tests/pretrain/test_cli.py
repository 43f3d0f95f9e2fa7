"""The command line: its frozen surface, exit codes, and what a cheap answer may cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from data_pipelines.errors import DataError
from pretrain.cli.main import cli, main
from pretrain.errors import RequestError, RunFailed
from pretrain.record.events import Evaluated
from pretrain.record.journal import Journal

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "ray", "mlflow", "deepspeed", "timm", "torchvision", "pandas", "matplotlib")


INIT_OPTIONS = ("output", "name", "objective", "model", "image-size", "hours", "batch", "workers")


MANIFEST_OPTIONS = (
    *("kind", "name", "namespace", "image", "nodes", "gpus-per-node", "cpus", "memory", "queue", "pvc", "storage"),
    *("secret", "env", "schedule", "time-zone", "retries", "grace", "hours", "setup", "host", "ssh-user", "output"),
)


def test_cli__surface_is_frozen() -> None:
    """A new command or option is a promise to users: it has to be added here as well."""
    surface = {
        name: [
            parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            for parameter in command.params
        ]
        for name, command in cli.commands.items()
    }
    assert surface == {
        "run": [
            *("RECIPE", "[KEY=VALUE]...", "--address", "--run-id", "--sweep", "--parallel", "--retries", "--dry-run"),
        ],
        "resume": ["RUN_ID", "[KEY=VALUE]...", "--storage"],
        "evaluate": [
            "CHECKPOINT",
            "--protocol",
            "--suite",
            "--data",
            "--batch-size",
            "--again",
            "--half-features",
            "--pictures",
            "--device",
            "--storage",
        ],
        "compare": ["FIRST", "SECOND", "--storage"],
        "leaderboard": ["--protocol", "--data", "--all", "--csv", "--html", "--storage"],
        "pull": ["NAME[@ALIAS]", "DEST", "--full", "--storage"],
        "report": ["RUN_ID", "--storage"],
        "recipes": ["NAME"],
        "init": ["DATA", *(f"--{option}" for option in INIT_OPTIONS)],
        "data": [],
        "schedule": [],
        "doctor": ["--address", "--storage", "--json"],
        "manifest": ["RECIPE", "[KEY=VALUE]...", *(f"--{option}" for option in MANIFEST_OPTIONS)],
        "embed": ["CHECKPOINT", "DATA", "DEST", "--format", "--tokens", "--batch-size", "--device", "--storage"],
        "export": ["CHECKPOINT", "DEST", "--format", "--storage"],
        "submit": ["RECIPE", "[KEY=VALUE]...", "--address", "--run-id", "--env", "--retries", "--sweep", "--parallel"],
        "jobs": ["--address", "--storage", "--all"],
        "status": ["ID", "--address", "--storage"],
        "logs": ["ID", "--follow", "--address", "--storage"],
        "stop": ["ID", "--now", "--address", "--storage"],
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "dmeo"], ["error: recipe dmeo: unknown; known are demo, "]),
        (["run"], ["error: Missing argument 'RECIPE'."]),
        (["runn"], ["error: No such command 'runn'."]),
        (["run", "demo", "--adress", "x"], ["error: No such option '--adress'."]),
        (
            ["run", "demo", "train.stepz=3", "train.zero_stage=9"],
            [
                "error: command line: train.stepz=3: unknown setting; did you mean 'train.steps'?",
                "error: command line: train.zero_stage=9: expected a whole number in [0, 3]",
            ],
        ),
        (
            ["run", "data.root=DIR", "dinov3_cifar10"],
            ["error: data.root=DIR: a setting, and a recipe comes first: pretrain run RECIPE data.root=DIR"],
        ),
        (["recipes", "dmeo"], ["error: recipe dmeo: unknown; known are demo, "]),
        (["resume", "demo-1"], ["error: run demo-1: not in "]),
        (["report", "demo-1"], ["error: run demo-1: not in "]),
        (["leaderboard", "--protocol", "liner"], ["error: protocol liner: unknown; known are "]),
        (
            ["evaluate", "nowhere", "--protocol", "liner", "--data", "x", "--data", "a=nothing"],
            [
                "error: checkpoint nowhere: no such directory",
                "error: protocol liner: unknown; known are ",
                "error: --data x: expected NAME=DIRECTORY",
                "error: --data a=nothing: no such directory",
            ],
        ),
        (["pull", "a/b"], ["error: "]),
    ],
)
def test_main__wrong_request_is_2_with_one_line_per_mistake(
    arguments: list[str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == len(said), captured.err
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(start)
    assert list(tmp_path.iterdir()) == []


def test_main__first_six_mistakes_and_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", *(f"train.step{i}={i}" for i in range(9)), "name=" + "y/" * 900]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].strip() for line in lines[:6]] == [f"train.step{i}={i}" for i in range(6)]
    assert lines[6:] == ["error: and 4 more mistakes"]


def test_main__a_long_line_is_cut_in_its_middle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "x/" * 500 + "end.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) == 400 and " ... " in line and line.endswith("x/x/x")


def test_main__what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run-1"
    run.mkdir()
    (run / "recipe.yaml").write_text("a: b")
    (run / "report.html").mkdir()
    assert main(["report", "run-1", "--storage", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run}/report.html") and line.endswith("Is a directory")


def test_report__says_where_it_is_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "run-1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("a: b")
    assert main(["report", "run-1"]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n" and (run / "report.html").is_file()


def test_main__nothing_asked_for_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: pretrain" in capsys.readouterr().err


def test_main__recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert {line.split()[0] for line in listed.splitlines()} >= {"demo", "mae_cifar10", "mae_vitb16_imagenet"}
    assert main(["recipes", "demo"]) == 0
    assert capsys.readouterr().out == (ROOT / "pretrain/recipes/demo.yaml").read_text()


@pytest.fixture
def run_stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Put a function in the place of the work behind `pretrain run`."""
    return lambda function: monkeypatch.setattr("pretrain.driver.start.run", lambda plan, **options: function(plan))


def test_main__run_gets_the_resolved_recipe(run_stub: Callable[..., None]) -> None:
    seen: list[Any] = []
    run_stub(seen.append)
    assert main(["run", "demo", "train.steps=200", "--address", "ray://head:1"]) == 0
    (plan,) = seen
    recipe = plan.recipe
    assert plan.total_steps == 200
    assert (recipe.name, recipe.train.steps, recipe.cluster.address) == ("demo", 200, "ray://head:1")


def test_main__another_objective_on_a_recipe_says_what_stays(
    run_stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_stub(lambda plan: None)
    assert main(["run", "demo", "objective.name=dino"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "note: objective.name=dino: its settings are its defaults; all others stay those of demo, made"
    )
    assert "learning rate" in line and line.endswith("dino_cifar10, dino_photos, dino_vits16_imagenet")
    assert main(["run", "demo", "objective.name=mae"]) == 0
    assert capsys.readouterr().err == ""


def test_main__evaluation_data_that_no_task_is_on_are_named(
    run_stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_stub(lambda plan: None)
    task = ["evaluation.tasks=[{protocol: knn, data: grocery}]", "evaluation.select=null"]
    assert main(["run", "demo", *task]) == 0
    assert "no task of evaluation.tasks is on chair of evaluation.data" in capsys.readouterr().err
    assert main(["run", "demo", "evaluation.tasks=[]", "evaluation.select=null"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunFailed("worker 1 was killed", Path("runs/x/logs")), 1, ["worker 1 was killed", "the log is runs/x/logs"]),
        (RunFailed("it stopped"), 1, ["it stopped"]),
        (RequestError("one", "two"), 2, ["one", "two"]),
        (DataError("shard a.tar: cut off"), 2, ["shard a.tar: cut off"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_main__errors_of_the_work(
    error: BaseException,
    code: int,
    said: list[str],
    run_stub: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(recipe: object) -> None:
        raise error

    run_stub(fail)
    assert main(["run", "demo"]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == len(said)
    assert all(line.startswith(f"error: {start}") for line, start in zip(lines, said, strict=True))


IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.{handler})
from pretrain.cli import console

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "pretrain.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
sys.argv[1:] = ["--version"]
console()
"""


@pytest.mark.parametrize(
    ("handler", "code", "said"), [("default_int_handler", 130, "error: interrupted\n"), ("SIG_IGN", 0, "")]
)
def test_console__ctrl_c_while_it_imports_is_one_line(handler: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", IMPORTING.format(handler=handler)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_main__unexpected_error_leaves_its_traceback_in_a_file(
    run_stub: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(recipe: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_stub(fail)
    assert main(["run", "demo"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: RuntimeError: first line"
    assert "Traceback" in Path(second.removeprefix("error: the traceback is in ")).read_text()


def test_main__leaderboard_of_a_storage_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        assert main(["leaderboard", "--storage", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --storage {tmp_path / name}: no such directory; give")


@pytest.mark.parametrize("arguments", [["leaderboard"], ["schedule", "list"]], ids=lambda arguments: arguments[0])
def test_main__a_storage_with_a_control_character(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--storage", "runs\n"]) == 2
    said = capsys.readouterr().err
    assert said == "error: --storage runs\\n: \\n is in it, a control character; leave it out\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(["schedule", "list"], ["schedule", "serve"], ["schedule", "run-now", "x"], ["schedule", "history"]),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_main__a_remote_storage_where_it_has_to_be_a_directory(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--storage", "s3://me:secret@bucket/runs"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --storage s3://bucket/runs: a remote store; pretrain ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(["resume", "run-1"], ["evaluate", "runs:/run-1"], ["leaderboard"], ["pull", "mae"], ["report", "run-1"]),
        *(["jobs"], ["status", "run-1"], ["logs", "run-1"], ["stop", "run-1"]),
        *(["export", "runs:/run-1", "DEST", "--format", "timm"], ["embed", "runs:/run-1", "DATA", "DEST"]),
    ],
    ids=lambda arguments: arguments[0],
)
def test_main__a_remote_storage_that_cannot_be(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri, said in (
        ("s3://me:secret@bucket/runs", "error: --storage s3://bucket/runs: user, password and query belong in"),
        ("s33://bucket", "error: --storage s33://bucket: fsspec knows no s33://; did you mean 's3'?"),
    ):
        assert main([*arguments, "--storage", uri]) == 2
        found = capsys.readouterr().err
        assert found.startswith(said) and found.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", "demo", "--sweep", "train.seed=1,2"],
            "a sweep is kept in a directory; checkpoints.storage=s3://b/runs",
        ),
        (["submit", "demo", "--address", "http://127.0.0.1:1"], "a job needs a directory that all its nodes see"),
        (
            ["submit", "demo", "--address", "http://127.0.0.1:1", "--sweep", "train.seed=1,2"],
            "a job needs a directory that all its nodes see",
        ),
        (
            ["manifest", "demo", "--kind", "slurm"],
            "a remote store; the nodes share a directory; give that, and the checkpoints alone a store: "
            "checkpoints.storage=s3://b/runs",
        ),
        (["manifest", "demo", "--kind", "rayjob", "--image", "a/b:1", "--pvc", "x"], "a remote store; the nodes share"),
    ],
    ids=["sweep", "submit", "submit a sweep", "slurm", "rayjob"],
)
def test_main__runs_that_need_a_directory(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "storage=s3://b/runs"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: storage=s3://b/runs: {said}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run_dir", "setting", "said"),
    [
        (
            "run",
            "storage=s3://b/runs",
            "storage=s3://b/runs: the record of a run of torchrun is in its --run-dir; say ",
        ),
        ("s3://b/runs/x", "train.seed=1", "--run-dir s3://...: expected a local directory; checkpoints alone go to a "),
    ],
)
def test_torchrun__a_remote_storage_is_refused(
    run_dir: str,
    setting: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pretrain import worker

    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["worker", "demo", setting, "--run-dir", run_dir])
    with pytest.raises(SystemExit) as ended:
        worker.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith(f"error: {said}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_main__leaderboard_is_sorted_and_filtered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = tmp_path / "evaluations"

    def record(run: str, step: int, protocol: str, metric: str, score: float) -> None:
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "recipe.yaml").touch()
        with (tmp_path / run / "evaluations.jsonl").open("a") as file:
            key = f"{run}-{protocol}"
            line = {"step": step, "protocol": protocol, "data": "mine", "metrics": {metric: score}, "key": key}
            by_hand.mkdir(exist_ok=True)
            (by_hand / f"{key}.json").write_text(json.dumps(line))  # the store's copy, which is not another result
            file.write(json.dumps({"time": 0.0, "kind": "evaluation", "cached": False, "seconds": 1.0, **line}) + "\n")

    record("a", 10, "linear", "top1", 0.5)
    record("b", 20, "linear", "top1", 0.75)
    record("b", 20, "segmentation", "miou", 0.4)
    alone = {"protocol": "linear", "data": "mine", "metrics": {"top1": 0.6}, "key": "alone"}
    (by_hand / "alone.json").write_text(json.dumps(alone))
    assert main(["leaderboard", "--storage", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["linear/mine", "top1"],
        ["score", "95", "%", "CI", "n", "step", "run"],
        ["75.0%", "20", "b"],
        ["60.0%", "(by", "hand)"],
        ["50.0%", "10", "a"],
        ["segmentation/mine", "miou"],
        ["score", "95", "%", "CI", "n", "step", "run"],
        ["40.0%", "20", "b"],
    ]
    assert main(["leaderboard", "--storage", str(tmp_path), "--csv", "--protocol", "linear"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "protocol,data,metric,unit,score,ci_low,ci_high,n,step,began_with,run,by_hand",
        "linear,mine,top1,fraction,0.75,,,,20,,b,False",
        "linear,mine,top1,fraction,0.6,,,,,,(by hand),True",
        "linear,mine,top1,fraction,0.5,,,,10,,a,False",
    ]
    assert main(["leaderboard", "--storage", str(tmp_path), "--protocol", "segmentation"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["leaderboard", "--storage", str(tmp_path), "--data", "mien"]) == 2
    assert "did you mean 'mine'?" in capsys.readouterr().err


def test_main__leaderboard_of_an_error_has_the_lowest_first_with_its_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records say what their numbers mean, so the plug-in they come from need not be installed."""
    described = [
        {"name": "share", "unit": "fraction", "better": "higher", "headline": False},
        {"name": "error", "unit": "m", "better": "lower", "headline": True},
    ]
    for run, error in (("a", 0.75), ("b", 0.25), ("c", 0.5)):
        (tmp_path / run).mkdir()
        (tmp_path / run / "recipe.yaml").touch()
        event = Evaluated(
            step=10, protocol="depth", data="rooms", metrics={"share": 0.5, "error": error}, key=run, seconds=1.0,
            cached=False, described=tuple(described),
        )  # fmt: skip
        (tmp_path / run / "evaluations.jsonl").write_text(json.dumps(event.to_json()) + "\n")
    assert main(["leaderboard", "--storage", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["depth/rooms", "error"] and rows[2:] == [
        ["0.25", "m", "10", "b"],
        ["0.5", "m", "10", "c"],
        ["0.75", "m", "10", "a"],
    ]


def test_main__leaderboard_shows_the_best_and_what_their_runs_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("a", "b", "c"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "recipe.yaml").write_text("init_from: null\n")

    def record(run: str, protocol: str, step: int, top1: float) -> None:
        event = Evaluated(
            step=step, protocol=protocol, data="photos", metrics={"top1": top1}, key=f"{run}{step}", seconds=1.0,
            cached=False,
        )  # fmt: skip
        with (tmp_path / run / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(event.to_json()) + "\n")

    for step in range(110):
        record("a", "knn", step, 0.1 + step / 1000)
        record("b", "knn", step, 0.05 + step / 10000)
    record("c", "knn", 0, 0.01)
    for step in range(30):
        record("a", "linear", step + 1, 0.5)
    record("b", "linear", 0, 0.2)
    record("c", "linear", 0, 0.1)
    record("c", "linear", 9, 0.1)
    assert main(["leaderboard", "--storage", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    knn, linear = lines[:24], lines[24:]
    assert [line.split()[1:] for line in knn[2:22]] == [[str(step), "a"] for step in range(109, 89, -1)]
    assert knn[22].split() == ["10.0%", "0", "random", "a"] and knn[23] == "and 200 more; --all shows them"
    assert linear[22].split() == ["20.0%", "0", "random", "b"]  # the best of those that others began with
    assert linear[23:] == ["and 12 more; --all shows them"]

    assert main(["leaderboard", "--storage", str(tmp_path), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 221 + 2 + 33 and lines[1].split() == ["score", "95", "%", "CI", "n", "step", "run"]
    assert {len(line) for line in lines[1:221]} == {lines[1].index("run") + len("run"), lines[1].index("run") + 1}


def test_main__leaderboard_reads_no_more_recipes_than_it_shows_beginnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them took most of the time where there were hundreds of runs."""
    from pretrain import evaluations

    read: list[str] = []
    monkeypatch.setattr(evaluations, "parse_yaml", lambda text: read.append(text) or {"init_from": text})
    for number in range(30):
        run = f"run-{number:02d}"
        (tmp_path / run).mkdir()
        (tmp_path / run / "recipe.yaml").write_text(run)
        with Journal(tmp_path / run / "evaluations.jsonl") as journal:
            for step in (0, 10):
                top1 = (number + step) / 100
                score = {"protocol": "knn", "data": "photos", "metrics": {"top1": top1}, "key": f"{run}{step}"}
                journal.write(Evaluated(step=step, seconds=1.0, cached=False, **score))
    assert main(["leaderboard", "--storage", str(tmp_path)]) == 0
    assert sorted(read) == [f"run-{number:02d}" for number in range(15, 30)]


def test_main__leaderboard_marks_what_a_run_began_with_and_gives_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of the random encoder read like one of a checkpoint. All of it fits 80 columns."""
    names = [f"mae_photos_of_animals-20260101-00000{number}-abcd" for number in (1, 2)]
    for name, init_from in zip(names, ("null", "timm:vit_tiny_patch16_224"), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"init_from: {init_from}\n")
        for step, score in ((0, 0.25), (8000, 0.5)):
            metrics = {"top1": score, "top1_ci_low": score - 0.125, "top1_ci_high": score + 0.125}
            event = Evaluated(
                step=step, protocol="linear", data="photos", metrics=metrics, key=f"{name}{step}", seconds=1.0,
                cached=False, num_test=10_000,
            )  # fmt: skip
            with (tmp_path / name / "evaluations.jsonl").open("a") as file:
                file.write(json.dumps(event.to_json()) + "\n")
    details = {
        "details": {"num_test": 90, "num_scored": 50},  # of a protocol that leaves classes out
        "protocol": "linear",
        "data": "photos",
        "metrics": {"top1": 0.125},
        "key": "x",
    }
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "x.json").write_text(json.dumps(details))
    assert main(["leaderboard", "--storage", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["50.0%", "37.5-62.5%", "10000", "8000", names[1]],
        ["50.0%", "37.5-62.5%", "10000", "8000", names[0]],
        ["25.0%", "12.5-37.5%", "10000", "0", "initial", names[1]],
        ["25.0%", "12.5-37.5%", "10000", "0", "random", names[0]],
        ["12.5%", "50", "(by", "hand)"],
    ]
    assert max(map(len, lines)) <= 80


CHEAP = {
    "help": (["--help"], 0),
    "recipes": (["recipes"], 0),
    "unknown recipe": (["run", "dmeo"], 2),
    "wrong settings": (["run", "demo", "train.steps=many", "backbone.name=vit_tin_patch16_224", "objective.x=1"], 2),
    "missing data": (["run", "mae_cifar10", "data.root=nowhere"], 2),
    "wrong evaluation": (["evaluate", "nowhere", "--protocol", "liner"], 2),
    "wrong run": (["resume", "nowhere"], 2),
}
MEASURE = f"""
import json, re, sys
from pathlib import Path
from pretrain.cli.main import main
code = main(sys.argv[1:])
heavy = [name for name in {HEAVY!r} if name in sys.modules]
# Not ru_maxrss: a process begins with that of the (large) test process that started it.
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps([code, heavy, len(sys.modules), peak_kb / 1024]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose byte code is written once, as in an installation."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("pyc"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


@pytest.mark.parametrize("case", CHEAP)
def test_main__cheap_answers_are_cheap(case: str, compiled: dict[str, str], tmp_path: Path) -> None:
    """None of the heavy packages is imported and few others are: half a CPU-second when it was measured, and 80 MB."""
    arguments, expected = CHEAP[case]
    command = [sys.executable, "-c", MEASURE, *arguments]
    result = subprocess.run(command, env=compiled, cwd=tmp_path, capture_output=True, text=True, check=True)
    code, heavy, modules, rss_mb = json.loads(result.stdout.splitlines()[-1])
    assert code == expected, result.stderr
    assert heavy == []
    assert modules < 600
    assert rss_mb < 80
