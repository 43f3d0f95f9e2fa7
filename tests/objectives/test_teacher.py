"""A teacher computes the same twice, whatever its student drops, and its batch norms still see their own batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from backbones.registry import create_backbone
from objectives.teacher import Teacher

DROPPING = {"drop_path_rate": 0.4, "proj_drop_rate": 0.4, "attn_drop_rate": 0.4}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3, "pos_drop_rate": 0.4, **DROPPING},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), **DROPPING},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2, 2, 2), "proj_drop_rate": 0.4},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_teacher__drops_nothing(name: str) -> None:
    torch.manual_seed(0)
    student = create_backbone(name, image_size=224, options=NETWORKS[name])
    teacher = Teacher(backbone=student)
    x = torch.randn(2, 3, 224, 224)
    assert not torch.equal(student.features(x).patches, student.features(x).patches)
    assert torch.equal(teacher.backbone.features(x).patches, teacher.backbone.features(x).patches)  # type: ignore[operator]
    assert all(module.training for module in teacher.modules.modules())


def test_teacher__batch_norms_use_their_own_batch_and_attention_drops_nothing() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
            self.drop = nn.AlphaDropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            assert abs(x.mean().item()) < 1e-5  # that of the batch is taken off, and not the running one
            return self.drop(self.attention(x[None], x[None], x[None])[0])

    torch.manual_seed(0)
    student = Student()
    teacher = Teacher(student=student)
    x = 5 + torch.randn(16, 8)
    assert torch.equal(teacher.student(x), teacher.student(x))
    assert not torch.equal(student(x), student(x))
    assert student.drop.p == student.attention.dropout == 0.5
