"""Reading, merging and resolving recipes: what a request becomes, and that it survives being saved."""

from __future__ import annotations

import tarfile
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path

import pytest

from backbones import registry as backbones
from data_pipelines.shards.source import expand_source
from objectives.mae.config import MAEConfig
from pretrain.config.load import load_for_resume, load_recipe, recipe_content, recipe_names, recipe_path, to_yaml
from pretrain.config.schema import Recipe
from pretrain.errors import RequestError

MINIMAL = """
objective: {name: mae}
backbone: {name: vit_tiny_patch16_224}
data: {train: shards}
optimizer: {lr: 1.0e-3}
train: {steps: 100, global_batch_size: 32, checkpoint_every: 50}
"""


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like data for training and evaluation; it is `shards` in the current directory."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "shards"
    directory.mkdir()
    for name in ("train-000000.tar", "train-000001.tar", "test-000000.tar"):
        (directory / name).touch()
    for name in ("images", "volumes"):  # of recipes with two data sets
        (directory / name).symlink_to(directory)
    return directory


@pytest.fixture
def minimal(tmp_path: Path, shards: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_load_recipe__demo_needs_nothing_but_the_package() -> None:
    recipe = load_recipe("demo")
    assert recipe.name == "demo"
    assert recipe.tracking.model_name == "demo"
    assert len(expand_source(recipe.data.train)) == 6
    assert all(Path(directory).is_absolute() for directory in recipe.evaluation.data.values())


def what_it_requires(name: str, shards: Path) -> list[str]:
    """The settings that a shipped recipe leaves to whoever runs it."""
    required = {"data.root": shards, "teacher_from": "runs:/teacher"}
    content = recipe_content(name)
    left = {"data.root": content["data"].get("root"), "teacher_from": content.get("teacher_from")}
    return [f"{key}={value}" for key, value in required.items() if left[key] == "???"]


def test_load_recipe__every_shipped_recipe_loads(shards: Path) -> None:
    for name in recipe_names():
        recipe = load_recipe(name, what_it_requires(name, shards))
        assert recipe.name == name
        assert recipe_content(name)["description"]
        assert "Command:" in recipe_path(name).read_text()


def test_load_recipe__every_shipped_recipe_comes_back_from_its_yaml(shards: Path, tmp_path: Path) -> None:
    for name in recipe_names():
        recipe = load_recipe(name, what_it_requires(name, shards))
        saved = tmp_path / "recipe.yaml"
        saved.write_text(to_yaml(recipe))
        # Of a recipe in stages this is the last one alone, whose teacher is the stage before.
        assert load_recipe(saved, check_files=False) == recipe


def test_load_recipe__paper_setting_is_the_papers() -> None:
    recipe = load_recipe("mae_vitb16_imagenet", ["data.root=anywhere"], check_files=False)
    assert recipe.peak_lr == pytest.approx(2.4e-3)
    assert recipe.train.micro_batch_size == 64 and recipe.train.accumulation == 1
    assert recipe.optimizer.warmup_steps == round(recipe.train.steps * 40 / 800)
    assert recipe.train.steps == -(-800 * 1_281_167 // 4096)
    mae = recipe.objective
    assert isinstance(mae, MAEConfig)
    assert (mae.decoder_dim, mae.decoder_depth, mae.decoder_heads) == (512, 8, 16)


def test_load_recipe__result_is_plain_and_frozen(minimal: str) -> None:
    recipe = load_recipe(minimal)
    assert type(recipe) is Recipe and type(recipe.objective) is MAEConfig
    assert type(recipe.optimizer.betas) is list and type(recipe.deepspeed) is dict
    with pytest.raises(FrozenInstanceError):
        recipe.train.steps = 5  # type: ignore[misc]


def test_load_recipe__command_line_wins_over_the_file_over_defaults(minimal: str) -> None:
    recipe = load_recipe(minimal, ["train.steps=200", "objective.mask_ratio=0.5", "train.steps=300"])
    assert recipe.train.steps == 300
    assert recipe.objective.mask_ratio == 0.5
    assert recipe.train.checkpoint_every == 50
    assert recipe.train.zero_stage == 1


def test_load_recipe__name_is_the_files_unless_given(minimal: str) -> None:
    assert load_recipe(minimal).name == "small"
    assert load_recipe(minimal, ["name=other"]).tracking.model_name == "other"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.clip_grad=null", None),
        ("optimizer.betas=[0.9, 0.999]", [0.9, 0.999]),
        ("optimizer.betas[1]=0.98", [0.9, 0.98]),
        ("train.precision=bf16", "bf16"),
        ("evaluation.enabled=false", False),
        ("backbone.options={depth: 6, drop_path_rate: 0.1}", {"depth": 6, "drop_path_rate": 0.1}),
        ("backbone.options.depth=3", {"depth": 3}),
        ("deepspeed.zero_optimization.reduce_bucket_size=1000", {"zero_optimization": {"reduce_bucket_size": 1000}}),
        ("tracking.experiment=a=b", "a=b"),
        ("train.seed=7", 7),
    ],
)
def test_load_recipe__override(minimal: str, text: str, value: object) -> None:
    node: object = load_recipe(minimal, [text])
    for name in text.partition("=")[0].partition("[")[0].split("."):
        if isinstance(node, dict):
            break
        node = getattr(node, name)
    assert node == value and type(node) is type(value)


