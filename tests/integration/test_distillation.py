"""A DINOv3 teacher's run, and the run of a smaller student that learns what the teacher's heads say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backbones.io import load_backbone
from pretrain.record.events import Resumed, Taught
from pretrain.record.journal import read_events

pytestmark = pytest.mark.integration

RECIPE = """
name: distilled
objective:
  name: dinov3
  num_prototypes: 24
  head_hidden_dim: 24
  head_bottleneck_dim: 8
  patch_num_prototypes: 16
  patch_head_hidden_dim: 24
  patch_head_bottleneck_dim: 8
  num_local: 2
  local_size: 16
  drop_path: 0.0
backbone:
  name: vit_small_patch16_dinov3_qkvb
  image_size: 32
  patch_size: 8
  options: {embed_dim: 32, depth: 2, num_heads: 2, num_reg_tokens: 1}
data: {train: "package:demo_data/grocery/train-*.tar", loader_workers: 1}
optimizer: {lr: 1.0e-3, clip_grad: 1.0}
train: {steps: 2, global_batch_size: 16, workers: 1, log_every: 1, checkpoint_every: 2}
checkpoints: {asynchronous: false}  # so that a run that is killed after a step goes on from a known one
evaluation: {enabled: false, baseline: false}
"""
STUDENT = (
    "objective.distill=true",
    "backbone.options={embed_dim: 16, depth: 1, num_heads: 2, num_reg_tokens: 1}",
    "train.steps=6",
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "distilled.yaml"
    path.write_text(RECIPE)
    return path


def test_distillation__a_student_learns_from_the_checkpoint_of_a_run_and_is_resumed(
    launch: Callable[..., Any], losses: Callable[[Path], dict[int, float]]
) -> None:
    """Killed after a checkpoint, the student goes on: the step that is trained twice has the same loss (`losses`)."""
    teacher = launch("teacher", ranks=1)
    teacher.wait()
    source = f"teacher_from={teacher.run_dir}/checkpoints/step-00000002"
    student = launch("student", *STUDENT, source, ranks=1)
    student.kill_after_step(3)
    again = launch("student", *STUDENT, source, ranks=1)
    again.wait()
    assert sorted(losses(again.run_dir)) == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in read_events(again.run_dir / "journal.jsonl")[0] if isinstance(event, Resumed)]

    taught = [event for event in read_events(again.run_dir / "journal.jsonl")[0] if isinstance(event, Taught)]
    described = "checkpoints/step-00000002: step 2, vit_small_patch16_dinov3_qkvb, 32 px, patches of 8 px"
    assert [event.step for event in taught] == [0, 2] and all(event.teacher.endswith(described) for event in taught)

    checkpoint = again.run_dir / "checkpoints/step-00000006"
    assert load_backbone(checkpoint).embed_dim == 16
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    assert manifest["heads"]["head"]["dim"] == 16  # so that it can be a teacher itself
    references = json.loads((checkpoint / "training_state/companions.json").read_text())
    digests = json.loads((teacher.run_dir / "checkpoints/step-00000002/checkpoint.json").read_text())["files"]
    assert {name: reference["sha256"] for name, reference in references.items()} == {
        f"frozen_{part}": digests[f"{part}.safetensors"]["sha256"] for part in ("backbone", "heads")
    }
