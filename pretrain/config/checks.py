"""What settings mean together: paths, names of other packages, batch arithmetic, schedules, DeepSpeed keys.

Each rule runs when the settings it reads are sound by themselves, so one request gets all of its mistakes reported.
`resolve` also fills in what the recipe leaves open; afterwards nothing is derived a second time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backbones.images.config import ImageConfig
from backbones.images.timm_names import model_names
from data_pipelines.errors import DataError
from data_pipelines.files import expanded
from data_pipelines.shards.manifest import MANIFEST_NAME
from data_pipelines.shards.source import check_source
from data_pipelines.split_names import held_out
from data_pipelines.storage.locations import redact, scheme_of
from evaluation import registry as evaluations
from evaluation.extraction.recipe import EXTRACTIONS
from objectives.parts.settings import MultiCropConfig
from pretrain.config.mistakes import Mistakes
from pretrain.config.optimizer_facts import WHOLE_PARAMETER
from pretrain.config.pairing import source_problem
from pretrain.config.schema import DataConfig, EvaluationConfig, EvaluationTask, OptimizerConfig, Recipe, TrainConfig
from pretrain.errors import nearest, nearest_file

__all__ = [
    "absolute_reference",
    "data_folder_problem",
    "evaluation_data_problem",
    "resolve",
    "sizes",
    "zero_objections",
]

_PACKAGE = Path(__file__).parents[1]
_TRACKERS = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",)}  # and what writes for them
_MOST_LOADER_WORKERS = 8  # unless asked for; each decodes for a fast GPU, and keeps batches in memory
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MODEL_SIZES = re.compile(r"_patch(\d+)(?:_[a-z]\w*?)?_(\d+)(?:_|\.|$)")

# DeepSpeed keys that a setting of ours decides; saying both would leave it open which one counts.
_OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optimizer.clip_grad",
    "zero_optimization.stage": "train.zero_stage",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
}


def resolve(draft: Recipe, mistakes: Mistakes, *, check_files: bool) -> Recipe:
    """Check the settings together and fill in paths and derived values.

    Args:
        draft: the merged recipe, with stand-ins where `mistakes` already holds a mistake.
        mistakes: receives the mistakes; the result is only meaningful when it stays empty.
        check_files: also look whether the data is there.
    """
    if mistakes.is_typed("data.root") and draft.data.root is not None and not mistakes.refers_to("data.root"):
        problem = (
            f"{draft.name} reads no data below it; give data.train=SHARDS, or take a recipe with ${{data.root}} in it"
        )
        mistakes.add("data.root", draft.data.root, problem)
    elif check_files:
        _check_root(draft, mistakes)
    draft = _counted_in_steps(draft, mistakes, check_files=check_files)
    draft = replace(draft, train=replace(draft.train, zero_stage=_zero_stage(draft)))
    draft = replace(draft, data=replace(draft.data, loader_workers=_loader_workers(draft)))
    _check_names(draft, mistakes)
    if isinstance(draft.backbone, ImageConfig):  # of another kind, its own constructor knows what is right
        _check_image_encoder(draft.backbone, mistakes)
        _check_crops(draft.objective, draft.backbone, mistakes)
    _check_optimizer(draft, mistakes)
    _check_zero_stage(draft, mistakes)
    _check_deepspeed(draft.deepspeed, mistakes)
    _check_checkpoint_storage(draft.checkpoints.storage, mistakes)
    _check_address(draft.cluster.address, mistakes)
    _check_trackers(draft.tracking.also, mistakes, check_files=check_files)
    for key in ("init_from", "teacher_from", "resume_from"):
        reference = getattr(draft, key)
        if mistakes.sound(key) and reference and redact(reference) != reference:
            problem = "user, password and query belong in the environment of the store's library, not in a recipe"
            mistakes.add(key, redact(reference), problem)
    recipe = replace(
        draft,
        data=_with_absolute_paths(draft.data),
        train=_with_batch_arithmetic(draft.train, mistakes),
        evaluation=replace(
            draft.evaluation, data={name: absolute(path) for name, path in draft.evaluation.data.items()}
        ),
        tracking=replace(draft.tracking, model_name=draft.tracking.model_name or draft.name),
        init_from=absolute_reference(draft.init_from),
        teacher_from=absolute_reference(draft.teacher_from),
        resume_from=absolute_reference(draft.resume_from),
        storage=_checked_storage(draft.storage, mistakes),
    )
    _check_data(draft.data, mistakes, check_files=check_files)
    if check_files and mistakes.sound("backbone.kind"):
        _check_pairing(draft, mistakes)
    if recipe.evaluation.enabled:
        if check_files:
            _check_evaluation_data(recipe.evaluation, mistakes)
        _check_evaluation_tasks(recipe.evaluation, recipe.backbone, mistakes)
    return recipe


def absolute(path: str | None) -> Any:
    """The absolute form of a path: `package:` is in the installed package, `~` at home, others in the current folder.

    URLs, commands and None come back as they are.
    """
    if path is None or "://" in path or scheme_of(path) == "pipe":
        return path
    if path.startswith("package:"):
        return str(_PACKAGE / path.removeprefix("package:"))
    return os.path.abspath(expanded(path))


def absolute_reference(reference: str | None) -> str | None:
    """A reference to a checkpoint with the path in it, if there is one, made absolute."""
    if not reference or reference.startswith(("runs:/", "models:/")):
        return reference
    if reference.startswith("timm:"):
        name, at, file = reference.partition("@")
        return f"{name}@{absolute(file)}" if at else reference
    is_path = "/" in reference or reference.endswith(".safetensors") or os.path.exists(expanded(reference))
    return str(absolute(reference)) if is_path else reference


def data_folder_problem(folder: Path) -> str | None:
    """Why there is nothing to train on; None when photos or shards lie somewhere below the folder."""
    if not os.path.isdir(folder):  # unlike `Path.is_dir`, also of names that no file can have
        wanted = "is a file; expected the folder of photos or shards"
        return wanted if os.path.exists(folder) else f"no such directory{nearest_file(folder)}"
    from data_pipelines.packing.inputs import FAMILIES, holds

    if (folder / MANIFEST_NAME).exists() or holds(folder, "images", "tars"):  # whoever opens shards says which are gone
        return None
    return f"no shards (.tar) and no photos ({' '.join(FAMILIES['images'])}) in it"


def evaluation_data_problem(directory: str | Path) -> str | None:
    """What is wrong with a directory of evaluation data; None when it holds both splits."""
    folder = Path(directory)
    if not folder.is_dir():
        return f"no such directory{nearest_file(folder)}"
    patterns = ("train-*.tar", f"{held_out(folder)}-*.tar")
    absent = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if absent:
        wanted = "evaluation data has shards train-*.tar and test-*.tar (or val-*.tar)"
        pack = f"pretrain data pack {folder} DEST --split train=0.9,test=0.1"
        remedy = "" if any(folder.glob("*.tar")) else f"; photos become such by: {pack}"
        return f"no {' and no '.join(absent)} in it; {wanted}{remedy}"
    try:
        check_source([folder / pattern for pattern in patterns])
    except DataError as error:
        return str(error)
    return None


def _check_root(draft: Recipe, mistakes: Mistakes) -> None:
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


def _counted_in_steps(draft: Recipe, mistakes: Mistakes, *, check_files: bool) -> Recipe:
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

            opened = replace(draft, data=_with_absolute_paths(draft.data))
            if (opened.data.train is None) != (not opened.data.mixture):
                return replace(in_steps(opened), data=draft.data)
        except DataError as error:
            problem = str(error)
    for key, steps in asked.items():
        mistakes.distrust(steps)
        if problem is not None and (check_files or draft.data.unindexed == "stream"):
            mistakes.add(key, counted[key][0], problem)
    return draft


def _check_names(draft: Recipe, mistakes: Mistakes) -> None:
    for key, name in (("name", draft.name), ("tracking.model_name", draft.tracking.model_name)):
        if mistakes.sound(key) and name is not None and not _RUN_NAME.fullmatch(name):
            mistakes.add(key, name, "expected letters, digits, '.', '_' and '-' only (it names directories)")


def _check_image_encoder(backbone: ImageConfig, mistakes: Mistakes) -> None:
    if not mistakes.sound("backbone.name"):
        return
    known = model_names()
    plain_name = backbone.name.partition(".")[0]
    if plain_name not in known:
        problem = f"unknown model; it is none of the {len(known)} registered names{nearest(plain_name, known)}"
        mistakes.add("backbone.name", backbone.name, problem)
        return
    image_size, patch_size = sizes(backbone)
    if mistakes.sound("backbone.image_size", "backbone.patch_size") and image_size and patch_size:
        _check_divisible("backbone.image_size", image_size, patch_size, mistakes)
    channels = backbone.in_chans
    for key, numbers in (("backbone.pixel_mean", backbone.pixel_mean), ("backbone.pixel_std", backbone.pixel_std)):
        if mistakes.sound(key) and len(numbers) != channels:
            problem = f"{key} has {len(numbers)} numbers, expected one for each of {channels} channels"
            blamed = mistakes.latest(key, "backbone.in_chans")
            mistakes.add(blamed, channels if blamed.endswith("in_chans") else numbers, problem)


def _check_crops(objective: Any, backbone: ImageConfig, mistakes: Mistakes) -> None:
    """Sides in pixels that an objective gives crops have to be whole patches."""
    patch_size = sizes(backbone)[1]
    if not isinstance(objective, MultiCropConfig) or patch_size is None or not mistakes.sound("backbone"):
        return
    if objective.num_local and objective.local_size and mistakes.sound("objective.local_size", "objective.num_local"):
        _check_divisible("objective.local_size", objective.local_size, patch_size, mistakes)


def sizes(backbone: ImageConfig) -> tuple[int | None, int | None]:
    """Image and patch size in pixels, read from the model's name where the recipe leaves them open."""
    match = _MODEL_SIZES.search(backbone.name)
    patch_size, image_size = (int(match.group(1)), int(match.group(2))) if match else (None, None)
    return backbone.image_size or image_size, backbone.patch_size or patch_size


