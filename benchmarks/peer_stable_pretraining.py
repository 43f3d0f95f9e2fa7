"""The job of `job_cost.py --peers` by stable-pretraining: DINO on a folder of pictures, one epoch, to saved weights.

Started by the interpreter that has it (`--peer-python`); imports nothing of this repository. stable-pretraining exports
no backbone by itself: the teacher's weights are saved as its users would, to OUT/exported_models/backbone.pt. Gray,
colors, blur and solarization are those of DINO's paper, as in the other jobs.

    python benchmarks/peer_stable_pretraining.py PICTURES OUT [--batch 100]

The file OUT.started is made after the first optimizer step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as pl
import stable_pretraining as spt
import torch
from PIL import Image
from stable_pretraining.data import transforms
from stable_pretraining.methods import DINO
from torch.optim.optimizer import register_optimizer_step_post_hook

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures(torch.utils.data.Dataset):
    """The JPEGs of a folder, and its views of each."""

    def __init__(self, folder: Path, views: Any) -> None:
        self.paths, self.views = sorted(folder.glob("*.jpg")), views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, idx: int) -> Any:
        return self.views({"image": Image.open(self.paths[idx]).convert("RGB")})


def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
    """A crop and its distortion."""
    return transforms.Compose(
        transforms.RandomResizedCrop((size, size), scale=scale),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.PILGaussianBlur(p=blur),
        transforms.RandomSolarize(threshold=128, p=solarize),
        transforms.ToImage(mean=MEAN, std=STD),
    )


class Job(DINO):
    """DINO as its module wants it: a batch of named views in, a dictionary with the loss out."""

    def forward(self, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        crops = {name: views["image"] for name, views in batch.items() if isinstance(views, dict)}
        large = [image for name, image in crops.items() if name.startswith("global")]
        small = [image for name, image in crops.items() if name.startswith("local")]
        return {"loss": super().forward(global_views=large, local_views=small).loss}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = Path(f"{arguments.out}.started")
    register_optimizer_step_post_hook(lambda *_: started.touch())
    views = {"global_0": view(64, (0.14, 1.0), 1.0, 0.0), "global_1": view(64, (0.14, 1.0), 0.1, 0.2)}
    views |= {f"local_{number}": view(32, (0.05, 0.14), 0.5, 0.0) for number in range(6)}
    data = Pictures(arguments.pictures, transforms.MultiViewTransform(views))
    loader = torch.utils.data.DataLoader(
        data, batch_size=arguments.batch, num_workers=1, shuffle=True, drop_last=True, persistent_workers=True
    )
    job = Job(
        "vit_tiny_patch16_224",
        n_prototypes=1024,
        encoder_kwargs={"img_size": 64, "dynamic_img_size": True},
    )
    job.optim = {"optimizer": {"type": "AdamW", "lr": 5e-4 * arguments.batch / 256, "weight_decay": 0.04}}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=arguments.out,
        num_sanity_val_steps=0,
    )
    spt.Manager(trainer=trainer, module=job, data=spt.data.DataModule(train=loader))()
    exported = arguments.out / "exported_models"
    exported.mkdir(parents=True, exist_ok=True)
    torch.save(job.backbone.teacher.state_dict(), exported / "backbone.pt")


if __name__ == "__main__":
    main()
