"""What a stage of a run takes, from its model without numbers: tokens, memory of a worker in each ZeRO stage, disk.

Not here: what weights take (`pretrain.training.memory`), activations (`pretrain.training.activations`), the data
(`pretrain.training.preflight`), what people read (`pretrain.cli.dry_run`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.errors import BackboneError
from backbones.images.base import ImageEncoder
from data_pipelines.views.base import View
from data_pipelines.views.specs import views_from
from objectives.base import Objective
from objectives.errors import ObjectiveError
from pretrain.config.schema import Recipe
from pretrain.training.activations import kept_by_forward
from pretrain.training.memory import Memory, memory_of

__all__ = ["Counted", "Outlook", "Shown", "accumulation_warning", "look_at"]


@dataclass(frozen=True)
class Shown:
    """What a share of the steps shows of each sample.

    Attributes:
        share: Of the steps.
        views: As the objective states them.
        grids: Tokens of what each view shows, along each axis where they lie on a grid; None where it is not known.
        num_prefix: Tokens before the patches of a crop.
    """

    share: float
    views: tuple[View, ...]
    grids: tuple[tuple[int, ...] | None, ...]
    num_prefix: int

    @property
    def tokens(self) -> int | None:
        """Of a sample, with those that the objective leaves out; None where it is not known of a view."""
        if None in self.grids:
            return None
        counted = zip(self.views, self.grids, strict=True)
        return sum((view.times or 1) * (math.prod(grid or ()) + self.num_prefix) for view, grid in counted)


@dataclass(frozen=True)
class Counted:
    """How many numbers an objective has.

    Attributes:
        parts: Of its trained parameters, by part (`Objective.part_of`).
        frozen: Of its other parameters.
        companions: Of each companion, by name.
        titles: What people call each of them, by name.
        exported: Of the encoder that is exported.
        heads: Of what is exported beside it, see `Objective.exported_heads`.
        heads_at_start: Of these, what is beside the backbone of step 0, too.
        saved: Of what a training state has beside parameters and moments: buffers and companions.
    """

    parts: dict[str, int]
    frozen: int
    companions: dict[str, int]
    titles: dict[str, str]
    exported: int
    heads: int
    heads_at_start: int
    saved: int

    @property
    def trained(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Outlook:
    """Of one stage.

    Attributes:
        recipe: Of the stage.
        shown: What some share of its steps shows; those that `Objective.views` states are first.
        counted: Numbers of its objective.
        memory: Of a worker, in each ZeRO stage.
        activations: Bytes that a worker keeps of a micro-batch of the largest views; None: not known before it is run.
        compares_images: See `Objective.compares_images`.
        teacher: Where its frozen teachers come from, for people; empty without any.
    """

    recipe: Recipe
    shown: tuple[Shown, ...]
    counted: Counted
    memory: tuple[Memory, ...]
    activations: int | None
    compares_images: bool
    teacher: str = ""

    @property
    def warning(self) -> str | None:
        """What a user may not expect of these settings."""
        return accumulation_warning(self.recipe, compares_images=self.compares_images)

    @property
    def tokens_per_step(self) -> float | None:
        """On average over the steps, of all workers."""
        of_samples = [(shown.share, shown.tokens) for shown in self.shown]
        if any(tokens is None for _, tokens in of_samples):
            return None
        return self.recipe.train.global_batch_size * sum(share * (tokens or 0) for share, tokens in of_samples)

    @property
    def chosen(self) -> Memory:
        """In the ZeRO stage of the recipe."""
        return self.memory[self.recipe.train.zero_stage or 0]

    def in_all(self, zero_stage: int) -> int:
        """Bytes of a worker at the fullest moment, with the activations that are known."""
        memory = self.memory[zero_stage]
        lasting = memory.weights + memory.optimizer + memory.companions
        return lasting + max(memory.backward + (self.activations or 0), memory.update)

    @property
    def backbone_bytes(self) -> int:
        """Of the backbone in a checkpoint."""
        return 4 * self.counted.exported

    @property
    def heads_bytes(self) -> int:
        """Of the heads beside it."""
        return 4 * self.counted.heads

    @property
    def baseline_bytes(self) -> int:
        """Of the backbone of step 0, and of heads beside it."""
        return self.backbone_bytes + 4 * self.counted.heads_at_start

    @property
    def state_bytes(self) -> int:
        """Of the training state in a checkpoint, all ranks together."""
        train, counted = self.recipe.train, self.counted
        width = 2 if train.precision == "bf16" else 4
        beside = {0: counted.trained + counted.frozen, 3: 0}.get(train.zero_stage or 0, counted.frozen)  # the masters
        shares = train.workers if train.zero_stage else 1
        return width * beside + shares * self.chosen.optimizer + 4 * counted.saved


def look_at(recipe: Recipe, objective: Objective) -> Outlook:
    """The outlook of a stage.

    Args:
        recipe: Of the stage.
        objective: Built from it on torch's meta device; it is used up.

    Raises:
        BackboneError, DataError, ObjectiveError: Its first step would fail, with these views or in a micro-batch of
            this size on so many workers.
    """
    counted, memory = _count(objective), _memory(recipe, objective)
    others = objective.mixed_views()
    each = [(1 - sum(share for share, _ in others), objective.views()), *others]
    shown = tuple(_show(objective, share, views_from(specs)) for share, specs in each if share > 1e-9)
    if recipe.train.precision == "bf16":
        for parameter in objective.parameters():
            parameter.data = parameter.data.bfloat16()
    kept = [kept_by_forward(recipe, objective, views) for views in _largest([one.views for one in shown])]
    known = [size for size in kept if size is not None]
    activations = max(known) if len(known) == len(kept) else None
    return Outlook(recipe, shown, counted, memory, activations, objective.compares_images)


def accumulation_warning(recipe: Recipe, *, compares_images: bool) -> str | None:
    """Why accumulation is no larger batch here; None where it is, or there is none."""
    number = recipe.train.accumulation or 1
    if not compares_images or number == 1:
        return None
    what = f"{recipe.objective.name} compares the samples of a micro-batch"
    return f"{what}: {number} of them are not what one large one is; train.accumulation=1 is"


def _count(objective: Objective) -> Counted:
    parts: Counter[str] = Counter()
    frozen = 0
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            parts[objective.part_of(name)] += parameter.numel()
        else:
            frozen += parameter.numel()

    def size(state: Iterable[Tensor]) -> int:
        return sum(tensor.numel() for tensor in state)

    companions, heads = objective.companions().items(), objective.exported_heads()
    return Counted(
        parts=dict(parts),
        frozen=frozen,
        companions={name: size(companion.state_dict().values()) for name, companion in companions},
        titles={name: companion.title or name for name, companion in companions},
        exported=size(objective.exported.weights().values()),
        heads=0 if heads is None else size(heads.tensors.values()),
        heads_at_start=size(heads.tensors.values()) if heads is not None and heads.from_start else 0,
        saved=size(objective.extra_state().values()),
    )


def _memory(recipe: Recipe, objective: Objective) -> tuple[Memory, ...]:
    """In ZeRO stages 0 to 3, on GPUs unless CPUs are asked for."""
    device = torch.device("cpu" if recipe.train.device == "cpu" else "cuda")
    recipes = (replace(recipe, train=replace(recipe.train, zero_stage=stage)) for stage in range(4))
    return tuple(memory_of(each, objective, device) for each in recipes)


def _show(objective: Objective, share: float, views: tuple[View, ...]) -> Shown:
    encoder = objective.backbone
    num_prefix = encoder.num_prefix_tokens if isinstance(encoder, ImageEncoder) else 0
    return Shown(share, views, tuple(_grid(objective, view) for view in views), num_prefix)


def _largest(shown: Sequence[tuple[View, ...]]) -> list[tuple[View, ...]]:
    """Those that are not all smaller than others of the same names."""

    def sizes(views: tuple[View, ...]) -> dict[str, tuple[int, int]]:
        return {view.name: (getattr(view, "size", 0), view.times or 1) for view in views}

    def covers(large: dict[str, tuple[int, int]], small: dict[str, tuple[int, int]]) -> bool:
        return large != small and all(
            name in large and size <= large[name][0] and times <= large[name][1]
            for name, (size, times) in small.items()
        )

    different = list({tuple(sizes(views).items()): views for views in shown}.values())
    return [views for views in different if not any(covers(sizes(other), sizes(views)) for other in different)]


def _grid(objective: Objective, view: View) -> tuple[int, ...] | None:
    """Tokens of what a view shows; None where it is not known.

    Raises:
        ObjectiveError: The encoder does not take it.
    """
    shapes = view.shapes(objective.backbone.channels_of(view.kind))
    if shapes is None:
        return None
    try:
        return objective.backbone.grid_of(shapes[view.name][0])
    except BackboneError as error:
        raise ObjectiveError(f"view {view.name!r} is of {view.extent}: {error}") from error
