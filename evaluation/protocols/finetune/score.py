"""Fine-tuning: what an encoder is worth as the beginning of supervised training, in the manner of MAE (2111.06377).

All weights are trained, those of layer l of L at lr * decay^(L + 1 - l), so that low layers, which are good for many
tasks, change least. The layer on top sees the mean of the patch tokens, normed without gain and bias, as MAE's
`fc_norm`, and begins at zero. Images are seen whole; half of them are mirrored. Nothing is chosen: the settings are
fixed, and the weights after the last step are reported.

It costs about three passes over the training images per epoch where a linear probe takes one in all. So it runs for a
few epochs only, without what MAE needs in a hundred of them: RandAugment, mixup, CutMix, erasing and stochastic depth.
Scores are of this rule, and lower than published ones.

Legend: B batch, n images, D width, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import BackboneError
from backbones.features import Features
from evaluation.extraction.frozen import Frozen
from evaluation.metrics import Outcome, top1_metrics, top_k_accuracy
from evaluation.protocol import EvaluationError
from evaluation.protocols.linear.score import batch_rows
from evaluation.protocols.linear_maps import warm_cosine

__all__ = ["layer_groups", "score"]


def score(
    train: Frozen, test: Frozen, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Trains a copy of the encoder on the training images and tests it; `train` and `test` stay as they are.

    Raises:
        EvaluationError: there are fewer than 2 training images, the encoder does not say which layers it has, or the
            loss is no longer finite.
    """
    if len(train) < 2:
        raise EvaluationError(f"finetune needs at least 2 training images, got {len(train)}")
    encoder: Any = copy.deepcopy(train.encoder).requires_grad_(True).train()
    weight = torch.zeros(num_classes, encoder.embed_dim, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    groups = layer_groups(encoder, params["layer_decay"], params["weight_decay"])
    groups += [
        {"params": [weight], "weight_decay": params["weight_decay"], "share": 1.0},
        {"params": [bias], "weight_decay": 0.0, "share": 1.0},
    ]
    descent = torch.optim.AdamW(groups, lr=0.0, betas=params["betas"])
    batch_size = min(params["batch_size"], len(train))
    steps = max(params["min_steps"], params["epochs"] * (len(train) // batch_size))
    labels: Any = train.labels
    chance = torch.Generator().manual_seed(seed)

    def scores(batch: Any) -> Tensor:
        """(B, C)."""
        return F.linear(_vector(encoder.tokens(batch)), weight, bias)

    def step(number: int, rows: Tensor) -> float:
        for group in descent.param_groups:
            group["lr"] = params["lr"] * group["share"] * warm_cosine(number, steps, params["warmup"])
        batch = train.batch(rows.tolist())
        is_mirrored = (torch.rand(len(rows), generator=chance) < 0.5).to(device)
        batch = torch.where(is_mirrored[:, None, None, None], batch.flip(-1), batch)
        loss = F.cross_entropy(scores(batch), labels[rows].to(device), label_smoothing=params["label_smoothing"])
        descent.zero_grad()
        loss.backward()
        descent.step()
        return loss.item()

    loss = math.nan
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of encoders that drop something while they are trained
        for number, rows in enumerate(batch_rows(len(train), batch_size, steps, seed)):
            loss = train.threads.run(step, number, rows)
            if not math.isfinite(loss):
                raise EvaluationError(f"finetune: the loss is {loss} at step {number + 1} of {steps}")

    encoder.eval()
    logits = test.measure(lambda batch, _: {"logits": scores(batch)})["logits"]
    truth: Any = test.labels
    predicted = logits.argmax(1)
    return Outcome(
        metrics=top1_metrics(predicted, truth, num_classes),
        details={
            "steps": steps,
            "epochs": round(steps * batch_size / len(train), 1),
            "last_loss": loss,
            "num_parameters": sum(weight.numel() for weight in encoder.network.parameters()),
            **({"top5": top_k_accuracy(logits, truth, 5)} if num_classes > 5 else {}),
        },
        per_sample=predicted == truth,
    )


def layer_groups(encoder: Any, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters of an encoder for an optimizer, by layer, with the `share` of the learning rate that each has.

    Matrices and filters decay; vectors, tokens and positions do not.

    Raises:
        EvaluationError: the encoder does not say which layers it has.
    """
    try:
        layers = encoder.layer_ids()
    except BackboneError:
        raise EvaluationError(f"finetune: backbone {encoder.spec['name']!r} does not say which layers it has") from None
    last = max(layers.values())
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in encoder.network.named_parameters():
        decays = parameter.ndim in (2, 4)  # tokens and positions have 3 dimensions
        groups.setdefault((layers[name], decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay * decays, "share": layer_decay ** (last + 1 - layer)}
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _vector(features: Features) -> Tensor:
    """(B, D) float32."""
    mean = features.mean.float()
    return F.layer_norm(mean, mean.shape[-1:])
