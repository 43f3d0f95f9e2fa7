"""What each objective makes of the same minutes: probes at the start and at each checkpoint of the CIFAR-10 recipes.

Runs the recipes one after the other, each sized to about thirty minutes on two quiet cores, and prints a table: a run
that was interrupted is gone on with (`pretrain resume`) before. Raw pixels are evaluated beside them: 10 nearest
neighbours (cosine, temperature 0.07) of photos shrunk to 16 x 16, less the mean photo.

    python benchmarks/objectives_cifar10.py DIR [--objectives mae dino ...] [--storage DIR] [--table] [key=value ...]

DIR holds train-*.tar and test-*.tar with members KEY.jpg (or png) and KEY.cls. Overrides such as train.seed=1 go to all
recipes. With --table nothing is run: the newest runs in the storage are read again.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from pathlib import Path

from pretrain.record.events import Evaluated, Metrics
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir

OBJECTIVES = ("mae", "gmml", "sit", "dino", "selfpatch", "ibot", "dinov3")


def row(objective: str, storage: Path) -> str:
    """The newest run of an objective's recipe: minutes of steps, images seen, and scores of its steps in percent."""
    run = RunDir(max(storage.glob(f"{objective}_cifar10-*"), key=lambda path: path.stat().st_mtime))
    steps = [event for event in read_events(run.journal)[0] if isinstance(event, Metrics)]
    # Until the first logged step, a run also starts; that is left out of its time.
    minutes = (steps[-1].time - steps[0].time) / 60 * steps[-1].step / (steps[-1].step - steps[0].step)
    scores: dict[str, dict[int, float]] = {"linear": {}, "knn": {}}
    for event in read_events(run.evaluations)[0]:
        if isinstance(event, Evaluated):
            scores[event.protocol][event.step] = 100 * event.metrics["top1"]
    course = [" / ".join(f"{scores[probe][step]:.1f}" for step in sorted(scores[probe])) for probe in ("linear", "knn")]
    return f"| {objective} | {minutes:.1f} | {steps[-1].values['samples_seen']} | {' | '.join(course)} |"


def raw_pixels(data: Path) -> float:
    """kNN accuracy of thumbnails in percent."""
    import numpy as np
    import torch
    from PIL import Image

    from data_pipelines.shards.dataset import open_dataset
    from evaluation.protocols.knn.score import vote

    def split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        dataset = open_dataset(data / f"{name}-*.tar")
        samples = [dataset.read(sample_id) for sample_id in range(dataset.num_samples)]
        photos = [Image.open(io.BytesIO(sample.get("jpg") or sample["png"])) for sample in samples]
        pixels = np.stack([np.asarray(photo.convert("RGB").resize((16, 16)), np.float32).ravel() for photo in photos])
        return torch.from_numpy(pixels), torch.tensor([int(sample["cls"]) for sample in samples])

    (known, classes), (asked, truth) = split("train"), split("test")
    mean = known.mean(0)
    votes = vote(known - mean, classes, asked - mean, num_classes=10, ks=[10], temperature=0.07)[10]
    return 100 * (votes.argmax(1) == truth).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_intermixed_args()
    for objective in () if arguments.table else arguments.objectives:
        command = [sys.executable, "-m", "pretrain", "run", f"{objective}_cifar10", f"data.root={arguments.data}"]
        subprocess.run([*command, f"storage={arguments.storage}", *arguments.overrides], check=True)
    print("| objective | minutes | images | linear, % | kNN, % |\n|---|---|---|---|---|")
    for objective in arguments.objectives:
        print(row(objective, arguments.storage))
    print(f"raw pixels, kNN: {raw_pixels(arguments.data):.1f} %")


if __name__ == "__main__":
    main()
