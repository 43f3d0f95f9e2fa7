"""What is typed and written means what a person reads, also where YAML 1.1 reads something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.config.load import load_plan, load_recipe, to_yaml
from pretrain.config.values import parse_yaml
from pretrain.errors import RequestError

MINIMAL = """
objective: {name: mae}
backbone: {name: vit_tiny_patch16_224}
data: {train: shards}
optimizer: {lr: 1.0e-3}
train: {steps: 100, global_batch_size: 32, checkpoint_every: 50}
"""


@pytest.fixture
def minimal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("shards", "pics", "pics #2", "007", "a: b", "[x]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train-000000.tar").touch()
        (tmp_path / folder / "test-000000.tar").touch()
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("folder", ["pics #2", "007", "a: b", "[x]"])
def test_load_recipe__a_path_is_what_was_typed(minimal: Path, folder: str) -> None:
    """`data.train=pics #2` trained on `pics`."""
    recipe = load_recipe(minimal, [f"data.train={folder}", f"storage={folder}-runs", f"evaluation.data.x={folder}"])
    assert recipe.data.train == str(minimal.parent / folder)
    assert recipe.storage == str(minimal.parent / f"{folder}-runs")
    assert recipe.evaluation.data == {"x": str(minimal.parent / folder)}


@pytest.mark.parametrize(
    "text", ["on", "no", "1:30", "010", "1_000", "1.10", "0x1f", "2024-01-01", "~", "true", "a #b"]
)
def test_load_recipe__a_text_is_what_was_typed(minimal: Path, text: str, tmp_path: Path) -> None:
    recipe = load_recipe(minimal, [f"tracking.experiment={text}"], check_files=False)
    assert recipe.tracking.experiment == text
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(recipe))
    assert load_recipe(saved, check_files=False) == recipe


def test_load_recipe__null_is_null_where_it_may_be(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["data.cache_dir=null", "tracking.model_name="])
    assert recipe.data.cache_dir is None and recipe.tracking.model_name == "small"
    with pytest.raises(RequestError, match="storage=: expected a text"):
        load_recipe(minimal, ["storage="])


@pytest.mark.parametrize("value", ["010", "+10", "1_0"])
def test_load_recipe__numbers_are_decimal(minimal: Path, value: str) -> None:
    """010 was 8."""
    assert load_recipe(minimal, [f"train.checkpoint_every={value}"]).train.checkpoint_every == 10
    minimal.write_text(MINIMAL.replace("50", value))
    assert load_recipe(minimal).train.checkpoint_every == 10


@pytest.mark.parametrize("value", ["1:30", "0x1f", "0b11", "0o17"])
def test_load_recipe__no_number_in_base_60_or_another(minimal: Path, value: str) -> None:
    """1:30 was 90."""
    expected = f"train.checkpoint_every={value}: expected a whole number >= 1"
    with pytest.raises(RequestError, match=expected):
        load_recipe(minimal, [f"train.checkpoint_every={value}"])
    minimal.write_text(MINIMAL.replace("50", value))
    with pytest.raises(RequestError, match=expected):
        load_recipe(minimal)


@pytest.mark.parametrize("value", ["yes", "on", "true", "True"])
def test_load_recipe__booleans_have_many_words(minimal: Path, value: str) -> None:
    assert load_recipe(minimal, [f"train.compile={value}"]).train.compile is True


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("key", ["train.steps", "optimizer.lr", "train.seed", "evaluation.tasks[0].image_size"])
def test_load_recipe__a_number_beyond_all_bounds_is_one_line(minimal: Path, key: str, digits: int) -> None:
    overrides = [f"{key}={'9' * digits}", "evaluation.tasks=[{protocol: knn, data: x}]", "evaluation.data.x=shards"]
    with pytest.raises(RequestError) as caught:
        load_recipe(minimal, overrides[::-1])
    assert any(key in line for line in caught.value.mistakes)
    assert all(len(line) < 400 for line in caught.value.mistakes)


def test_load_recipe__a_file_gives_texts_as_written(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "tracking: {experiment: no, model_name: 007}\n")
    recipe = load_recipe(minimal)
    assert (recipe.tracking.experiment, recipe.tracking.model_name) == ("no", "007")
    minimal.write_text(MINIMAL + "tracking: {experiment: 1.10}\n")  # 1.1 to every reader of YAML
    with pytest.raises(RequestError, match=r"tracking\.experiment=1\.1: expected a text"):
        load_recipe(minimal)


def test_load_plan__a_mistake_about_a_stage_is_blamed_on_who_made_it(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "stages: [{name: a}, {name: b}]\n")
    with pytest.raises(RequestError, match=r"^command line: stages\[1\]\.name=a: named twice"):
        load_plan(minimal, ["stages[1].name=a"])
    with pytest.raises(RequestError, match=r"^command line: stages\[1\]\.train\.workers: is one for all stages"):
        load_plan(minimal, ["stages[1].train.workers=2"])
    assert [stage.name for stage in load_plan(minimal, ["stages[1].name=007"]).stages] == ["a", "007"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: 1, b: [x, 2.5, .inf, null, ~]}", {"a": 1, "b": ["x", 2.5, float("inf"), None, None]}),
        ("a: &x {b: 1}\nc: {<<: *x, d: yes}", {"a": {"b": 1}, "c": {"b": 1, "d": "yes"}}),
        ("[1e3, 1.0e-3, -.5, -7, 00, 0]", [1e3, 1e-3, -0.5, -7, "00", 0]),
        ("", None),
    ],
)
def test_parse_yaml__values(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "!!binary aa==", "!!set {a}", "&a [*a]", "{[a]: 1}", "{a", "\x00"])
def test_parse_yaml__refuses(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("{a: " * 100_000, "nested deeper than 64 levels"),
        ("- " * 100_000 + "x", "nested deeper than 64 levels"),
        ("? " * 100_000 + "x", "nested deeper than 64 levels"),
        ("\n".join(" " * level + "a:" for level in range(1000)), "nested deeper than 64 levels"),
        ("a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 99)), "nested deeper than 64 levels"),
        ("a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 30)), "stands for more"),
        ("a: &a [*a]", "stands for a value that holds it"),
        ("&a {b: {c: *a}}", "stands for a value that holds it"),
    ],
    ids=["lists", "mappings", "dashes", "keys", "blocks", "aliases", "multiplied", "itself", "itself below"],
)
def test_parse_yaml__depth_and_size_are_bounded(text: str, problem: str) -> None:
    """Also where aliases make them: a recipe of 30 lines is no document of 10^28 values."""
    with pytest.raises(yaml.YAMLError, match=problem):
        parse_yaml(text)


def test_parse_yaml__aliases_stand_for_values() -> None:
    once = {"x": [1, 2]}
    assert parse_yaml("a: &a {x: [1, 2]}\nb: {<<: *a, y: *a}") == {"a": once, "b": {**once, "y": once}}
    deep = "[" * 63 + "1" + "]" * 63
    assert str(parse_yaml(deep)) == deep


DEMO = [
    "data.train=package:demo_data/grocery",
    "train.global_batch_size=64",
]  # 640 photos to train on: 10 steps an epoch


def test_load_recipe__epochs_become_steps() -> None:
    recipe = load_recipe("demo", [*DEMO, "data.limit=640", "train.epochs=2.5", "optimizer.warmup_epochs=0.5"])
    assert (recipe.train.steps, recipe.train.epochs) == (25, None)
    assert (recipe.optimizer.warmup_steps, recipe.optimizer.warmup_epochs) == (5, None)
    recipe = load_recipe("demo", [*DEMO, "data.limit=640", "train.checkpoint_every_epochs=1", "train.epochs=9"])
    assert (recipe.train.steps, recipe.train.checkpoint_every, recipe.train.pictures_every) == (90, 10, 10)


@pytest.mark.parametrize(
    ("typed", "blamed", "steps", "warmup"),
    [
        (["train.steps=10"], "train.steps=10", 10, 30),
        (["train.epochs=0.5"], "train.epochs=0.5", 5, 30),
        (["train.steps=10", "optimizer.warmup_epochs=2"], "optimizer.warmup_epochs=2", 10, 20),
    ],
)
def test_load_recipe__a_warmup_that_does_not_fit_is_blamed_on_what_was_typed(
    typed: list[str], blamed: str, steps: int, warmup: int
) -> None:
    """The recipe was blamed, whose warm-up had fitted until its run was made shorter."""
    with pytest.raises(RequestError) as caught:
        load_recipe("demo", [*DEMO, "data.limit=640", *typed])
    problem = f"a warm-up of {warmup} steps does not fit a run of {steps}"
    assert caught.value.mistakes == (f"command line: {blamed}: {problem}; give optimizer.warmup_steps=N below {steps}",)
    remedied = [text for text in typed if "warmup" not in text] + [f"optimizer.warmup_steps={steps - 1}"]
    assert load_recipe("demo", [*DEMO, "data.limit=640", *remedied]).train.steps == steps


def test_load_recipe__of_steps_and_epochs_the_later_layer_counts(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("steps: 100", "epochs: 3"))
    assert load_recipe(minimal, ["train.steps=70"]).train.steps == 70
    minimal.write_text(MINIMAL.replace("steps: 100", "epochs: 3, steps: 100"))
    with pytest.raises(RequestError, match=r"small\.yaml: train\.epochs=3\.0: train\.steps is given too and only one"):
        load_recipe(minimal)
    with pytest.raises(RequestError, match=r"command line: train\.epochs=3\.0: train\.steps is given too"):
        load_recipe("demo", ["train.steps=3", "train.epochs=3"])


def test_load_recipe__epochs_of_data_that_are_not_there_are_one_line(minimal: Path) -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe(minimal, ["train.epochs=3", "data.train=nowhere", "optimizer.warmup_steps=7"])
    assert any("train.epochs=3.0: no such shard" in line for line in caught.value.mistakes)
    assert not any("warmup" in line for line in caught.value.mistakes)


def test_load_plan__mistakes_of_the_list_and_in_the_stages_are_told_at_once(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "stages: [{name: a}, {name: a, train: {steps: no}}]\n")
    with pytest.raises(RequestError) as caught:
        load_plan(minimal, ["stages[0].reset_optimizer=false", "data.train=nowhere", "stray"])
    said = "\n".join(caught.value.mistakes)
    for part in ("stray: expected key=value", "named twice", "no moments to carry over", "train.steps=no", "nowhere"):
        assert part in said
