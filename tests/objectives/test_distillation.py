"""Distillation of features: a student's tokens against those of a teacher of another width and another grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.images.base import ImageEncoder
from backbones.registry import create_backbone
from objectives import contract
from objectives.base import Progress
from objectives.distillation.config import FeatureDistillationConfig
from objectives.distillation.objective import FeatureDistillation
from objectives.errors import ObjectiveError
from objectives.parts.token_grid import on_grid

LATE = Progress(step=900, total_steps=1000)
VIT = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def encoder(patch_size: int = 8, name: str = "vit_tiny_patch16_224", image: int = 32, **more: Any) -> ImageEncoder:
    options = (VIT if name.startswith("vit_tiny") else {}) | more.pop("options", {})
    return create_backbone(name, image_size=image, patch_size=patch_size, options=options, **more)


def taught(student: ImageEncoder, teacher: ImageEncoder, **config: Any) -> FeatureDistillation:
    objective = FeatureDistillation(
        student, FeatureDistillationConfig(**{"teacher_dim": teacher.embed_dim, "head_hidden_dim": 16} | config)
    )
    objective.frozen.outline(teacher.spec)
    network = objective.frozen.backbone.network
    network.load_state_dict(teacher.network.state_dict())
    return objective


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"image": torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "seed": torch.arange(4)}


def test_loss__follows_the_formula(batch: dict[str, Tensor]) -> None:
    """AM-RADIO, section 3.2, number by number, with the teacher's own pixel statistics and twice as fine a grid."""
    torch.manual_seed(0)
    teacher = encoder(4, options={"embed_dim": 32}, pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3).eval()
    objective = taught(encoder(), teacher, image_weight=2.0, patch_weight=3.0, length_share=0.25)
    found = objective(batch, LATE)

    with torch.no_grad():
        theirs = teacher.features((batch["image"] - 0.5) / 0.5)
        ours = objective.backbone.features(objective.backbone.normalized(batch["image"]))
        assert theirs.cls is not None and ours.cls is not None
        patches = on_grid(theirs.patches, (8, 8), (4, 4), "bilinear", antialias=True)
        image, seen = objective.head(ours.cls), objective.patch_head(ours.patches)
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())  # noqa: E731
    of_image = sum(1 - cosine(a, b) for a, b in zip(image, theirs.cls, strict=True)) / 4
    rows = list(zip(seen.flatten(0, 1), patches.flatten(0, 1), strict=True))
    direction = sum(1 - cosine(a, b) for a, b in rows) / len(rows)
    gaps = [abs(float(gap)) for a, b in rows for gap in a - b]
    length = sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)
    assert found.loss.item() == pytest.approx(2 * of_image + 3 * (0.75 * direction + 0.25 * length), rel=1e-5)
    assert float(found.metrics["image_distance"]) == pytest.approx(of_image, rel=1e-5)


def test_loss__is_nothing_where_the_student_says_what_the_teacher_does(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    student = encoder().eval()
    objective = taught(student, student)
    objective.head = objective.patch_head = torch.nn.Identity()
    assert objective(batch, LATE).loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("student", "teacher"), [
    ({}, {"options": {"embed_dim": 32}}),
    ({"name": "fastvit_t8", "patch_size": None}, {"patch_size": 4}),  # of feature maps, without class tokens
    ({}, {"name": "fastvit_t8", "patch_size": None}),
], ids=["vit", "of maps from vit", "vit from maps"])  # fmt: skip
def test_contract(student: dict[str, Any], teacher: dict[str, Any], check: Any, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    check(taught(encoder(**student), encoder(**teacher)), batch)


def test_after_step__moves_the_average_and_not_the_teacher() -> None:
    objective = taught(encoder(), encoder(), teacher_momentum=0.5)
    frozen = {name: tensor.clone() for name, tensor in objective.frozen.state_dict().items()}
    before = objective.exported.weights()["norm.weight"].clone()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1.0)
    objective.after_step(Progress(0, 1000), contract.read_weights)
    assert objective.exported is not objective.backbone
    torch.testing.assert_close(objective.exported.weights()["norm.weight"], before + 0.5)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in objective.frozen.state_dict().items())
    assert {name.partition(".")[0] for name in objective.extra_state()} == {"teacher"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (lambda: encoder(options={"embed_dim": 48}).spec, "tokens have 48 numbers; set objective.teacher_dim=48"),
        (lambda: {"name": "vit_tiny_patch16_224"}, "tokens have 192 numbers; set objective.teacher_dim=192"),
        (lambda: {"name": "vit_tinny_patch16_224"}, r"no model of timm's; did you mean 'vit_tiny_patch16_224'\?"),
        (lambda: encoder(in_chans=1, pixel_mean=[0.5], pixel_std=[0.5]).spec, "sees 1 channels, the student 3"),
        (lambda: encoder(5, image=35).spec, "teacher cannot take images of 32 px: .* not a multiple of patch_size 5"),
        (lambda: {}, "says which model it is; a timm model is timm:NAME@FILE"),
    ],
)
def test_outline__refuses_what_does_not_fit(spec: Any, says: str) -> None:
    objective = FeatureDistillation(encoder(), FeatureDistillationConfig(teacher_dim=24))
    with pytest.raises(ObjectiveError, match=says) as refused:
        objective.frozen.outline(spec())
    assert "\n" not in str(refused.value)
