"""What is wrong with a request, in one line each and all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation import registry as evaluations
from objectives import registry as objectives
from pretrain.config.load import load_for_resume, load_recipe, to_yaml
from pretrain.errors import RequestError

MINIMAL = """
objective: {name: mae}
backbone: {name: vit_tiny_patch16_224, image_size: 32, patch_size: 4}
data: {train: shards}
optimizer: {lr: 1.0e-3}
train: {steps: 100, global_batch_size: 64, checkpoint_every: 50}
evaluation:
  data: {mine: shards}
  tasks: [{protocol: linear, data: mine}, {protocol: knn, data: mine}]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("train-000000.tar", "test-000000.tar"):
        (tmp_path / "shards" / name).touch()
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def mistakes(recipe: str | Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RequestError) as refused:
        load_recipe(recipe, overrides)
    assert all("\n" not in line for line in refused.value.mistakes)
    return refused.value.mistakes


def test_load_recipe__the_last_checkpoint_alone_cannot_be_best() -> None:
    tasks = "evaluation.tasks=[{protocol: knn, data: grocery}, {protocol: linear, data: grocery, at: last}]"
    (line,) = mistakes("demo", tasks, "evaluation.select=linear/grocery/top1")
    assert "evaluation.select=linear/grocery/top1: only the last checkpoint has this score (at: last)" in line
    assert "; those of every checkpoint: knn/grocery/" in line and "linear" not in line.partition(";")[2]


def test_load_recipe__without_tasks_nothing_can_be_selected_by() -> None:
    """The recipe's `select` is not to blame when the command line has taken its tasks away."""
    (line,) = mistakes("demo", "evaluation.tasks=[]")
    assert line == "command line: evaluation.tasks=[]: no task has a score to select by; add evaluation.select=null"
    assert load_recipe("demo", ["evaluation.tasks=[]", "evaluation.select=null"]).evaluation.tasks == []


@pytest.mark.parametrize(
    ("override", "character"),
    [
        ("storage=runs\n", r"\n"),
        ("storage=/a\x1b[2J", r"\x1b"),
        ("data.train=sha\trds", r"\t"),
        ("data.train=[shards, 'x\x7f']", r"\x7f"),
        ("init_from=a\u2028b", r"\u2028"),
        ("name=a\0b", r"\x00"),
    ],
)
def test_load_recipe__a_control_character_is_in_no_setting(override: str, character: str, recipe: Path) -> None:
    lines = [line for line in mistakes(recipe, override) if "control character" in line]
    (line,) = lines
    key = override.partition("=")[0]
    assert line.startswith(f"command line: {key}") and f": {character} is in it, a control" in line