def test_load_recipe__item_of_a_list_of_settings(shards: Path) -> None:
    overrides = [f"data.root={shards}", "evaluation.tasks[1].image_size=64"]
    tasks = load_recipe("mae_cifar10", overrides).evaluation.tasks
    assert [task.image_size for task in tasks] == [None, 64]


def test_load_recipe__a_task_may_have_a_height_and_a_width(shards: Path) -> None:
    """A plain number of a later layer takes back the width of an earlier one."""
    tasks = "evaluation.tasks=[{protocol: segmentation, data: mine, image_size: [48, 64]}, {protocol: knn, data: mine}]"
    overrides = [f"data.root={shards}", f"evaluation.data={{mine: {shards}}}", "evaluation.select=null", tasks]
    first, second = load_recipe("mae_cifar10", overrides).evaluation.tasks
    assert first.size == (48, 64) and second.size is None
    recipe = load_recipe("mae_cifar10", [*overrides, "evaluation.tasks[1].image_size=32"])
    assert recipe.evaluation.tasks[1].size == 32
    said = str(_refused(overrides, "evaluation.tasks[1].image_size=[32, 64]"))
    assert "evaluation.tasks[1].image_size=[32, 64]: WIDTH=64: protocol knn takes square images" in said
    said = str(_refused(overrides, "evaluation.tasks[0].image_size=[48, 66]"))
    assert "evaluation.tasks[0].image_size=[48, 66]: WIDTH=66: not a multiple of the patch size 4" in said
    said = str(_refused(overrides, "evaluation.tasks[1]={protocol: segmentation, data: mine, image_width: 64}"))
    assert "evaluation.tasks[1].image_width=64: needs evaluation.tasks[1].image_size, the height" in said


