"""`pretrain init DATA`: a commented recipe fitted to the data and to this machine, with the time that it will take.

Looks at the data (photos, or shards of photos, clouds or volumes: how many, how large, which classes) and at the
machine (cores, memory, GPUs), and trains a few steps on some of them to see how fast that is. Nothing is asked; every
choice has an option. Not here: what clouds and volumes are (`found_data`).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipelines.cores import usable_cores
from pretrain.cli.filled import Filled
from pretrain.errors import RequestError
from pretrain.record.destinations import require_local
from pretrain.record.run_dir import RECIPE
from pretrain.screen import printable, say

if TYPE_CHECKING:
    from torch import device

    from pretrain.cli.found_data import FoundArrays

__all__ = ["init"]

_LOOKED_AT = 64  # samples whose size is read
_MEASURED = 16  # photos that are trained on
_MEASURED_ARRAYS = 4  # clouds or volumes
_MOST_EPOCHS = 800  # over photos
_MOST_HOURS = 10_000
_LEAST_STEPS = 20
_TITLES = {"sit": "SiT", "selfpatch": "SelfPatch", "dinov3": "DINOv3"}  # what is no abbreviation in capitals
_MOST_WORKERS = 8  # on one machine's cores
_EFFICIENCY = 0.7  # of several workers that share memory and exchange gradients, compared with one alone


@dataclass(frozen=True)
class Found:
    """What the data are.

    Attributes:
        text: In words.
        samples: To train on.
        side: Median of the shorter side of photos in pixels.
        labels: Whether there are classes, and samples that are held out to test on.
        examples: Some samples as shards hold them.
        arrays: What else follows of clouds and volumes; None of photos.
    """

    text: str
    samples: int
    side: int
    labels: bool
    examples: Sequence[dict[str, Any]]
    arrays: FoundArrays | None = None


@dataclass(frozen=True)
class Machine:
    """What it computes with."""

    text: str
    cores: int
    gpus: int

    def device(self) -> device:
        import torch

        return torch.device("cuda" if self.gpus else "cpu")


@click.command(cls=Filled)
@click.argument("data", metavar="DATA")
@click.option("--output", "-o", metavar="FILE.yaml", help="Default: NAME.yaml in the current directory.")
@click.option("--name", metavar="NAME", help="Of the recipe and its model; default: OBJECTIVE_FOLDER.")
@click.option("--objective", metavar="NAME", help="Of photos: mae (default), gmml, sit, dino, selfpatch.")
@click.option("--model", metavar="NAME", help="Of photos: a model of timm; default: vit_tiny, with a GPU vit_small.")
@click.option("--image-size", type=click.IntRange(16, 4096), metavar="PIXELS", help="Of photos; default: theirs.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), metavar="N", default=1.0, show_default=True)
@click.option(
    "--batch", type=click.IntRange(1), metavar="N", help="Samples per step; default: 64, with GPUs 256; of volumes 8."
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Default: the GPUs, else up to 8 cores.")
def init(
    data: str,
    output: str | None,
    name: str | None,
    objective: str | None,
    model: str | None,
    image_size: int | None,
    hours: float,
    batch: int | None,
    workers: int | None,
) -> None:
    """Write a commented recipe for DATA, fitted to this machine, with an estimate of the time.

    DATA is a folder of photos, or of shards of photos, point clouds, volumes or radiance grids.

    \b
    pretrain init photos/
    pretrain init photos/ --hours 8 --objective dino -o dino.yaml
    pretrain data pack clouds/ shards/ && pretrain init shards/
    """
    from objectives.registry import config_class
    from pretrain.config.checks.data import data_folder_problem
    from pretrain.config.layers import REFERENCE_IN_A_NAME
    from pretrain.config.load import recipe_content, recipe_names
    from pretrain.config.paths import absolute

    if not hours < _MOST_HOURS:  # also what is no number
        raise RequestError(f"--hours {hours}: expected a number above 0 and below {_MOST_HOURS}")
    folder = Path(absolute(data))
    if problem := REFERENCE_IN_A_NAME if "${" in str(folder) else data_folder_problem(folder):
        raise RequestError(f"DATA {data}: {problem}")
    known = [known.removesuffix("_photos") for known in recipe_names() if known.endswith("_photos")]
    if objective is not None and objective not in known:
        from pretrain.errors import nearest

        raise RequestError(f"--objective {objective}: expected one of {', '.join(known)}{nearest(objective, known)}")
    asked = {"--objective": objective, "--model": model, "--image-size": image_size}
    of_photos = [f"{option} {value}" for option, value in asked.items() if value is not None]
    objective = _objective_of_arrays(folder) or objective or "mae"
    if of_photos and objective not in known:
        raise RequestError(f"{of_photos[0]}: is of photos, and DATA {data} is for {objective}; leave it out")
    name = name or f"{objective}_{_plain(folder.name)}"
    target = Path(absolute(output or f"{name}.yaml"))
    if os.path.lexists(target):
        raise RequestError(f"{target}: exists already; name another file with --output, or remove it")
    if not target.parent.is_dir() or target.suffix not in (".yaml", ".yml"):
        raise RequestError(f"--output {target}: expected a name that ends in .yaml, in a directory that exists")
    require_local(target, "a recipe")

    from pretrain.reporting.progress import shown_while

    with shown_while("looking at the data"):
        found = _look_at(folder)
    machine = _machine()
    arrays = found.arrays
    content = recipe_content(arrays.recipe if arrays else f"{objective}_photos")
    settings = {
        "objective": {**content["objective"], **(arrays.objective if arrays else {})},
        "backbone": {
            **content["backbone"],
            **(arrays.backbone if arrays else _photo_backbone(model, image_size or found.side, image_size, machine)),
        },
    }
    backbone = settings["backbone"]
    workers = workers or machine.gpus or min(machine.cores, _MOST_WORKERS)
    is_large = backbone.get("kind") == "voxels"
    batch = batch or (8 if is_large else 256 if machine.gpus else 64)
    batch = max(workers, batch - batch % workers)
    optimizer = {**content["optimizer"], "warmup_steps": 0}
    title = arrays.title if arrays else _TITLES.get(objective, objective.upper())
    lines = [
        f"name: {name}",
        f"description: {title} on {_plain(folder.name)}, by pretrain init",
        *_section("objective", settings["objective"], {"objective": config_class(objective), "backbone": None}),
        *_section("backbone", backbone, {"objective": None, "backbone": _backbone_class(backbone)}),
        "data:",
        f"  root: {json.dumps(str(folder))}  # shards{'' if arrays else ', or photos, which the first run packs'}",
        "  train: ${data.root}/train-*.tar",
    ]
    noun = "samples" if arrays else "photos"
    with shown_while(f"training on a few {noun}, to see how fast it is"):
        rate = _rate([*lines, *_section("optimizer", optimizer)], batch, workers, found, machine)
    possible, most = hours * 3600 * rate / batch, found.samples * (arrays.passes if arrays else _MOST_EPOCHS) / batch
    steps = max(_LEAST_STEPS, math.floor(min(possible, most)))
    passes = f"{steps * batch / found.samples:.3g} passes over the data"
    if possible > max(most, _LEAST_STEPS):
        passes += f", the most that init plans; --hours {hours:g} would allow {possible / steps:.1f} times as many"
    every = max(1, -(-steps // 4))
    lines += _section("optimizer", {**optimizer, "warmup_steps": steps // 20})
    time_text = _duration(steps * batch / rate)
    evaluation = _evaluation(found)
    header = [
        f"{name}: {title} on {found.text}",
        "",
        f"Machine:   {machine.text}",
        f"Time:      about {time_text} and the evaluations, at {rate:.3g} samples/s: measured here on a few {noun}",
        f"Epochs:    {passes}",
        f"Command:   pretrain run {target.name}     (with --dry-run it only says what it would do)",
        f"           pretrain run {target.name} train.steps={steps * 4}     longer is better; any setting can be given",
    ]
    train = [
        "train:",
        f"  steps: {steps}  # or instead of it, epochs: N",
        f"  global_batch_size: {batch}  # samples per step, over all workers",
        f"  workers: {workers}  # processes; one per GPU, or as many as there are cores to spare",
        f"  checkpoint_every: {every}  # steps",
        f"  log_every: {max(1, min(20, steps // 20))}",
        *(["  precision: bf16"] if machine.gpus else []),
    ]
    text = "\n".join([*(f"# {printable(line)}".rstrip() for line in header), *lines, *train, *evaluation, ""])
    _write(target, text)
    say(f"data      {found.text}")
    say(f"machine   {machine.text}")
    say(f"recipe    {target}: {objective} with {backbone['name']}{_size_text(backbone)}, {steps} steps of {batch}")
    measured = _MEASURED_ARRAYS if arrays else _MEASURED
    say(f"time      about {time_text} and the evaluations ({rate:.3g} samples/s, measured on {measured} {noun})")
    say(f"epochs    {passes}")
    say(f"next      pretrain run {target.name} --dry-run")


def _look_at(folder: Path) -> Found:
    from data_pipelines.packing.inputs import FAMILIES

    if any(name.lower().endswith(FAMILIES["tars"]) for name in os.listdir(folder)):
        return _shards(folder)
    from data_pipelines.packing.inputs import list_folder
    from pretrain.photos import drawn_splits

    listing = list_folder(folder, kind="images")
    drawn = drawn_splits(listing)
    size = sum(item.pieces[0].size for item in listing.items)
    examples = []
    for item in listing.items[:: max(1, len(listing.items) // _LOOKED_AT)][:_LOOKED_AT]:
        examples.append({item.pieces[0].field: (folder / item.pieces[0].path).read_bytes()})
    classes = f"{len(listing.classes)} classes" if listing.classes else "no classes"
    side, examples = _sides(examples)
    text = f"{len(listing.items)} photos of {folder} ({size / 1e6:.0f} MB, {classes}, shorter side {side} px)"
    labels = listing.classes is not None and bool({"test", "val"} & drawn.keys())
    return Found(text, max(1, drawn["train"]), side, labels, examples)


def _objective_of_arrays(folder: Path) -> str | None:
    """The objective for shards of clouds, volumes or grids, by the names of their fields; None of others."""
    from data_pipelines.errors import DataError
    from data_pipelines.field_kinds import INPUT_FIELDS
    from data_pipelines.shards.source import expand_source
    from data_pipelines.shards.tar_walk import first_fields

    try:
        fields = first_fields(Path(expand_source(str(folder / "train-*.tar"))[0]))
    except (DataError, OSError):  # photos, or what is said when the data are looked at
        return None
    if fields & {"jpg", "jpeg", "png", "webp"}:
        return None
    if fields & {"points.npy", "points.npz"}:
        return "point_mae"
    return "nerf_mae" if "grid.npy" in fields else "volume_mae" if fields.intersection(INPUT_FIELDS["volume"]) else None


def _shards(folder: Path) -> Found:
    from backbones.registry import IMAGE
    from data_pipelines.shards.dataset import open_dataset
    from pretrain.cli.found_data import look_at_arrays
    from pretrain.config.checks.evaluation import evaluation_data_problem
    from pretrain.config.pairing import source_problem

    dataset = open_dataset(str(folder / "train-*.tar"))
    ids = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
    samples = [dict(dataset.read(sample)) for sample in list(ids)[:_LOOKED_AT]]
    has_test = evaluation_data_problem(folder) is None
    if _objective_of_arrays(folder) and (arrays := look_at_arrays(dataset, samples, has_test=has_test)) is not None:
        text = f"{len(dataset)} {arrays.text} in shards of {folder}"
        examples = (samples * _MEASURED_ARRAYS)[:_MEASURED_ARRAYS]
        return Found(text, len(dataset), 0, bool(arrays.protocols), examples, arrays)
    if problem := source_problem(IMAGE, str(folder / "train-*.tar"), allow_pipe=False):
        raise RequestError(f"DATA {folder}: {problem}")
    side, examples = _sides(samples)
    labels = "cls" in dataset.fields and has_test
    text = f"{len(dataset)} samples in shards of {folder} (shorter side {side} px)"
    return Found(text, len(dataset), side, labels, examples)


def _sides(samples: Sequence[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """Median of the shorter sides, and the samples whose picture can be decoded, with nothing else in them.

    Raises:
        RequestError: there is none.
    """
    from statistics import median

    from data_pipelines.decode import decode_image
    from data_pipelines.errors import DataError

    sides, good = [], []
    for sample in samples:
        for field in sample.keys() & {"jpg", "jpeg", "png", "webp"}:
            try:
                height, width = decode_image(sample[field]).shape[:2]
            except DataError:
                continue
            sides.append(min(height, width))
            good.append({"jpg": sample[field]})  # whatever it is: the content tells
    if not good:
        raise RequestError("DATA: none of the first pictures can be decoded; `pretrain data verify` names the damage")
    return round(median(sides)), (good * _MEASURED)[:_MEASURED]


def _machine() -> Machine:
    import psutil  # type: ignore[import-untyped]
    import torch

    cores, memory = usable_cores(), psutil.virtual_memory().total / 2**30
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)}))
    return Machine(
        f"{cores} cores, {memory:.0f} GB of memory, {f'{gpus} GPUs ({names})' if gpus else 'no GPU'}", cores, gpus
    )


def _photo_backbone(model: str | None, side: int, asked: int | None, machine: Machine) -> dict[str, Any]:
    """Settings for photos of a shorter side of so many pixels, or for the size that was asked for."""
    size, patch = (asked, 16 if asked >= 160 else 8) if asked else _sizes(side)
    name = model or ("vit_small_patch16_224" if machine.gpus else "vit_tiny_patch16_224")
    return {"name": name, "image_size": size, **({} if model else {"patch_size": patch})}


def _backbone_class(settings: dict[str, Any]) -> type:
    from backbones.registry import IMAGE, config_class

    return config_class(settings.get("kind", IMAGE), settings["name"])


def _size_text(settings: dict[str, Any]) -> str:
    if "num_points" in settings:
        return f" at {settings['num_points']} points"
    if "size" in settings:
        return f" at {' x '.join(map(str, settings['size']))} voxels"
    return f" at {settings['image_size']} px"


def _sizes(side: int) -> tuple[int, int]:
    """Side of the input and of a patch in pixels, for photos with that shorter side."""
    return (32, 4) if side < 48 else (64, 8) if side < 96 else (128, 8) if side < 160 else (224, 16)


def _rate(lines: Sequence[str], batch: int, workers: int, found: Found, machine: Machine) -> float:
    """Samples per second of all workers."""
    from pretrain.config.load import load_recipe
    from pretrain.training.estimate import samples_per_second

    train = ["train: {steps: 10, checkpoint_every: 10, " + f"global_batch_size: {batch}, workers: {workers}" + "}"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / RECIPE
        path.write_text("\n".join([*lines, *train]), encoding="utf-8")
        recipe = load_recipe(path, check_files=False)
    one = samples_per_second(recipe, found.examples, machine.device())
    share = 1.0 if machine.gpus else min(1.0, machine.cores / workers)
    return one * workers * share * (_EFFICIENCY if workers > 1 else 1.0)


def _section(name: str, settings: dict[str, Any], classes: dict[str, type | None] | None = None) -> list[str]:
    """Settings as YAML, each with what it does."""
    import yaml

    from pretrain.config.fields import declared_settings

    declared, _ = declared_settings(classes or {"objective": None, "backbone": None})
    lines = [f"{name}:"]
    for key, value in settings.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
        known = declared.get(f"{name}.{key}")
        comment = f"  # {known.metadata['help']}" if known and known.metadata.get("help") else ""
        lines.append(f"  {key}: {text.removesuffix('...' + chr(10)).strip()}{comment}")
    return lines


def _evaluation(found: Found) -> list[str]:
    if not found.labels:
        without = "no held-out samples, or no labels, to score with" if found.arrays else "no labels to score with"
        return ["evaluation:", f"  enabled: false  # {without}"]
    arrays = found.arrays
    name, select = (arrays.name, arrays.select) if arrays else ("photos", "linear/photos/val_top1")
    protocols = arrays.protocols if arrays else ("linear", "knn")
    return [
        f"evaluation:  # beside training, on the {name if name != 'scenes' else 'grids'} that are held out",
        "  data:",
        f"    {name}: ${{data.root}}",
        "  tasks:",
        *(f"    - {{protocol: {protocol}, data: {name}}}" for protocol in protocols),
        f"  select: {select}",
    ]


def _write(target: Path, text: str) -> None:
    """Write a recipe that loads, whole, and never over another file."""
    from pretrain.config.load import load_plan

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".init-") as scratch:
        path = Path(scratch) / target.name
        path.write_text(text, encoding="utf-8")
        load_plan(path, check_files=False)
        try:
            os.link(path, target)
        except FileExistsError:
            raise RequestError(f"{target}: exists already; name another file with --output, or remove it") from None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _plain(name: str) -> str:
    import re

    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "photos"
