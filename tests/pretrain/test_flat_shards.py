"""Flat shards: whatever number of ranks wrote them, any other gets every number back, bit by bit."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from backbones.images.config import ImageConfig
from objectives.base import Progress
from objectives.mae.config import MAEConfig
from pretrain.checkpoints.storage import CheckpointError
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training import deepspeed_internals
from pretrain.training.engine import TAG, Engine
from pretrain.training.flat_shards import FILES, Part, Vector, ranges_of, read
from pretrain.training.model import build_objective

WORLDS = (1, 2, 3, 4, 7)
NUMBERS = 23  # of the vector below: no world but the first divides it, and seven leave a rank with padding alone
PARTS = [Part("a", 0, 10), Part("b", 12, 11)]  # two numbers between them are alignment


def _pieces(rank: int, world: int, *, fill: float | None = None) -> list[Vector]:
    """As DeepSpeed cuts a vector, padded at its end to a multiple; and a parameter that all ranks have whole."""
    size = -(-NUMBERS // (2 * world)) * 2
    padded = torch.zeros(size * world)
    padded[:NUMBERS] = torch.arange(1.0, NUMBERS + 1)

    def piece(scale: float) -> Tensor:
        own = scale * padded[rank * size : (rank + 1) * size]
        return own.clone() if fill is None else torch.full_like(own, fill)

    moments = {"exp_avg": piece(10), "exp_avg_sq": piece(100), "step": torch.tensor(5.0)} if fill is None else {}
    frozen = torch.ones(2, 3, dtype=torch.bfloat16) * (7 if fill is None else fill)
    return [
        Vector("group-0", piece(1), PARTS, start=rank * size, is_whole=False, state=moments),
        Vector("positions", frozen, [Part("positions", 0, 6)], state={"is_muon": True} if fill is None else {}),
    ]


def _write(directory: Path, world: int) -> None:
    directory.mkdir()
    for rank in range(world):
        tensors, facts = ranges_of(_pieces(rank, world), rank, world)
        header = {"vectors": json.dumps(facts), "counts": json.dumps({"global_steps": 5})}
        save_file(tensors, directory / FILES.format(rank), header)


@pytest.mark.parametrize("saved_by", WORLDS)
def test_read__every_number_of_ranks_gets_what_any_other_wrote(saved_by: int, tmp_path: Path) -> None:
    _write(tmp_path / "state", saved_by)
    assert all(
        file.stat().st_size < 4 * 3 * NUMBERS / saved_by + 1500 for file in (tmp_path / "state").iterdir()
    )  # each its share, with a header
    for world in WORLDS:
        for rank in range(world):
            found, expected = _pieces(rank, world, fill=-1.0), _pieces(rank, world)
            states, counts = read(tmp_path / "state", found)
            assert counts == {"global_steps": 5}
            for here, wanted, state in zip(found, expected, states, strict=True):
                assert torch.equal(here.weights, wanted.weights) and here.weights.dtype == wanted.weights.dtype
                assert state.keys() == wanted.state.keys()
                for key, value in wanted.state.items():
                    assert torch.equal(state[key], value) if torch.is_tensor(value) else state[key] is value


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_read__a_range_that_is_in_no_file_is_named(gone: int, tmp_path: Path) -> None:
    _write(tmp_path / "state", 3)
    (tmp_path / "state" / FILES.format(gone)).unlink()
    end = gone * 8
    message = f"state: no file has the numbers of group-0 from {end} on|positions is here and not in it"
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "state", _pieces(0, 1, fill=0.0))


def test_read__a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "state", 2)
    file = tmp_path / "state" / FILES.format(1)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{file.name}: no safetensors"):
        read(tmp_path / "state", _pieces(0, 1, fill=0.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": [Part("b", 0, 10), Part("a", 12, 11)]}, "a of 10 numbers at 0 where b of 10 numbers at 0 is here"),
        ({"parts": [Part("a", 0, 10), Part("b", 10, 11)]}, "b of 11 numbers at 12 where b of 11 numbers at 10 is"),
        ({"parts": PARTS[:1]}, "b of 11 numbers at 12 where nothing is here"),
        ({"name": "group-1"}, "of another model: group-0 is in it and not here"),
    ],
)
def test_read__the_state_of_other_parameters_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Flat numbers fit any model of as many: that they are of the same parameters has to be said."""
    _write(tmp_path / "state", 2)
    group, frozen = _pieces(0, 1, fill=0.0)
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "state", [replace(group, **change), frozen])


