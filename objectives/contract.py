"""What every objective keeps to, as checks that a plug-in can run in its own tests.

    from objectives import contract

    objective = MyObjective(backbone, MyConfig(...))
    for check in contract.CHECKS:
        check(objective, batch)

Each check raises AssertionError with the reason, and may be run after another. One process and plain PyTorch; NOT here:
engines, several ranks, checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from objectives.base import Objective, Progress

__all__ = [
    "CHECKS",
    "check_forward_changes_no_state",
    "check_gradients",
    "check_metrics",
    "check_param_groups",
    "check_pictures",
    "check_shared_companions",
    "check_state",
    "read_weights",
]

_STEPS = 4
_LATE = Progress(_STEPS - 1, _STEPS)  # the last step: nothing is held back any more

Batch = dict[str, Tensor]


def read_weights(parameters: Sequence[nn.Parameter], *, shares: bool = False) -> list[Tensor]:
    """What `Objective.after_step` is given where no engine shards anything."""
    assert not shares, "one process has everything whole"
    return [parameter.detach().float() for parameter in parameters]


def check_param_groups(objective: Objective, batch: Batch) -> None:
    """Every trainable parameter is in one group, which knows its scales; `batch` is not used."""
    groups = objective.param_groups(0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable), "parameter groups do not hold each trainable parameter once"
    assert all({"lr_scale", "wd_scale"} <= group.keys() for group in groups), "a group lacks lr_scale or wd_scale"


def check_gradients(objective: Objective, batch: Batch) -> None:
    """A gradient reaches every trainable parameter, and nothing else."""
    objective.zero_grad()
    objective(batch, _LATE).loss.backward()
    named = list(objective.named_parameters())
    without = {name for name, p in named if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without, f"no gradient reaches {', '.join(sorted(without))}"
    frozen = {name for name, p in named if not p.requires_grad and p.grad is not None}
    for companion in objective.companions().values():
        frozen |= {name for name, p in companion.module.named_parameters() if p.grad is not None or p.requires_grad}
    assert not frozen, f"a gradient reaches {', '.join(sorted(frozen))}, which is not trained"
    objective.zero_grad()


def check_forward_changes_no_state(objective: Objective, batch: Batch) -> None:
    """The same batch gives the same loss whatever torch's generator says, and `forward` leaves all state as it was."""
    before = {name: tensor.clone() for name, tensor in objective.extra_state().items()}
    first = objective(batch, Progress(1, _STEPS)).loss
    torch.rand(1)  # another place of the global generator
    second = objective(batch, Progress(1, _STEPS)).loss
    assert torch.equal(first, second), "two passes over one batch differ: draw from batch['seed'] alone"
    changed = {name for name, tensor in objective.extra_state().items() if not torch.equal(tensor, before[name])}
    # Batch norms of a network count by themselves; an engine puts them back.
    changed = {name for name in changed if "running" not in name and "num_batches" not in name}
    assert not changed, f"forward has changed {', '.join(sorted(changed))}: leave that to after_step"


def check_metrics(objective: Objective, batch: Batch) -> None:
    """Metrics are detached scalars, the loss is the same where they are not read, and a young run is not judged."""
    progress = Progress(1, _STEPS)
    logged = objective(batch, progress)
    unread = objective(batch, Progress(1, _STEPS, is_logged=False))
    assert torch.equal(logged.loss, unread.loss), "the loss depends on whether the step is logged"
    assert unread.metrics.keys() <= logged.metrics.keys(), "metrics of a step that is not logged are other ones"
    wrong = {name for name, value in logged.metrics.items() if value.ndim or value.requires_grad}
    assert not wrong, f"metrics {', '.join(sorted(wrong))} are no detached scalars"
    values = {name: value.item() for name, value in {**logged.metrics, "loss": logged.loss.detach()}.items()}
    finding = objective.diagnose(values, progress)
    assert finding is None, f"diagnose judges a young run: {finding}"


def check_state(objective: Objective, batch: Batch) -> None:
    """`extra_state` comes back after a step bit for bit, and other names are refused."""
    saved = {name: tensor.clone() for name, tensor in objective.extra_state().items()}
    objective(batch, _LATE)
    objective.after_step(_LATE, read_weights)
    objective.load_extra_state(saved)
    wrong = {name for name, tensor in objective.extra_state().items() if not torch.equal(tensor, saved[name])}
    assert not wrong, f"state does not come back: {', '.join(sorted(wrong))}"
    try:
        objective.load_extra_state({**saved, "surplus": torch.zeros(1)})
    except KeyError:
        return
    raise AssertionError("load_extra_state takes a name that is not its own")


def check_shared_companions(objective: Objective, batch: Batch) -> None:
    """ZeRO-3 has a companion's weights there only while the part runs that they belong to, and the loss is the same."""
    shared = copy.deepcopy(objective)
    for companion in shared.companions().values():
        companion.shard()
    loss, wanted = shared(batch, _LATE).loss, objective(batch, _LATE).loss
    assert torch.equal(loss, wanted), "a companion's weights are read while the module that has them does not run"


def check_pictures(objective: Objective, batch: Batch) -> None:
    """1 to 16 RGB pictures in [0, 1] per caption that show something; mode and torch's generator stay as they are."""
    state, was_training = torch.get_rng_state(), objective.training
    pictures = objective.pictures(batch)
    assert torch.equal(torch.get_rng_state(), state), "pictures draws from torch's generator"
    assert objective.training == was_training, "pictures leaves the objective in another mode"
    assert pictures, "there are no pictures"
    for caption, images in pictures.items():
        assert images.ndim == 4 and images.shape[1] == 3 and 1 <= len(images) <= 16, f"{caption}: {tuple(images.shape)}"
        assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1, f"{caption}: not in [0, 1]"
        assert images.float().std() > 0, f"{caption} shows nothing"


CHECKS: tuple[Callable[[Objective, Batch], None], ...] = (
    check_param_groups,
    check_gradients,
    check_forward_changes_no_state,
    check_metrics,
    check_state,
    check_shared_companions,
    check_pictures,
)