def test_load_recipe__a_command_of_a_shell_may_have_several_lines(recipe: Path) -> None:
    found = load_recipe(recipe, ["data.train=pipe:cat a.tar |\n\tcat", "evaluation.enabled=false"], check_files=False)
    assert found.data.train == "pipe:cat a.tar |\n\tcat"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # unknown keys
        ("train.stepz=5", "train.stepz=5: unknown setting; did you mean 'train.steps'?"),
        ("steps=5", "steps=5: unknown setting; did you mean 'train.steps'?"),
        ("objective.mask_rati=0.5", "objective.mask_rati=0.5: unknown setting; did you mean 'objective.mask_ratio'?"),
        (
            "evaluation.tasks[0].protocl=knn",
            "evaluation.tasks[0].protocl=knn: unknown setting; did you mean 'evaluation.tasks[].protocol'?",
        ),
        ("train.steps.more=1", "train.steps.more=1: unknown setting"),
        # wrong types
        ("train.steps=many", "train.steps=many: expected a whole number >= 1"),
        ("train.steps=1.5", "train.steps=1.5: expected a whole number >= 1"),
        ("train.steps=null", "train.steps=null: expected a whole number >= 1"),
        ("train.steps=true", "train.steps=true: expected a whole number >= 1"),
        ("evaluation.enabled=3", "evaluation.enabled=3: expected true or false"),
        ("tracking.experiment=", "tracking.experiment=: expected a text"),
        ("train.steps=", "train.steps=: expected a whole number >= 1"),
        ("train.steps=null", "train.steps=null: expected a whole number >= 1"),
        ("optimizer.lr=", "optimizer.lr=: give one of optimizer.lr and optimizer.base_lr"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: expected a list of 2 numbers in [0, 1]"),
        ("optimizer.betas=[0.9, x]", "optimizer.betas=[0.9, x]: expected a list of 2 numbers in [0, 1]"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected a number >= 0 or null"),
        ("train=5", "train=5: expected settings below it, e.g. train.steps"),
        ("evaluation.tasks=knn", "evaluation.tasks=knn: expected a list of mappings"),
        ("evaluation.tasks[2].data=x", "evaluation.tasks[2].data=x: evaluation.tasks has 2 items, counted from 0"),
        ("backbone.options=6", "backbone.options=6: expected a mapping {name: value}"),
        ("backbone.options={a", "backbone.options={a: not readable as a YAML value"),
        ("train.steps", "train.steps: expected key=value, e.g. train.steps=200"),
        # ranges and choices
        ("train.steps=0", "train.steps=0: expected a whole number >= 1"),
        ("train.zero_stage=4", "train.zero_stage=4: expected a whole number in [0, 3]"),
        ("train.precision=fp8", "train.precision=fp8: expected one of fp32, bf16"),
        ("optimizer.lr=.nan", "optimizer.lr=nan: expected a number >= 0 or null"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: expected a list of 2 numbers in [0, 1]"),
        ("objective.mask_ratio=1.5", "objective.mask_ratio=1.5: expected a number in [0.01, 0.99]"),
        # names
        (
            "objective.name=maee",
            f"objective.name=maee: unknown objective; known are {', '.join(objectives.names())}; did you mean 'mae'?",
        ),
        ("name=a/b", "name=a/b: expected letters, digits"),
        (
            "evaluation.tasks[0].protocol=liner",
            f"unknown protocol; known are {', '.join(evaluations.names())}; did you mean ",
        ),
        (
            "evaluation.tasks=[{data: mine}]",
            "evaluation.tasks[0]={'data': 'mine'}: names neither a protocol nor a suite",
        ),
        ("evaluation.tasks=[{suite: fast, data: mine}]", "expected one of quick, standard, full or null"),
        ("evaluation.tasks=[{suite: quick, data: mein}]", "known are mine; did you mean 'mine'?"),
        (
            "evaluation.tasks=[{protocol: knn, data: mine, every: 2, at: last}]",
            "evaluation.tasks[0].every=2: beside at=last; give one of them",
        ),
        ("evaluation.tasks[0].data=mein", "unknown entry of evaluation.data; known are mine; did you mean 'mine'?"),
        ("evaluation.select=linear/mine/top1_ci_low", "only reported, nothing can be best by it; those that say"),
        ("evaluation.select=knn/mine/top2", "unknown score of evaluation.tasks; known are linear/mine/top1"),
        # sizes
        (
            "objective={name: dino, local_size: 18}",
            "line: objective.local_size=18: not a multiple of the patch size 4; nearest: 16 or 20",
        ),
        ("backbone.image_size=30", "backbone.image_size=30: not a multiple of the patch size 4; nearest: 28 or 32"),
        ("evaluation.tasks[1].image_size=2", "image_size=2: not a multiple of the patch size 4; nearest: 4"),
        ("backbone.pixel_mean=[0.5]", "backbone.pixel_mean has 1 numbers, expected one for each of 3 channels"),
        # schedules
        ("optimizer.base_lr=1e-3", "optimizer.lr is given too and only one can count; add optimizer.lr=null"),
        ("optimizer.lr=null", "give one of optimizer.lr and optimizer.base_lr"),
        ("optimizer.min_lr=1", "optimizer.min_lr=1.0: above the peak learning rate; expected a number in [0, 0.001]"),
        ("optimizer.warmup_steps=100", "has to be below train.steps=100; expected a whole number in [0, 99]"),
        (
            "optimizer.decay_steps=101",
            "decay_steps=101: train.steps=100 leaves 100 after the warm-up; give as many or fewer",
        ),
        ("optimizer.decay_stretch=-1", "optimizer.decay_stretch=-1.0: expected a number in [0, 100]"),
        # files
        ("data.train=shard/*.tar", "data.train=shard/*.tar: no .tar shard matches"),
        ("data.train=shards/train-{000000..000001}.tar", "no such shard"),
        ("data.train=ftp://host/train.tar", "ftp"),
        ("data.train=pipe:cat train.tar", "data.allow_pipe=true"),
        (
            "data.mixture=[{name: a, shards: shards, weight: 1}]",
            "data.train and data.mixture are both given; add data.train=null",
        ),
        ("data.max_corrupt_fraction=0.9", "expected a number in [0, 0.5]"),
        ("data.unindexed=no", "expected one of index, stream"),
        ("data.fetch=all", "expected one of auto, range, shard"),
        ("evaluation.data.mine=shardz", "no such directory; did you mean"),
        ("storage=s33://bucket", "fsspec knows no s33://; did you mean 's3'?"),
        ("storage=s3://user:secret@bucket", "user, password and query belong in the environment"),
        ("storage=file:///data/runs", "is on a disk; give the directory itself: /data/runs"),
        ("storage=mine.yaml", "is a file; expected a directory"),
        # references
        ("data.train=${data.rot}/x", "unknown setting in ${data.rot}; did you mean 'data.root'?"),
        ("tracking.experiment=${oc.env:HOME}", "only references to other settings such as ${data.root} are allowed"),
        ("tracking.experiment=${now:}", "only references to other settings such as ${data.root} are allowed"),
        ("train.seed=${tracking.experiment}", "what it refers to is not a whole number"),
        # DeepSpeed keys that are ours
        ("deepspeed.train_batch_size=8", "train_batch_size=8: decided by train.global_batch_size; set that instead"),
        ("deepspeed.zero_optimization.stage=2", "decided by train.zero_stage; set that instead"),
        ("deepspeed={bf16: {enabled: true}}", "decided by train.precision; set that instead"),
        ("deepspeed.gradient_clipping=1.0", "decided by optimizer.clip_grad; set that instead"),
    ],
)
def test_load_recipe__mistake(recipe: Path, override: str, line: str) -> None:
    found = mistakes(recipe, override)
    assert len(found) == 1, found
    assert found[0].startswith("command line: ") and line in found[0]


@pytest.mark.parametrize("objective", ["dino", "selfpatch"])
def test_load_recipe__old_spelling_gets_the_new_one(recipe: Path, objective: str) -> None:
    found = mistakes(recipe, f"objective.name={objective}", "objective.centre_momentum=0.9")
    assert found == (
        "command line: objective.centre_momentum=0.9: unknown setting; did you mean 'objective.center_momentum'?",
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.limit=8", "data.limit=8: needs an index, which data.unindexed=stream does without; add data.limit=null"),
        ("data.record_samples=true", "data.record_samples=true: needs an index"),
        ("data.mixture=[{name: a, shards: shards, weight: 1}]", "data.mixture=['a']: needs an index"),
    ],
)
def test_load_recipe__what_needs_an_index(recipe: Path, override: str, line: str) -> None:
    unset = ["data.train=null"] if "mixture" in override else []
    found = mistakes(recipe, "data.unindexed=stream", override, *unset)
    assert len(found) == 1, found
    assert line in found[0]


