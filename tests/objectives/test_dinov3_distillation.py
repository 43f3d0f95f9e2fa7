"""DINOv3's distillation: what a frozen teacher and its heads make of whole crops is what a smaller student learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from backbones.io import save_backbone
from backbones.registry import create_backbone
from objectives import contract
from objectives.base import Objective, Progress
from objectives.dinov3.config import DINOv3Config
from objectives.dinov3.objective import DINOv3
from objectives.errors import ObjectiveError
from objectives.parts.sinkhorn import sinkhorn_knopp
from tests.objectives.test_dinov3 import SMALL, VIT, images, small

LATE = Progress(step=900, total_steps=1000)
STUDENT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_reg_tokens": 1, "init_values": 1.0}


def published(teacher: DINOv3, folder: Path) -> dict[str, Any]:
    """The files of a checkpoint of the teacher, and what its `checkpoint.json` says of them."""
    heads = teacher.exported_heads()
    save_backbone(folder / "backbone.safetensors", teacher.exported.weights(), teacher.exported.spec)
    save_file(heads.tensors, folder / "heads.safetensors")
    found: dict[str, Any] = json.loads(json.dumps({"backbone": teacher.exported.spec, "heads": heads.spec}))
    return found


def fill(student: Objective, specs: dict[str, Any], folder: Path) -> None:
    for companion in student.companions().values():
        if companion.filled == "checkpoint":
            companion.outline(specs[companion.part])
            companion.load(folder)


def pair(folder: Path, teacher_options: dict[str, Any] | None = None, **config: Any) -> tuple[DINOv3, DINOv3]:
    """A teacher with heads of other widths than the student's, and the student with its weights at hand."""
    wide = {"head_hidden_dim": 40, "head_bottleneck_dim": 16, "last_layer": "weight_norm"}
    teacher = small(seed=1, **wide | (teacher_options or {}))
    student = small(seed=2, options=STUDENT, distill=True, drop_path=0.0, **config)
    with torch.no_grad():  # its moving average is not its student
        for parameter in teacher.teacher.modules.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fill(student, published(teacher, folder), folder)
    return teacher, student


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    return -(targets * (logits / 0.1).log_softmax(-1)).sum(-1)


def test_losses__are_those_of_pretraining_with_targets_of_the_frozen_teacher_and_nothing_masked(tmp_path: Path) -> None:
    teacher, student = pair(tmp_path, koleo_weight=0.0)
    batch = images()
    found = student(batch, LATE)

    crops = torch.cat([batch["global_1"], batch["global_2"]])
    given = teacher.exported.features(teacher.exported.normalized(crops))
    own, locals_ = (
        student.backbone.features(student.backbone.normalized(pixels))
        for pixels in (crops, batch["local"].flatten(0, 1))
    )
    assert given.cls is not None and own.cls is not None and locals_.cls is not None
    targets = sinkhorn_knopp(teacher.teacher.head(given.cls), 0.07)  # (2 B, K)
    logits = student.head(own.cls)
    other = cross_entropy(targets[:4], logits[4:]).mean() + cross_entropy(targets[4:], logits[:4]).mean()
    torch.testing.assert_close(found.metrics["dino_global"], other / 2)
    pairs = [
        cross_entropy(taught, seen).mean() for taught in targets.chunk(2) for seen in student.head(locals_.cls).chunk(2)
    ]
    torch.testing.assert_close(found.metrics["dino_local"], torch.stack(pairs).mean())

    masks = student._masks(batch["seed"], crops)
    patch_targets = sinkhorn_knopp(teacher.teacher.patch_head(given.patches.flatten(0, 1)[masks.idx]), 0.07)
    patch_loss = cross_entropy(patch_targets, student.patch_head(own.patches.flatten(0, 1)[masks.idx]))
    torch.testing.assert_close(found.metrics["ibot"], (patch_loss * masks.weight).sum() / 8)
    share = 2 / (2 + 4)
    expected = share * other / 2 + (1 - share) * torch.stack(pairs).mean() + found.metrics["ibot"]
    torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("config", [{}, {"local_norm": True, "rope_rescale": 2.0}, {"targets": "softmax"}], ids=str)
def test_contract(config: dict[str, Any], check: Any, tmp_path: Path) -> None:
    _, student = pair(tmp_path, **config)
    assert "mask_token" not in dict(student.named_parameters())  # which no gradient would reach
    check(student, images())


