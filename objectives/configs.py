"""Settings of the built-in objectives, as plain dataclasses that a recipe fills in. Imports no torch.

Field metadata: "help" says what it does, "range" = (lowest, highest) allowed, both ends included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CorruptionConfig", "DINOConfig", "GMMLConfig", "MAEConfig", "SelfPatchConfig", "SiTConfig"]

# Of settings that several objectives have with other defaults.
_CROP_SCALE = {"range": (0.01, 1.0), "length": 2, "help": "smallest and largest share of the image of a crop"}
_GLOBAL_SCALE = _CROP_SCALE | {"help": "smallest and largest share of the image of a global crop"}
_LOCAL_SCALE = _CROP_SCALE | {"help": "smallest and largest share of the image of a local crop"}
_HFLIP = {"range": (0.0, 1.0), "help": "probability of a horizontal flip"}
_TEACHER_MOMENTUM = {"range": (0.0, 1.0), "help": "share of the teacher kept per step at the start; then to 1"}
_FREEZE = {"range": (0.0, 1.0), "help": "share of the steps, from the start, with fixed prototypes"}
_FILLED_SHARE = {
    "range": (0.01, 0.9),
    "help": "greatest share of the pixels that is filled; the least is a half, or this where it is less",
}
_FILL = {"choices": ("noise", "zeros"), "help": "what blocks are filled with: noise, or the mean colour"}


@dataclass
class MAEConfig:
    """Masked autoencoder (He et al. 2021, arXiv:2111.06377); defaults are the paper's ViT-B/16 pretraining."""

    name: str = "mae"
    # Paper figure 5: 75 % is best for linear probing and near the best for fine-tuning.
    mask_ratio: float = field(
        default=0.75, metadata={"range": (0.01, 0.99), "help": "share of patches hidden from the encoder"}
    )
    # Paper table 1d: normalised pixels gain 0.5 points fine-tuned (ViT-L, 800 epochs).
    norm_pix_loss: bool = field(
        default=True, metadata={"help": "predict pixels normalised by their own patch's mean and deviation"}
    )
    masking: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "drop", "token"),
            "help": "hidden patches are left out (drop) or covered (token, SimMIM); auto: drop where the backbone can",
        },
    )
    mask_size: int | None = field(
        default=None,
        metadata={
            "range": (1, 1024),
            "help": "pixels per side of what masking=token covers at once; null: a token, less on small images",
        },
    )
    # Width x depth 512 x 8 belongs to encoders from ViT-B up; 192 x 4 makes a ViT-Tiny step several times cheaper.
    decoder_dim: int = field(
        default=512,
        metadata={"range": (4, 4096), "help": "decoder width, a multiple of 4; masking=token has no decoder"},
    )
    decoder_depth: int = field(default=8, metadata={"range": (1, 64), "help": "decoder blocks"})
    decoder_heads: int = field(default=16, metadata={"range": (1, 64), "help": "decoder attention heads"})
    # Paper appendix A.1: random resized crop and flip are the only augmentation.
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata=_CROP_SCALE)
    hflip: float = field(default=0.5, metadata=_HFLIP)


@dataclass
class DINOConfig:
    """Self-distillation (Caron et al. 2021, arXiv:2104.14294); defaults are the authors' ViT-S/16 run of 100 epochs."""

    name: str = "dino"
    num_prototypes: int = field(default=65536, metadata={"range": (2, 2**20), "help": "outputs of the head"})
    head_hidden_dim: int = field(default=2048, metadata={"range": (1, 65536), "help": "width of the head's layers"})
    head_bottleneck_dim: int = field(default=256, metadata={"range": (1, 65536), "help": "width before the prototypes"})
    student_temp: float = field(
        default=0.1, metadata={"range": (0.001, 10.0), "help": "softmax temperature of the student"}
    )
    # The authors advise 0.07 after a warm-up from 0.04 over 30 epochs for runs longer than this one.
    teacher_temp: float = field(
        default=0.04, metadata={"range": (0.001, 10.0), "help": "softmax temperature of the teacher after its warm-up"}
    )
    teacher_temp_start: float = field(
        default=0.04, metadata={"range": (0.001, 10.0), "help": "softmax temperature of the teacher at the start"}
    )
    teacher_temp_warmup: float = field(
        default=0.0, metadata={"range": (0.0, 1.0), "help": "share of the steps in which it goes from start to end"}
    )
    teacher_momentum: float = field(default=0.996, metadata=_TEACHER_MOMENTUM)
    centre_momentum: float = field(
        default=0.9, metadata={"range": (0.0, 1.0), "help": "share of the teacher's centre that is kept per step"}
    )
    # One epoch of a hundred: prototypes that move before the features do make the first steps unstable.
    freeze_prototypes: float = field(default=0.01, metadata=_FREEZE)
    global_scale: list[float] = field(default_factory=lambda: [0.4, 1.0], metadata=_GLOBAL_SCALE)
    num_local: int = field(default=8, metadata={"range": (0, 64), "help": "local crops, which only the student sees"})
    local_size: int | None = field(
        default=None,
        metadata={
            "range": (1, 8192),
            "help": "side of a local crop in pixels; null: 3/7 of the image, in whole patches",
        },
    )
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.4], metadata=_LOCAL_SCALE)
    hflip: float = field(default=0.5, metadata=_HFLIP)
    photometric: bool = field(default=True, metadata={"help": "jitter colours, grey, blur and solarise; needs RGB"})
    blur: bool = field(default=True, metadata={"help": "blur among these; leaves little of images of 32 pixels"})


