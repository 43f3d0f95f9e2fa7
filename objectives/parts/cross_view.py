"""Cross-entropies between a teacher's and a student's views, and the signs of a collapse in them.

M. Caron et al., 2021, arXiv:2104.14294. NOT here: the center (`objectives.parts.centering`), the head
(`objectives.parts.prototypes`), schedules (`objectives.parts.teacher_schedules`).

Legend: B batch, V views (the T that the teacher sees come first), K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from objectives.base import Progress
from objectives.health import entropy, used_share

__all__ = [
    "collapse",
    "constant_features",
    "cross_view_loss",
    "head_metrics",
    "masked_patch_loss",
    "over_smoothing",
    "soft_cross_entropy",
]


def soft_cross_entropy(targets: Tensor, scores: Tensor) -> Tensor:
    """Cross-entropy with distributions as targets: (..., K), (..., K) -> (...).

    -sum p log softmax(s) = logsumexp(s) - sum p s, since p sums to 1: this needs no (..., K) of logarithms.
    """
    return scores.logsumexp(-1) - (targets * scores).sum(-1)


def cross_view_loss(targets: Tensor, scores: Tensor) -> Tensor:
    """Mean cross-entropy over the T (V - 1) pairs of a teacher's view and another view of the student.

    Cross-entropy is linear in the targets, so all T V pairs cost as much as V, and those of a view with itself are
    taken off again.

    Args:
        targets: (T, B, K) distributions.
        scores: (V, B, K) logits over the student's temperature; the first T are the teacher's views.
    """
    num_taught, num_views = len(targets), len(scores)
    all_pairs = soft_cross_entropy(targets.mean(0), scores).mean(1).sum() * num_taught
    own_pairs = soft_cross_entropy(targets, scores[:num_taught]).mean(1).sum()
    return (all_pairs - own_pairs) / (num_taught * (num_views - 1))


def masked_patch_loss(targets: Tensor, scores: Tensor, weight: Tensor, num_crops: int) -> Tensor:
    """iBOT's loss (J. Zhou et al., 2022, arXiv:2111.07832): mean over a crop's masked patches, then over all crops.

    A crop without masked patches counts 0, so that at the start, with half of them masked, it is ln(K) / 2.

    Args:
        targets: (M, K) distributions at the masked patches of all crops.
        scores: (M, K) logits over the student's temperature.
        weight: (M,), 1 / number of masked patches of the same crop.
        num_crops: with the unmasked ones.
    """
    return (soft_cross_entropy(targets, scores) * weight).sum() / num_crops


@torch.no_grad()
def head_metrics(prefix: str, loss: Tensor, targets: Sequence[Tensor], shares: Sequence[float]) -> dict[str, Tensor]:
    """What a head's loss consists of and how its prototypes are used.

    PREFIXteacher_entropy + PREFIXkl = PREFIXloss, where kl is from teacher to student; PREFIXprototypes is the number
    of different best prototypes over the most there could be, in the first of the tensors: 1 / n when all n rows have
    the same one.

    Args:
        prefix: starts the names.
        loss: the head's loss.
        targets: (..., K) distributions, one tensor per resolution.
        shares: weight of each in the loss; they sum to 1.
    """
    means = [share * entropy(target).mean() for share, target in zip(shares, targets, strict=True)]
    mean_entropy = torch.stack(means).sum()
    num_prototypes = targets[0].shape[-1]
    most = min(targets[0].numel() // num_prototypes, num_prototypes)
    return {
        f"{prefix}teacher_entropy": mean_entropy,
        f"{prefix}kl": loss.detach() - mean_entropy,
        f"{prefix}prototypes": used_share(targets[0]) * num_prototypes / most,
    }


def collapse(metrics: Mapping[str, float], progress: Progress, num_prototypes: int, prefix: str = "") -> str | None:
    """The finding for a head with metrics PREFIXloss, PREFIXteacher_entropy, PREFIXprototypes.

    Uniform: the teacher prefers next to nothing and the student nothing, near ln K and at it. One-hot: the teacher is
    certain, and of the same few prototypes whatever it sees. Neither is judged in a young run, where a network that has
    not learned anything looks like the first.
    """
    if progress.is_young:
        return None
    highest = math.log(num_prototypes)
    loss, spread = metrics[f"{prefix}loss"], metrics[f"{prefix}teacher_entropy"]
    used = metrics[f"{prefix}prototypes"]
    what = f"{prefix.replace('_', ' ')}outputs"
    if loss > 0.995 * highest and spread > 0.98 * highest:
        return (
            f"{what} are uniform: teacher entropy {spread:.2f} and loss {loss:.2f} of at most ln {num_prototypes} = "
            f"{highest:.2f}; lower objective.teacher_temp"
        )
    if spread < 0.02 * highest and used < 0.05:
        return (
            f"{what} have fallen on a few prototypes: teacher entropy {spread:.3f}, {used:.1%} as many different best "
            "prototypes as there could be; raise objective.teacher_temp, or lower optimizer.lr"
        )
    return None


def constant_features(metrics: Mapping[str, float], progress: Progress) -> str | None:
    """The finding for `effective_rank`: an encoder that gives all images the same feature."""
    rank = metrics["effective_rank"]
    if progress.is_young or rank > 1.05:
        return None
    return f"all images have the same feature: effective rank {rank:.3f}; lower optimizer.lr, or warm it up longer"


def over_smoothing(metrics: Mapping[str, float], progress: Progress) -> str | None:
    """The finding for `patch_cosine`: an encoder whose patches of an image are all the same."""
    cosine = metrics["patch_cosine"]
    if progress.is_young or cosine < 0.995:
        return None
    return f"patches of an image are all alike: mean cosine {cosine:.4f}; lower objective.patch_loss_weight"
