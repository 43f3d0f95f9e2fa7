"""What point clouds score without any encoder: floors that learned features have to beat, by the same heads.

    python benchmarks/point_floors.py DIRECTORY          with train-*.tar and test-*.tar of points.npy and cls

Two descriptors of the cloud as an encoder would be given it (unit sphere, farthest points), neither of which knows
where a point lies: `radii`, the sorted distances to the center at 64 quantiles and the eigenvalues of the covariance;
`distances`, histograms of the distances between points and of those to the center (D2 and a shape histogram; Osada et
al. 2002, Ankerst et al. 1999). Both are classified by the heads of the protocols `knn`, `linear`, `svm` and `few_shot`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from evaluation import EvaluationData
from evaluation.data import class_label
from evaluation.extraction.forward import Pooled
from evaluation.extraction.points import POINTS
from evaluation.floor import distances
from evaluation.protocol import format_interval, format_value
from evaluation.registry import load_head, protocol

HEADS = ("knn", "linear", "svm", "few_shot")
NUM_POINTS = 1024
BINS = 64
Cloud = npt.NDArray[np.float64]


def radii(cloud: Cloud) -> Cloud:
    """(67,): quantiles of the distances to the center, and the eigenvalues of the covariance."""
    quantiles = np.quantile(np.linalg.norm(cloud, axis=1), np.linspace(0, 1, BINS))
    return np.concatenate((quantiles, np.linalg.eigvalsh(np.cov(cloud.T))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--num-points", type=int, default=NUM_POINTS)
    arguments = parser.parse_args()
    opened = EvaluationData("clouds", arguments.directory).open(protocol("knn"), POINTS.inputs)
    clouds: dict[str, list[Cloud]] = {}
    labels: dict[str, list[int]] = {}
    for split in ("train", "test"):
        dataset = getattr(opened, split)
        field = dataset.require_field(*POINTS.inputs)
        samples = [dataset.read(idx) for idx in range(dataset.num_samples)]
        prepared = [POINTS.prepare(sample[field], {"num_points": arguments.num_points}) for sample in samples]
        clouds[split] = [np.asarray(cloud, np.float64)[:, :3] for cloud in prepared]
        labels[split] = [class_label(sample, opened.classes) for sample in samples]
    num_classes = opened.num_classes or 1 + max(map(max, labels.values()))
    for descriptor in (radii, distances):
        splits = {
            split: Pooled(
                cls=None,
                patch_mean=torch.from_numpy(np.stack([descriptor(cloud) for cloud in clouds[split]])).float(),
                labels=torch.tensor(labels[split]),
            )
            for split in clouds
        }
        for name in HEADS:
            spec = protocol(name)
            settings = {"num_classes": num_classes, "params": spec.params, "seed": 0, "device": torch.device("cpu")}
            metrics = load_head(spec)(splits["train"], splits["test"], **settings).metrics
            headline = spec.headline
            bounds = [metrics[f"{headline.name}{suffix}"] for suffix in ("_ci_low", "_ci_high")]
            interval = format_interval(bounds[0], bounds[1], headline.unit)
            value = format_value(metrics[headline.name], headline.unit)
            print(f"{descriptor.__name__:<10} {name:<9} {headline.name:<11} {value:>6}  ({interval})", flush=True)


if __name__ == "__main__":
    main()
