"""The settings of a run: every key with its type, default, allowed range and reason.

A recipe file and the command line may set exactly these keys. `pretrain.config.load` merges the layers and
`pretrain.config.checks` checks what no single key can know. The settings of an objective live with it
(`objectives/NAME/config.py`) and are put in `Recipe.objective` by name; those of a kind of backbone likewise
(`backbones.images.config`), in `Recipe.backbone` by `backbone.kind`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from backbones.images.config import ImageConfig
from evaluation.suites import SUITES
from pretrain.config.optimizer_facts import NAMES

__all__ = [
    "CheckpointsConfig",
    "ClusterConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvaluationTask",
    "MixturePart",
    "OptimizerConfig",
    "Recipe",
    "TrackingConfig",
    "TrainConfig",
]

REQUIRED = "???"  # OmegaConf's mark of a mandatory value


def setting(
    help: str,
    default: Any = REQUIRED,
    *,
    range: tuple[float | None, float | None] | None = None,
    choices: tuple[str, ...] | None = None,
    length: int | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with what the loader checks and the error messages say.

    Args:
        help: one line: what the setting does.
        default: the value when nobody sets it; lists and dicts are copied; without one the setting is mandatory.
        range: inclusive bounds of a number, or of each number in a list; None leaves a side open.
        choices: the allowed texts.
        length: number of items of a list.
        metavar: what stands for the value in examples, e.g. DIR.
    """
    metadata = {"help": help, "range": range, "choices": choices, "length": length, "metavar": metavar}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MixturePart:
    """One of several data sets that are mixed. Exactly one of weight and repeat is set."""

    name: str = setting("what messages call it")
    shards: str = setting("as data.train", metavar="SHARDS")
    weight: float | None = setting("share of the samples, relative to the other parts", None, range=(1e-6, 1e9))
    repeat: float | None = setting("passes over it in one pass over the mixture", None, range=(1e-6, 1e9))
    limit: int | None = setting("use only the first n samples; null: all", None, range=(1, None))


@dataclass(frozen=True)
class DataConfig:
    """What to learn from: one of train and mixture. The sample order is a pure function of it, train.seed,
    block_size, window and num_streams.
    """

    root: str | None = setting("directory other paths of the recipe may refer to as ${data.root}", None, metavar="DIR")
    train: str | None = setting(
        "shards: a directory, dir/train-*.tar, train-{000..003}.tar, one tar; also http(s)://, s3://, gs://",
        None,
        metavar="SHARDS",
    )
    mixture: list[MixturePart] = setting("several data sets instead of data.train", [])
    mixture_by: str = setting(
        "share: each sample is of one part, in shares; join: each sample is one of every part, side by side",
        "share",
        choices=("share", "join"),
    )
    limit: int | None = setting("use only the first n samples of data.train; null: all", None, range=(1, None))
    unindexed: str = setting(
        "shards without an index; index: read all once before the first step; stream: do not, but resume inexactly",
        "index",
        choices=("index", "stream"),
    )
    loader_workers: int | None = setting(
        "decoding processes per training worker; 0: in the worker itself; null: a core each of those that this machine "
        "has for the worker beside its own, 1 to 8",
        None,
        range=(0, 256),
    )
    prefetch_batches: int = setting("micro-batches each decoding process prepares ahead", 2, range=(1, 1024))
    loader_timeout_s: float = setting(
        "seconds to wait for a micro-batch of the decoding processes before they are given up",
        600.0,
        range=(1.0, 86400.0),
    )
    block_size: int = setting("neighbouring samples that are read together", 256, range=(1, None))
    window: int = setting("blocks that are mixed with each other", 16, range=(1, None))
    num_streams: int = setting("independent sequences the samples are dealt to", 8, range=(1, None))
    decoder: str = setting(
        "of JPEGs; auto: simplejpeg where it is installed, else PIL", "auto", choices=("auto", "pil", "simplejpeg")
    )
    resampler: str = setting(
        "what scales crops; torch takes a third of PIL's time and crops before it scales, as torchvision does",
        "torch",
        choices=("torch", "pil"),
    )
    scaled_decoding: bool = setting("let the decoder halve photos much larger than their views; changes pixels", False)
    exif_rotation: bool = setting(
        "use photos and masks as they are shown, turned by their EXIF orientation; false: as stored", True
    )
    max_corrupt_fraction: float = setting(
        "share of damaged samples that are replaced by others; 0: the first one ends the run", 0.0, range=(0.0, 0.5)
    )
    record_samples: bool = setting("write the ids of the samples of each step to samples/rank-*.jsonl", False)
    fetch: str = setting(
        "remote shards: by range, whole (shard), or whatever the server can (auto)",
        "auto",
        choices=("auto", "range", "shard"),
    )
    cache_dir: str | None = setting("where remote shards are kept; null: $PRETRAIN_CACHE/shards", None, metavar="DIR")
    cache_gb: float = setting(
        "bound of that cache in GB (1e9 bytes), for all processes of a node", 32.0, range=(0.01, 1e6)
    )
    allow_pipe: bool = setting("accept pipe:COMMAND as a shard; the command is run", False)