def _check_divisible(key: str, image_size: int, patch_size: int, mistakes: Mistakes) -> None:
    if image_size % patch_size:
        below = image_size - image_size % patch_size
        sizes = [size for size in (below, below + patch_size) if size]
        problem = f"not a multiple of the patch size {patch_size}; nearest: {' or '.join(map(str, sizes))}"
        mistakes.add(key, image_size, problem)


def _check_optimizer(draft: Recipe, mistakes: Mistakes) -> None:
    optimizer = draft.optimizer
    if mistakes.sound("optimizer.lr", "optimizer.base_lr"):
        if optimizer.lr is None and optimizer.base_lr is None:
            problem = "give one of optimizer.lr and optimizer.base_lr (lr = base_lr x global_batch_size / 256)"
            mistakes.add("optimizer.lr", None, problem)
        elif optimizer.lr is not None and optimizer.base_lr is not None:
            key = mistakes.latest("optimizer.base_lr", "optimizer.lr")
            other = "optimizer.base_lr" if key == "optimizer.lr" else "optimizer.lr"
            value = optimizer.lr if key == "optimizer.lr" else optimizer.base_lr
            problem = f"{other} is given too and only one can count; add {other}=null"
            mistakes.add(key, value, problem)
    peak_is_known = mistakes.sound("optimizer.lr", "optimizer.base_lr", "train.global_batch_size")
    if peak_is_known and mistakes.sound("optimizer.min_lr") and optimizer.min_lr > draft.peak_lr:
        problem = f"above the peak learning rate; expected a number in [0, {draft.peak_lr:g}]"
        mistakes.add("optimizer.min_lr", optimizer.min_lr, problem)
    warmup, steps = optimizer.warmup_steps, draft.train.steps
    if mistakes.sound("optimizer.warmup_steps", "train.steps") and warmup >= steps:
        key = mistakes.latest("optimizer.warmup_steps", "optimizer.warmup_epochs", "train.steps", "train.epochs")
        problem = f"a warm-up of {warmup} steps does not fit a run of {steps}"
        remedy = f"give optimizer.warmup_steps=N below {steps}"
        if key == "optimizer.warmup_steps":
            problem, remedy = f"has to be below train.steps={steps}", f"expected a whole number in [0, {steps - 1}]"
        mistakes.add(key, mistakes.written(key), f"{problem}; {remedy}")
    decay, left = optimizer.decay_steps, steps - warmup
    is_sound = mistakes.sound("optimizer.decay_steps", "optimizer.warmup_steps", "train.steps")
    if is_sound and decay is not None and 0 < left < decay:
        problem = f"train.steps={steps} leaves {left} after the warm-up; give as many or fewer, or null"
        mistakes.add("optimizer.decay_steps", decay, problem)