def test_after_step__moves_the_average_of_the_student_and_not_the_teacher(tmp_path: Path) -> None:
    _, student = pair(tmp_path, teacher_momentum=0.5, teacher_momentum_end=0.5)
    assert student.exported is student.teacher.backbone and student.exported.embed_dim == 32
    companions = {name: companion.state_dict() for name, companion in student.companions().items()}
    before = {name: {key: t.clone() for key, t in state.items()} for name, state in companions.items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    student.after_step(LATE, contract.read_weights)
    moved = {
        name
        for name, companion in student.companions().items()
        if any(not torch.equal(t, before[name][key]) for key, t in companion.state_dict().items())
    }
    assert moved == {"teacher"}
    assert student.references().keys() == {"frozen_backbone", "frozen_heads"}
    assert {name.partition(".")[0] for name in student.extra_state()} == {"teacher"}  # the frozen one is not saved


def test_health__is_that_of_the_student(tmp_path: Path) -> None:
    """A student that gives every image one feature is found out, however good its teacher is."""
    _, student = pair(tmp_path)
    with torch.no_grad():
        student.backbone.vit.norm.weight.zero_()
    assert float(student(images(), LATE).metrics["effective_rank"]) == pytest.approx(1.0, abs=0.01)


def test_teacher__sees_pixels_as_it_learned_to(tmp_path: Path) -> None:
    backbone = create_backbone(
        "vit_small_patch16_dinov3_qkvb", image_size=32, patch_size=4, options=VIT, pixel_mean=[0.2] * 3,
        pixel_std=[0.5] * 3,
    )  # fmt: skip
    teacher = DINOv3(backbone, DINOv3Config(**SMALL))
    student = small(seed=2, options=STUDENT, distill=True)
    fill(student, published(teacher, tmp_path), tmp_path)
    seen: list[Tensor] = []
    assert student.frozen is not None
    features = student.frozen.backbone.features
    student.frozen.backbone.features = lambda x: (seen.append(x), features(x))[1]  # type: ignore[method-assign]
    batch = images()
    student(batch, LATE)
    torch.testing.assert_close(seen[0], (torch.cat([batch["global_1"], batch["global_2"]]) - 0.2) / 0.5)


def test_teacher__with_one_head_for_all_tokens(tmp_path: Path) -> None:
    shared = {"shared_head": True, "num_prototypes": 48, "patch_num_prototypes": 48}
    teacher, student = pair(tmp_path, shared, patch_num_prototypes=48)
    assert published(teacher, tmp_path)["heads"].keys() == {"head"}
    assert student.frozen is not None and student.frozen.patch_head is student.frozen.head
    assert student(images(), LATE).loss.isfinite()


@pytest.mark.parametrize(("student", "line"), [
    ({"num_prototypes": 32}, r"teacher's head has 48 prototypes, the student's 32; set objective.num_prototypes=48"),
    ({"patch_num_prototypes": 8}, r"patch_head has 40 prototypes, .* 8; set objective.patch_num_prototypes=40"),
    ({"mix_share": [0.5], "mix_global": [18], "mix_local": [6], "patch": 2}, r"cannot take images of 18 px"),
    ({"patch": 2}, r"patches of 4 px, the student of 2; set backbone.patch_size=4"),
    ({"in_chans": 1, "photometric": False}, r"sees 3 channels, the student 1; set backbone.in_chans=3"),
])  # fmt: skip
def test_teacher__that_does_not_fit_is_refused(student: dict[str, Any], line: str, tmp_path: Path) -> None:
    specs = published(small(), tmp_path)
    patch, in_chans = student.pop("patch", 4), student.pop("in_chans", 3)
    stats = {"pixel_mean": [0.5] * in_chans, "pixel_std": [0.5] * in_chans}
    backbone = create_backbone(
        "vit_small_patch16_dinov3_qkvb", image_size=16, patch_size=patch, in_chans=in_chans, options=STUDENT, **stats
    )
    objective = DINOv3(backbone, DINOv3Config(**SMALL | {"distill": True} | student))
    with pytest.raises(ObjectiveError, match=line) as refused:
        fill(objective, specs, tmp_path)
    assert "\n" not in str(refused.value)


def test_teacher__without_class_token_or_with_strange_heads_is_refused(tmp_path: Path) -> None:
    specs = published(small(), tmp_path)
    student = small(options=STUDENT, distill=True)
    backbone, heads = (student.companions()[f"frozen_{part}"] for part in ("backbone", "heads"))
    without = specs["backbone"] | {"name": "vit_base_patch16_siglip_224", "options": {}, "patch_size": 4}
    with pytest.raises(ObjectiveError, match="'vit_base_patch16_siglip_224' has no class token"):
        backbone.outline(without)
    backbone.outline(specs["backbone"])
    with pytest.raises(ObjectiveError, match="heads are not those of objective dinov3"):
        heads.outline({"projector": {"dim": 3}})
    with pytest.raises(ObjectiveError, match="takes tokens of 3 numbers, and its backbone has 64"):
        heads.outline({"head": specs["heads"]["head"] | {"dim": 3}})


def test_settings__no_anchor_beside_a_frozen_teacher() -> None:
    with pytest.raises(ObjectiveError, match=r"objective.distill and the anchor .*; set gram_weight=0"):
        small(distill=True, gram_weight=1.0)


def test_forward__without_weights_says_what_is_missing() -> None:
    with pytest.raises(ObjectiveError, match="no weights yet: give them with teacher_from"):
        small(distill=True)(images(), LATE)
