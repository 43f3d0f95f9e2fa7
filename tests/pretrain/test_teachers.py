"""A frozen teacher is there where settings need one, and nowhere else; told by settings and `checkpoint.json`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoints.initialization import checked_plan
from pretrain.config.load import load_plan
from pretrain.errors import RequestError
from tests.pretrain.conftest import write_manifest

DINOV3 = ["objective={name: dinov3}", "backbone.patch_size=8"]
STAGES = ["stages=[{name: a}, {name: b}]", "stages[1].objective.gram_weight=2.0"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            [*DINOV3, "objective.gram_weight=2.0"],
            "command line: objective.gram_weight=2.0: needs an anchor; give teacher_from=REFERENCE, or "
            "objective.gram_weight=0",
        ),
        (
            [*DINOV3, "objective.distill=true", "teacher_from="],
            "command line: objective.distill=true: needs a teacher; give teacher_from=REFERENCE, or "
            "objective.distill=false",
        ),
        (
            ["objective.name=distillation", "teacher_from=null"],
            "command line: objective.name=distillation: needs a teacher; give teacher_from=REFERENCE",
        ),
        (
            [*DINOV3, "teacher_from=runs:/x"],
            "command line: teacher_from=runs:/x: nothing is learned from it; what would is objective.distill=true, or "
            "objective.gram_weight above 0 with objective.gram_from=checkpoint; leave it out",
        ),
        (
            ["teacher_from=runs:/x"],
            "command line: teacher_from=runs:/x: objective mae learns from no frozen teacher, as dinov3, distillation "
            "do; leave it out",
        ),
        (
            [*DINOV3, *STAGES],
            "stage b: command line: objective.gram_weight=2.0: needs an anchor; give",
        ),
        (
            [*DINOV3, STAGES[0], "stages[1].teacher_from=a"],
            "command line: stages[1].teacher_from=a: nothing is learned from it; what would is",
        ),
    ],
)
def test_load_plan__a_teacher_that_is_missing_or_of_no_use(settings: list[str], line: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_plan("demo", settings)
    (found,) = refused.value.mistakes
    assert found.startswith(line)


@pytest.mark.parametrize(
    "settings",
    [
        ["objective.gram_weight=1.0", "objective.gram_from=teacher"],
        ["objective.gram_weight=1.0", "objective.gram_from=live"],
        ["objective.gram_weight=1.0", "teacher_from=runs:/x"],
        ["objective.distill=true", "teacher_from=runs:/x"],
        [*STAGES, "stages[1].teacher_from=a"],
    ],
)
def test_load_plan__a_teacher_where_it_is_needed(settings: list[str]) -> None:
    assert load_plan("demo", [*DINOV3, *settings])


def described(checkpoint: Path, **facts: object) -> Path:
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return checkpoint


def test_checked_plan__all_that_a_checkpoint_says_against_itself_at_once(
    tmp_path: Path, make_checkpoint: Callable[[Path, int], Path]
) -> None:
    """Prototypes of both heads and the patch size; the first alone was named, by a worker."""
    spec = {"library": "timm", "name": "vit_small_patch16_dinov3_qkvb", "patch_size": 4}
    headless = described(make_checkpoint(tmp_path / "first", 40), backbone=spec)
    heads = {"head": {"num_prototypes": 24}, "patch_head": {"num_prototypes": 16}}
    teacher = make_checkpoint(tmp_path / "second", 40)
    (teacher / "heads.safetensors").write_bytes(b"not read, but verified")
    write_manifest(teacher, 40, "second")
    described(teacher, backbone=spec, heads=heads)

    def refused(*settings: str) -> tuple[str, ...]:
        with pytest.raises(RequestError) as error:
            checked_plan(load_plan("demo", [*DINOV3, *settings]), tmp_path / "new")
        return error.value.mistakes

    (line,) = refused("objective.distill=true", f"teacher_from={headless}")
    assert line.startswith(f"teacher_from={headless}: has no heads.safetensors, whose outputs would be learned; ")
    assert refused("objective.distill=true", f"teacher_from={teacher}", "objective.patch_num_prototypes=32") == tuple(
        f"teacher_from={teacher}: {mistake}"
        for mistake in (
            "the teacher has patches of 4 px, the student of 8; set backbone.patch_size=4",
            "the teacher's head has 24 prototypes, the student's 65536; set objective.num_prototypes=24",
            "the teacher's patch_head has 16 prototypes, the student's 32; set objective.patch_num_prototypes=16",
        )
    )
    anchor = ["objective.gram_weight=1.0", f"teacher_from={headless}"]
    stages = [*STAGES, f"stages[1].teacher_from={headless}"]
    mistake = "the anchor has patches of 4 px, the student of 8; set backbone.patch_size=4"
    assert refused(*anchor) == (f"teacher_from={headless}: {mistake}",)
    assert refused(*stages) == (f"stages[1].teacher_from={headless}: {mistake}",)
    (line,) = refused(*STAGES, f"stages[1].teacher_from={tmp_path}/lost")
    assert line.startswith(f"stages[1].teacher_from={tmp_path}/lost: no such directory") and line.count("/lost") == 1
    assert line.endswith("FILE.safetensors, timm:NAME or timm:NAME@FILE")


def test_refused__without_torch(tmp_path: Path) -> None:
    code = """
import sys
from pretrain.cli.main import main
assert main(sys.argv[1:]) == 2
assert not {"mlflow", "torch", "ray", "deepspeed", "timm"} & sys.modules.keys()
"""
    root = Path(__file__).parents[2]
    request = ["run", "demo", *DINOV3, "objective.gram_weight=2.0", f"storage={tmp_path}/runs"]
    done = subprocess.run(
        [sys.executable, "-c", code, *request], env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "objective.gram_weight=2.0: needs an anchor" in done.stderr
