"""Data to train on: are they there, do the settings of one source or of a mixture go together, how long is an epoch?

Whether a backbone can read them is asked in `pretrain.config.pairing`, and noted here.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from data_pipelines.cores import usable_cores
from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import MANIFEST_NAME
from data_pipelines.shards.source import check_source
from data_pipelines.storage.locations import redact, scheme_of
from pretrain.config.mistakes import Mistakes
from pretrain.config.pairing import source_problem
from pretrain.config.paths import absolute
from pretrain.config.schema import DataConfig, Recipe
from pretrain.errors import nearest_file

__all__ = [
    "check_data",
    "check_pairing",
    "check_root",
    "counted_in_steps",
    "data_folder_problem",
    "loader_workers",
    "with_absolute_paths",
]

_MOST_LOADER_WORKERS = 8  # unless asked for; each decodes for a fast GPU, and keeps batches in memory


def data_folder_problem(folder: Path) -> str | None:
    """Why there is nothing to train on; None when photos or shards lie somewhere below the folder."""
    if not os.path.isdir(folder):  # unlike `Path.is_dir`, also of names that no file can have
        wanted = "is a file; expected the folder of photos or shards"
        return wanted if os.path.exists(folder) else f"no such directory{nearest_file(folder)}"
    from data_pipelines.packing.inputs import FAMILIES, holds

    if (folder / MANIFEST_NAME).exists() or holds(folder, "images", "tars"):  # whoever opens shards says which are gone
        return None
    problem = f"no shards (.tar) and no photos ({' '.join(FAMILIES['images'])}) in it"
    if holds(folder, "points", "volumes"):
        problem += f"; point clouds and volumes are packed first: pretrain data pack {folder} shards/"
    return problem


def check_root(draft: Recipe, mistakes: Mistakes) -> None:
    """A root without anything to train on is one mistake, not one for every path that begins with it."""
    keys = ["data.train", *(f"data.mixture[{index}].shards" for index in range(len(draft.data.mixture)))]
    below = [key for key in keys if str(mistakes.written(key)).startswith("${data.root}/")]
    root = absolute(draft.data.root) if mistakes.sound("data.root", *below) else None
    if not below or root is None or "://" in root or scheme_of(root) == "pipe":
        return
    is_pattern = not os.path.exists(root) and any(letter in root for letter in "*?[{")
    if is_pattern or (problem := data_folder_problem(Path(root))) is None:
        return
    mistakes.add("data.root", draft.data.root, problem)
    for key in below:
        mistakes.distrust(key)
    for name, directory in draft.evaluation.data.items():
        if Path(absolute(directory)).is_relative_to(root):
            mistakes.distrust(f"evaluation.data.{name}")


def counted_in_steps(draft: Recipe, mistakes: Mistakes, *, check_files: bool) -> Recipe:
    """With steps in the place of epochs; the data are opened for it, for they say how many samples an epoch has.

    Where files need not be there, their steps stay stand-ins.
    """
    counted = {
        "train.epochs": (draft.train.epochs, "train.steps"),
        "train.checkpoint_every_epochs": (draft.train.checkpoint_every_epochs, "train.checkpoint_every"),
        "optimizer.warmup_epochs": (draft.optimizer.warmup_epochs, "optimizer.warmup_steps"),
    }
    asked = {key: steps for key, (value, steps) in counted.items() if value is not None and mistakes.sound(key)}
    if not asked:
        return draft
    problem = None
    if draft.data.unindexed == "stream":
        problem = "data without an index have no number of samples; count in steps"
    elif mistakes.sound("data", "train.global_batch_size"):
        try:
            from pretrain.config.data import in_steps

            opened = replace(draft, data=with_absolute_paths(draft.data))
            if (opened.data.train is None) != (not opened.data.mixture):
                return replace(in_steps(opened), data=draft.data)
        except DataError as error:
            problem = str(error)
    for key, steps in asked.items():
        mistakes.distrust(steps)
        if problem is not None and (check_files or draft.data.unindexed == "stream"):
            mistakes.add(key, counted[key][0], problem)
    return draft


def loader_workers(draft: Recipe) -> int:
    """Loader processes per worker: as asked for, else one on each core that the worker has beside its own, 1 to 8.

    The cores are those that this process may use; on a given cluster, those that Ray reserves for a worker. What a step
    sees does not depend on the number.
    """
    if draft.data.loader_workers is not None:
        return draft.data.loader_workers
    if draft.cluster.address or os.environ.get("RAY_ADDRESS"):
        cores = draft.cluster.cpus_per_worker
    else:
        cores = usable_cores() // draft.train.workers
    return max(1, min(cores - 1, _MOST_LOADER_WORKERS))


def with_absolute_paths(data: DataConfig) -> DataConfig:
    return replace(
        data,
        root=absolute(data.root),
        train=absolute(data.train),
        mixture=[replace(part, shards=absolute(part.shards)) for part in data.mixture],
        cache_dir=absolute(data.cache_dir),
    )


def check_data(data: DataConfig, mistakes: Mistakes, *, check_files: bool) -> None:
    if mistakes.sound("data.train", "data.mixture") and (data.train is None) == (not data.mixture):
        if data.train is None:
            mistakes.add_missing("data.train", mistakes.origin("name"), "data.train=SHARDS, or a list in data.mixture")
        else:
            key = mistakes.latest("data.train", "data.mixture")
            value = data.train if key == "data.train" else [part.name for part in data.mixture]
            mistakes.add(key, value, "data.train and data.mixture are both given; add data.train=null or mixture=[]")
    if mistakes.sound("data.limit", "data.mixture") and data.limit is not None and data.mixture:
        mistakes.add("data.limit", data.limit, "limits data.train; in a mixture give each part its own limit")
    if mistakes.sound("data.mixture_by") and data.mixture_by == "join" and not data.mixture:
        mistakes.add("data.mixture_by", "join", "joins the parts of data.mixture, and there is none; leave it out")
    if mistakes.sound("data.unindexed") and data.unindexed == "stream":
        _check_unindexed(data, mistakes)
    sources = {"data.train": data.train}
    for index, part in enumerate(data.mixture):
        key = f"data.mixture[{index}]"
        sources[f"{key}.shards"] = part.shards
        if mistakes.sound(key) and data.mixture_by == "join":
            for name in ("weight", "repeat"):
                if (value := getattr(part, name)) is not None:
                    problem = "has no effect with data.mixture_by=join, of one sample of every part; leave it out"
                    mistakes.add(f"{key}.{name}", value, problem)
        elif mistakes.sound(key) and (part.weight is None) == (part.repeat is None):
            mistakes.add(f"{key}.weight", part.weight, "give one of weight (share) and repeat (passes) to each part")
        elif mistakes.sound(key) and (part.weight is None) != (data.mixture[0].weight is None):
            problem = f"{data.mixture[0].name} has the other of weight and repeat; give all parts the same one"
            mistakes.add(f"{key}.weight", part.weight, problem)
        if mistakes.sound(key) and part.name in [other.name for other in data.mixture[:index]]:
            mistakes.add(f"{key}.name", part.name, "named twice; give each part its own name")
    if mistakes.sound("data.decoder") and data.decoder == "simplejpeg" and find_spec("simplejpeg") is None:
        mistakes.add("data.decoder", data.decoder, "not installed: pip install 'pretrain[fast]', or use auto or pil")
    for key, source in sources.items():
        if check_files and source is not None and mistakes.sound(key):
            try:
                compressed = data.unindexed == "stream"
                check_source(absolute(source), allow_pipe=data.allow_pipe, compressed=compressed)
            except DataError as error:
                mistakes.add(key, redact(source), str(error))


def check_pairing(draft: Recipe, mistakes: Mistakes) -> None:
    """Refuse data of another kind than the backbone encodes."""
    sources = {"data.train": draft.data.train}
    sources |= {f"data.mixture[{index}].shards": part.shards for index, part in enumerate(draft.data.mixture)}
    problems = {
        key: source_problem(draft.backbone.kind, str(absolute(source)), allow_pipe=draft.data.allow_pipe)
        for key, source in sources.items()
        if source is not None and mistakes.sound(key)
    }
    if draft.data.mixture_by == "join" and None in problems.values():
        return  # one part is what it encodes; what it wants of the others is found out later
    for key, problem in problems.items():
        if problem is not None:
            mistakes.add(key, redact(str(sources[key])), problem)


def _check_unindexed(data: DataConfig, mistakes: Mistakes) -> None:
    """Without an index there are no numbered samples, so nothing can count, name or order them."""
    for key, value, default in (
        ("data.limit", data.limit, "null"),
        ("data.mixture", [part.name for part in data.mixture], "[]"),
        ("data.record_samples", data.record_samples, "false"),
    ):
        if mistakes.sound(key) and value:
            problem = f"needs an index, which data.unindexed=stream does without; add {key}={default}"
            mistakes.add(key, value, f"{problem} or data.unindexed=index")
    for name in ("block_size", "window", "num_streams"):
        key, value, default = f"data.{name}", getattr(data, name), getattr(DataConfig, name)
        # The recipe of a run spells out every setting, so a default says nothing unless someone typed it.
        if mistakes.sound(key) and (value != default or mistakes.is_typed(key)):
            problem = "has no effect with data.unindexed=stream, which reads shards from front to back"
            remedy = "leave it out" if mistakes.is_typed(key) else f"add {key}={default}"
            mistakes.add(key, value, f"{problem}; {remedy} or add data.unindexed=index")
