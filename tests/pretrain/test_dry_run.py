"""`pretrain run ... --dry-run`: what each stage shows, holds and writes, for every recipe that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.cli.main import main
from pretrain.config.load import recipe_content, recipe_names
from pretrain.training import preflight
from tests.small_data import NUM_POINTS
from tests.small_objectives import data_of


def screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, *settings: str
) -> list[str]:
    """The lines of a dry run in an empty directory, which it leaves empty."""
    monkeypatch.chdir(tmp_path)
    root = [] if name == "demo" else [f"data.root={data_of(recipe_content(name)['objective']['name'])}"]
    if recipe_content(name)["backbone"].get("kind") == "points":
        settings = (f"backbone.num_points={NUM_POINTS}", *settings)  # as many as the small clouds have
    assert main(["run", name, *root, *settings, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    return capsys.readouterr().out.splitlines()


def column(lines: list[str], row: str, zero_stage: int) -> float:
    """A number of the first table."""
    (values, *_) = (line.split()[-4:] for line in lines if line[10:].startswith(row))
    return float(values[zero_stage])


# Of 7 billion parameters the shapes alone take a quarter of a minute.
RECIPES = [name for name in recipe_names() if "teacher_from" not in recipe_content(name)]
HEAVY = {"dinov3_vit7b": pytest.mark.long}


@pytest.mark.parametrize("name", [pytest.param(name, marks=HEAVY.get(name, ())) for name in RECIPES])
def test_dry_run__every_recipe_on_80_columns(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = screen(tmp_path, capsys, monkeypatch, name)
    assert [line for line in lines if len(line) > 80 and len(line.split()[-1]) < 70] == []
    labels = [line[:10].strip() for line in lines]
    num_stages = labels.count("train")
    assert num_stages == (3 if name in ("dinov3_cifar10", "dinov3_vit7b") else 1)
    for label in ("views", "model", "memory", "disk"):
        assert labels.count(label) == num_stages
    assert sum(" tokens per step" in line for line in lines) == num_stages
    assert sum(line[10:].startswith("activations  ") for line in lines) == num_stages
    stages = [column(lines, "in all, at the fullest moment", stage) for stage in range(4)]
    assert all(stages) and column(lines, "masters", 1) == column(lines, "masters", 3) > 0
    assert column(lines, "weights", 0) >= column(lines, "weights", 1) == column(lines, "weights", 2) > 0


def test_dry_run__a_stage_as_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = screen(tmp_path, capsys, monkeypatch, "dinov3_cifar10", "train.device=cpu")
    begin, end = (next(i for i, line in enumerate(lines) if f"stage {name}:" in line) for name in ("gram", "highres"))
    assert [line for line in lines[begin:end] if not line[10:].startswith(("activations  ", "in all"))] == [
        "train     stage gram: dinov3, 1500 steps of 64 = 96000 samples, 150 epochs;",
        "          adamw, peak lr 0.0003, warm-up 0 steps",
        "teacher   pretrain/4000: what this run exports at step 4000",
        "views     global_1, global_2: 32 px, 4 x 4 patches; local: 4 x 16 px,",
        "          2 x 2 patches; 60 tokens per sample",
        "          3840 tokens per step, 2 of each crop beside its patches",
        "model     1.1 million trained parameters: backbone 818944, head 131904,",
        "          patch_head 131904; teacher 1.1 million; Gram anchor 818816",
        "memory    MB per worker (of 2), ZeRO stage           [0]      1       2       3",
        "          weights                                   4.3     4.3     4.3     6.5",
        "          masters, moments                          8.7     6.5     6.5     6.5",
        "          gradients, buffers                        8.7   207.0   402.6   406.5",
        "          teacher, Gram anchor                      7.6     7.6     7.6     3.8",
        "          [0] is train.zero_stage",
        "          activations are those of 32 samples",
        "disk      every 750 steps a backbone of 3.3 MB, heads of 1.1 MB and a training",
        "          state of 20.6 MB",
        "          86.7 MB when the stage ends (6 backbones, 3 states); one state more",
        "          while it is written",
    ]


@pytest.mark.parametrize(
    ("settings", "heads", "said"),
    [
        (["train.precision=bf16", "train.zero_stage=1"], "(0) [1] 2 3", "(0) is refused: train.precision=bf16"),
        (["train.compile=true"], "[0] 1 2 (3)", "(3) is refused: train.compile=true"),
        (["train.workers=1", "optimizer.name=lamb"], "[0] (1) (2) (3)", "(3) is refused: optimizer.name=lamb"),
    ],
)
def test_dry_run__marks_the_zero_stage_and_what_refuses_others(
    settings: list[str],
    heads: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = screen(tmp_path, capsys, monkeypatch, "demo", *settings)
    (head,) = [line for line in lines if line.startswith("memory")]
    assert " ".join(head.split()[-4:]) == heads
    assert said in " ".join(" ".join(lines).split())


def test_dry_run__other_views_of_some_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = ["objective.mix_share=[0.25]", "objective.mix_global=[64]", "objective.mix_local=[16]"]
    whole = " ".join(" ".join(screen(tmp_path, capsys, monkeypatch, "dinov3_cifar10", *mixed)).split())
    assert "in 75% of the steps global_1, global_2: 32 px, 4 x 4 patches; local: 4 x 16 px, 2 x 2 patches" in whole
    assert "in 25% of the steps global_1, global_2: 64 px, 8 x 8 patches; local: 4 x 16 px, 2 x 2 patches" in whole
    assert "activations are those of 32 samples of the largest views" in whole
    assert f"{round(64 * (0.75 * 60 + 0.25 * 156))} tokens per step on average, 2 of each crop" in whole


def test_dry_run__disk_grows_with_the_checkpoints_that_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of MAE in fp32 and stage 0: weights and two moments are 12 bytes a parameter, the positions a buffer beside."""

    def disk(*settings: str) -> str:
        lines = screen(tmp_path, capsys, monkeypatch, "demo", *settings)
        begin, end = (next(i for i, line in enumerate(lines) if line.startswith(row)) for row in ("disk", "where"))
        return " ".join(" ".join(lines[begin:end]).split())

    backbone, state = 4 * 1_829_568, 12 * 1_966_368 + 4 * 12_480
    assert f"a backbone of {backbone / 1e6:.1f} MB and a training state of {state / 1e6:.1f} MB" in disk()
    few = f"{(3 * backbone + 2 * state) / 1e6:.1f} MB when the run ends (3 backbones, 2 states)"
    assert few in disk("train.keep_last=5")
    assert f"{(8 * backbone + 3 * state) / 1e6:.1f} MB when" in disk("train.checkpoint_every=100")
    alone = ["train.checkpoint_every=100", "evaluation.enabled=false"]
    assert f"{(7 * backbone + 2 * state) / 1e6:.1f} MB when" in disk(*alone)


