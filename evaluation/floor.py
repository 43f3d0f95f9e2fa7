"""What samples score without any backbone, by the head that one is evaluated with: no better is worth nothing.

Of images their pixels, brought to `SIDE` x `SIDE` and taken as they are: at 16 pixels CIFAR-10 photos score as high as
at 32 by nearest neighbors and a linear layer, for a quarter of the cost. Of clouds histograms of the distances between
points and of those to the center (D2 of Osada et al. 2002 and a shape histogram of Ankerst et al. 1999), which do not
know where a point lies. A protocol of pooled features has such a floor if it has a metric `HEADLINE_pixels` or
`HEADLINE_distances`. It depends on data and protocol alone, so it is computed once.

Not here: floors that protocols compute themselves, such as what the place in an image alone scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipelines.decode import decode_array, decode_image
from data_pipelines.shards.dataset import Dataset
from data_pipelines.views.crops import eval_view
from data_pipelines.views.kinds.points import shape_in_float32
from evaluation.data import OpenedData, class_label
from evaluation.extraction.forward import Pooled
from evaluation.protocol import Protocol
from evaluation.threads import Threads

__all__ = ["Floor", "distances", "floor_of", "is_small"]

SIDE = 16
BINS = 64
MOST_POINTS = 512  # of a cloud with more every second, third ... is taken: histograms want no more
MOST_SAMPLES = 50_000  # for training; of more, floors take longer than most backbones


@dataclass(frozen=True)
class Floor:
    """A way to describe samples of one kind without a backbone.

    Attributes:
        name: Behind the name of the metric that says what it scores, and in the place of a digest of weights.
        facts: What decides the vectors besides the data.
        describe: The vector (D,) float32 of the content of a sample's input field.
    """

    name: str
    facts: Mapping[str, Any]
    describe: Callable[[Any], Tensor]

    def key_facts(self, data: OpenedData) -> dict[str, Any]:
        """What decides the features, in the place of weights, recipe and data."""
        return {"weights": self.name, "features": dict(self.facts), "data": data.digest}

    def splits_of(self, data: OpenedData, inputs: tuple[str, ...], threads: Threads) -> tuple[Pooled, Pooled]:
        """Both splits as heads take them, the vectors in the place of the mean of patches."""
        train, test = (_split(getattr(data, split), data, self, inputs, threads) for split in ("train", "test"))
        return train, test


def floor_of(spec: Protocol, kind: str) -> Floor | None:
    """The floor that a protocol has for backbones of a kind, where data are small enough."""
    floor = _FLOORS.get(kind)
    if floor is None or spec.tokens != "pooled":
        return None
    return floor if f"{spec.headline.name}_{floor.name}" in {metric.name for metric in spec.metrics} else None


def is_small(data: OpenedData) -> bool:
    """Whether a floor of the data is computed at all."""
    return data.train.num_samples <= MOST_SAMPLES


def distances(xyz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Histograms of the distances between points (N, 3) of the unit sphere and to its center, as shares (2 * BINS,)."""
    squares = (xyz**2).sum(axis=1)
    between = squares[:, None] + squares - 2 * xyz @ xyz.T
    pairs = np.sqrt(between[np.triu_indices(len(xyz), 1)].clip(0))
    counts = [np.histogram(pairs, BINS, (0, 2))[0], np.histogram(np.sqrt(squares), BINS, (0, 1))[0]]
    return np.concatenate([count / max(1, count.sum()) for count in counts])


def _pixels(content: Any) -> Tensor:
    """(3 * SIDE * SIDE,) in [0, 1]."""
    return eval_view(decode_image(content), SIDE).flatten().float() / 255


def _distances(content: Any) -> Tensor:
    """Of at most `MOST_POINTS`, whose center is their mean, and the farthest of which is at distance 1."""
    cloud = shape_in_float32(decode_array(content)[:, :3]).astype(np.float64)
    cloud = cloud[:: -(-len(cloud) // MOST_POINTS)]
    cloud -= cloud.mean(axis=0)
    radius = float(np.sqrt((cloud**2).sum(axis=1).max()))
    return torch.from_numpy(distances(cloud / (radius or 1.0))).float()


# by kind of backbone
_FLOORS = {
    "image": Floor("pixels", {"side": SIDE}, _pixels),
    "points": Floor("distances", {"bins": BINS, "points": MOST_POINTS}, _distances),
}


def _split(dataset: Dataset, data: OpenedData, floor: Floor, inputs: tuple[str, ...], threads: Threads) -> Pooled:
    field = dataset.require_field(*inputs)
    rows: list[Tensor] = []
    labels = torch.empty(dataset.num_samples, dtype=torch.int64)

    def read() -> None:
        for number in range(dataset.num_samples):
            sample = dataset.read(number)
            labels[number] = class_label(sample, data.classes)
            rows.append(floor.describe(sample[field]))

    threads.run(read)
    return Pooled(cls=None, patch_mean=torch.stack(rows), labels=labels)