def _refused(overrides: list[str], last: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        load_recipe("mae_cifar10", [*overrides, last])
    return caught.value


def test_load__an_evaluation_that_does_not_fit_the_kind_of_backbone(shards: Path) -> None:
    tasks = "[{protocol: segmentation, data: mine}, {protocol: knn, data: mine, image_size: 32}]"
    data = [f"data.root={shards}", f"evaluation.data={{mine: {shards}}}", f"evaluation.tasks={tasks}"]
    with pytest.raises(RequestError) as caught:
        load_recipe("mae_cifar10", [*data, "evaluation.select=null", "backbone={kind: voxels, name: voxel_vit}"])
    said = str(caught.value)
    assert "evaluation.tasks[0].protocol=segmentation" in said and "does not fit backbone.kind=voxels" in said
    listed = said.partition("built-in ones that do: ")[2].splitlines()[0]
    assert "knn, linear, " in listed and "masked_reconstruction" in listed and ", segmentation" not in listed
    assert "evaluation.tasks[1].image_size=32" in said and "with backbone.kind=voxels leave it out" in said


QUICK = [("knn", "mine"), ("ridge", "mine"), ("spectrum", "mine")]


def _labelled(folder: Path, *fields: str) -> Path:
    """A sample with these fields in each split."""
    folder.mkdir()
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as shard:
            for field in fields:
                shard.addfile(tarfile.TarInfo(f"a.{field}"))
    return folder


def test_load__a_suite_is_its_protocols_that_fit_and_the_recipe_of_a_run_has_these(tmp_path: Path) -> None:
    mine = _labelled(tmp_path / "mine", "jpg", "cls")
    settings = [f"evaluation.data={{mine: {mine}}}", "evaluation.select=knn/mine/top1"]
    recipe = load_recipe("demo", [*settings, "evaluation.tasks=[{suite: quick, data: mine, every: 2}]"])
    tasks = recipe.evaluation.tasks
    assert [(task.protocol, task.data) for task in tasks] == QUICK
    assert {(task.suite, task.every, task.at) for task in tasks} == {("quick", 2, None)}
    written = tmp_path / "recipe.yaml"
    written.write_text(to_yaml(recipe))
    assert load_recipe(written, check_files=False).evaluation.tasks == tasks

    unlabelled = _labelled(tmp_path / "unlabelled", "jpg")
    settings = [f"evaluation.data={{mine: {unlabelled}}}", "evaluation.select=null"]
    (alone,) = load_recipe("demo", [*settings, "evaluation.tasks=[{suite: quick, data: mine}]"]).evaluation.tasks
    assert alone.protocol == "spectrum"


def test_load__masks_without_names_of_classes_are_no_labels_of_a_suite(tmp_path: Path) -> None:
    mine = _labelled(tmp_path / "mine", "jpg", "seg.png")
    settings = [f"evaluation.data={{mine: {mine}}}", "evaluation.select=null"]
    settings += ["evaluation.tasks=[{suite: standard, data: mine}]"]
    names = [task.protocol for task in load_recipe("demo", settings).evaluation.tasks]
    assert names == ["spectrum", "token_health"]
    (mine / "dataset.json").write_text('{"classes": ["ground", "cat"]}')
    names = [task.protocol for task in load_recipe("demo", settings).evaluation.tasks]
    assert names == ["spectrum", "token_health", "segmentation", "patch_knn"]


@pytest.mark.parametrize("first", [0, 1])
def test_load__a_protocol_of_two_suites_is_run_once_as_often_as_one_of_them_says(tmp_path: Path, first: int) -> None:
    mine = _labelled(tmp_path / "mine", "jpg", "cls")
    both = ["{suite: quick, data: mine}", "{suite: standard, data: mine, at: last}"]
    named = "{protocol: ridge, data: mine, image_size: 96, at: last}"
    written = ", ".join([both[first], both[1 - first], named])
    settings = [f"evaluation.data={{mine: {mine}}}", f"evaluation.tasks=[{written}]", "evaluation.select=null"]
    tasks = load_recipe("demo", settings).evaluation.tasks
    assert len({(task.protocol, task.data) for task in tasks}) == len(tasks) == 7
    when = {task.protocol: (task.suite, task.at) for task in tasks}
    assert when["knn"] == when["spectrum"] == ("quick", None)
    assert when["linear"] == when["few_shot"] == ("standard", "last")
    assert when["ridge"] == (None, "last")  # it was named


def test_load_recipe__a_list_or_mapping_replaces(shards: Path) -> None:
    overrides = [f"evaluation.data={{mine: {shards}}}", "evaluation.tasks=[{protocol: knn, data: mine}]"]
    recipe = load_recipe("demo", [*overrides, "evaluation.select=knn/mine/top1"])
    assert recipe.evaluation.data == {"mine": str(shards)}
    assert [task.protocol for task in recipe.evaluation.tasks] == ["knn"]


def test_load_recipe__references_follow_the_command_line(shards: Path) -> None:
    recipe = load_recipe("mae_cifar10", ["data.root=shards"])
    assert recipe.data.root == str(shards)
    assert recipe.data.train == f"{shards}/train-*.tar"
    assert recipe.evaluation.data == {"cifar10": str(shards)}


@pytest.mark.parametrize(
    ("overrides", "micro", "accumulation"),
    [
        ([], 16, 1),
        (["train.workers=1"], 32, 1),
        (["train.micro_batch_size=4"], 4, 4),
        (["train.accumulation=8"], 2, 8),
        (["train.workers=4", "train.micro_batch_size=2", "train.accumulation=4"], 2, 4),
    ],
)
def test_load_recipe__batch_arithmetic_is_filled_in(
    minimal: str, overrides: list[str], micro: int, accumulation: int
) -> None:
    train = load_recipe(minimal, overrides).train
    assert (train.micro_batch_size, train.accumulation) == (micro, accumulation)
    assert train.micro_batch_size * train.accumulation * train.workers == train.global_batch_size


@pytest.mark.parametrize(
    ("cores", "overrides", "loaders"),
    [
        (2, [], 1),
        (2, ["train.workers=1"], 1),
        (16, ["train.workers=4"], 3),  # each worker computes on a core of its own
        (256, ["train.workers=8"], 8),
        (16, ["train.workers=4", "data.loader_workers=0"], 0),
        (16, ["cluster.address=somewhere:6379"], 1),  # where cores are those that Ray reserves
        (1, ["cluster.address=somewhere:6379", "cluster.cpus_per_worker=6"], 5),
    ],
)
def test_load_recipe__loader_workers_fit_the_cores_and_are_written_down(
    minimal: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, overrides: list[str], loaders: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    recipe = load_recipe(minimal, overrides)
    assert recipe.data.loader_workers == loaders
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(recipe))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert load_for_resume(saved, []).recipe.data.loader_workers == loaders


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        ([], 1),
        (["train.workers=1"], 0),  # nobody to share with
        (["train.device=cpu"], 0),
        (["optimizer.name=lamb"], 0),  # it needs whole parameters
        (["train.workers=1", "train.precision=bf16"], 1),  # which keeps float32 masters
        (["train.workers=1", "deepspeed.zero_optimization.overlap_comm=true"], 1),  # its settings are wanted
        (["train.workers=1", "train.zero_stage=2"], 2),
        (["train.zero_stage=0"], 0),
    ],
)
def test_load_recipe__zero_stage_is_chosen_and_written_down(
    minimal: str, tmp_path: Path, overrides: list[str], stage: int
) -> None:
    recipe = load_recipe(minimal, overrides)
    assert recipe.train.zero_stage == stage
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(recipe))
    if recipe.optimizer.name == "adamw":  # a resume with other workers goes on with the state that there is
        assert load_for_resume(saved, ["train.workers=1"]).recipe.train.zero_stage == stage