def _zero_stage(draft: Recipe) -> int:
    """The stage that is asked for, else 1, or 0 where that saves nothing worth the copies that ZeRO makes in a step.

    With one worker there is nobody to share with, and memory of CPUs is seldom what a model lacks; ZeRO 1 took 1.05 to
    1.25 times the CPU time of stage 0 there. In bf16, stages 1 to 3 keep the float32 masters.
    """
    train = draft.train
    if train.zero_stage is not None:
        return train.zero_stage
    saves_nothing = train.workers == 1 or train.device == "cpu" or draft.optimizer.name in WHOLE_PARAMETER
    return 0 if saves_nothing and train.precision == "fp32" and "zero_optimization" not in draft.deepspeed else 1


def zero_objections(optimizer: OptimizerConfig, train: TrainConfig, stage: int) -> Iterator[tuple[str, Any, str]]:
    """What speaks against a ZeRO stage: a setting, its value, and the problem with its remedy."""
    if optimizer.name in WHOLE_PARAMETER and stage:
        problem = (
            f"computes {WHOLE_PARAMETER[optimizer.name]}, and ZeRO stage {stage} gives it flat pieces of many; use "
            "train.zero_stage=0 (and train.precision=fp32) with it, or one of adamw, nadamw, adoptw, lion, sgdw"
        )
        yield "optimizer.name", optimizer.name, problem
    if train.precision == "bf16" and stage == 0:
        problem = "DeepSpeed's stage 0, which train.zero_stage says here, trains worse in bf16; add train.zero_stage=1"
        yield "train.precision", train.precision, problem
    if train.compile and stage == 3:
        problem = "ZeRO stage 3 gathers parameters within the blocks that are compiled; use train.zero_stage=2 with it"
        yield "train.compile", train.compile, problem