@pytest.mark.parametrize("setting", ["block_size=256", "block_size=64", "window=2", "num_streams=1"])
def test_load_recipe__an_order_without_an_index_is_no_order(recipe: Path, setting: str) -> None:
    (line,) = mistakes(recipe, "data.unindexed=stream", f"data.{setting}")
    problem = "has no effect with data.unindexed=stream, which reads shards from front to back; leave it out"
    assert line == f"command line: data.{setting}: {problem} or add data.unindexed=index"


def test_load_recipe__an_order_in_a_recipe_counts_unless_it_is_the_default(recipe: Path) -> None:
    for number, (value, allowed) in enumerate(((256, True), (64, False))):
        own = recipe.with_name(f"own{number}.yaml")
        own.write_text(MINIMAL.replace("train: shards", f"train: shards, unindexed: stream, block_size: {value}"))
        if allowed:
            assert load_recipe(own).data.block_size == value
        else:
            (line,) = mistakes(own)
            assert f"{own.name}: data.block_size=64: has no effect" in line and "add data.block_size=256 or" in line
            assert load_recipe(own, ["data.unindexed=index"]).data.block_size == 64


@pytest.mark.parametrize(
    ("mixture", "line"),
    [
        ("[]", "data.train is required: data.train=SHARDS, or a list in data.mixture"),
        ("[{name: a, shards: shards}]", "data.mixture[0].weight=null: give one of weight (share) and repeat (passes)"),
        ("[{name: a, shards: shards, weight: 1, repeat: 1}]", "data.mixture[0].weight=1.0: give one of weight"),
        (
            "[{name: a, shards: shards, weight: 1}, {name: a, shards: shards, weight: 1}]",
            "data.mixture[1].name=a: named twice",
        ),
        (
            "[{name: a, shards: shards, weight: 1}, {name: b, shards: shards, repeat: 1}]",
            "data.mixture[1].weight=null: a has the other of weight and repeat; give all parts the same one",
        ),
        ("[{name: a, shards: shardz, weight: 1}]", "data.mixture[0].shards=shardz: "),
        ("[{name: a, shards: shards, weight: 1, limt: 3}]", "did you mean 'data.mixture[].limit'?"),
        ("[{name: a, shards: shards, weight: 0}]", "data.mixture[0].weight=0.0: expected a number in [1e-06, "),
    ],
)
def test_load_recipe__mistake_in_a_mixture(recipe: Path, mixture: str, line: str) -> None:
    found = mistakes(recipe, "data.train=null", f"data.mixture={mixture}")
    assert len(found) == 1, found
    assert line in found[0]


