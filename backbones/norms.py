"""Norms that stay exact when an engine casts their parameters to bf16.

Two faults of bf16 parameters are met here, by giving the modules of a network a class that reads them wider:

* On CPUs, torch's backward of layer norms sums the gradients of weight and bias over all rows in bf16. The error of the
  bias's gradient, relative to float32, is 0.2 at 4160 rows and 0.66 at 16384. Such norms run in float32.
* Batch norms keep float32 statistics, and no kernel takes bf16 weights with them. They run with float32 weights.

Nothing changes for float32 parameters, for names in state dicts, or for `isinstance`. NOT here: norms that are neither
(group norms, root-mean-square norms), which torch computes as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["make_norms_exact"]


def make_norms_exact(network: nn.Module) -> None:
    """Lets all layer norms and batch norms inside `network` read their parameters as said above, in place."""
    for module in network.modules():
        mixin = next((mixin for kinds, mixin in _EXACT if isinstance(module, kinds)), None)
        if mixin is not None and not isinstance(module, _Exact):
            own: Any = type(module)
            module.__class__ = _exact(own, mixin)


class _Exact(nn.Module):
    """Mix-in before the class of a norm: `weight` and `bias` are float32 where `_is_wide` says so."""

    def _is_wide(self, parameter: Tensor) -> bool:
        raise NotImplementedError

    def _read(self, name: str) -> Any:
        parameter = self._parameters[name]
        return parameter.float() if parameter is not None and self._is_wide(parameter) else parameter

    @property
    def weight(self) -> Any:
        return self._read("weight")

    @property
    def bias(self) -> Any:
        return self._read("bias")


class _ExactLayerNorm(_Exact):
    def _is_wide(self, parameter: Tensor) -> bool:
        return parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        """As the norm's own, in float32 where either the input or the parameters are bf16 on a CPU."""
        is_narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        output: Tensor = super().forward(x.float() if is_narrow else x)
        return output.to(x.dtype)


class _ExactBatchNorm(_Exact):
    def _is_wide(self, parameter: Tensor) -> bool:
        return parameter.dtype == torch.bfloat16


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_EXACT: tuple[tuple[Any, Any], ...] = ((nn.LayerNorm, _ExactLayerNorm), (_BATCH_NORMS, _ExactBatchNorm))


@cache
def _exact(base: Any, mixin: Any) -> Any:
    return type(base.__name__, (mixin, base), {})