def test_dry_run__a_plug_in_that_is_not_known_before_it_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "outline", lambda _: None)
    lines = screen(tmp_path, capsys, monkeypatch, "demo")
    assert "model     of a plug-in, which is not known before it is built" in lines
    assert not any(line.startswith(("views", "memory", "disk")) for line in lines)


def test_dry_run__each_stage_has_its_own_division_of_the_batch_and_its_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    divided = ["stages[2].train.micro_batch_size=16", "stages[2].train.accumulation=2"]
    whole = " ".join(" ".join(screen(tmp_path, capsys, monkeypatch, "dinov3_cifar10", *divided)).split())
    assert "stage pretrain, gram: micro-batch 32 x accumulation 1; fp32, ZeRO stage 0" in whole
    assert "stage highres: micro-batch 16 x accumulation 2; fp32, ZeRO stage 0" in whole
    warning = "warning: dinov3 compares the samples of a micro-batch: 2 of them are not what one large one is"
    assert whole.count(warning) == 1 and whole.index("stage highres: dinov3") < whole.index(warning)


def test_dry_run__says_what_suites_are_and_when_each_of_their_protocols_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "evaluation.tasks=[{suite: quick, data: cifar10}, {suite: standard, data: cifar10, at: last}]"
    settings = [tasks, "evaluation.select=knn/cifar10/top1", "train.steps=500", "train.checkpoint_every=250"]
    lines = screen(tmp_path, capsys, monkeypatch, "mae_cifar10", *settings)
    begin, end = (next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("evaluate", "leaves"))
    assert " ".join(line[10:] for line in lines[begin:end]) == (
        "knn/cifar10, ridge/cifar10, spectrum/cifar10 after steps 0, 250, 500 "
        "linear/cifar10, logreg/cifar10, few_shot/cifar10, token_health/cifar10 after steps 0, 500; "
        "best by knn/cifar10/top1 "
        "without masked_reconstruction/cifar10, voxel_segmentation/cifar10: not for backbones of kind image "
        "without segmentation/cifar10, patch_knn/cifar10: no labels seg.png"
    )