def test_load_for_resume__refuses_what_would_change_the_run(recipe: Path) -> None:
    recipe.write_text(to_yaml(load_recipe(str(recipe))))
    with pytest.raises(RequestError) as refused:
        load_for_resume(recipe, ["train.seed=3", "train.workers=1", "optimizer.lr=1"])
    first, second, allowed = refused.value.mistakes
    assert (first.partition(": ")[0], second.partition(": ")[0]) == ("train.seed=3", "optimizer.lr=1")
    assert "fixed when the run began" in first
    assert (
        "a resume may change train: steps, epochs, workers, min_workers, micro_batch_size" in allowed
        and len(allowed) < 450
    )


def test_load_recipe__unknown_model_names_the_nearest(recipe: Path) -> None:
    (line,) = mistakes(recipe, "backbone.name=vit_tin_patch16_224")
    assert line.startswith("command line: backbone.name=vit_tin_patch16_224: unknown model")
    assert line.endswith("did you mean 'vit_tiny_patch16_224'?")


def test_load_recipe__channels_and_pixel_statistics_belong_together(recipe: Path) -> None:
    assert mistakes(recipe, "backbone.in_chans=4") == (
        "command line: backbone.in_chans=4: backbone.pixel_mean has 3 numbers, expected one for each of 4 channels",
        "command line: backbone.in_chans=4: backbone.pixel_std has 3 numbers, expected one for each of 4 channels",
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["train.compile=true", "train.zero_stage=3"],
            "train.compile=true: ZeRO stage 3 gathers parameters within the blocks that are compiled; "
            "use train.zero_stage=2 with it",
        ),
        (
            ["train.precision=bf16", "train.zero_stage=0"],
            "train.precision=bf16: DeepSpeed's stage 0, which train.zero_stage says here, trains worse in bf16; "
            "add train.zero_stage=1",
        ),
        (
            ["train.global_batch_size=65"],
            "train.global_batch_size=65: micro ? x accumulation ? x workers 2 can not be the global batch 65; "
            "nearest: train.global_batch_size=64 or 66, train.workers=1 or 5",
        ),
        (
            ["train.micro_batch_size=24", "train.accumulation=2"],
            "train.accumulation=2: micro 24 x accumulation 2 x workers 2 is 96, not the global batch 64; "
            "nearest: train.global_batch_size=96, train.micro_batch_size=16 (accumulation 2) or 32 (accumulation 1)",
        ),
        (
            ["train.micro_batch_size=24"],
            "train.micro_batch_size=24: micro 24 x accumulation ? x workers 2 can not be the global batch 64; "
            "nearest: train.global_batch_size=48 or 96, "
            "train.micro_batch_size=16 (accumulation 2) or 32 (accumulation 1)",
        ),
        (
            ["train.accumulation=5"],
            "train.accumulation=5: micro ? x accumulation 5 x workers 2 can not be the global batch 64; "
            "nearest: train.global_batch_size=60 or 70, train.accumulation=4 or 8",
        ),
        (
            ["train.workers=100"],
            "train.workers=100: micro ? x accumulation ? x workers 100 can not be the global batch 64; "
            "nearest: train.global_batch_size=100, train.workers=64",
        ),
    ],
)
def test_load_recipe__batch_arithmetic_that_does_not_work_out(recipe: Path, overrides: list[str], line: str) -> None:
    assert mistakes(recipe, *overrides) == (f"command line: {line}",)


