"""`pretrain data ...`: files to shards, and what is in them.

Requests are checked before numpy or an image library is imported. The work is in `data_pipelines`: `packing`,
`radiance` and `inspection`.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipelines.cores import usable_cores
from data_pipelines.radiance.settings import AXES, BACKGROUNDS, DTYPES, UPS, FitSettings
from pretrain.cli.filled import Commands
from pretrain.errors import RequestError
from pretrain.record.destinations import require_local
from pretrain.reporting.progress import progress_of
from pretrain.screen import say

if TYPE_CHECKING:
    from data_pipelines.radiance.make import Made
    from data_pipelines.shards.manifest import Manifest

__all__ = ["data", "plain_warnings"]

CHANNELS = ("first", "last")
KINDS = ("auto", "images", "pairs", "sequences", "points", "volumes", "list", "tars")
_SHOWN_CLASSES = 12
_GOOD_PSNR = 25.0  # dB, from which on grids of whole objects look right

_sources = click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
_workers = click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Processes; default: as many as this machine has cores."
)


@click.group(cls=Commands)
def data() -> None:
    """Make shards, check them, look at them.

    \b
    pretrain data pack photos/ shards/ --split train=0.9,test=0.1
    pretrain data radiance scenes/ grids/              photos with known cameras to voxel grids
    pretrain data verify shards/                       every damage by shard, sample and offset
    pretrain data stats shards/ --json                 sizes, channel means, class balance
    pretrain data show shards/ -o sheet.png            a contact sheet

    SOURCE is a directory, a glob 'shards/train-*.tar', a range 'shards/train-{000000..000009}.tar' or one .tar; local
    or on http(s), s3 or gs.
    """
    click.get_current_context().with_resource(plain_warnings())


@data.command()
@click.argument("src")
@click.argument("dest")
@click.option("--kind", type=click.Choice(KINDS), default="auto", show_default=True, help="What SRC holds.")
@click.option(
    "--split",
    "splits",
    metavar="NAME=SHARE,...",
    help="Shares, drawn by a hash of the name: train=0.9,test=0.1; default: the splits of SRC, else all in train.",
)
@click.option(
    "--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of the order of the samples."
)
@click.option(
    "--shard-mb", type=click.IntRange(1), metavar="MB", default=256, show_default=True, help="Size of a shard."
)
@click.option("--shard-samples", type=click.IntRange(1), metavar="N", help="Samples per shard instead of a size: 1000")
@click.option("--size", type=click.IntRange(1), metavar="PIXELS", help="Make the shorter side of photos this long: 256")
@click.option("--reencode", metavar="FORMAT", help="Write photos anew: jpeg:90, webp:80 or png.")
@click.option("--masks", metavar="DIR", help="Folder of masks or label volumes named like the files of SRC.")
@click.option("--classes", metavar="NAME,...", help="Names of all classes in index order; default: sorted.")
@click.option("--ignore-index", type=click.IntRange(0), metavar="N", help="Value of masks that is no class: 255")
@click.option(
    "--channels",
    type=click.Choice(CHANNELS),
    help="Of volumes with four axes; default: first, asked if they look last.",
)
@click.option("--name", metavar="NAME", help="Of the data set; default: that of SRC.")
@click.option("--dedupe", is_flag=True, help="Leave out samples with the same content as another one.")
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    metavar="SHARE",
    help="Share of samples that may be broken: 0.001",
)
@_workers
def pack(
    src: str,
    dest: str,
    kind: str,
    splits: str | None,
    seed: int,
    shard_mb: int,
    shard_samples: int | None,
    size: int | None,
    reencode: str | None,
    masks: str | None,
    classes: str | None,
    ignore_index: int | None,
    channels: str | None,
    name: str | None,
    dedupe: bool,
    max_bad: float,
    workers: int | None,
) -> None:
    """Pack SRC into shards in DEST.

    SRC is a folder of photos (sub-folders are classes, or splits such as train and val with the classes in them),
    photos with masks, image sequences, point clouds or volumes; a list (.txt, .csv, .parquet) of paths and labels; or
    tars. The same files and options give the same bytes, and the same command goes on where a killed one stopped.

    \b
    pretrain data pack photos/ shards/ --size 256 --reencode jpeg:90
    pretrain data pack frames/ shards/ --masks masks/ --split train=0.8,val=0.1,test=0.1
    pretrain data pack photos.csv shards/ --dedupe --max-bad 0.001
    """
    shares = None if splits is None else _parse_splits(splits)
    _require_inputs(src, masks)
    from data_pipelines.packing.pack import pack

    began = time.monotonic()
    with progress_of("packing") as progress:
        manifest = pack(
            src,
            dest,
            kind=kind,
            splits=shares,
            seed=seed,
            shard_mb=shard_mb,
            shard_samples=shard_samples,
            size=size,
            reencode=reencode,
            masks=masks,
            classes=None if classes is None else classes.split(","),
            ignore_index=ignore_index,
            channels=channels,
            name=name,
            dedupe=dedupe,
            workers=workers or usable_cores(),
            max_bad=max_bad,
            progress=progress,
        )
    from data_pipelines.inspection.stats_text import readable_bytes

    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    samples = ", ".join(f"{name} {split.samples}" for name, split in manifest.splits.items())
    say(
        f"packed {samples} samples into {len(shards)} shards, {readable_bytes(sum(shard.bytes for shard in shards))}, "
        f"in {time.monotonic() - began:.1f} s; {manifest.duplicates or 0} duplicates and {manifest.rejected or 0} "
        "broken ones left out"
    )
    fields = ", ".join(sorted(manifest.fields))
    say(f"took SRC as {manifest.options.get('kind')} (each sample has {fields}), {_said_classes(manifest)}")
    say(f"next: pretrain data verify {dest}")


@data.command()
@click.argument("src")
@click.argument("dest")
@click.option(
    "--resolution",
    type=click.IntRange(8, 512),
    metavar="N",
    default=64,
    show_default=True,
    help="Voxels, longest side.",
)
@click.option("--steps", type=click.IntRange(1), metavar="N", default=1000, show_default=True, help="Of the optimiser.")
@click.option("--rays", type=click.IntRange(1), metavar="N", default=1024, show_default=True, help="In each step.")
@click.option(
    "--size",
    type=click.IntRange(1),
    metavar="PIXELS",
    default=400,
    show_default=True,
    help="Reduce photos to this shorter side.",
)
@click.option(
    "--bound",
    type=click.FloatRange(0, min_open=True),
    metavar="LENGTH",
    help="Fit the cube [-LENGTH, LENGTH] of the world; default: what the cameras look at, or the room they are in.",
)
@click.option("--box", metavar="X0,Y0,Z0,X1,Y1,Z1", help="Fit this part of the world instead, z up.")
@click.option(
    "--background",
    type=click.Choice(tuple(BACKGROUNDS)),
    default="white",
    show_default=True,
    help="Behind transparent parts and the box.",
)
@click.option(
    "--axes", type=click.Choice(AXES), default="opengl", show_default=True, help="Of cameras in JSON and npz files."
)
@click.option(
    "--up",
    type=click.Choice(UPS),
    default="auto",
    show_default=True,
    help="Axis that points up; auto: z, with COLMAP that of the pictures.",
)
@click.option(
    "--min-psnr",
    type=float,
    metavar="DB",
    default=20.0,
    show_default=True,
    help="Leave out scenes below, on held-out views.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="uint8", show_default=True, help="Of the grids.")
@click.option("--cuts", type=click.IntRange(1), metavar="N", help="Random cubes of each scene instead of all of it: 64")
@click.option("--cut-size", type=click.IntRange(1), metavar="N", help="Voxels of a side of a cut; default: 32.")
@click.option("--test", multiple=True, metavar="SCENE", help="Put this scene into the split test (may be repeated).")
@click.option(
    "--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of pixels, cuts and order."
)
@click.option("--name", metavar="NAME", help="Of the data set; default: that of SRC.")
@click.option("--address", metavar="URL", help="A running Ray; default: $RAY_ADDRESS, else a private local one.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Scenes at a time; default: as many as cores.")
def radiance(
    src: str,
    dest: str,
    box: str | None,
    min_psnr: float,
    dtype: str,
    cuts: int | None,
    cut_size: int | None,
    test: tuple[str, ...],
    name: str | None,
    address: str | None,
    workers: int | None,
    **settings: Any,
) -> None:
    """Fit voxel grids of color and opacity to photos with known cameras; shards of them in DEST.

    SRC is a scene, or a folder of scenes: transforms_train.json of the Blender sets, transforms.json of nerfstudio and
    instant-ngp, a COLMAP text model, an npz of images, poses and focal, or a tar of one of these. Scenes run as Ray
    tasks. The same command goes on where a killed one stopped; exit code 1 if a scene was left out.

    \b
    pretrain data radiance chair.tar grids/ --bound 1.2
    pretrain data radiance scenes/ grids/ --test lego --cuts 64 --cut-size 32
    """
    _require_inputs(src, None)
    if cut_size is not None and cuts is None:
        raise RequestError(f"--cut-size {cut_size}: there are no cuts without --cuts N")
    chosen = FitSettings(**settings, box=None if box is None else _parse_box(box))
    from data_pipelines.radiance.make import Writing, make_grids
    from data_pipelines.worker_pool import run_jobs
    from pretrain.radiance import run_on_ray

    began, workers = time.monotonic(), workers or usable_cores()
    writing = Writing(test, min_psnr, dtype, cuts or 0, cut_size or 32, name=name)
    with progress_of("fitting") as progress:
        made = make_grids(
            src,
            dest,
            chosen,
            writing,
            workers=workers,
            run_jobs=run_jobs if workers == 1 and address is None else run_on_ray(address),
            progress=progress,
        )
    _say_made(made, dest, time.monotonic() - began)
    if made.manifest is None or made.manifest.rejected:
        raise click.exceptions.Exit(1)


@data.command()
@_sources
@click.option("--no-decode", is_flag=True, help="Check bytes and structure only; do not decode images and arrays.")
@_workers
def verify(sources: tuple[str, ...], no_decode: bool, workers: int | None) -> None:
    """Name every damage; exit code 1 if there is one.

    Reads every shard whole and checks sizes, SHA-256 and counts of dataset.json, the structure of the tar, the CRC of
    every sample against the index beside the shard, and that every field decodes. Pickles are never read.

    \b
    pretrain data verify shards/
    pretrain data verify 's3://bucket/set/train-{000000..000099}.tar' --workers 8 --no-decode
    """
    _check_sources(sources, allow_missing=True)  # a finding here, not a wrong request
    from data_pipelines.inspection.verify import verify

    began = time.monotonic()
    with progress_of("verifying") as progress:
        report = verify(sources, decode=not no_decode, workers=workers or usable_cores(), progress=progress)
    for finding in report.findings:
        say(str(finding))
    from data_pipelines.inspection.stats_text import readable_bytes

    fields = ", ".join(f"{name} {count}" for name, count in sorted(report.fields.items()))
    notes = [
        *([f"not decoded: {', '.join(sorted(report.unknown))}"] if report.unknown and not no_decode else []),
        *([f"never read (pickles): {', '.join(sorted(report.never_read))}"] if report.never_read else []),
        *(
            [f"{len(report.left_out)} hidden or nameless members: {report.left_out[0]!r} ..."]
            if report.left_out
            else []
        ),
    ]
    say(
        f"{len(report.findings) or 'no'} finding{'s' * (len(report.findings) != 1)} in {report.num_shards} shards, "
        f"{report.num_samples} samples, {readable_bytes(report.num_bytes)} ({'; '.join([fields, *notes])}), "
        f"{time.monotonic() - began:.1f} s"
    )
    if report.findings:
        raise click.exceptions.Exit(1)


@data.command()
@_sources
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Read the first N samples only; default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_workers
def stats(sources: tuple[str, ...], limit: int | None, as_json: bool, workers: int | None) -> None:
    """Count samples, sizes, classes, channel means, copies.

    \b
    pretrain data stats shards/
    pretrain data stats 'shards/train-*.tar' --limit 10000 --json
    """
    _check_sources(sources)
    from data_pipelines.inspection.stats import stats
    from data_pipelines.inspection.stats_text import stats_lines

    with progress_of("counting") as progress:
        found = stats(sources, limit=limit, workers=workers or usable_cores(), progress=progress)
    as_text = json.dumps(found.to_dict(), indent=1).replace("\x7f", "\\u007f").splitlines() if as_json else None
    for line in as_text or stats_lines(found):
        say(line)


@data.command()
@click.argument("source")
@click.argument("ids", type=click.IntRange(0), nargs=-1)
@click.option("--first", type=click.IntRange(1), metavar="N", help="The first N samples instead of IDS; default: 8.")
@click.option("--field", metavar="NAME", help="Only this field: jpg, seg.png")
@click.option("-o", "--output", metavar="FILE.png", help="Write a contact sheet instead of text: sheet.png")
@click.option(
    "--size", type=click.IntRange(16, 1024), metavar="PIXELS", default=128, show_default=True, help="Of a picture."
)
def show(
    source: str, ids: tuple[int, ...], first: int | None, field: str | None, output: str | None, size: int
) -> None:
    """Print samples of SOURCE, or draw them.

    IDS are numbers from 0 through the shards in order.

    \b
    pretrain data show shards/ 0 17 4711
    pretrain data show shards/ --first 64 --field jpg -o sheet.png
    """
    _check_sources((source,))
    _check_show(ids, first, output)
    from data_pipelines.inspection.show import contact_sheet, describe
    from data_pipelines.shards.dataset import open_dataset

    dataset = open_dataset(source)
    chosen = ids or range(min(first or 8, dataset.num_samples))
    dataset.prefetch(chosen)
    if output is None:
        for sample_id in chosen:
            for line in describe(dataset, sample_id, field):
                say(line)
        return
    sheet = contact_sheet(dataset, chosen, size, field)
    sheet.save(output)
    say(f"{len(chosen)} of {dataset.num_samples} samples are in {output} ({sheet.width} x {sheet.height})")


def _say_made(made: Made, dest: str, seconds: float) -> None:
    """A line for each scene, and what was written."""
    for scene in made.scenes:
        if scene.problem is not None:
            say(f"error: left out: {scene.problem}", err=True)
        else:
            note = "" if (scene.psnr or 0.0) >= _GOOD_PSNR else f"; below {_GOOD_PSNR:g} dB, look at it before use"
            say(f"{scene.name}: {scene.psnr:.1f} dB on held-out views, fitted in {scene.seconds:.0f} CPU s{note}")
    if made.manifest is None:
        say(f"error: no scene is left, nothing was written to {dest}", err=True)
        return
    samples = ", ".join(f"{name} {split.samples}" for name, split in made.manifest.splits.items())
    if made.scenes:
        say(f"wrote {samples} grids in {seconds:.1f} s")
    else:
        say(f"{dest} holds them already: {samples} grids; {made.manifest.rejected or 0} scenes were left out")
    say(f"next: pretrain data show {dest} -o sheet.png --size 256")


def _said_classes(manifest: Manifest) -> str:
    """`3 classes: cat 0, dog 1, fox 2`, of many the first and the last."""
    if manifest.classes is None:
        return "classes without names" if "label" in manifest.fields.values() else "no classes"
    named = [f"{name} {index}" for index, name in enumerate(manifest.classes)]
    shown = named if len(named) <= _SHOWN_CLASSES else [*named[: _SHOWN_CLASSES - 2], "...", named[-1]]
    return f"{len(named)} class{'es' * (len(named) != 1)}: {', '.join(shown)}"


def _parse_splits(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` -> shares by name.

    Raises:
        RequestError: not of that form, a share outside (0, 1], a name twice, or a sum other than 1.
    """
    wanted = "expected NAME=SHARE,... such as train=0.9,test=0.1"
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise RequestError(f"--split {text}: {name!r} is no name of letters, digits and _; {wanted}")
        if name in shares:
            raise RequestError(f"--split {text}: {name} is named twice; {wanted}")
        try:
            shares[name] = float(number)
        except ValueError:
            raise RequestError(f"--split {text}: {number!r} is no number; {wanted}") from None
        if not 0 < shares[name] <= 1:
            raise RequestError(f"--split {text}: share {number} of {name} is not in (0, 1]; {wanted}")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise RequestError(f"--split {text}: the shares add up to {sum(shares.values()):g}; they must add up to 1")
    return shares