def _check_zero_stage(draft: Recipe, mistakes: Mistakes) -> None:
    for key, value, problem in zero_objections(draft.optimizer, draft.train, draft.train.zero_stage or 0):
        if mistakes.sound(key, "train.zero_stage"):
            mistakes.add(key, value, problem)


def _loader_workers(draft: Recipe) -> int:
    """Loader processes per worker: as asked for, else one on each core that the worker has beside its own, 1 to 8.

    The cores are those that this process may use; on a given cluster, those that Ray reserves for a worker. What a step
    sees does not depend on the number.
    """
    if draft.data.loader_workers is not None:
        return draft.data.loader_workers
    if draft.cluster.address or os.environ.get("RAY_ADDRESS"):
        cores = draft.cluster.cpus_per_worker
    else:
        cores = len(os.sched_getaffinity(0)) // draft.train.workers
    return max(1, min(cores - 1, _MOST_LOADER_WORKERS))


def _check_deepspeed(raw: Mapping[str, Any], mistakes: Mistakes) -> None:
    for owned, ours in _OWNED_DEEPSPEED_KEYS.items():
        node: Any = raw
        for name in owned.split("."):
            node = node[name] if isinstance(node, Mapping) and name in node else None
        if node is not None:
            mistakes.add(f"deepspeed.{owned}", node, f"decided by {ours}; set that instead")


def _with_batch_arithmetic(train: TrainConfig, mistakes: Mistakes) -> TrainConfig:
    """Fill in micro_batch_size, accumulation and pictures_every, so that global = micro x accumulation x workers."""
    keys = ("train.global_batch_size", "train.micro_batch_size", "train.accumulation", "train.workers")
    micro, accumulation = train.micro_batch_size, train.accumulation
    if micro is None and accumulation is None:
        accumulation = 1
    given = micro if micro is not None else accumulation
    assert given is not None
    if mistakes.sound(*keys):
        quotient, rest = divmod(train.global_batch_size, given * train.workers)
        both = micro is not None and accumulation is not None
        wanted = accumulation if both else quotient
        if rest or quotient != wanted or not quotient:
            mistakes.add(*_batch_mistake(train, mistakes.latest(*keys)))
        elif micro is None:
            micro = quotient
        else:
            accumulation = quotient
    pictures_every = train.checkpoint_every if train.pictures_every is None else train.pictures_every
    return replace(train, micro_batch_size=micro, accumulation=accumulation, pictures_every=pictures_every)


