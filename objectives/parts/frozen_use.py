"""What settings make of a frozen teacher, whose weights `teacher_from` names: told before any model is built.

Imports no torch. NOT here: the teacher itself (`objectives.parts.frozen_teacher`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

__all__ = ["FrozenTeacherConfig", "TeacherUse", "patches_unlike"]


class TeacherUse(NamedTuple):
    """Why an objective needs weights from a checkpoint.

    Attributes:
        setting, value: of the objective, that asks for it.
        role: what it is for the objective, such as "a teacher".
        without: a value of the setting that needs none; None: there is none.
        needs_heads: the checkpoint has to have heads beside its backbone.
    """

    setting: str
    value: Any
    role: str
    without: str | None = None
    needs_heads: bool = False


@dataclass
class FrozenTeacherConfig(ABC):
    """Settings of an objective that may learn from a frozen teacher."""

    teacher_settings: ClassVar[str]  # which settings do, in words

    @abstractmethod
    def teacher_use(self) -> TeacherUse | None:
        """What these settings need one for; None: for nothing."""

    def teacher_misfits(
        self, patch_size: int | None, teacher: Mapping[str, Any], heads: Mapping[str, Any] | None
    ) -> Iterator[str]:
        """Why a checkpoint cannot be the teacher, each with the setting that would fit; by default nothing is known.

        Args:
            patch_size: pixels of the student's; None: not known.
            teacher: `Encoder.spec` of its backbone, or as much of it as is known.
            heads: of what lies beside it, as `Objective.exported_heads` describes it; None without any.
        """
        yield from ()


def patches_unlike(role: str, found: int, own: int) -> str:
    """The mistake of patches of another size, in pixels, than the student's."""
    return f"the {role} has patches of {found} px, the student of {own}; set backbone.patch_size={found}"