# Under DeepSpeed ------------------------------------------------------------------------------------------------------

MICRO, CHAIN = 2, (3, 2, 1, 2)  # ranks, one after another
SETTINGS = [
    ("adamw", precision, stage) for precision, stages in (("fp32", (0, 1, 2)), ("bf16", (1, 2))) for stage in stages
]
SETTINGS += [("muon", "fp32", 0), ("lars", "fp32", 0), ("lion", "bf16", 2), ("sgdw", "fp32", 1), ("adoptw", "bf16", 1)]


def _recipe(name: str, precision: str, stage: int, workers: int) -> Recipe:
    return Recipe(
        name="flat",
        objective=MAEConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2),
        backbone=ImageConfig("vit_tiny_patch16_224", 16, 4, options={"depth": 1, "embed_dim": 24, "num_heads": 2}),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(name=name, lr=2e-3, weight_decay=0.05, betas=[0.8, 0.9]),
        train=TrainConfig(
            steps=9,
            global_batch_size=MICRO * workers,
            micro_batch_size=MICRO,
            accumulation=1,
            workers=workers,
            zero_stage=stage,
            precision=precision,
            checkpoint_every=9,
        ),
    )


def _steps(engine: Engine, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        images = torch.randint(0, 256, (MICRO, 3, 16, 16), dtype=torch.uint8, generator=generator)
        engine.set_schedule(2e-3, 0.05)
        assert engine.step([{"image": images, "seed": torch.arange(MICRO)}], Progress(step, 9, is_logged=False)).applied


def _digests(engine: Engine) -> dict[str, Any]:
    """Of everything that a training state has to bring back, the ranges of all ranks joined."""
    vectors = [
        (vector.name, vector.start, vector.total, {"weights": vector.weights, **vector.state})
        for vector in _vectors(engine)
    ]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, vectors)
    joined: dict[str, str] = {}
    for own in zip(*shares, strict=True):
        (name, _, total, state) = own[0]
        for key, value in state.items():
            if not torch.is_tensor(value) or value.shape != state["weights"].shape:
                joined[f"{name}/{key}"] = str(value)
                continue
            whole = torch.zeros(max(start + values[key].numel() for _, start, _, values in own), dtype=value.dtype)
            for _, start, _, values in own:
                whole[start : start + values[key].numel()] = values[key].flatten()
            assert not whole[total:].any()  # padding
            joined[f"{name}/{key}"] = _digest(whole[:total])
    return joined | {"steps": engine.optimizer_steps}


def _vectors(engine: Engine) -> list[Vector]:
    from pretrain.training import flat_shards

    return flat_shards._vectors(engine._engine, engine.stage)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _model_digests(engine: Engine) -> list[str]:
    """Of the weights that this rank computes with, the same on all ranks."""
    own = [_digest(parameter) for parameter in engine.objective.parameters()]
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, own)
    assert all(one == own for one in all_ranks)
    return own


def _link(directory: Path, number: int) -> dict[str, Any]:
    """Take up what the link before saved, train on, save."""
    found = {}
    for name, precision, stage in SETTINGS:
        key = f"{name}-{precision}-{stage}"
        torch.manual_seed(number)
        recipe = _recipe(name, precision, stage, dist.get_world_size())
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        loaded = None
        if number:
            engine.load(directory / key / str(number - 1))
            loaded = [_digests(engine), _model_digests(engine)]
        _steps(engine, 2 * number, 2 * number + 2)
        target = directory / key / str(number)
        target.mkdir(parents=True, exist_ok=True)
        engine.save(target)
        dist.barrier()
        found[key] = [loaded, [_digests(engine), _model_digests(engine)]]
        engine.close()
    return found


