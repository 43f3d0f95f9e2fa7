"""MAE to which something happens within a step, when a file says so. Its losses are those of `mae`.

Tests register it as the objective `faulty` (`register`) and write two files into its folder `control`: `hold` with the
number of a step, in which rank 0 waits until the file says another one, and `order` with `RANK WORD`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from objectives.base import Output, Progress
from objectives.mae.config import MAEConfig
from objectives.mae.objective import MAE

__all__ = ["Faulty", "FaultyConfig", "register"]

_LOOK_S = 0.02
_PIECE = 64 * 2**20
_MOST = 10 * 2**30  # bytes: who should have ended the process before has not


@dataclass
class FaultyConfig(MAEConfig):
    name: str = "faulty"
    control: str = field(default="", metadata={"help": "folder of the files that are obeyed"})


class Faulty(MAE):
    """Words: `sleep` for an hour, `refuse` with a ValueError, `allocate` until somebody ends the process."""

    Config: ClassVar[type] = FaultyConfig
    config: FaultyConfig

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        rank, control = os.environ["RANK"], Path(self.config.control)
        while True:
            if (control / "order").exists():
                whose, word = (control / "order").read_text().split()
                if whose == rank:
                    (control / "order").unlink()
                    _obey(word)
            if rank != "0" or progress.step + 1 != int((control / "hold").read_text()):
                return super().forward(batch, progress)
            time.sleep(_LOOK_S)


def _obey(word: str) -> None:
    if word == "refuse":
        raise ValueError("no step fits this setting")
    held: list[Any] = []
    while word == "allocate" and len(held) * _PIECE < _MOST:
        held.append(b"\1" * _PIECE)
        time.sleep(_LOOK_S)
    time.sleep(3600)


def register(folder: Path) -> None:
    """For processes whose path of modules has `folder` and this repository."""
    info = folder / "faulty-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[pretrain.objectives]\nfaulty = {__name__}:Faulty\n")