@dataclass
class SelfPatchConfig(DINOConfig):
    """DINO with a loss on patches (Yun et al. 2022, arXiv:2206.07990); defaults are the authors' ViT-S/16 setting."""

    name: str = "selfpatch"
    # One epoch of the paper's 200.
    freeze_prototypes: float = field(default=0.005, metadata=_FREEZE)
    global_scale: list[float] = field(default_factory=lambda: [0.25, 1.0], metadata=_GLOBAL_SCALE)
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.25], metadata=_LOCAL_SCALE)
    num_patch_prototypes: int = field(
        default=4096, metadata={"range": (2, 2**20), "help": "outputs of the head for patches"}
    )
    patch_loss_weight: float = field(
        default=0.1, metadata={"range": (0.0, 1000.0), "help": "weight of the loss on patches; that on images has 1"}
    )
    num_positives: int = field(
        default=4, metadata={"range": (1, 8), "help": "most similar neighbours that a patch learns from"}
    )
    borders: str = field(
        default="wrap",
        metadata={
            "choices": ("wrap", "clip"),
            "help": "neighbours beyond a border: those at the opposite one, as the authors' code has it, or none",
        },
    )
    aggregation_depth: int = field(
        default=2, metadata={"range": (1, 12), "help": "class-attention blocks that sum a set of patches up"}
    )
    aggregation_heads: int | None = field(
        default=None,
        metadata={"range": (1, 64), "help": "their attention heads; null: one per 64 channels, as in a ViT"},
    )


@dataclass
class CorruptionConfig:
    """Settings that GMML and SiT share: blocks of the images are replaced, and what was there is predicted."""

    name: str = ""
    share: float = field(default=0.75, metadata=_FILLED_SHARE)
    fill: str = field(default="noise", metadata=_FILL)
    # The authors' default. With the patch size, whole patches are masked, as their paper describes it.
    align: int = field(default=1, metadata={"range": (1, 1024), "help": "blocks start and end at multiples, in pixels"})
    alien_p: float = field(
        default=0.5, metadata={"range": (0.0, 1.0), "help": "probability that blocks show another image instead"}
    )
    alien_share: float = field(
        default=0.3, metadata={"range": (0.01, 0.9), "help": "share of the pixels that another image then covers"}
    )
    masked_only: bool = field(default=True, metadata={"help": "count the error of replaced pixels only"})
    crop_scale: list[float] = field(default_factory=lambda: [0.05, 1.0], metadata=_CROP_SCALE)
    hflip: float = field(default=0.5, metadata=_HFLIP)
    photometric: bool = field(default=True, metadata={"help": "change colours and blur, as the paper; needs RGB"})
    blur: bool = field(default=True, metadata={"help": "blur crops as part of that; ruins pictures of few pixels"})


@dataclass
class GMMLConfig(CorruptionConfig):
    """Group masked model learning (Atito et al. 2022, arXiv:2205.14986); defaults are the authors' code."""

    name: str = "gmml"
    # The authors read blocks 6, 8, 10 and 12 of 12.
    read_depths: list[float] = field(
        default_factory=lambda: [0.5, 0.67, 0.83, 1.0],
        metadata={"range": (0.01, 1.0), "help": "blocks whose mean is decoded, as shares of the encoder's depth"},
    )
    # Only "more samples per step": nothing relates the views of an image.
    num_views: int = field(default=2, metadata={"range": (1, 16), "help": "crops per image"})


@dataclass
class SiTConfig(CorruptionConfig):
    """Masked reconstruction and momentum contrast (Atito et al., arXiv:2104.03602); defaults are the authors' code."""

    name: str = "sit"
    share: float = field(default=0.5, metadata=_FILLED_SHARE)
    fill: str = field(default="zeros", metadata=_FILL)
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata=_CROP_SCALE)
    # The authors take 5 for small data sets.
    reconstruction_weight: float = field(
        default=1.0, metadata={"range": (0.0, 1000.0), "help": "weight of the reconstruction; the contrast has 1"}
    )
    temperature: float = field(
        default=0.2, metadata={"range": (0.01, 10.0), "help": "softmax temperature of the contrast"}
    )
    projector_hidden_dim: int = field(
        default=4096, metadata={"range": (1, 65536), "help": "width of the projector's layers"}
    )
    projector_dim: int = field(
        default=256, metadata={"range": (1, 65536), "help": "width in which images are compared"}
    )
    teacher_momentum: float = field(default=0.996, metadata=_TEACHER_MOMENTUM)
