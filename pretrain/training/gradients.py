"""The gradient of a step, when its backward passes are done: its mean over the ranks, and its norms.

Each rank looks at what it holds once: all of the mean gradient in ZeRO stage 0, its own share of it in stages 1 to 3,
whose squares are then added over the ranks in one small collective. DeepSpeed averages in stages 1 to 3; in stage 0 its
way copies every gradient twice, and does so for a single rank, too.

Not here: what the norms decide (`pretrain.training.engine`), who holds which share
(`pretrain.training.deepspeed_internals`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training import deepspeed_internals
from pretrain.training.torch_internals import norms_of

__all__ = ["Gradients"]


class Gradients:
    """The gradients of a module's trainable parameters between the last backward pass of a step and its update.

    Args:
        module: Trained by DeepSpeed.
        part_of: Name of a parameter -> the part of the module that norms are told of.
        stage: The ZeRO stage.
        bucket_elements: Most numbers that travel in one message.
    """

    def __init__(self, module: nn.Module, part_of: Callable[[str], str], stage: int, bucket_elements: int) -> None:
        self._parts: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._parts[part_of(name)].append(parameter)
        self._parameters = [parameter for part in self._parts.values() for parameter in part]
        self._stage, self._bucket_elements = stage, bucket_elements

    @torch.no_grad()
    def average(self) -> None:
        """Stage 0: from each rank's own gradients to their mean on all ranks. A collective when there are several.

        A parameter that took no part in this rank's step has gradient 0, as it has in the other stages.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        num_ranks = dist.get_world_size()
        if num_ranks == 1:
            return
        for bucket in self._buckets():
            flat = torch.cat([parameter.grad.flatten() for parameter in bucket])  # type: ignore[union-attr]
            dist.all_reduce(flat)
            means = flat.div_(num_ranks).split([parameter.numel() for parameter in bucket])
            for parameter, mean in zip(bucket, means, strict=True):
                parameter.grad = mean.view_as(parameter)

    def _buckets(self) -> Iterator[list[nn.Parameter]]:
        """All parameters in order, in lists of about `bucket_elements` numbers at most."""
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in self._parameters:
            if bucket and size + parameter.numel() > self._bucket_elements:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Euclidean norms of the mean gradient, scalars on the device and the same on all ranks.

        "grad_norm" of everything and, where the module has several parts, "grad_norm/PART" of each. They are not
        finite where a gradient is not. A collective in stages 1 to 3.
        """
        squares = torch.stack([self._own_square(part) for part in self._parts.values()])  # (parts,)
        if self._stage > 0:
            dist.all_reduce(squares)  # all ranks: shares do not overlap
        norms = dict(zip(self._parts, squares.sqrt(), strict=True))
        parts = {f"grad_norm/{part}": norm for part, norm in norms.items()} if len(norms) > 1 else {}
        return {"grad_norm": squares.sum().sqrt(), **parts}

    @torch.no_grad()
    def clip_parts(self, norms: Mapping[str, Tensor], bound: float) -> None:
        """Scale each part whose norm is above `bound` down to it, for itself and without waiting for the device.

        Args:
            norms: What `norms` has given.
            bound: Of the norm of a part.
        """
        for part, parameters in self._parts.items():
            norm = norms.get(f"grad_norm/{part}", norms["grad_norm"])
            factor = (bound / (norm + 1e-6)).clamp_max(1.0)  # as torch's clip_grad_norm_
            if self._stage == 0:
                torch._foreach_mul_([share for share in map(self._share, parameters) if share is not None], factor)
                continue
            for parameter in parameters:
                deepspeed_internals.scale_gradient(parameter, factor)

    def _own_square(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Square of the norm of what this rank holds of the gradients of some parameters."""
        shares = [self._share(parameter) for parameter in parameters]
        held = [share for share in shares if share is not None]
        return norms_of(held).square().sum() if held else torch.zeros((), device=parameters[0].device)

    def _share(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad if self._stage == 0 else deepspeed_internals.gradient_share(parameter)
