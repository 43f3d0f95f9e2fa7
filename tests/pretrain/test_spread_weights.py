"""Where a stage begins and where a run goes on under ZeRO stage 3, no rank holds the model whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from backbones.io import open_weights
from objectives.base import Objective
from pretrain.config.stages import Stage
from pretrain.training import state
from pretrain.training.engine import Engine
from pretrain.training.handover import take_over, weights_of
from pretrain.training.initial_weights import InitialWeights
from pretrain.training.model import build_objective
from pretrain.training.spread_weights import Sent, Shared
from pretrain.training.torch_internals import WeakStorage
from tests.pretrain.test_initial_weights import CPU, LITTLE, RANKS, recipe_of


class Watch:
    """How many bytes of what passed here somebody has at a time, at most, by whatever tensor."""

    def __init__(self) -> None:
        self.most = self.largest = 0
        self._seen: list[WeakStorage] = []

    def see(self, tensor: Tensor) -> None:
        self._seen = [one for one in self._seen if one.storage() is not None]
        self._seen.append(WeakStorage(tensor.untyped_storage()))
        alive = {one.data_ptr(): one.nbytes() for seen in self._seen if (one := seen.storage()) is not None}
        self.most, self.largest = max(self.most, sum(alive.values())), max(self.largest, tensor.nbytes)

    def each(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.see(tensor)
            yield name, tensor
            del tensor

    @property
    def is_one_at_a_time(self) -> bool:
        """Two are while one follows the other."""
        return 0 < self.most <= 2 * self.largest


class Watched(Mapping[str, Tensor]):
    """Weights, each of which is watched when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], watch: Watch) -> None:
        self._weights, self._watch = weights, watch

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]
        self._watch.see(tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _built(seed: int) -> Objective:
    torch.manual_seed(seed)
    return build_objective(recipe_of(3))


def _everything(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights_of(engine)}


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def _handed_over() -> dict[str, Any]:
    """From the engine of a stage to that of the next."""
    given, taken, handed = Watch(), Watch(), Shared(CPU)
    before = Engine(_built(0), recipe_of(3), CPU)
    expected = _everything(before)
    handed.update(given.each(weights_of(before)))
    before.close()
    with InitialWeights(CPU, budget=LITTLE) as initial:
        objective = _built(1)
        done = take_over(objective, Watched(handed, taken))
        left = initial._bytes_here
        after = Engine(objective, recipe_of(3), CPU)
    total = sum(tensor.nbytes for tensor in expected.values())
    found = {"same": _same(_everything(after), expected), "loaded": len(done.loaded), "number": len(expected)}
    after.close()
    is_one = given.is_one_at_a_time and taken.is_one_at_a_time
    return found | {"one": is_one, "most": max(given.most, taken.most), "left": left, "total": total}


def _begun(file: Path) -> dict[str, Any]:
    """With weights of a file that rank 0 alone can read."""
    given = _built(2).backbone.weights()
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, file)
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch, InitialWeights(CPU, budget=LITTLE) as initial:
        sent = Sent.__getitem__
        patch.setattr(Sent, "__getitem__", lambda self, name: Watched({name: sent(self, name)}, watch)[name])
        objective = _built(3)
        start = state.Start("init_from", str(file if dist.get_rank() == 0 else "/gone"))
        state.begin_with(objective, start, Stage("", recipe_of(3)), CPU)
        left = initial._bytes_here
        engine = Engine(objective, recipe_of(3), CPU)
    student = {name: tensor.clone() for name, tensor in engine.named_weights(dict(objective.named_parameters()))}
    paths = {parameter: name for name, parameter in objective.named_parameters()}
    own = {name: paths[one] for name, one in objective.backbone.network.named_parameters()}
    same = _same({name: student[path] for name, path in own.items()}, {name: given[name] for name in own})
    teacher = _same(dict(engine.exported_weights()), given)
    total = sum(tensor.nbytes for tensor in student.values())
    engine.close()
    return {"same": same, "teacher": teacher, "one": watch.is_one_at_a_time, "left": left, "total": total}


def _gone_on(file: Path) -> dict[str, Any]:
    """With the extra state of a file, and what is compared with the backbone that was saved."""
    engine = Engine(_built(0), recipe_of(3), CPU)
    saved = {name: tensor.clone() for name, tensor in engine.objective.named_extra_state()}
    if dist.get_rank() == 0:
        save_file(saved, file)
    dist.barrier()
    engine.close()
    again, read, exported = Engine(_built(1), recipe_of(3), CPU), Watch(), Watch()
    again.objective.load_extra_state(Watched(open_weights(file), read))
    for _, tensor in exported.each(again.exported_weights()):
        del tensor
    return {
        "same": _same(again.objective.extra_state(), saved),
        "one": read.is_one_at_a_time and exported.is_one_at_a_time,
    }


def _all_of_it(directory: Path) -> dict[str, Any]:
    return {
        "handed over": _handed_over(),
        "begun": _begun(directory / "given.safetensors"),
        "gone on": _gone_on(directory / "extra.safetensors"),
    }


@pytest.mark.integration
def test_beginnings__hold_one_whole_tensor_beside_shares(run_on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """And every number is what it was."""
    found = run_on_ranks(RANKS, _all_of_it, tmp_path)
    assert found["handed over"]["same"] and found["handed over"]["loaded"] == found["handed over"]["number"] > 100
    assert found["begun"]["same"] and found["begun"]["teacher"] and found["gone on"]["same"]
    assert all(each["one"] for each in found.values())
    for each in ("handed over", "begun"):
        assert 2 * found[each]["left"] < found[each]["total"] > 10 * LITTLE