def _parse_box(text: str) -> tuple[float, ...]:
    """`X0,Y0,Z0,X1,Y1,Z1` -> numbers.

    Raises:
        RequestError: one of them is none.
    """
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise RequestError(f"--box {text}: expected six numbers X0,Y0,Z0,X1,Y1,Z1 such as -1,-1,0,1,1,2") from None


def _require_inputs(src: str, masks: str | None) -> None:
    from pretrain.errors import nearest_file

    given = {"SRC": src} | ({} if masks is None else {"--masks": masks})
    mistakes = [
        f"{name} {path}: no such file or directory{nearest_file(Path(path))}"
        for name, path in given.items()
        if not os.path.exists(os.path.expanduser(path))
    ]
    if mistakes:
        raise RequestError(*mistakes)


def _check_sources(sources: tuple[str, ...], *, allow_missing: bool = False) -> None:
    from data_pipelines.shards.source import check_source

    check_source(sources, allow_missing=allow_missing)


def _check_show(ids: tuple[int, ...], first: int | None, output: str | None) -> None:
    if ids and first is not None:
        raise RequestError(f"--first {first}: IDS are given as well; give one of the two")
    if output is None:
        return
    if not output.lower().endswith(".png"):
        raise RequestError(f"--output {output}: expected a name that ends in .png")
    if not require_local(output, "a contact sheet").parent.is_dir():
        raise RequestError(f"--output {output}: there is no directory {Path(output).absolute().parent}")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """What the work warns of is meant for the user: one line each, without the place in the source."""
    with warnings.catch_warnings():
        shown_otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, UserWarning):
                say(f"warning: {' '.join(str(message).split())}", err=True)
            else:
                shown_otherwise(message, category, *place, **more)

        warnings.showwarning = show
        yield
