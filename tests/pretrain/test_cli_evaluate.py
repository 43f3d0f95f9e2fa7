"""`pretrain evaluate` on the command line: the score, and that test samples which were trained on say little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbones.io import save_backbone
from backbones.registry import create_backbone
from data_pipelines.packing.pack import pack
from pretrain.cli.main import main
from tests.pretrain.conftest import write_manifest


def test_evaluate__warns_of_test_samples_that_are_in_train(
    tmp_path: Path, make_checkpoint: Callable[[Path, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with official splits, of which `val` has two pictures of `train`, from packing to the score."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for number in range(count):
            picture = tmp_path / "photos" / split / ("ant", "bee")[number % 2] / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture)
    for number in (0, 1):
        name = f"{('ant', 'bee')[number]}/{number}.png"
        (tmp_path / "photos" / "val" / name).write_bytes((tmp_path / "photos" / "train" / name).read_bytes())
    with pytest.warns(UserWarning, match="2 samples of val have the content of some of train"):
        pack(tmp_path / "photos", tmp_path / "shards", workers=1)
    checkpoint = make_checkpoint(tmp_path / "run", 7)
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=options)
    save_backbone(checkpoint / "backbone.safetensors", backbone.timm_state_dict(), backbone.spec)
    write_manifest(checkpoint, 7, "run")
    data = f"photos={tmp_path / 'shards'}"
    arguments = ["evaluate", str(checkpoint), "--protocol", "knn", "--data", data]
    for _ in range(2):  # also when the result is known
        assert main([*arguments, "--storage", str(tmp_path / "runs")]) == 0
        assert capsys.readouterr().err == (
            "warning: 2 of 6 test samples of photos are in its train split, too; scores on them say little\n"
        )
