"""`pretrain export` and `pretrain embed`: a checkpoint's backbone, and what it sees, for other programs.

The work is in `pretrain.exports` and `pretrain.embeddings`.
"""

from __future__ import annotations

import time

import click

from pretrain.cli.filled import Filled
from pretrain.cli.storage import storage_option
from pretrain.screen import say

__all__ = ["embed", "export"]

_storage = storage_option(may_be_remote=True)


@click.command(cls=Filled)
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
    say(f"{checkpoint} is in {made} as {form} ({size / 2**20:.1f} MiB), loaded back and compared")


@click.command(cls=Filled)
@click.argument("checkpoint")
@click.argument("data")
@click.argument("dest")
@click.option("--format", "form", type=click.Choice(("parquet", "npy")), default="parquet", show_default=True)
@click.option(
    "--tokens",
    type=click.Choice(("cls", "patch", "both")),
    default="both",
    show_default=True,
    help="The class token, the mean of the patch tokens, or both.",
)
@click.option("--batch-size", type=click.IntRange(1), metavar="N", default=64, show_default=True)
@click.option("--device", metavar="NAME", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_storage
def embed(
    checkpoint: str, data: str, dest: str, form: str, tokens: str, batch_size: int, device: str, storage: str
) -> None:
    """Write what the backbone of CHECKPOINT sees in every sample of DATA to the folder DEST.

    CHECKPOINT is a directory, runs:/ID[/step] or models:/NAME@ALIAS. DATA is a folder of photos, shards (a folder, a
    glob, a range or a URL), or a name of evaluation data in the checkpoint's recipe. The same command goes on where a
    killed one stopped; what an evaluation has stored is not computed again.

    \b
    pretrain embed models:/demo@best photos/ embeddings/           embeddings.parquet: shard, key, cls, patch_mean
    pretrain embed runs:/demo-1 grocery out/ --format npy          keys.npy, cls.npy, patch_mean.npy
    """
    from pretrain.embeddings.embed import embed
    from pretrain.reporting.progress import progress_of

    def say_start(done: int, total: int) -> None:
        kept = f", after {done} from before" if done else ""
        say(f"embedding {total - done} samples of {data} by {checkpoint}{kept}")

    began = time.monotonic()
    with progress_of("embedding") as progress:
        made = embed(
            checkpoint,
            data,
            dest,
            form=form,
            tokens=tokens,
            batch_size=batch_size,
            device=device,
            storage=storage,
            on_start=say_start,
            progress=progress,
        )
    notes = [f"{made.num_kept} from before"] * (made.num_kept > 0)
    notes += [f"{made.num_known} known from an evaluation"] * (made.num_known > 0)
    said = f" ({', '.join(notes)})" if notes else ""
    say(f"{made.num_samples} samples are in {made.dest}{said}, {time.monotonic() - began:.1f} s")