def test_load_recipe__all_mistakes_at_once(recipe: Path) -> None:
    text = MINIMAL.replace("lr: 1.0e-3", "lr: 1.0e-3, momentum: 0.9").replace("data: mine}]", "data: yours}]")
    recipe.write_text(text)
    found = mistakes(recipe, "train.steps=many", "foo", "objective.hflip=2", "data.train=nowhere", "train.workers=3")
    assert sorted(line.split("=")[0] for line in found) == [
        "command line: data.train",
        "command line: foo: expected key",
        "command line: objective.hflip",
        "command line: train.steps",
        "command line: train.workers",
        "recipe mine.yaml: evaluation.tasks[1].data",
        "recipe mine.yaml: optimizer.momentum",
    ]


def test_load_recipe__a_mistake_does_not_cause_others(recipe: Path) -> None:
    # warm-up, checkpoints and pictures all depend on the steps that could not be read
    assert len(mistakes(recipe, "train.steps=many", "optimizer.warmup_steps=500")) == 1
    # nothing can be said about the settings of an objective that does not exist
    assert len(mistakes(recipe, "objective.name=other", "objective.anything=1")) == 1


def test_load_recipe__mandatory_setting_says_how_to_give_it() -> None:
    assert mistakes("mae_cifar10") == (
        "recipe mae_cifar10.yaml: data.root is required: pretrain run mae_cifar10 data.root=DIR",
    )


def test_load_recipe__null_inside_a_text_is_a_setting_that_is_missing(recipe: Path) -> None:
    required = "command line: data.root is required: pretrain run mae_cifar10 data.root=DIR"
    assert mistakes("mae_cifar10", "data.root=") == (required,)
    (line,) = mistakes(recipe, "data.train=${data.root}/train-*.tar")
    assert line.endswith(f"data.root is required: pretrain run {recipe} data.root=DIR")
    assert load_recipe(recipe, ["tracking.model_name=${init_from}"]).tracking.model_name == "mine"  # null, and may be


