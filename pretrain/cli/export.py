"""`pretrain export` and `pretrain embed`: a checkpoint's backbone, and what it sees, for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from pretrain.screen import say

__all__ = ["export"]

_storage = click.option("--storage", metavar="DIR", default="runs", show_default=True, help="Directory of the runs.")


@click.command()
@click.argument("checkpoint")
@click.argument("dest")
@click.option(
    "--format",
    "form",
    type=click.Choice(("timm", "safetensors", "onnx", "torchscript", "hf")),
    required=True,
    help="timm and hf make a folder, the others a file.",
)
@_storage
def export(checkpoint: str, dest: str, form: str, storage: str) -> None:
    """Write the backbone of CHECKPOINT to DEST for other programs, loaded back and compared.

    CHECKPOINT is a directory, runs:/ID[/step] or models:/NAME@ALIAS.

    \b
    pretrain export models:/demo@best --format timm demo-timm      timm.create_model("local-dir:demo-timm", pretrained=True)
    pretrain export runs:/demo-1 --format onnx demo.onnx           images (B, C, H, W), normalized -> patches, cls
    """  # noqa: E501
    from pretrain.exports.export import export

    made = export(checkpoint, form, dest, storage=storage)
    size = sum(path.stat().st_size for path in [made, *made.rglob("*")] if path.is_file())
    say(f"{checkpoint} is in {Path(made)} as {form} ({size / 2**20:.1f} MiB), loaded back and compared")