def test_load_recipe__mixture(shards: Path, minimal: str) -> None:
    parts = "[{name: a, shards: shards, weight: 3, limit: 10}, {name: b, shards: shards/train-*.tar, weight: 2}]"
    data = load_recipe(minimal, ["data.train=null", f"data.mixture={parts}"]).data
    assert [(part.name, part.shards, part.weight, part.repeat, part.limit) for part in data.mixture] == [
        ("a", str(shards), 3.0, None, 10),
        ("b", f"{shards}/train-*.tar", 2.0, None, None),
    ]


@pytest.mark.parametrize(
    ("overrides", "workers", "micro", "accumulation"),
    [
        ([], 2, 16, 1),
        (["train.workers=1"], 1, 16, 2),  # the micro-batch that fits a worker's memory stays
        (["train.workers=4"], 4, 8, 1),  # four of 16 would be more than the global batch
        (["train.workers=1", "train.micro_batch_size=32"], 1, 32, 1),
        (["train.workers=1", "train.accumulation=4"], 1, 8, 4),
    ],
)
def test_load_for_resume__global_batch_stays(
    minimal: str, tmp_path: Path, overrides: list[str], workers: int, micro: int, accumulation: int
) -> None:
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(load_recipe(minimal)))
    train = load_for_resume(saved, overrides).recipe.train
    assert (train.workers, train.micro_batch_size, train.accumulation) == (workers, micro, accumulation)
    assert train.global_batch_size == 32


