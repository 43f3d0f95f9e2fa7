"""A teacher: the moving average of student modules, in float32 whatever the student computes in.

    teacher <- m * teacher + (1 - m) * student     after each optimiser step (Tarvainen, Valpola, arXiv:1703.01780)

In bf16 the increments of m near 1 round to nothing, and ZeRO-3 empties parameters between steps. So the teacher is
kept out of the objective's module tree, where no engine finds it to cast or shard it: every rank holds it whole, and
updates it alike from what `read` makes of the student's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from objectives.schedules import half_cosine

__all__ = ["ReadWeight", "Teacher", "cosine_momentum"]

# The whole float32 value of a parameter, wherever an engine keeps it. A collective when it is sharded.
ReadWeight = Callable[[nn.Parameter], Tensor]


def cosine_momentum(start: float, step: int, total_steps: int) -> float:
    """Half a cosine from `start` to 1, which the last step does not quite reach (BYOL, arXiv:2006.07733)."""
    return half_cosine(start, 1.0, step / total_steps)


class Teacher:
    """Float32 copies of named student modules, without gradients, and without dropout and stochastic depth of any kind.

    The copies stay in training mode, so batch norms use the statistics of their own batch; their buffers are not
    averaged. Each copy is an attribute of the name that it was given.
    """

    def __init__(self, **students: nn.Module) -> None:
        self.modules = nn.ModuleDict({name: copy.deepcopy(student).float() for name, student in students.items()})
        self.modules.requires_grad_(False)
        _drop_nothing(self.modules)
        self._pairs = [
            (source, target)
            for name, student in students.items()
            for source, target in zip(student.parameters(), self.modules[name].parameters(), strict=True)
        ]

    def __getattr__(self, name: str) -> nn.Module:
        modules = self.__dict__.get("modules")
        if modules is None or name not in modules:
            raise AttributeError(f"the teacher has no {name}")
        return modules[name]

    def precision(self, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
        """Context in which the teacher computes as a student of this weight type does; the weights stay float32."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    @torch.no_grad()
    def update(self, momentum: float, read: ReadWeight) -> None:
        """Move towards the student; `momentum` in [0, 1] is the share that stays."""
        for source, target in self._pairs:
            target.lerp_(read(source).to(target), 1 - momentum)

    @torch.no_grad()
    def copy_from(self, read: ReadWeight) -> None:
        """Become the student, frozen parameters included."""
        self.update(0.0, read)

    def to(self, device: torch.device) -> None:
        """Move to a device; never to another type."""
        self.modules.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of all modules, by `MODULE.NAME`."""
        return self.modules.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore from `state_dict`, strictly."""
        self.modules.load_state_dict(state)


def _drop_nothing(network: nn.Module) -> None:
    """Sets all rates to 0 at which layers drop numbers, patches or branches in training mode.

    Evaluation mode would do the same and more: batch norms would use their running statistics, and some attention
    layers would cache biases that the next update changes.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, PatchDropout | PatchDropoutWithIndices):
            module.prob = 0.0
        for name, value in vars(module).items():  # `drop_prob`, `attn_drop_p`, `drop_rate`, ... of timm's layers
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
