"""Do the values that a run is given fit the mean and the deviation that its backbone expects?

An encoder subtracts the one and divides by the other. Of data in other units, such as a CT in Hounsfield units where a
recipe expects bytes, it makes numbers in the thousands, or hardly different ones: training goes on, and little is
learned.

Legend: n samples, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backbones.encoder import Encoder
from backbones.voxels.padding import inside
from data_pipelines.views.base import View
from data_pipelines.views.specs import views_from
from objectives.base import Objective

__all__ = ["scale_warning"]

# Of what an encoder has normalized. Channels of photos and of scans that fit have means within 3 and deviations of 0.2
# to 2.
_FAR = 5.0
_FLAT = 0.01
_MOST_SAMPLES = 8
_AXES = {"image": 2, "volume": 3}  # of a view of this kind, behind its channels


@torch.no_grad()
def scale_warning(
    objective: Objective, batch: Mapping[str, Tensor], fields: frozenset[str], device: torch.device
) -> str | None:
    """What is to be said of the first batch: the field, what it holds, and the settings; None where they fit.

    Args:
        objective: On `device`.
        batch: Views as a stream gives them.
        fields: Of all samples of the data.
    """
    for view in views_from(objective.views()):
        normalization = objective.backbone.normalization(view.kind)
        axes, is_checked = _AXES.get(view.kind), bool(getattr(view, "unit_channels", 0))  # by the view itself
        if normalization is None or axes is None or is_checked or view.name not in batch:
            continue
        stored = batch[view.name].flatten(0, -axes - 2)[:_MOST_SAMPLES].to(device)  # (n, C, ...)
        is_data = _is_data(view, batch, stored)
        shown = [_moments(values, is_data) for values in (normalization.apply(stored), stored)]
        far = [max(abs(mean), deviation) > _FAR or 0 < deviation < _FLAT for mean, deviation, _, _ in shown[0]]
        if any(far):
            channel = far.index(True)
            (mean, deviation, _, _), (mean_stored, deviation_stored, low, high) = (of[channel] for of in shown)
            which = f"channel {channel} of " if len(far) > 1 else ""
            return (
                f"{which}field {view.reads(fields).field} holds values from {low:.4g} to {high:.4g} (mean "
                f"{mean_stored:.4g}, deviation {deviation_stored:.4g}); "
                f"{_written(objective.backbone, normalization.settings)} make of them a mean of {mean:.4g} and a "
                f"deviation of {deviation:.4g}, and should make about 0 and 1: set them by `pretrain data stats`"
            )
    return None


def _is_data(view: View, batch: Mapping[str, Tensor], stored: Tensor) -> Tensor:
    """(n, ...) bool: what is no padding."""
    size = batch.get(f"{view.name}.size")
    if size is None:
        return torch.ones_like(stored[:, 0], dtype=torch.bool)
    return inside(size.flatten(0, -2)[:_MOST_SAMPLES].to(stored.device), stored.shape[2:])


def _moments(values: Tensor, is_data: Tensor) -> list[tuple[float, float, float, float]]:
    """Mean, deviation, least and greatest value of each channel."""
    found = []
    for channel in values.unbind(1):
        inner = channel[is_data].double()
        found.append((inner.mean().item(), inner.std(correction=0).item(), inner.min().item(), inner.max().item()))
    return found


def _written(encoder: Encoder, settings: tuple[str, ...]) -> str:
    """Settings of the backbone as a recipe writes them."""
    values: Mapping[str, Any] = encoder.spec.get("settings", encoder.spec)
    return " ".join(f"backbone.{key}={list(values[key])}" for key in settings)
