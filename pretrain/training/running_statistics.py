"""Running statistics of batch norms, which every forward pass moves by itself.

They are the one state that a step changes before it is known whether the step counts, and each rank's are of its own
samples. So they are put back after a step that is dropped, and averaged over the ranks after one that is not.
NOT here: the statistics that a batch is normalised with, which stay those of a rank's micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The running means and variances of all batch norms in some modules; there may be none."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        norms = [
            norm
            for module in modules
            for norm in module.modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
        ]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._before: list[torch.Tensor] = []

    def remember(self) -> None:
        """Keep the present values for `restore`."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        """Go back to what was remembered."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def average(self) -> None:
        """Give all ranks the mean of theirs. A collective over all ranks if there are any statistics."""
        moving = [buffer for buffer in self._buffers if buffer.is_floating_point()]  # the others count batches
        if moving and dist.get_world_size() > 1:
            flat = torch.cat([buffer.flatten() for buffer in moving])
            dist.all_reduce(flat)
            means = (flat / dist.get_world_size()).split([buffer.numel() for buffer in moving])
            for buffer, mean in zip(moving, means, strict=True):
                buffer.copy_(mean.view_as(buffer))