def test_load_for_resume__follows_a_moved_storage_and_moved_data(minimal: str, shards: Path, tmp_path: Path) -> None:
    """It went on in the storage that the recipe had recorded, and made it again."""
    run = tmp_path / "moved" / "small-1"
    run.mkdir(parents=True)
    settings = ["storage=old", "evaluation.data.a=shards", "evaluation.tasks=[{protocol: knn, data: a}]"]
    (run / "recipe.yaml").write_text(to_yaml(load_recipe(minimal, settings)))
    shards.rename(tmp_path / "elsewhere")
    plan = load_for_resume(run / "recipe.yaml", ["data.train=elsewhere", "evaluation.data.a=elsewhere"])
    assert plan.recipe.storage == str(tmp_path / "moved")
    assert plan.recipe.data.train == plan.recipe.evaluation.data["a"] == str(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"evaluation\.tasks=\[\]: fixed when the run began"):
        load_for_resume(run / "recipe.yaml", ["evaluation.tasks=[]"])


def test_load_recipe__base_lr_is_per_256_samples(minimal: str) -> None:
    assert load_recipe(minimal).peak_lr == 1e-3
    overrides = ["optimizer.lr=null", "optimizer.base_lr=1e-3", "train.global_batch_size=512"]
    assert load_recipe(minimal, overrides).peak_lr == pytest.approx(2e-3)


def test_load_recipe__pictures_follow_checkpoints_unless_given(minimal: str) -> None:
    assert load_recipe(minimal).train.pictures_every == 50
    assert load_recipe(minimal, ["train.pictures_every=0"]).train.pictures_every == 0


def test_load_recipe__disabled_evaluation_needs_no_data(minimal: str) -> None:
    overrides = ["evaluation.enabled=false", "evaluation.data={gone: nowhere}"]
    assert load_recipe(minimal, overrides).evaluation.data["gone"].endswith("/nowhere")


def test_load_recipe__without_files_for_a_recipe_from_elsewhere(minimal: str) -> None:
    overrides = ["data.train=/nowhere/train-*.tar", "evaluation.data={gone: /nowhere}"]
    with pytest.raises(RequestError) as refused:
        load_recipe(minimal, overrides)
    assert len(refused.value.mistakes) == 2
    assert load_recipe(minimal, overrides, check_files=False).data.train == "/nowhere/train-*.tar"