def _batch_mistake(train: TrainConfig, key: str) -> tuple[str, Any, str]:
    """The arithmetic that does not work out, and the nearest numbers that do."""
    total, workers = train.global_batch_size, train.workers
    micro, accumulation = train.micro_batch_size, train.accumulation
    unit = (micro or 1) * (accumulation or 1) * workers
    below = total - total % unit
    totals = [unit] if micro and accumulation else [size for size in (below, below + unit) if size]
    remedies = [f"train.global_batch_size={' or '.join(map(str, totals))}"]
    per_worker = total // workers if total % workers == 0 else None
    if per_worker and micro:
        near = _nearest_divisors(per_worker, micro)
        pairs = [f"{size} (accumulation {per_worker // size})" for size in near]
        remedies.append(f"train.micro_batch_size={' or '.join(pairs)}")
    elif per_worker and accumulation:
        remedies.append(f"train.accumulation={' or '.join(map(str, _nearest_divisors(per_worker, accumulation)))}")
    else:
        remedies.append(f"train.workers={' or '.join(map(str, _nearest_divisors(total, workers)))}")
    arithmetic = f"micro {micro or '?'} x accumulation {accumulation or '?'} x workers {workers}"
    verdict = f"is {unit}, not" if micro and accumulation else "can not be"
    problem = f"{arithmetic} {verdict} the global batch {total}; nearest: {', '.join(remedies)}"
    return key, getattr(train, key.removeprefix("train.")), problem


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` next to `wanted`, ascending."""
    below = next(size for size in range(min(wanted, number), 0, -1) if number % size == 0)
    above = next((size for size in range(wanted + 1, number + 1) if number % size == 0), below)
    return sorted({below, above})


def _with_absolute_paths(data: DataConfig) -> DataConfig:
    return replace(
        data,
        root=absolute(data.root),
        train=absolute(data.train),
        mixture=[replace(part, shards=absolute(part.shards)) for part in data.mixture],
        cache_dir=absolute(data.cache_dir),
    )


def _check_data(data: DataConfig, mistakes: Mistakes, *, check_files: bool) -> None:
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


def _check_pairing(draft: Recipe, mistakes: Mistakes) -> None:
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


def _checked_storage(storage: str, mistakes: Mistakes) -> str:
    if mistakes.sound("storage"):
        if "://" in storage:
            mistakes.add("storage", storage, "expected a local directory (remote stores are not supported yet)")
        elif problem := _place_problem(Path(absolute(storage))):
            mistakes.add("storage", storage, problem)
    return str(absolute(storage))


def _place_problem(folder: Path) -> str | None:
    """Why no directory can be made or used there."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return "is a file; expected a directory" if there == folder else f"{there} is no directory"
    return None if os.access(there, os.W_OK) else f"{there} is not writable; name another directory"


def _check_checkpoint_storage(uri: str | None, mistakes: Mistakes) -> None:
    if uri is None or not mistakes.sound("checkpoints.storage"):
        return
    from fsspec.registry import known_implementations, registry

    scheme, separator, rest = uri.partition("://")
    example = "expected a URI such as s3://BUCKET/PREFIX, or null for the directory of the run"
    problem = None
    if not separator or not rest:
        problem = example
    elif scheme == "memory":
        problem = f"holds what one process writes, and no other sees it; {example}"
    elif scheme not in registry and scheme not in known_implementations:
        problem = f"fsspec knows no {scheme}://{nearest(scheme, known_implementations)}; {example}"
    elif redact(uri) != uri:
        problem = "user, password and query belong in the environment of the store's library, not in a recipe"
    if problem:
        mistakes.add("checkpoints.storage", redact(uri), problem)


def _check_trackers(names: Iterable[str], mistakes: Mistakes, *, check_files: bool) -> None:
    """Other trackers must be known and, where the run is to begin, installed."""
    for name in names if mistakes.sound("tracking.also") else ():
        packages = _TRACKERS.get(name)
        if packages is None:
            problem = f"{name}: unknown tracker; known are {', '.join(_TRACKERS)}{nearest(name, _TRACKERS)}"
            mistakes.add("tracking.also", list(names), problem)
        elif check_files and not any(map(find_spec, packages)):
            problem = f"{name} is not installed: pip install {packages[0]}, or leave it out"
            mistakes.add("tracking.also", list(names), problem)


def _check_address(address: str | None, mistakes: Mistakes) -> None:
    if address is None or not mistakes.sound("cluster.address") or address == "auto":
        return
    _, _, place = address.rpartition("ray://")
    host, _, port = place.rpartition(":")
    if not (host and _HOST.fullmatch(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        problem = "is no address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT or auto"
        mistakes.add("cluster.address", redact(address), problem)


def _check_evaluation_data(evaluation: EvaluationConfig, mistakes: Mistakes) -> None:
    for name, directory in evaluation.data.items():
        key = f"evaluation.data.{name}"
        if mistakes.sound(key) and (problem := evaluation_data_problem(directory)):
            mistakes.add(key, directory, problem)


def _check_evaluation_tasks(evaluation: EvaluationConfig, backbone: Any, mistakes: Mistakes) -> None:
    patch_size = sizes(backbone)[1] if isinstance(backbone, ImageConfig) else None
    protocols = evaluations.names()
    for index, task in enumerate(evaluation.tasks):
        key = f"evaluation.tasks[{index}]"
        _check_known(f"{key}.protocol", task.protocol, "protocol", protocols, mistakes)
        if mistakes.sound(f"{key}.protocol", "backbone.kind"):
            _check_fits(key, task, backbone.kind, mistakes)
        if mistakes.sound("evaluation.data"):
            _check_known(f"{key}.data", task.data, "entry of evaluation.data", evaluation.data, mistakes)
        if mistakes.sound(f"{key}.image_size", "backbone.patch_size") and task.image_size and patch_size:
            _check_divisible(f"{key}.image_size", task.image_size, patch_size, mistakes)
    if evaluation.select is not None and not evaluation.tasks and mistakes.sound("evaluation"):
        key = mistakes.latest("evaluation.select", "evaluation.tasks")
        value = evaluation.select if key == "evaluation.select" else []
        mistakes.add(key, value, "no task has a score to select by; add evaluation.select=null")
    elif evaluation.select is not None and mistakes.sound("evaluation.select", "evaluation.tasks"):
        scores = {
            f"{task.protocol}/{task.data}/{metric.name}": metric
            for task in evaluation.tasks
            for metric in evaluations.protocol(task.protocol).metrics
        }
        choices = [name for name, metric in scores.items() if metric.better is not None]
        if evaluation.select in scores and evaluation.select not in choices:
            problem = f"only reported, nothing can be best by it; those that say which is better: {', '.join(choices)}"
            mistakes.add("evaluation.select", evaluation.select, problem)
        else:
            _check_known("evaluation.select", evaluation.select, "score of evaluation.tasks", choices, mistakes)


def _check_fits(key: str, task: EvaluationTask, kind: str, mistakes: Mistakes) -> None:
    """Refuse what a backbone of this kind cannot be evaluated by."""
    try:
        does_fit = bool(evaluations.fitting(kind, [task.protocol]))
    except evaluations.EvaluationError as error:  # a plug-in that cannot be imported
        mistakes.add(f"{key}.protocol", task.protocol, str(error))
        return
    if not does_fit:
        problem = f"does not fit backbone.kind={kind}; built-in ones that do: {', '.join(evaluations.fitting(kind))}"
        mistakes.add(f"{key}.protocol", task.protocol, problem)
    elif task.image_size is not None and kind in EXTRACTIONS and kind != "image":
        mistakes.add(f"{key}.image_size", task.image_size, f"is of images; with backbone.kind={kind} leave it out")


def _check_known(key: str, name: str, noun: str, known: Iterable[str], mistakes: Mistakes) -> None:
    names = list(known)
    if mistakes.sound(key) and name not in names:
        listing = ", ".join(names) if names else "none"
        mistakes.add(key, name, f"unknown {noun}; known are {listing}{nearest(name, names)}")
