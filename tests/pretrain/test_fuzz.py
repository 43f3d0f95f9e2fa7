"""Requests that nobody foresaw: whatever is typed, and whatever a file holds, ends in an answer and not in a traceback.

Random requests of all commands against a small storage, some of whose files are damaged. Training itself is left out:
what is tested is everything before Ray starts. `-m long` makes 10 000 of them instead of 300.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import pretrain
from backbones.images.config import ImageConfig
from evaluation import runner
from evaluation.results import EvaluationResult, ResultStore
from objectives.mae.config import MAEConfig
from pretrain.cli.main import main
from pretrain.config.fields import declared_settings
from pretrain.config.load import load_plan
from pretrain.config.stages import plan_yaml
from pretrain.driver import drive
from pretrain.errors import RunFailed
from pretrain.record.events import CheckpointPublished, Evaluated, Metrics, Start, Visualizations, Warned
from pretrain.record.journal import Journal
from pretrain.training.preflight import look_ahead

RUN = "mine-1"
SEED = 0
KEYS = sorted(declared_settings({"objective": MAEConfig, "backbone": ImageConfig})[0])
DEMO = Path(pretrain.__file__).parent / "demo_data" / "chair"
RECIPE = """
objective: {name: mae, decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}
backbone: {name: vit_tiny_patch16_224, image_size: 32, patch_size: 8, options: {depth: 1}}
data: {train: shards, loader_workers: 0}
optimizer: {lr: 0.001}
train: {steps: 12, global_batch_size: 8, workers: 1, checkpoint_every: 6}
evaluation: {data: {mine: shards}, tasks: [{protocol: knn, data: mine}], select: knn/mine/top1}
stages: [{name: a}, {name: b, train: {steps: 3}}]
"""
BIG = "9" * 5000
ODD = [
    *("", " ", "0", "-1", "1", "010", "1:30", "1e400", "nan", ".inf", "null", "~", "true", "yes", "mae", "dino"),
    *(BIG, f"-{BIG}", f"1.{BIG}", "[" * 900, "{a: " * 900, "${", "${a", "${data.root}", "${oc.env:HOME}", "???"),
    *("{}", "[]", "[1, x]", "{a: {b: [c]}}", "&a [*a]", "!!python/object:os.system x", "'", '"', "\\", "#", "a #b"),
    *("..", "/", "/dev/null", "shards", "pics #2", "[x]", "{0..9}", "{9..0}", "{a", "**", "shards/*", "a\nb", "%s"),
    *("s3://", "http://[", "file://x", "pipe:true", "ray://", "a:b:c", "runs:/", f"runs:/{RUN}/{BIG}", "x" * 999),
    *("mine@best", f"models:/mine/{BIG}", "models:/mine/9", "timm:", "timm:vit@x", "u\u0308", "\udcff", "\u0663"),
    *("\u00b2", "\U0001f4a5", "\x1b[31m", "cuda", "lars", "x.tar", "knn", "~nobody/x"),
]


def texts() -> st.SearchStrategy[str]:
    # no NUL: no operating system passes it in an argument
    free = st.text(st.characters(exclude_characters="\x00", exclude_categories=()), max_size=12)
    return st.sampled_from(ODD) | free


@st.composite
def keys(draw: st.DrawFn) -> str:
    more = ("stages", "stages[0].train.steps", "stages[1].init_from", "evaluation.data.mine")
    key = draw(st.sampled_from([*KEYS, *more]))
    change = draw(st.sampled_from(["", "", "", "cut", "swap", "index", "below"]))
    if change == "cut":
        key = key[: draw(st.integers(0, len(key)))]
    if change == "swap":
        key = draw(texts()) + key[1:]
    if change == "below":
        key = f"{key}.{draw(texts())}"
    return key.replace("[]", f"[{draw(st.sampled_from(['0', '1', BIG, '-1', 'x']))}]")


def pairs() -> st.SearchStrategy[list[str]]:
    return st.lists(st.builds("{}={}".format, keys(), texts()) | texts(), max_size=9)


references = texts() | st.sampled_from([RUN, f"runs/{RUN}/checkpoints/step-00000006", f"runs:/{RUN}/best", "mine@best"])
flags = st.sampled_from(["--storage", "--protocol", "--data", "--json", "--full", "--limit", "-h"])
options = st.lists(flags | texts(), max_size=2)
recipes = st.sampled_from(["mine.yaml", "mine.yaml", "demo"]) | texts()


def command(names: list[str], *arguments: st.SearchStrategy[str], more: st.SearchStrategy[list[str]]) -> Any:
    return st.tuples(st.sampled_from(names), *arguments, more).map(lambda given: [*given[:-1], *given[-1]])


requests = st.one_of(
    command(["run"], recipes, more=pairs()),
    command(["resume"], st.just(RUN), more=pairs()),
    command(["leaderboard", "report", "resume", "recipes"], more=options),
    command(["evaluate", "pull"], references, more=options),
    command(["embed"], references, texts() | st.just("shards"), texts(), more=options),
    command(["export"], references, texts(), more=st.just(["--format", "timm"]) | options),
    command(["data"], st.just("show"), texts() | st.just("shards"), more=options),
    st.sampled_from([["leaderboard"], ["report", RUN]]),
    st.lists(texts(), max_size=3),
)


@dataclass(frozen=True)
class Damage:
    """What happens to one file of the storage."""

    file: int
    how: str
    where: float
    content: Any

    def do(self, files: list[Path]) -> None:
        path = files[self.file % len(files)]
        if not path.is_file():  # damaged already
            return
        content = path.read_bytes()
        if self.how == "cut":
            path.write_bytes(content[: int(self.where * len(content))])
        elif self.how == "bytes":
            at = int(self.where * len(content))
            path.write_bytes(content[:at] + self.content.encode("utf-8", "surrogateescape") + content[at + 3 :])
        elif self.how == "value" and path.suffix in (".json", ".jsonl"):
            text = content.decode("utf-8", "replace")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            if not (lines and all(map(is_json, lines))):  # damaged already
                return
            number = int(self.where * len(lines))
            lines[number] = changed(lines[number], self.where, self.content)
            path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
        elif self.how == "whole":
            path.write_bytes(self.content.encode("utf-8", "surrogateescape"))
        else:
            path.unlink()
            if self.how == "folder":
                path.mkdir()
            elif self.how == "loop":
                path.symlink_to(path.name)


def is_json(text: str) -> bool:
    try:
        return bool(json.loads(text))
    except ValueError:
        return False


def changed(line: str, where: float, value: str) -> str:
    """A JSON text with one value, somewhere in it, replaced."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    record = json.loads(line)
    walk(record)
    if not places:
        return value
    node, key = places[int(where * len(places))]
    node[key] = "@@"
    return json.dumps(record).replace('"@@"', value)