def test_load_recipe__a_root_without_data_hides_no_other_mistake(recipe: Path) -> None:
    root, other = mistakes("mae_cifar10", "data.root=shard", "train.epochs=3", "train.zero_stage=7")[::-1]
    assert root == f"command line: data.root=shard: no such directory; did you mean '{recipe.parent}/shards'?"
    assert other.startswith("command line: train.zero_stage=7")
    line, _ = mistakes("mae_cifar10", "data.root=s{hard,hart}")  # a pattern, so not a folder that is not there
    assert line.startswith("recipe mae_cifar10.yaml: data.train=s{hard,hart}/train-*.tar: no .tar shard matches")


def test_load_recipe__everything_mandatory_is_listed(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("description: nothing yet\n")
    named = {line.split(" is required")[0].removeprefix("recipe empty.yaml: ") for line in mistakes(empty)}
    assert named >= {
        "objective.name",
        "backbone.name",
        "data.train",
        "train.steps",
        "train.global_batch_size",
        "train.checkpoint_every",
    }


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("dmeo", "recipe dmeo: unknown; known are demo, "),
        ("dmeo", "did you mean 'demo'?"),
        ("minee.yaml", "recipe minee.yaml: no such file; did you mean "),
        ("nowhere/mine.yaml", "there is no directory "),
    ],
)
def test_load_recipe__unknown_recipe(recipe: Path, name: str, line: str) -> None:
    assert line in mistakes(name)[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  steps: {\n", ", line 3: not readable as YAML"),
        ("train: {}\ntrain: {}\n", "not readable as YAML: key 'train' is given twice"),
        ("name: !!python/object:os.system x", "not readable as YAML"),
        ("- a\n- b\n", "expected settings (key: value), found a list"),
    ],
)
def test_load_recipe__broken_file(recipe: Path, text: str, line: str) -> None:
    recipe.write_text(text)
    assert line in mistakes(recipe)[0]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.gpus", "cluster.gpus_per_worker"),
        ("gpus", "cluster.gpus_per_worker"),
        ("batch_size", "train.global_batch_size"),
        ("data.batch_size", "train.global_batch_size"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("train.learning_rate", "optimizer.lr"),
        ("optimizer.weight_dcay", "optimizer.weight_decay"),
        ("train.weight_decay", "optimizer.weight_decay"),
        ("num_workers", "data.loader_workers"),
        ("steps", "train.steps"),
        ("objective.mask_rati", "objective.mask_ratio"),
    ],
)
def test_load_recipe__what_other_tools_call_a_setting(recipe: Path, key: str, hint: str) -> None:
    assert mistakes(recipe, f"{key}=1") == (f"command line: {key}=1: unknown setting; did you mean '{hint}'?",)


def test_load_recipe__a_setting_of_another_objective_and_one_of_none(recipe: Path) -> None:
    """`grey_p` was taken for the closest name of any section."""
    assert mistakes(recipe, "objective.center_momentum=1")[0].endswith(
        "unknown setting; it is a setting of dino, dinov3 and selfpatch"
    )
    assert mistakes(recipe, "objective.grey_p=0.1")[0].endswith("objective.grey_p=0.1: unknown setting")


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "ray://head-1.local:10001", "auto", "[::1]:6379"])
def test_load_recipe__addresses(recipe: Path, address: str) -> None:
    assert load_recipe(recipe, [f"cluster.address={address}"]).cluster.address == address


@pytest.mark.parametrize(
    "address", ["nowhere", "http://x:1", "x:0", "x:99999", "ray://x", ":1", "a b:1", "x:" + "9" * 5000]
)
def test_load_recipe__what_is_no_address(recipe: Path, address: str) -> None:
    (line,) = mistakes(recipe, f"cluster.address={address}")
    assert line.endswith("is no address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT or auto")
