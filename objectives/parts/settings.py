"""Settings that several objectives share: dataclasses to inherit, and metadata of fields. Imports no torch.

Field metadata: "help" says what it does, "range" = (lowest, highest) allowed, both ends included, "choices" lists what
is allowed, "length" is the number of items of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "CROP_SCALE",
    "FILL",
    "FILLED_SHARE",
    "FLIP",
    "FREEZE",
    "GLOBAL_SCALE",
    "HFLIP",
    "LAST_LAYERS",
    "LOCAL_SCALE",
    "TEACHER_MOMENTUM",
    "TURN",
    "VOLUME_ARRAY",
    "VOLUME_FIELD",
    "AugmentationConfig",
    "CorruptionConfig",
    "DistillationConfig",
    "MultiCropConfig",
]

# Metadata of settings whose defaults differ between objectives.
CROP_SCALE = {"range": (0.01, 1.0), "length": 2, "help": "smallest and largest share of the image of a crop"}
GLOBAL_SCALE = CROP_SCALE | {"help": "smallest and largest share of the image of a global crop"}
LOCAL_SCALE = CROP_SCALE | {"help": "smallest and largest share of the image of a local crop"}
HFLIP = {"range": (0.0, 1.0), "help": "probability of a horizontal flip"}
TEACHER_MOMENTUM = {"range": (0.0, 1.0), "help": "share of the teacher kept per step at the start; then to 1"}
FLIP = {"range": (0.0, 1.0), "length": 3, "help": "probability of a mirror along each axis"}
TURN = {"range": (0.0, 1.0), "help": "probability of a quarter turn in the plane of the first two axes"}
VOLUME_FIELD = {"help": "field of the samples to read, an npy or npz; null: the first of those a volume may have"}
VOLUME_ARRAY = {"help": "which array of an npz; null: the only one"}
FREEZE = {"range": (0.0, 1.0), "help": "share of the steps, from the start, with fixed prototypes"}
FILLED_SHARE = {
    "range": (0.01, 0.9),
    "help": "greatest share of the pixels that is filled; the least is a half, or this where it is less",
}
LAST_LAYERS = ("linear", "weight_norm", "weight_norm_frozen")  # of `objectives.parts.prototypes.DINOHead`
FILL = {"choices": ("noise", "zeros"), "help": "what blocks are filled with: noise, or the mean color"}


@dataclass
class AugmentationConfig:
    """How crops are changed beyond where they are cut (`objectives.parts.photometric`)."""

    name: str = ""
    hflip: float = field(default=0.5, metadata=HFLIP)
    photometric: bool = field(default=True, metadata={"help": "change colors and blur, as the paper; needs RGB"})
    blur: bool = field(
        default=True, metadata={"help": "blur crops as part of that; leaves little of images of 32 pixels"}
    )


@dataclass
class CorruptionConfig(AugmentationConfig):
    """Blocks of the images are replaced, and what was there is predicted (`objectives.parts.block_corruption`)."""

    share: float = field(default=0.75, metadata=FILLED_SHARE)
    fill: str = field(default="noise", metadata=FILL)
    # The authors' default. With the patch size, whole patches are masked, as their paper describes it.
    align: int = field(default=1, metadata={"range": (1, 1024), "help": "blocks start and end at multiples, in pixels"})
    alien_p: float = field(
        default=0.5, metadata={"range": (0.0, 1.0), "help": "probability that blocks show another image instead"}
    )
    alien_share: float = field(
        default=0.3, metadata={"range": (0.01, 0.9), "help": "share of the pixels that another image then covers"}
    )
    masked_only: bool = field(default=True, metadata={"help": "count the error of replaced pixels only"})
    crop_scale: list[float] = field(default_factory=lambda: [0.05, 1.0], metadata=CROP_SCALE)


@dataclass
class MultiCropConfig(AugmentationConfig):
    """Two large crops and several small ones of each image (`objectives.parts.multicrop`)."""

    global_scale: list[float] = field(default_factory=lambda: [0.4, 1.0], metadata=GLOBAL_SCALE)
    num_local: int = field(default=8, metadata={"range": (0, 64), "help": "local crops, which only the student sees"})
    local_size: int | None = field(
        default=None,
        metadata={
            "range": (1, 8192),
            "help": "side of a local crop in pixels; null: 3/7 of the image, in whole patches",
        },
    )
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.4], metadata=LOCAL_SCALE)


@dataclass
class DistillationConfig:
    """How a student follows its own moving average (`objectives.parts.teacher_schedules`)."""

    student_temp: float = field(
        default=0.1, metadata={"range": (0.001, 10.0), "help": "softmax temperature of the student"}
    )
    # The authors advise 0.07 after a warm-up from 0.04 over 30 epochs for runs of more than 100 epochs.
    teacher_temp: float = field(
        default=0.04, metadata={"range": (0.001, 10.0), "help": "softmax temperature of the teacher after its warm-up"}
    )
    teacher_temp_start: float = field(
        default=0.04, metadata={"range": (0.001, 10.0), "help": "softmax temperature of the teacher at the start"}
    )
    teacher_temp_warmup: float = field(
        default=0.0, metadata={"range": (0.0, 1.0), "help": "share of the steps in which it goes from start to end"}
    )
    teacher_momentum: float = field(default=0.996, metadata=TEACHER_MOMENTUM)
    # One epoch of a hundred: prototypes that move before the features do make the first steps unstable.
    freeze_prototypes: float = field(default=0.01, metadata=FREEZE)
