"""A teacher: the moving average of student modules, in float32 whatever the student computes in.

    teacher <- m * teacher + (1 - m) * student     after each optimizer step (Tarvainen, Valpola, arXiv:1703.01780)

In bf16 the increments of m near 1 round to nothing, and ZeRO-3 empties parameters between steps. So the teacher is
kept out of the objective's module tree, where no engine finds it to cast or shard it: every rank holds it whole, and
updates it alike from what `read` makes of the student's parameters. Under ZeRO-3 each rank holds a share of it, cut as
the student is, and moves that by its own share of the student: nothing travels for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from objectives.companions import Companion
from objectives.schedules import half_cosine

__all__ = ["ReadWeights", "Teacher", "cosine_momentum"]

# Numbers that are read and moved at a time. Between GPUs each message costs latency: few large ones, of at most 128
# MiB. On CPUs they go through memory, and pieces that stay in the cache are faster (`benchmarks/teacher_update.py`).
_CHUNK = {"cpu": 2**22}
_LARGE_CHUNK = 2**25


class ReadWeights(Protocol):
    """The float32 values of a student's parameters, wherever an engine keeps them."""

    def __call__(self, parameters: Sequence[nn.Parameter], *, shares: bool = False) -> list[Tensor]:
        """All ranks ask for the same parameters, in the same order.

        Args:
            parameters: of the student.
            shares: of each this rank's share as `objectives.shards` cuts it, which costs nothing where an engine shards
                parameters, instead of the whole value, which is a collective there.
        """


def cosine_momentum(start: float, step: int, total_steps: int) -> float:
    """Half a cosine from `start` to 1, which the last step does not quite reach (BYOL, arXiv:2006.07733)."""
    return half_cosine(start, 1.0, step / total_steps)


class Teacher(Companion):
    """Float32 copies of named student modules, without gradients, and without dropout and stochastic depth of any kind.

    The copies stay in training mode, so batch norms use the statistics of their own batch; their buffers are not
    averaged. Each copy is an attribute of the name that it was given. A training state has all of it.

    Attributes:
        modules: the copies by name.
    """

    def __init__(self, **students: nn.Module) -> None:
        self.modules = nn.ModuleDict({name: copy.deepcopy(student).float() for name, student in students.items()})
        super().__init__(self.modules, filled="student", moves="ema", saved="whole")
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
    def update(self, momentum: float, read: ReadWeights) -> None:
        """Move towards the student; `momentum` in [0, 1] is the share that stays."""
        move = get_ema_multi_avg_fn(momentum)
        whole = [pair for pair in self._pairs if self.share_of(pair[1]) is pair[1]]
        for sources, targets in _chunks(whole):
            move(targets, [value.to(target) for value, target in zip(read(sources), targets, strict=True)], 0)
        shares = [
            (source, self.share_of(target)) for source, target in self._pairs if self.share_of(target) is not target
        ]
        for sources, targets in _chunks(shares):
            values = read(sources, shares=True)
            move(targets, [value.to(target) for value, target in zip(values, targets, strict=True)], 0)

    @torch.no_grad()
    def copy_student(self) -> None:
        """Become the student, frozen parameters included, before an engine has either."""
        for source, target in self._pairs:
            target.copy_(source)


def _chunks(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[tuple[list[nn.Parameter], list[Tensor]]]:
    """Sources and targets of about `_CHUNK` numbers each, in order."""
    chunk: list[tuple[nn.Parameter, Tensor]] = []
    largest = _CHUNK.get(pairs[0][1].device.type, _LARGE_CHUNK) if pairs else 0
    size = 0
    for pair in pairs:
        if chunk and size + pair[1].numel() > largest:
            yield [source for source, _ in chunk], [target for _, target in chunk]
            chunk, size = [], 0
        chunk.append(pair)
        size += pair[1].numel()
    if chunk:
        yield [source for source, _ in chunk], [target for _, target in chunk]


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