def test_load_recipe__kind_of_backbone_chooses_its_settings(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class SeriesConfig:
        kind: str = "series"
        name: str = "mean"
        dim: int = field(default=4, metadata={"range": (1, 64)})

    find = backbones.config_class
    monkeypatch.setattr(backbones, "config_class", lambda kind, name: SeriesConfig if kind == "series" else find(kind))
    assert load_recipe(minimal, ["backbone.kind=image"]).backbone == load_recipe(minimal).backbone
    recipe = load_recipe(minimal, ["backbone.kind=series", "backbone.dim=6"])
    assert recipe.backbone == SeriesConfig(dim=6)  # the file's settings, of images, do not count
    saved = Path(minimal).with_name("saved.yaml")
    saved.write_text(to_yaml(recipe))
    assert load_recipe(str(saved)) == recipe
    with pytest.raises(RequestError) as caught:
        load_recipe(minimal, ["backbone.kind=series", "backbone.dim=65", "backbone.image_size=32"])
    assert caught.value.mistakes == (
        "command line: backbone.image_size=32: unknown setting",
        "command line: backbone.dim=65: expected a whole number in [1, 64]",
    )
    with pytest.raises(RequestError) as caught:
        load_recipe(minimal, ["backbone.kind=imge", "backbone.dim=65"])
    known = ", ".join(backbones.kinds())
    expected = f"unknown kind of backbone; known are {known}; did you mean 'image'?"
    assert caught.value.mistakes == (f"command line: backbone.kind=imge: {expected}",)


def _written_by_a_run(minimal: str, tmp_path: Path) -> Path:
    run_dir = tmp_path / "storage" / "run-1"
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(to_yaml(load_recipe(minimal)))
    return run_dir / "recipe.yaml"


def test_load_for_resume__takes_another_number_of_steps(minimal: str, tmp_path: Path) -> None:
    written = _written_by_a_run(minimal, tmp_path)
    steps = load_for_resume(written, ()).total_steps
    for number in (steps + 10, steps, steps - 1):
        assert load_for_resume(written, (f"train.steps={number}",)).total_steps == number


def test_load_for_resume__steps_of_stages_are_fixed(minimal: str, tmp_path: Path) -> None:
    written = _written_by_a_run(minimal, tmp_path)
    written.write_text(written.read_text() + "stages:\n  - {name: a}\n  - {name: b}\n")
    with pytest.raises(RequestError, match=r"train\.steps=1000000: fixed in a run of stages"):
        load_for_resume(written, ("train.steps=1000000",))
    with pytest.raises(RequestError) as caught:  # nor is it named among what may be changed
        load_for_resume(written, ("train.step=7",))
    assert "train: workers, min_workers, micro_batch_size, " in str(caught.value) and "train.steps" not in str(
        caught.value
    )


def test_load_recipe__a_root_that_the_recipe_does_not_use_is_refused(minimal: str, tmp_path: Path) -> None:
    """The demo was trained on the photos that come along, whatever folder was named."""
    with pytest.raises(RequestError) as caught:
        load_recipe("demo", [f"data.root={tmp_path}"])
    (line,) = caught.value.mistakes
    assert line.startswith(f"command line: data.root={tmp_path}: demo reads no data below it; give data.train=SHARDS")
    assert load_recipe("mae_cifar10", [f"data.root={tmp_path}"], check_files=False).data.root == str(tmp_path)


def test_load_for_resume__a_recipe_that_was_cut_is_not_filled_up_with_defaults(minimal: str, tmp_path: Path) -> None:
    written = _written_by_a_run(minimal, tmp_path)
    whole = written.read_text().splitlines(keepends=True)
    for number in range(1, len(whole)):
        if whole[number].startswith(" "):
            continue  # cut within a section: what follows is missing as well
        written.write_text("".join(whole[:number]))
        with pytest.raises(RequestError, match=r"cut short, for the end is missing; restore it") as caught:
            load_for_resume(written, ())
        assert len(caught.value.mistakes) == 1


def test_load_for_resume__says_whether_a_setting_is_fixed_or_unknown(minimal: str, tmp_path: Path) -> None:
    written = _written_by_a_run(minimal, tmp_path)
    for text, why in (
        ("train.checkpoint_every=5", "fixed when the run began"),
        ("train.step=30", "unknown setting; did you mean 'train.steps'?"),
    ):
        with pytest.raises(RequestError) as caught:
            load_for_resume(written, (text,))
        assert caught.value.mistakes[0] == f"{text}: {why}"
