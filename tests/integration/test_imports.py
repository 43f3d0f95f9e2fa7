"""What the processes of a run hold in memory at their end that they do not use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

AT_EXIT = """
import atexit, sys
sys.argv[1:] = {arguments}
unwanted = ("pandas", "matplotlib", *{more})
atexit.register(lambda: print("HOLDS", sorted(name for name in unwanted if sys.modules.get(name)), flush=True))
"""


def held(code: str, arguments: list[str], more: tuple[str, ...], **environment: str) -> str:
    """Run a program with arguments; what of the unwanted modules it has imported by its end."""
    script = AT_EXIT.format(arguments=arguments, more=more) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rpartition("HOLDS ")[2].strip()


@pytest.mark.long
def test_driver__holds_no_torch_and_no_pandas(recipe: Path, tmp_path: Path) -> None:
    short = ["train.steps=2", "optimizer.warmup_steps=1", "train.workers=1", "train.global_batch_size=8"]
    arguments = ["run", str(recipe), *short, "evaluation.baseline=false", f"storage={tmp_path}/runs"]
    # pyarrow is there: Ray imports it to register what it could serialize.
    code = "from pretrain.cli.main import console; console()"
    assert held(code, arguments, ("torch", "timm", "deepspeed")) == "[]"
    assert (tmp_path / "runs" / "mlflow.db").exists()


def test_worker__holds_neither_ray_nor_mlflow_nor_pandas(recipe: Path, tmp_path: Path) -> None:
    short = ["train.steps=2", "optimizer.warmup_steps=1", "train.workers=1", "train.global_batch_size=8"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    code = "from pretrain.worker import main; main()"
    arguments = [str(recipe), *short, "--run-dir", str(tmp_path / "run")]
    assert held(code, arguments, ("ray", "mlflow", "fastapi", "pyarrow"), **place) == "[]"
