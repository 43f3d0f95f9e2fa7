"""Fine-tuning: shares of the learning rate by layer, an encoder that learns to see, what stays as it was, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.errors import BackboneError
from backbones.images.vit import ViTBackbone
from backbones.io import load_backbone, weights_digest
from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.extraction.images import IMAGES
from evaluation.protocols.finetune.score import layer_groups, score
from evaluation.registry import PROTOCOLS

SPEC = PROTOCOLS["finetune"]


def test_layer_groups__deep_layers_learn_faster_and_tokens_do_not_decay(checkpoint: Callable[..., Path]) -> None:
    """As MAE counts: of 2 blocks the stem is 3 layers below the head."""
    network = load_backbone(checkpoint(depth=2)).network
    groups = layer_groups(load_backbone(checkpoint(depth=2)), 0.5, 0.1)
    found = {tensor.shape: group for group in groups for tensor in group["params"]}
    names = dict(network.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(names)
    shares = [group["share"] for group in groups]
    assert sorted(set(shares)) == [0.125, 0.25, 0.5] and shares == sorted(shares)
    decaying = sum(tensor.numel() for group in groups if group["weight_decay"] for tensor in group["params"])
    assert decaying == sum(tensor.numel() for name, tensor in names.items() if tensor.ndim in (2, 4))
    for name, share, decay in (("patch_embed.proj.weight", 0.125, 0.1), ("pos_embed", 0.125, 0.0)):
        assert (found[names[name].shape]["share"], found[names[name].shape]["weight_decay"]) == (share, decay)


def test_evaluate__a_blind_encoder_learns_to_see(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path
) -> None:
    """All images look alike to it, and no layer on top could tell them apart; its file stays as it is."""
    blind = checkpoint(edit=lambda tensors: tensors["patch_embed.proj.weight"].zero_())
    digest, states, results = weights_digest(blind), [], []
    for protocol in ("knn", "finetune"):
        torch.manual_seed(0)
        results.append(evaluate(blind, protocol, colours, store=tmp_path / "runs"))
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and weights_digest(blind) == digest
    frozen, result = results
    assert result.metrics["top1"] == 1.0 and result.metrics["top1_ci_low"] > 0.8
    assert result.details["steps"] == 200 and result.details["last_loss"] < 0.5
    assert frozen.metrics["top1"] < 0.4


def test_score__half_of_the_training_images_are_mirrored_and_no_test_image(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    tokens = ViTBackbone.tokens

    def watched(self: Any, batch: Tensor) -> Any:
        seen[self.training].append(batch.clone())
        return tokens(self, batch)

    monkeypatch.setattr(ViTBackbone, "tokens", watched)
    few = {**SPEC.params, "min_steps": 1, "epochs": 2, "batch_size": 30}
    monkeypatch.setitem(PROTOCOLS, "finetune", replace(SPEC, params=few))
    first, again = (evaluate(checkpoint(), "finetune", colours, store=tmp_path / f"runs{turn}") for turn in range(2))
    assert first.metrics == again.metrics and first.details["last_loss"] == again.details["last_loss"]
    opened = colours.open(SPEC)
    pictures = torch.cat(seen[True][:2])  # of the first epoch, 60 images
    recipe = {"size": [16, 16], "tokens": "encoder"}
    as_they_are = [IMAGES.prepare(opened.train.read(number)["png"], recipe) for number in range(60)]
    straight = sum(any(torch.equal(one, other) for other in as_they_are) for one in pictures)
    assert 15 < straight < 45 and len(pictures) == 60
    mirrored = sum(any(torch.equal(one.flip(-1), other) for other in as_they_are) for one in pictures)  # type: ignore[union-attr]
    assert straight + mirrored == 60
    tested = torch.cat(seen[False][:1])
    wanted = torch.stack([IMAGES.prepare(opened.test.read(number)["png"], recipe) for number in range(23)])  # type: ignore[misc]
    assert torch.equal(tested, wanted)


def test_score__what_cannot_be_trained_is_refused() -> None:
    class Layerless(torch.nn.Linear):
        embed_dim, spec = 2, {"name": "plug"}

        def layer_ids(self) -> None:
            raise BackboneError("of a recipe")

    class Split(SimpleNamespace):
        def __len__(self) -> int:
            return int(self.count)

    settings: dict[str, Any] = {"num_classes": 2, "params": SPEC.params, "seed": 0, "device": torch.device("cpu")}

    one: Any = Split(count=1)
    with pytest.raises(EvaluationError, match="at least 2 training images, got 1"):
        score(one, one, **settings)
    two: Any = Split(count=2, encoder=Layerless(2, 2))
    with pytest.raises(EvaluationError, match="backbone 'plug' does not say which layers it has"):
        score(two, two, **settings)
