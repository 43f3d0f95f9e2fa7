"""Sinkhorn-Knopp: a teacher's logits as distributions over prototypes that together use all prototypes equally.

M. Cuturi, 2013, arXiv:1306.0895; as targets of self-distillation in SwAV (M. Caron et al., 2020, arXiv:2006.09882,
section 3.1) and DINOv2 (M. Oquab et al., 2023, arXiv:2304.07193). In logarithms: exp(logit / temperature) overflows as
soon as a logit is 89 times the temperature, and a prototype that nobody is near gives 0 / 0.

Legend: n rows of this rank (which may differ between ranks, and may be 0), K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.precision import at_least_float32
from objectives.distributed import max_over_ranks, total_over_ranks

__all__ = ["sinkhorn_knopp"]


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Targets (n, K) of logits (n, K), in at least float32; each sums to 1, prototypes have about equal shares.

    Every rank makes 2 collectives of K numbers per iteration, also one without rows.
    """
    log_q = at_least_float32(logits) / temperature
    for _ in range(num_iterations):
        log_q = log_q - _log_share_of_prototypes(log_q)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


def _log_share_of_prototypes(log_q: Tensor) -> Tensor:
    """logsumexp over the rows of all ranks, (K,)."""
    lowest = log_q.new_full((1, log_q.shape[1]), -torch.inf)  # so that there is a maximum of no rows
    top = max_over_ranks(torch.cat([lowest, log_q]).amax(dim=0))  # (K,)
    return top + total_over_ranks((log_q - top).exp().sum(dim=0)).log()