@dataclass(frozen=True)
class OptimizerConfig:
    """Warm-up and half-cosine decay per step. Exactly one of lr and base_lr is set."""

    name: str = setting("the optimizer; lamb, lars and muon work with train.zero_stage=0 only", "adamw", choices=NAMES)
    lr: float | None = setting("peak learning rate", None, range=(0.0, None))
    base_lr: float | None = setting(
        "peak learning rate per 256 samples: lr = base_lr x global_batch_size / 256 (MAE)", None, range=(0.0, None)
    )
    base_lr_rule: str = setting(
        "what base_lr is multiplied by; sqrt: the root of global_batch_size / 1024 (DINOv2)",
        "linear",
        choices=("linear", "sqrt"),
    )
    min_lr: float = setting("learning rate at the last step; the peak: constant", 0.0, range=(0.0, None))
    warmup_steps: int = setting("steps of warm-up from 0", 0, range=(0, None))
    warmup: str = setting(
        "its shape; linear reaches the peak in the step after it, inclusive and cosine in its last step",
        "linear",
        choices=("linear", "inclusive", "cosine"),
    )
    warmup_epochs: float | None = setting(
        "passes over the data of linear warm-up, instead of warmup_steps", None, range=(0.0, 1e6)
    )
    decay_steps: int | None = setting(
        "steps of half-cosine decay after the warm-up, whose last one has min_lr, as all after it; null: to the end of "
        "the run, where the step after the last would have it",
        None,
        range=(2, None),
    )
    decay_stretch: float = setting(
        "by which share half a cosine is longer than the decay; it is cut off and scaled to end at min_lr (DINOv2's "
        "trunc_extra)",
        0.0,
        range=(0.0, 100.0),
    )
    weight_decay: float = setting("decoupled weight decay; default: MAE", 0.05, range=(0.0, None))
    weight_decay_end: float | None = setting("weight decay at the last step; null: constant", None, range=(0.0, None))
    betas: list[float] = setting("betas, or (the first) momentum; of MAE", [0.9, 0.95], range=(0.0, 1.0), length=2)
    eps: float = setting("epsilon, where the optimizer has one", 1e-8, range=(0.0, None))
    layer_decay: float = setting("learning-rate factor per block, counted from the last", 1.0, range=(0.01, 1.0))
    clip_grad: float | None = setting("bound of the gradient norm; null: no clipping", None, range=(1e-6, None))
    clip_mode: str = setting(
        "of the norm of everything (global), or of that of each part of the objective, such as backbone and head",
        "global",
        choices=("global", "part"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how many workers, and in which batches: global = micro x accumulation x workers."""

    steps: int = setting("optimizer steps of the whole run", range=(1, None))
    epochs: float | None = setting("passes over the data instead of steps; becomes steps", None, range=(1e-6, 1e6))
    global_batch_size: int = setting("samples per optimizer step over all workers", range=(1, None))
    micro_batch_size: int | None = setting("samples per forward pass; null: derived", None, range=(1, None))
    accumulation: int | None = setting("forward passes per optimizer step; null: derived", None, range=(1, None))
    workers: int = setting("training processes; [FEWEST, MOST] sets min_workers as well", 2, range=(1, 65536))
    min_workers: int | None = setting(
        "fewest workers that the run goes on with when a cluster has no room for all; null: as many as workers",
        None,
        range=(1, 65536),
    )
    zero_stage: int | None = setting(
        "what DeepSpeed ZeRO shards: 0 nothing, 1 optimizer, 2 + gradients, 3 + parameters and teachers; null: 0 in "
        "fp32 with one worker, on CPUs or with an optimizer that needs it, else 1",
        None,
        range=(0, 3),
    )
    precision: str = setting("arithmetic of the model", "fp32", choices=("fp32", "bf16"))
    tf32: bool = setting(
        "on GPUs, multiply float32 matrices in TF32: several times as fast, with 10 bits behind the point", True
    )
    device: str = setting("where to compute; auto: cuda if there is one", "auto", choices=("auto", "cpu", "cuda"))
    compile: bool = setting("compile the blocks of the model; the first steps wait, losses change by rounding", False)
    checkpoint_blocks: bool = setting(
        "keep only the inputs of blocks and compute them again in the backward pass: less memory, a third more time",
        False,
    )
    seed: int = setting("seed of weights, sample order, crops and masks", 0, range=(0, 2**31 - 1))
    log_every: int = setting("steps between two recorded metrics", 10, range=(1, None))
    checkpoint_every: int = setting("steps between two checkpoints; the last step always has one", range=(1, None))
    checkpoint_every_epochs: float | None = setting(
        "passes over the data between two checkpoints, instead of checkpoint_every", None, range=(1e-6, 1e6)
    )
    keep_last: int = setting("newest checkpoints whose training state is kept; backbones all stay", 2, range=(1, None))
    keep_best: int = setting("best checkpoints by evaluation.select that keep theirs besides", 1, range=(0, None))
    max_failures: int = setting("restarts of the workers with no new checkpoint between them", 3, range=(0, None))
    hang_after_s: float = setting(
        "seconds of a step after which silent workers are ended, with their stacks in logs/, and start again; three "
        "times as many of a start and of a checkpoint; 0: never",
        600.0,
        range=(0, None),
    )
    collective_timeout_s: float = setting(
        "seconds that a worker waits for the others before it gives up", 1800.0, range=(1, None)
    )
    max_skipped_steps: int = setting(
        "steps with a non-finite loss that are skipped before the run ends", 10, range=(0, None)
    )
    stop_on_collapse: bool = setting("end the run when the objective finds its features or loss collapsed", False)
    pictures_every: int | None = setting("steps between pictures; 0: none; null: as checkpoints", None, range=(0, None))


@dataclass(frozen=True)
class CheckpointsConfig:
    """Where checkpoints are stored."""

    storage: str | None = setting(
        "store for checkpoints, e.g. s3://BUCKET/PREFIX; null: with the run", None, metavar="URI"
    )
    asynchronous: bool = setting(
        "write them while training goes on, from a copy in memory; false: training waits for each", True
    )


@dataclass(frozen=True)
class EvaluationTask:
    """One protocol on one data set, or a suite of them, which is one task for each protocol once it is resolved."""

    protocol: str = setting("name of an evaluation protocol; or give a suite", "")
    data: str = setting("name of an entry of evaluation.data")
    image_size: int | None = setting(
        "side of the input in pixels, or [HEIGHT, WIDTH]; null: the backbone's", None, range=(1, 8192)
    )
    image_width: int | None = setting(
        "width of inputs that are not square, which image_size sets as well; null: as high", None, range=(1, 8192)
    )
    suite: str | None = setting(
        "those of its protocols that fit the backbone and the labels; beside a protocol: which suite that is of",
        None,
        choices=SUITES,
    )
    every: int | None = setting("run on every n-th checkpoint; null: as evaluation.every", None, range=(1, None))
    at: str | None = setting(
        "last: only on the last checkpoint of the run, and as evaluation.baseline says; null: as every says",
        None,
        choices=("last",),
    )

    @property
    def size(self) -> int | tuple[int, int] | None:
        """Side or (height, width) in pixels, as `evaluation.evaluate` takes it; None: the backbone's."""
        if self.image_size is None or self.image_width is None:
            return self.image_size
        return self.image_size, self.image_width


@dataclass(frozen=True)
class EvaluationConfig:
    """How checkpoints are evaluated while training goes on."""

    enabled: bool = setting("evaluate checkpoints at all", True)
    every: int = setting("evaluate every n-th checkpoint; the last one always", 1, range=(1, None))
    baseline: bool = setting("evaluate the randomly initialized backbone as well (step 0)", True)
    data: dict[str, str] = setting("name: directory with train-*.tar and test-*.tar", {})
    tasks: list[EvaluationTask] = setting("what to run on each evaluated checkpoint", [])
    select: str | None = setting("PROTOCOL/DATA/METRIC that moves the alias `best`; null: the newest is best", None)
    half_features: bool = setting("store frozen features of samples in half precision: half the disk", False)
    slots: int = setting("evaluations that may run at the same time", 1, range=(1, 1024))


@dataclass(frozen=True)
class TrackingConfig:
    """How the run appears in MLflow, and which other trackers get its events."""

    experiment: str = setting("MLflow experiment", "pretrain")
    model_name: str | None = setting("registered model; null: the recipe's name", None)
    also: list[str] = setting("trackers beside MLflow, where they are installed: tensorboard, wandb", [])


@dataclass(frozen=True)
class ClusterConfig:
    """Where Ray places the workers."""

    address: str | None = setting("address of a running Ray; null: $RAY_ADDRESS, else a private local one", None)
    cpus_per_worker: int = setting("CPUs reserved per training worker", 1, range=(0, 4096))
    gpus_per_worker: int | None = setting("GPUs per worker; null: 1 when training on cuda, else 0", None, range=(0, 64))


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on. Once resolved it holds absolute paths and no derived value is left open."""

    name: str = setting("name of the recipe; default: the file name")
    description: str = setting("one line for `pretrain recipes`", "")
    suits: dict[str, str] = setting("what the recipe is meant for, in `pretrain recipes`: data, hardware, time", {})
    objective: Any = setting("name of the objective and its settings")
    backbone: Any = field(default_factory=ImageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init_from: str | None = setting(
        "weights to begin with: a run, a checkpoint, models:/NAME@ALIAS, FILE.safetensors or timm:NAME; null: random",
        None,
        metavar="REFERENCE",
    )
    teacher_from: str | None = setting(
        "weights of frozen teachers, in the words of init_from; of objectives that have one", None, metavar="REFERENCE"
    )
    resume_from: str | None = setting(
        "another run, or a checkpoint of one, whose whole training state to go on from; comes before init_from",
        None,
        metavar="REFERENCE",
    )
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    deepspeed: dict[str, Any] = setting("raw DeepSpeed keys, merged into its configuration last", {})
    storage: str = setting(
        "directory of runs, evaluations and the MLflow database, or a store for runs, e.g. s3://BUCKET/PREFIX", "runs"
    )

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, whichever of lr and base_lr the recipe gives."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        assert self.optimizer.base_lr is not None
        batch = self.train.global_batch_size
        factor = math.sqrt(batch / 1024) if self.optimizer.base_lr_rule == "sqrt" else batch / 256
        return self.optimizer.base_lr * factor
