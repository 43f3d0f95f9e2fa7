"""A kind of view in one place, as a plug-in would add one: it is stated, streamed, refused and explained like ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.specs import require_count, require_integers
from data_pipelines.streaming.stream import Stream
from data_pipelines.views import registry
from data_pipelines.views.base import Decoding, Reading, View
from data_pipelines.views.registry import kinds, register
from data_pipelines.views.specs import views_from

Write = Callable[[Path, Sequence[tuple[str, bytes]]], Path]


@dataclass(frozen=True)
class WaveReading(Reading):
    def decode(self, data: bytes, decoding: Decoding) -> np.ndarray:
        if len(data) % 2:
            raise DataError(f"{len(data)} bytes are no 16 bit samples")
        if data == b"flac":
            raise LookupError("no frame\nin this file")  # as libraries do, of any type
        return np.frombuffer(data, "<i2")


@dataclass(frozen=True)
class WaveView(View):
    """A stretch of sound, float32 (size,), where `same_crop_as` shows the same stretch of another field."""

    kind: ClassVar[str] = "wave"
    relations: ClassVar[tuple[str, ...]] = ("same_crop_as",)
    led_keys: ClassVar[tuple[str, ...]] = ("count", "size")

    size: int = 16
    count: int | None = None
    field: str | None = None
    same_crop_as: str | None = None

    def reads(self, fields: frozenset[str]) -> Reading:
        return WaveReading(self.chosen_field(self.field, ("pcm",), fields))

    def draw(self, content: np.ndarray, rng: ViewRandom, led: Mapping[str, Any]) -> list[int]:
        if self.same_crop_as is not None:
            return list(led[self.same_crop_as])
        return [rng.below(len(content) - self.size + 1) for _ in range(self.count or 1)]

    def entries(self, content: np.ndarray, rng: ViewRandom, drawn: Sequence[int]) -> dict[str, Tensor]:
        parts = [content[start : start + self.size].astype(np.float32) for start in drawn]
        return {self.name: self.stacked(parts), f"{self.name}.start": self.stacked(np.array(drawn))}

    def _check(self, where: str) -> None:
        require_integers(where, 1, size=self.size)
        require_count(where, self.count)


@pytest.fixture
def _wave(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    register(WaveView)
    yield


@pytest.fixture
def sounds(tmp_path: Path, write_tar: Write) -> Dataset:
    """Eight samples; `pcm` counts up from 100 times the number of the sample, `loud.pcm` is its negative."""
    members = []
    for number in range(8):
        wave = np.arange(64, dtype="<i2") + 100 * number
        members += [(f"{number}.pcm", wave.tobytes()), (f"{number}.loud.pcm", (-wave).tobytes())]
    write_tar(tmp_path / "sound-000000.tar", members)
    return open_dataset(tmp_path)


def stream_of(dataset: Dataset, specs: Sequence[dict[str, Any]], num_workers: int = 0, **settings: Any) -> Stream:
    sizes = {"global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1, "num_streams": 1}
    return Stream(dataset, views_from(specs), seed=3, num_workers=num_workers, **sizes, **settings)


@pytest.mark.usefixtures("_wave")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_register__a_new_kind_is_streamed(sounds: Dataset, num_workers: int) -> None:
    specs = [
        {"kind": "wave", "name": "sound", "count": 2},
        {"kind": "wave", "name": "loud", "field": "loud.pcm", "same_crop_as": "sound"},
        {"kind": "wave", "name": "one", "size": 4},
    ]
    stream = stream_of(sounds, specs, num_workers)
    batch = stream.finish(next(iter(stream)))
    assert {name: tuple(entry.shape) for name, entry in batch.items() if name not in ("sample_id", "seed")} == {
        "sound": (2, 4, 16),
        "sound.start": (2, 4),
        "loud": (2, 4, 16),
        "loud.start": (2, 4),
        "one": (4, 4),
        "one.start": (4,),
    }
    assert torch.equal(batch["sound"][..., 0], batch["sound.start"] + 100 * batch["sample_id"])
    assert torch.equal(batch["loud"], -batch["sound"]) and batch["sound"].dtype == torch.float32
    again = next(iter(stream_of(sounds, specs)))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


@pytest.mark.usefixtures("_wave")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "waves"}, "it is one of array, image, label, points, volume, wave; did you mean 'wave'?"),
        (
            {"sizes": 3},
            "'sizes'; allowed: name, size, count, field, same_crop_as, kind; did you mean 'size'",
        ),
        ({"size": 0}, "view 'v': size=0 is not allowed; it is an integer from 1"),
        ({"same_crop_as": "a", "size": 3}, "size=3 has no effect, the crops are those of 'a'"),
        (
            {"field": "pcn"},
            "'v': no field pcn in every sample; every sample has loud.pcm, pcm; did you mean 'pcm'?",
        ),
    ],
)
def test_register__a_new_kind_is_refused_like_ours(sounds: Dataset, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        stream_of(sounds, [{"kind": "wave", "name": "a"}, {"kind": "wave", "name": "v", **spec}])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("_wave")
def test_register__a_damaged_sample_of_a_new_kind_is_named(tmp_path: Path, write_tar: Write) -> None:
    write_tar(tmp_path / "sound-000000.tar", [(f"{number}.pcm", b"odd") for number in range(4)])
    with pytest.raises(DataError, match=r"sample '\d', field pcm: 3 bytes are no 16 bit samples; data.max_corrupt"):
        next(iter(stream_of(open_dataset(tmp_path), [{"kind": "wave", "name": "a"}])))


@pytest.mark.usefixtures("_wave")
def test_register__whatever_a_decoder_raises_is_a_damaged_sample(tmp_path: Path, write_tar: Write) -> None:
    sound = np.zeros(40, "<i2").tobytes()
    write_tar(tmp_path / "sound-000000.tar", [(f"{n}.pcm", b"flac" if n == 2 else sound) for n in range(8)])
    dataset, views = open_dataset(tmp_path), [{"kind": "wave", "name": "a"}]
    said = r"sample '2', field pcm: WaveReading cannot decode 4 bytes: LookupError: no frame; data.max_corrupt_fraction"
    with pytest.raises(DataError, match=said):
        list(islice(stream_of(dataset, views), 4))
    replaced = stream_of(dataset, views, max_corrupt_fraction=0.4)
    list(islice(replaced, 2))
    assert replaced.num_corrupt == 1


@pytest.mark.usefixtures("_wave")
def test_register__a_name_belongs_to_one_kind() -> None:
    register(WaveView)  # its module was imported again
    with pytest.raises(DataError, match=r"view kind 'image' is taken by data_pipelines.views.kinds.images.ImageView"):

        @register
        @dataclass(frozen=True)
        class Other(WaveView):
            kind: ClassVar[str] = "image"


def test_kinds__are_the_files_of_the_folder() -> None:
    folder = Path(registry.__file__).parent / "kinds"
    modules = {kind.__module__.rpartition(".")[2] for kind in kinds().values()}
    assert modules == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(kinds()) == {"image", "points", "volume", "array", "label"}
