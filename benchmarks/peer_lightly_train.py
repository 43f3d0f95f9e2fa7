"""The job of `job_cost.py --peers` by lightly-train: DINO on a folder of pictures, one epoch, to an exported backbone.

Started by the interpreter that has it (`--peer-python`); imports nothing of this repository.

    python benchmarks/peer_lightly_train.py PICTURES OUT [--batch 100]

The file OUT.started is made after the first optimizer step. The backbone is in OUT/exported_models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightly_train
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = Path(f"{arguments.out}.started")
    register_optimizer_step_post_hook(lambda *_: started.touch())
    lightly_train.pretrain(
        out=arguments.out,
        data=arguments.pictures,
        model="timm/vit_tiny_patch16_224",
        model_args={"pretrained": False, "img_size": 64},
        method="dino",
        method_args={"output_dim": 1024},
        transform_args={"image_size": (64, 64), "local_view": {"num_views": 6, "view_size": (32, 32)}},
        epochs=1,
        batch_size=arguments.batch,
        num_workers=1,
        devices=1,
        accelerator="cpu",
        precision="32-true",
        seed=0,
    )


if __name__ == "__main__":
    main()