@pytest.fixture(scope="module")
def chain(run_on_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    directory = tmp_path_factory.mktemp("chain")
    return directory, [run_on_ranks(ranks, _link, directory, number) for number, ranks in enumerate(CHAIN)]


@pytest.mark.integration
@pytest.mark.parametrize("setting", ["-".join(map(str, setting)) for setting in SETTINGS])
def test_engine__state_is_equal_bit_by_bit_on_other_numbers_of_ranks(
    setting: str, chain: tuple[Path, list[Any]]
) -> None:
    """Three ranks, two, one, two again; each trains on in between."""
    directory, links = chain
    for before, after in itertools.pairwise(links):
        assert after[setting][0] == before[setting][1]
        assert after[setting][1] != before[setting][1]
    assert any(key.endswith(("/exp_avg", "/momentum_buffer")) for key in links[0][setting][1][0])
    assert links[-1][setting][1][0]["steps"] == 2 * len(CHAIN)
    (written,) = {path.suffix for path in (directory / setting).rglob("*") if path.is_file()}
    assert written == ".safetensors"
    shares = [load_file(file) for file in sorted((directory / setting / "0").iterdir())]
    sizes = [sum(tensor.numel() for tensor in share.values()) for share in shares]
    assert len(sizes) == CHAIN[0] and max(sizes) < 0.6 * sum(sizes)


def _before(directory: Path) -> dict[str, Any]:
    """What checkpoints of format 1 hold: DeepSpeed's files in every stage."""
    found = {}
    for name, precision, stage in (
        ("adamw", "fp32", 0),
        ("adamw", "fp32", 1),
        ("adamw", "bf16", 2),
        ("lion", "fp32", 1),
    ):
        key = f"{name}-{precision}-{stage}"
        torch.manual_seed(3)
        recipe = _recipe(name, precision, stage, dist.get_world_size())
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        if not (directory / key).exists():
            dist.barrier()
            _steps(engine, 0, 2)
            engine._engine.save_checkpoint(str(directory / key), tag=TAG, save_latest=False)
        elif name == "lion":
            with pytest.raises(RuntimeError, match=r"optimizer\.name=lion fit the number of workers that saved them"):
                engine.load_resharded(directory / key, directory / "scratch")
            continue
        else:
            engine.load_resharded(directory / key, directory / "scratch")
            _steps(engine, 9, 9)
        found[key] = [_digests(engine), _model_digests(engine)]
        torch.manual_seed(4)
        again = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        if dist.get_world_size() == 2:
            again.load(directory / key)
            assert [_digests(again), _model_digests(again)] == found[key]
    return found


@pytest.mark.integration
def test_engine__reads_the_states_that_deepspeed_wrote_before(run_on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    two, one = run_on_ranks(2, _before, tmp_path), run_on_ranks(1, _before, tmp_path)
    assert len(one) == 3
    for setting, expected in one.items():
        assert two[setting] == expected


def _names(directory: Path) -> dict[str, Any]:
    recipe = _recipe("adamw", "bf16", 1, dist.get_world_size())
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    groups = deepspeed_internals.flat_groups(engine._engine)
    return {
        "optimizer": type(deepspeed_internals.torch_optimizer(engine._engine)).__name__,
        "starts": [group.start for group in groups],
        "sizes": [group.master.numel() for group in groups],
        "numbers": [sum(parameter.numel() for parameter, _ in group.parameters) for group in groups],
        "counts": deepspeed_internals.counts(engine._engine),
    }


def test_flat_groups__are_what_deepspeed_steps(run_on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    found = run_on_ranks(1, _names, tmp_path)
    assert found["optimizer"] == "AdamW" and set(found["starts"]) == {0}
    assert all(0 <= size - numbers < 2 for size, numbers in zip(found["sizes"], found["numbers"], strict=True))
    assert found["counts"] == {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
