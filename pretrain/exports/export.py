"""`export`: the backbone of a checkpoint as timm, Hugging Face, ONNX, TorchScript or plain safetensors take it.

What is written is made aside, loaded back and compared with the backbone, and only then put in its place: what is there
works, and nothing half-written is ever there. Importing this imports no torch.

Not here: what each form holds (`folders`, `graphs`); references to checkpoints (`pretrain.checkpoints.references`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.files import flush_to_disk
from data_pipelines.parsing import parse_json
from pretrain.checkpoints.references import resolve
from pretrain.errors import RequestError, RunFailed
from pretrain.record.destinations import nearest_above, require_local
from pretrain.record.remote_runs import brought
from pretrain.record.run_dir import MANIFEST

if TYPE_CHECKING:
    from backbones.encoder import Encoder

__all__ = ["FORMATS", "export"]

# format -> what DEST is
FORMATS = {
    "timm": "a folder",
    "hf": "a folder",
    "safetensors": "a file",
    "onnx": "a file",
    "torchscript": "a file",
}


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        backbone: with its weights, in evaluation mode.
        manifest: `checkpoint.json`.
    """

    backbone: Encoder
    manifest: Mapping[str, Any]


def export(
    checkpoint: str | os.PathLike[str],
    format: str,
    dest: str | os.PathLike[str],
    *,
    storage: str | os.PathLike[str] = "runs",
) -> Path:
    """Write the backbone of a checkpoint in another form.

    Args:
        checkpoint: A directory or URI, `runs:/ID[/step]` or `models:/NAME@ALIAS`.
        format: `timm`: a folder for `timm.create_model("local-dir:DEST", pretrained=True)`. `hf`: the same with a model
            card, as a repository of the Hugging Face hub. `safetensors`: weights with timm's names, the architecture
            in the header. `onnx`, `torchscript`: a graph from `images`, float32 (B, C, H, W) as `preprocess` gives
            them with any B and the size that the backbone was trained for, to `patches` (B, N, D) and, where the
            backbone has them, `cls` (B, D) and `registers` (B, R, D).
        dest: The folder or file to make; it must not exist, nor may a folder with something in it.
        storage: Where runs live, a directory or URI.

    Returns:
        `dest`, absolute.

    Raises:
        RequestError: An unknown checkpoint or format, a missing package, `dest` in use or not to be written, a backbone
            that has no such form.
        RunFailed: The form cannot be made, or does not compute what the backbone does.
    """
    place = require_local(dest, "an export")
    _check_request(format, place, os.fspath(dest))
    directory = resolve(os.fspath(checkpoint), brought(storage))
    from backbones.io import load_backbone

    source = Source(load_backbone(directory), parse_json((directory / MANIFEST).read_text(encoding="utf-8")))
    _write_whole(place, lambda aside: _writer(format)(source, aside))
    return place


def _check_request(format: str, dest: Path, text: str) -> None:
    if format not in FORMATS:
        raise RequestError(f"format {format}: unknown; known are {', '.join(FORMATS)}")
    if dest.is_symlink() or (dest.exists() and not (_is_folder(format) and dest.is_dir() and not os.listdir(dest))):
        kind = "an empty folder" if _is_folder(format) else "a new file"
        raise RequestError(f"{text}: already exists; choose another destination or remove it ({kind} is wanted)")
    if format == "onnx" and (lacking := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise RequestError(f"format onnx needs {' and '.join(lacking)}; install with: pip install 'pretrain[onnx]'")


def _is_folder(format: str) -> bool:
    return FORMATS[format] == "a folder"


def _writer(format: str) -> Callable[[Source, Path], None]:
    if format in ("timm", "hf"):
        from pretrain.exports.folders import write_hf, write_timm

        return write_timm if format == "timm" else write_hf
    from pretrain.exports.graphs import write_onnx, write_torchscript

    return {"onnx": write_onnx, "torchscript": write_torchscript, "safetensors": _write_safetensors}[format]


def _write_safetensors(source: Source, aside: Path) -> None:
    import torch

    from backbones.io import load_backbone, save_backbone

    weights = source.backbone.weights()
    save_backbone(aside, weights, source.backbone.spec)
    loaded = load_backbone(aside).weights()
    if any(not torch.equal(loaded[name], weights[name]) for name in weights):
        raise RunFailed("the file that was written holds other weights; is the disk failing?")


def _write_whole(dest: Path, write: Callable[[Path], None]) -> None:
    """Have `write(aside)` make, on the file system of `dest`, what then becomes `dest`; a failure leaves nothing."""
    room = Path(tempfile.mkdtemp(prefix=".export-", dir=nearest_above(dest)))
    try:
        aside = room / "made"  # not the name of `dest`, which not every library could write to
        write(aside)
        for path in [aside, *aside.rglob("*")]:
            flush_to_disk(path)
        dest.parent.mkdir(parents=True, exist_ok=True)
        if aside.is_dir():
            aside.rename(dest)  # an empty folder gives way, any other is refused by the system
        else:
            os.link(aside, dest)  # a file that came to be meanwhile is refused by the system
    finally:
        shutil.rmtree(room, ignore_errors=True)
