"""What checkpoints score on real data, beside what raw pixels score by the same heads: one table row per score.

    python benchmarks/evaluation_scores.py DATA CHECKPOINT... [--only SET...] [--storage DIR]

DATA is a folder of data sets by name (`CASES`); `chair` comes with the package. CHECKPOINTs are directories of one run,
from its first step on, so that the first column is of a random encoder. In the place of an encoder raw pixels are what
`evaluation.floor` takes of them for pooled features, and 4 x 4 colors of each patch for maps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.features import ImageFeatures
from backbones.io import load_backbone
from evaluation import EvaluationData, evaluate
from evaluation.extraction.forward import Dense, labels_of, num_classes_of
from evaluation.extraction.frozen import Frozen
from evaluation.extraction.images import IMAGES
from evaluation.extraction.recipe import feature_recipe
from evaluation.floor import pixels_of
from evaluation.protocol import Metric, Protocol, format_interval, format_value
from evaluation.registry import load_head, protocol
from evaluation.runner import CPU_BATCH, architecture_of
from evaluation.threads import Threads

CHAIR = Path(__file__).parents[1] / "pretrain" / "demo_data" / "chair"
CPU = torch.device("cpu")
COLORS = 4  # along each side of a patch


class Case(NamedTuple):
    """A data set, the protocols for it, and the size of its images in pixels, (height, width); None: the backbone's."""

    data: str
    protocols: tuple[str, ...]
    image_size: tuple[int, int] | None = None


CASES = (
    Case("cifar10", ("knn", "linear", "ridge", "few_shot")),
    Case("photos_grocery", ("knn", "linear", "ridge", "logreg", "few_shot")),
    Case("camvid", ("patch_knn", "segmentation"), (120, 160)),
    Case("rgbd_7scenes", ("depth",), (120, 160)),
    Case("chair", ("discovery", "prompt_patch"), (96, 96)),
)


class Pixels(torch.nn.Module):
    """An encoder whose tokens are the colors of patches, brought to `COLORS` x `COLORS`."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def tokens(self, batch: Tensor) -> ImageFeatures:
        """Of images (B, 3, H, W) in bytes."""
        grid = (batch.shape[2] // self.patch_size, batch.shape[3] // self.patch_size)
        small = F.adaptive_avg_pool2d(batch.float() / 255 - 0.5, [COLORS * side for side in grid])
        return ImageFeatures(F.unfold(small, COLORS, stride=COLORS).transpose(1, 2), None, None, grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--only", nargs="+", default=[case.data for case in CASES], metavar="SET")
    parser.add_argument("--storage", type=Path, help="where features and results are kept; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        storage = arguments.storage or Path(scratch)
        names = [path.name for path in arguments.checkpoints]
        print(f"| set | protocol | n | raw pixels | {' | '.join(names)} | beside them |")
        print(f"|{' --- |' * (5 + len(names))}", flush=True)
        for case in CASES:
            if case.data in arguments.only:
                for name in case.protocols:
                    print(_row(case, protocol(name), arguments.data, arguments.checkpoints, storage), flush=True)


def _row(case: Case, spec: Protocol, root: Path, checkpoints: list[Path], storage: Path) -> str:
    data = EvaluationData(case.data, CHAIR if case.data == "chair" else root / case.data)
    asked: dict[str, Any] = {"store": storage, "image_size": case.image_size, "device": CPU, "threads": Threads(1)}
    results = [evaluate(path, spec.name, data, **asked) for path in checkpoints]
    cells = [_score(spec.headline, dict(result.metrics)) for result in results]
    floor = _score(spec.headline, _of_pixels(spec, data, checkpoints[0], case.image_size))
    last = results[-1]
    priors = [
        f"{metric.name} {format_value(last.metrics[metric.name], metric.unit)}"
        for metric in spec.metrics
        if metric.name.endswith(("_prior", "_whole_image", "auroc_position")) and metric.name in last.metrics
    ]
    edges = [path.name for path, result in zip(checkpoints, results, strict=True) if result.details.get("at_grid_edge")]
    notes = [*priors, *([f"end of the grid: {', '.join(edges)}"] if edges else [])]
    count = last.details.get("num_scored", last.details["num_test"])
    return f"| {case.data} | `{spec.name}` | {count} | {floor} | {' | '.join(cells)} | {'; '.join(notes)} |"


def _score(metric: Metric, metrics: dict[str, float]) -> str:
    bounds = [metrics.get(f"{metric.name}_ci_{end}") for end in ("low", "high")]
    value = format_value(metrics[metric.name], metric.unit)
    if bounds[0] is None or bounds[1] is None:
        return value
    return f"{value} ({format_interval(bounds[0], bounds[1], metric.unit)})"


def _of_pixels(
    spec: Protocol, data: EvaluationData, checkpoint: Path, image_size: tuple[int, int] | None
) -> dict[str, float]:
    """What the head of a protocol says of raw pixels, in patches of the same size as those of the checkpoint."""
    opened = data.open(spec, IMAGES.inputs)
    train: Any
    test: Any
    if spec.tokens == "pooled":
        train, test = pixels_of(opened, IMAGES.inputs, Threads(1))
        num_classes = num_classes_of(opened, spec.target_label, [train.labels, test.labels])
    else:
        recipe = feature_recipe(IMAGES, spec, architecture_of(checkpoint), image_size)
        encoder: Any = Pixels(int(load_backbone(checkpoint).patch_size))
        train, test = (
            Frozen(
                getattr(opened, split),
                encoder,
                labels_of(opened, split, IMAGES, recipe, spec.target_label),
                IMAGES,
                recipe,
                batch_size=CPU_BATCH,
                device=CPU,
                threads=Threads(1),
            )
            for split in ("train", "test")
        )
        if spec.tokens == "patches":
            train, test = _mapped(train), _mapped(test)
        num_classes = num_classes_of(opened, spec.target_label, [train.labels, test.labels])
    outcome = load_head(spec)(train, test, num_classes=num_classes, params=spec.params, seed=0, device=CPU)
    return dict(outcome.metrics)


def _mapped(split: Frozen) -> Dense[Any]:
    """What a protocol of maps is given of a split."""

    def take(batch: Tensor, _: range) -> dict[str, Tensor]:
        features = split.encoder.tokens(batch)
        assert features.grid is not None
        return {"patches": features.tokens.unflatten(1, features.grid).half()}

    return Dense(split.measure(take)["patches"].numpy(), split.labels)  # type: ignore[type-var]


if __name__ == "__main__":
    main()
