"""A run that begins with another's weights, or goes on from another's training state: two gloo ranks, no Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from backbones.io import load_backbone, save_backbone
from data_pipelines.files import sha256
from objectives import registry
from objectives.base import Objective
from pretrain.checkpoints import store
from pretrain.checkpoints.initialization import Start
from pretrain.config.load import load_recipe
from pretrain.config.stages import Stage
from pretrain.record.events import Initialized, Resumed
from pretrain.record.journal import read_events
from pretrain.training import state
from pretrain.training.model import build_objective

pytestmark = pytest.mark.integration

Launch = Callable[..., Any]
Losses = Callable[[Path], dict[int, float]]


def _origin(run_dir: Path, step: int) -> Any:
    return json.loads((store.checkpoint_path(run_dir, step) / "checkpoint.json").read_text())["origin"]


def test_resume_from__goes_on_with_weights_optimizer_stream_and_rng(
    launch: Launch, losses: Losses, whole: Path
) -> None:
    """Bit for bit what the other run did; killed and resumed, the new run's own checkpoint comes first."""
    source = store.checkpoint_path(whole, 8)
    forked = launch("forked", f"resume_from={source}", "train.checkpoint_every=2")
    forked.kill_after_step(11)
    launch("forked", "resume_from=/gone", "train.checkpoint_every=2").wait()
    expected = losses(whole)
    assert losses(forked.run_dir) == {step: expected[step] for step in (9, 10, 11, 12)}
    resumed = [event for event in read_events(forked.run_dir / "journal.jsonl")[0] if isinstance(event, Resumed)]
    assert [(event.step, event.reference) for event in resumed] == [(8, str(source)), (10, "")]
    digest = sha256(source / "checkpoint.json")
    expected_origin = {"how": "resume_from", "reference": str(source), "sha256": digest, "step": 8}
    assert _origin(forked.run_dir, 10) == _origin(forked.run_dir, 12) == expected_origin
    assert _origin(whole, 12) is None
    assert [found.step for found in store.published(forked.run_dir)] == [10, 12]  # no baseline of foreign weights


def test_init_from__takes_the_weights_and_resamples_positions(launch: Launch, whole: Path) -> None:
    source = store.checkpoint_path(whole, 12)
    short = ("train.steps=1", "optimizer.warmup_steps=0", "train.workers=1", "backbone.image_size=48")
    run = launch("larger", f"init_from={source}", *short, ranks=1)
    run.wait()
    (begun,) = [event for event in read_events(run.run_dir / "journal.jsonl")[0] if isinstance(event, Initialized)]
    digest = sha256(source / "backbone.safetensors")
    assert (begun.reference, begun.sha256, begun.step) == (str(source), digest, 0)
    assert begun.resampled == ("pos_embed",) and begun.missing == begun.unexpected == ()
    assert begun.loaded == begun.total > 20
    assert _origin(run.run_dir, 0) == {"how": "init_from", "reference": str(source), "sha256": digest}
    assert _origin(run.run_dir, 1) == _origin(run.run_dir, 0)
    given = load_backbone(source).timm_state_dict()
    floor = load_backbone(store.checkpoint_path(run.run_dir, 0)).timm_state_dict()  # what step 0 is evaluated with
    assert all(torch.equal(floor[name], tensor) for name, tensor in given.items() if name != "pos_embed")
    assert floor["pos_embed"].shape != given["pos_embed"].shape
    text = run.log.read_text()
    assert f"initialized from {source}: {begun.total}/{begun.total} backbone tensors; resampled: pos_embed" in text
    assert "step 0 is evaluated with these weights" in text


def test_init_from__a_wrong_request_is_one_line_and_exit_code_2(launch: Launch) -> None:
    loop = launch("wrong", "init_from=/no/such/checkpoint", ranks=1)
    assert loop.exit_codes(120) == [2]
    (line,) = loop.log.read_text().strip().splitlines()
    assert line.startswith("error: init_from=/no/such/checkpoint: ")


CPU = torch.device("cpu")
SMALL = {"num_prototypes": 32, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "num_local": 2, "local_size": 16}


def _objective() -> Objective:
    size = ["backbone.image_size=32", "backbone.patch_size=8", "backbone.name=vit_tiny_patch16_224"]
    options = "backbone.options={depth: 1, embed_dim: 24, num_heads: 2}"
    settings = [f"objective.{name}={value}" for name, value in SMALL.items()]
    recipe = load_recipe("demo", [*size, options, "objective.name=dino", *settings], check_files=False)
    assert isinstance(recipe.objective, registry.config_class("dino"))
    return build_objective(recipe)


def _begin(file: Path) -> dict[str, Any]:
    """What `begin_with` does to student and teacher on every rank; rank 1 cannot read the file."""
    torch.manual_seed(1)
    given = _objective().backbone
    if dist.get_rank() == 0:
        save_backbone(file, given.timm_state_dict(), given.spec)
    torch.manual_seed(0)
    objective = _objective()
    before, random = objective.backbone.timm_state_dict()["norm.weight"].clone(), torch.get_rng_state()
    stage = Stage("", load_recipe("demo", check_files=False))
    used = state.begin_with(objective, Start("init_from", str(file if dist.get_rank() == 0 else "/gone")), stage, CPU)
    equal = [
        all(torch.equal(tensor, encoder.timm_state_dict()[name]) for name, tensor in given.timm_state_dict().items())
        for encoder in (objective.backbone, objective.exported)
    ]
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, [*equal, torch.equal(random, torch.get_rng_state()), before.shape.numel()])
    diverged = file.with_name("diverged.safetensors")
    if dist.get_rank() == 0:
        weights = given.timm_state_dict()
        save_backbone(diverged, weights | {"norm.weight": (0 * weights["norm.weight"]).log()}, given.spec)
    failed = []
    for reference in ("/gone.safetensors", diverged):
        try:
            state.begin_with(objective, Start("init_from", str(reference)), stage, CPU)
        except store.CheckpointError as error:
            failed.append(str(error))
    return {"answers": answers, "loaded": used.loaded, "total": used.total, "failed": failed}


def test_begin_with__student_and_teacher_on_every_rank(run_on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    found = run_on_ranks(2, _begin, tmp_path / "given.safetensors")
    assert found["answers"] == [[True, True, True, 24]] * 2
    assert found["loaded"] == found["total"] > 10
    gone, diverged = found["failed"]
    assert gone.startswith("init_from=/gone.safetensors: ")
    assert diverged.endswith("diverged.safetensors: norm.weight holds numbers that are not finite")