json_values = st.sampled_from(
    ["null", "-1", "1.5", "NaN", "true", "[]", "{}", '""', '"x"', BIG, f'"{"x" * 3000}"', "[" * 900, '{"a": ' * 900]
)
damages = st.builds(
    Damage,
    st.integers(0, 99),
    st.sampled_from(["cut", "bytes", "value", "value", "whole", "gone", "folder", "loop"]),
    st.floats(0, 0.999),
    json_values | texts(),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """Shards, a recipe, a run with a checkpoint and scores, an evaluation by hand."""
    root = tmp_path_factory.mktemp("original")
    (root / "shards").mkdir()
    for name in ("train-000000.tar", "test-000000.tar"):
        shutil.copyfile(DEMO / name, root / "shards" / name)
    (root / "mine.yaml").write_text(RECIPE)
    run = root / "runs" / RUN
    run.mkdir(parents=True)
    with chdir(root):
        (run / "recipe.yaml").write_text(plan_yaml(load_plan("mine.yaml")))
    make_checkpoint(run, 6)
    score: dict[str, Any] = {
        "protocol": "knn",
        "data": "mine",
        "metrics": {"top1": 0.5},
        "seconds": 1.0,
        "cached": False,
    }
    with Journal(run / "journal.jsonl") as journal:
        journal.write(Start(step=0, total_steps=15, world_size=1, device="cpu"))
        journal.write(Metrics(step=2, values={"loss": 1.0, "lr": 0.1, "samples_per_s": 9.0}))
        journal.write(CheckpointPublished(step=6, path="checkpoints/step-00000006"))
        journal.write(Visualizations(step=6, path="visualizations/step-00000006.png"))
        journal.write(Warned(step=6, about="collapse", text="x"))
    with Journal(run / "evaluations.jsonl") as evaluations:
        evaluations.write(Evaluated(step=6, key="a" * 64, **score))
    result = EvaluationResult(key="b" * 64, version=1, data_digest="c", weights_digest="d", details={}, **score)
    ResultStore(root / "runs").publish(result)
    return root


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, migrated_database: Path) -> Iterator[None]:
    """Accepted runs end where Ray would start; caches and records are apart from what is looked at."""
    shutil.copyfile(migrated_database, tmp_path / "mlflow.db")
    for name, value in {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PRETRAIN_CACHE": f"{tmp_path}/cache",
        "TMPDIR": f"{tmp_path}",
        "COLUMNS": "100",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(drive.Driver, "drive", lambda self, on_start: look_ahead(self.plan))
    monkeypatch.setattr(runner, "evaluate", refuse)
    yield


def refuse(*args: Any, **options: Any) -> None:
    raise RunFailed("nothing is computed here")


def tree(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.lstat().st_size for path in root.rglob("*") if not path.is_dir()}


def answer(original: Path, work: Path, arguments: list[str], hurt: list[Damage]) -> None:
    """Make one request, and check what it leaves and says."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(original, work)
    for damage in hurt:
        files = sorted(path for path in (work / "runs").rglob("*") if path.is_file())
        damage.do([*files, work / "mine.yaml"])
    before = tree(work)
    out, err = StringIO(), StringIO()
    with chdir(work), redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    said = err.getvalue() + out.getvalue()
    assert "raceback" not in said, said
    assert code in (0, 1, 2), said
    assert code == 0 or said.startswith("error: ") or "\nerror: " in said or arguments == [], said
    if code:
        assert tree(work) == before
    assert max(map(len, said.splitlines()), default=0) <= 400, said


def test_main__any_request_is_answered(original: Path, tmp_path: Path, quiet: None) -> None:
    fuzz(150, original, tmp_path / "work")


@pytest.mark.long
def test_main__any_of_10_000_requests_is_answered(original: Path, tmp_path: Path, quiet: None) -> None:
    fuzz(10_000, original, tmp_path / "work")


def fuzz(count: int, original: Path, work: Path) -> None:
    @seed(SEED)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests, st.lists(damages, max_size=2))
    def one(arguments: list[str], hurt: list[Damage]) -> None:
        answer(original, work, arguments, hurt)

    one()
