"""With and without Gram anchoring, from the same weights, on the same photos: patches and scores of each checkpoint.

Each seed is run twice: stage `pretrain` of `dinov3_cifar10` shortened, then stage `gram` with the weight 2 or with one
that is as good as none, but has the anchor measured. Dense scores are the mIoU of linear segmentation of CamVid.

    python benchmarks/gram_anchoring.py CIFAR10 CAMVID [--seeds 0 1 2] [--steps 2000 1000] [--storage DIR] [--table]

CIFAR10 holds train-*.tar and test-*.tar of small photos, CAMVID those of photos with label maps. With --table nothing
is run: the runs in the storage are read again. An hour on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from pretrain.record.events import Evaluated, Metrics
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir

WEIGHTS = {"none": 1e-6, "anchor": 2.0}
DRIFTS = ("gram_drift", "cls_patch_cosine", "patch_cosine")


def run(name: str, seed: int, weight: float, arguments: argparse.Namespace) -> None:
    """Both stages; a run that has begun is gone on with, and one that is finished is left as it is."""
    before, after = arguments.steps
    gram = {
        "name": "gram",
        "teacher_from": "pretrain",
        "reset_optimizer": False,
        "objective": {"gram_weight": weight, "teacher_momentum": 0.98, "teacher_momentum_end": 0.98},
        "optimizer": {"lr": 1e-3, "warmup_steps": 10},
        "train": {"steps": after, "checkpoint_every": after // 2},
    }
    pretrain = {"name": "pretrain", "train": {"steps": before, "checkpoint_every": before // 2}}
    tasks = [
        {"protocol": "knn", "data": "cifar10"},
        {"protocol": "segmentation", "data": "camvid", "image_size": 96},
    ]
    settings = {
        "data.root": str(arguments.cifar10),
        "storage": str(arguments.storage),
        "train.seed": seed,
        "stages": [pretrain, gram],
        "evaluation.data": {"cifar10": str(arguments.cifar10), "camvid": str(arguments.camvid)},
        "evaluation.tasks": tasks,
        "evaluation.select": "knn/cifar10/top1",
    }
    texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "pretrain", "run", "dinov3_cifar10", "--run-id", name, *texts], check=True)


def rows(name: str, storage: Path) -> list[str]:
    """Of each checkpoint: drifts, the mean over the twentieth of the steps before it, and scores in percent."""
    run_dir = RunDir(storage / name)
    logged = [event for event in read_events(run_dir.journal)[0] if isinstance(event, Metrics)]
    scores: dict[int, dict[str, float]] = {}
    for event in read_events(run_dir.evaluations)[0]:
        if isinstance(event, Evaluated):
            scores.setdefault(event.step, {})[event.protocol] = 100 * event.metrics[event.headline.name]
    lines = []
    for step in sorted(scores):
        near = [event.values for event in logged if step - logged[-1].step / 20 < event.step <= step]
        seen = [[values[key] for values in near if key in values] for key in DRIFTS]
        cells = [f"{mean(values):.4f}" if values else "" for values in seen]
        found = [f"{scores[step][key]:.1f}" if key in scores[step] else "" for key in ("segmentation", "knn")]
        lines.append(f"| {name} | {step} | {' | '.join([*cells, *found])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=2, default=[2000, 1000], metavar=("BEFORE", "AFTER"))
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    names = {f"gram-{kind}-{seed}": (seed, kind) for seed in arguments.seeds for kind in WEIGHTS}
    if not arguments.table:
        for name, (seed, kind) in names.items():
            run(name, seed, WEIGHTS[kind], arguments)
    print(f"| run | step | {' | '.join(DRIFTS)} | mIoU, % | kNN, % |\n|---|---|---|---|---|---|---|")
    for name in names:
        print("\n".join(rows(name, arguments.storage)))


if __name__ == "__main__":
    main()
