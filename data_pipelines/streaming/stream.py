"""The exactly resumable stream: this rank's micro-batches, from any position, with nothing to save but two integers.

The samples of optimizer step t are global positions `t * global_batch ... (t + 1) * global_batch - 1`; positions run
on from epoch to epoch, so a batch may straddle two epochs and nothing is dropped or padded. Which sample a position
holds (`order`) and how it is viewed (`views`) depend on (seed, epoch, position) only: ids and pixels of a step are
the same for any number of ranks and loader workers, and a run goes on exactly where its last completed step ended,
whatever had been prefetched. A damaged sample is replaced by one that depends on its id only, so positions stay exact.

Loader workers (forked) read, decode and crop; the main process only computes the order. Not here: moving batches to a
device, per-pixel augmentation on it (`photometric`), masks that objectives draw there from the batch's `seed`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from data_pipelines.errors import CorruptSampleError, DataError, MissingFieldError
from data_pipelines.order import ORDER_VERSION, Ids, key, rank_positions
from data_pipelines.purposes import Purpose
from data_pipelines.randomness import ViewRandom, sample_seed
from data_pipelines.streaming.loader_processes import leave_signals_to_parent, loaded, share
from data_pipelines.views.base import View
from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.photometric import finish

__all__ = ["Samples", "Stream", "StreamState"]

Batch = dict[str, Tensor]
Request = tuple[int, list[tuple[int, int]]]  # which views, and (epoch, sample id) of each sample of a micro-batch

_MAX_SUBSTITUTES = 16  # tries for one sample; with a tenth of the data damaged, 1e-16 of them fail

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamState:
    """Where a stream is: `position` samples of epoch `epoch` are consumed; samples seen = epoch * N + position."""

    epoch: int
    position: int


class Samples(Protocol):
    """What a stream asks of a data set; `shards.Dataset` says what each of these does."""

    @property
    def num_samples(self) -> int: ...

    @property
    def fields(self) -> frozenset[str]: ...

    @property
    def digest(self) -> str: ...

    def read(self, sample_id: int, /) -> dict[str, Any]: ...

    def prefetch(self, sample_ids: Sequence[int], /) -> None: ...

    def where(self, sample_id: int, /) -> str: ...

    def first_without(self, names: Sequence[str], /) -> str: ...

    def sample_order(
        self, *, seed: int, block_size: int, window: int, num_streams: int
    ) -> Callable[[Ids], tuple[Ids, Ids]]: ...


class Stream:
    """Endless micro-batches of one rank.

    Iterating yields dicts: what each view makes, stacked (b, ...) or (count, b, ...) if it states a count;
    `"sample_id"` int64 (b,), the sample that the order holds there, also where a substitute stands in for it;
    `"seed"` int64 (b,), the hash of (seed, epoch, sample id) for whatever is random on the device. The
    `micro_batches_per_step` micro-batches of a step come consecutively. Each `iter()` begins at `state` with loader
    workers of its own, which end with the iterator.

    Args:
        dataset: opened shards, or a mixture of several.
        views: what to make of each sample, see `views_from`.
        mix: (share, views): what to make of the samples of that share of the steps instead, such as the same views of
            another size. Which step has which views is drawn from its number, the same on all ranks.
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per batch yielded; `world_size * micro_batch_size` divides `global_batch_size`.
        rank: of this process, `0 <= rank < world_size`.
        world_size: number of ranks.
        seed: of order and views, from 0.
        state: where to begin.
        num_workers: loader processes; 0 loads in this process.
        prefetch_batches: micro-batches each loader process keeps ready.
        block_size: consecutive samples read together, see `order`.
        window: blocks shuffled together.
        num_streams: segments interleaved.
        max_corrupt_fraction: share of damaged samples that are replaced before the stream fails; 0 fails at the first.
        decoder: of JPEGs, see `ViewMaker`.
        scaled_decoding: let the JPEG decoder halve large photos while it decodes, see `ViewMaker`.
        resampler: what scales crops, see `ViewMaker`.
        exif_rotation: turn pictures as their EXIF orientation says, see `ViewMaker`.
        pin_memory: yield page-locked tensors, which copy to a GPU beside its work.
        loader_timeout_s: how long to wait for a micro-batch of the loader processes before they are given up.

    Attributes:
        num_corrupt: samples replaced so far, of those yielded.
        decoder: the one in use.

    Raises:
        DataError: an argument is not allowed, or the data lack what a view wants. While iterating: a shard cannot be
            read, too many samples are damaged (names shard and key), or `/dev/shm` is too small.
        LoaderError: while iterating: a loader process died or hangs.
    """

    def __init__(
        self,
        dataset: Samples,
        views: Sequence[View],
        *,
        mix: Sequence[tuple[float, Sequence[View]]] = (),
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        state: StreamState = StreamState(0, 0),
        num_workers: int = 0,
        prefetch_batches: int = 2,
        block_size: int = 256,
        window: int = 16,
        num_streams: int = 8,
        max_corrupt_fraction: float = 0.0,
        decoder: str = "auto",
        scaled_decoding: bool = False,
        resampler: str = "pil",
        exif_rotation: bool = True,
        pin_memory: bool = False,
        loader_timeout_s: float = 600.0,
    ) -> None:
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("world_size", world_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch_batches", prefetch_batches, 1),
            ("loader_timeout_s", loader_timeout_s, 1),
        ):
            if value < least:
                raise DataError(f"{name}={value} is not allowed; it is at least {least}")
        if global_batch_size % (world_size * micro_batch_size):
            raise DataError(
                f"global_batch_size={global_batch_size} is not a multiple of world_size * micro_batch_size = "
                f"{world_size} * {micro_batch_size} = {world_size * micro_batch_size}"
            )
        if not 0 <= max_corrupt_fraction < 1:
            raise DataError(f"max_corrupt_fraction={max_corrupt_fraction} is not allowed; it is in [0, 1)")
        layout = {"seed": seed, "block_size": block_size, "window": window, "num_streams": num_streams}
        self._order = dataset.sample_order(**layout)
        if min(state.epoch, state.position) < 0:
            raise DataError(f"{state} is not allowed; epoch and position are from 0")
        self._slots = rank_positions(global_batch_size, world_size, rank, num_streams)  # (global_batch / world,)
        try:
            makers = [
                ViewMaker(
                    shown,
                    dataset.fields,
                    decoder=decoder,
                    scaled=scaled_decoding,
                    resampler=resampler,
                    exif_rotation=exif_rotation,
                )
                for shown in (views, *(shown for _, shown in mix))
            ]
        except MissingFieldError as error:
            raise DataError(f"{error}{dataset.first_without(error.wanted)}") from None
        self._samples = _SampleViews(dataset, makers, seed, replaces=max_corrupt_fraction > 0)
        self._seed, self._shares = seed, [share for share, _ in mix]
        pixels = {"resampler": resampler, "scaled_decoding": scaled_decoding, "exif_rotation": exif_rotation}
        self._layout = layout | pixels
        self.decoder = makers[0].decoder  # not in the signature: all of them give the same pixels
        self.dataset, self.views, self.state = dataset, tuple(views), state
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.micro_batches_per_step = global_batch_size // (world_size * micro_batch_size)
        self.num_workers, self.prefetch_batches, self.pin_memory = num_workers, prefetch_batches, pin_memory
        self.loader_timeout_s = loader_timeout_s
        self.max_corrupt_fraction, self.num_corrupt = max_corrupt_fraction, 0
        self._share = dataset.num_samples / world_size  # samples of an epoch that this rank sees

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self._samples,
            batch_sampler=self._requests(),  # type: ignore[arg-type]  # a request need not be a list
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_batches if self.num_workers else None,
            multiprocessing_context="fork" if self.num_workers else None,
            collate_fn=_as_is,
            worker_init_fn=leave_signals_to_parent if self.num_workers else None,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else the loader draws a number from the global generator of the training
            timeout=self.loader_timeout_s if self.num_workers else 0,
        )
        num_seen = 0
        for made in loaded(loader):
            if isinstance(made, DataError):
                raise made
            num_seen += self.micro_batch_size
            self._count(made.faults, num_seen)
            yield made.batch

    def finish(self, batch: Batch) -> Batch:
        """What is left to do to the pixels of a batch, on the device that it is on: colours, blur (`photometric`)."""
        return finish(batch, self.views)

    def state_at(self, step: int) -> StreamState:
        """The state after `step` whole optimizer steps of a run that began at the first sample."""
        return StreamState(*divmod(step * self.global_batch_size, self.dataset.num_samples))

    @property
    def order_signature(self) -> dict[str, Any]:
        """Everything that must be equal for a saved (epoch, position) to name the same sample.

        JSON, stored in checkpoints.
        """
        return {
            "version": ORDER_VERSION,
            "dataset": self.dataset.digest,
            "num_samples": self.dataset.num_samples,
            **self._layout,
        }

    def require_order(self, saved: Mapping[str, Any]) -> None:
        """Refuse to resume from a state that was recorded under another order.

        Raises:
            DataError: names every differing entry with its saved and present value.
        """
        if not saved.get("exact", True):
            raise DataError(
                "the stream cannot resume exactly: the checkpoint was taken with data.unindexed=stream, which has no "
                "order to go on with; set data.unindexed=stream or begin a new run"
            )
        present = self.order_signature
        saved = {"exif_rotation": False, **saved}  # states of before there was a choice do not say it
        names = [name for name in present | dict(saved) if saved.get(name) != present.get(name)]
        if names:
            changes = ", ".join(f"{name} was {saved.get(name)!r}, is {present.get(name)!r}" for name in names)
            raise DataError(f"the stream cannot resume exactly: {changes}; restore these values or begin a new run")

    def _requests(self) -> Iterator[Request]:
        """Endless (epoch, sample id) lists of this rank's micro-batches."""
        begin = self.state.epoch * self.dataset.num_samples + self.state.position
        while True:
            epochs, ids = self._order(begin + self._slots)
            pairs = list(zip(epochs.tolist(), ids.tolist(), strict=True))
            chosen = self._chosen_views(begin // self.global_batch_size)
            for first in range(0, len(pairs), self.micro_batch_size):
                yield chosen, pairs[first : first + self.micro_batch_size]
            begin += self.global_batch_size

    def _chosen_views(self, step: int) -> int:
        """0 for the views of most steps, else 1 + the number of the others that this step has."""
        drawn = ViewRandom(key(self._seed, Purpose.SIZES, step)).uniform(0.0, 1.0)
        for number, of_steps in enumerate(self._shares, start=1):
            drawn -= of_steps
            if drawn < 0:
                return number
        return 0

    def _count(self, faults: Sequence[str], num_seen: int) -> None:
        """Log replaced samples; more of them than the allowed share of each epoch begun ends the stream."""
        for fault in faults:
            self.num_corrupt += 1
            logger.warning("replaced a damaged sample (%d so far): %s", self.num_corrupt, fault)
        allowed = self.max_corrupt_fraction * self._share * math.ceil(num_seen / self._share)
        if faults and self.num_corrupt > allowed:
            raise DataError(
                f"{self.num_corrupt} of {num_seen} samples read here were damaged, more than "
                f"data.max_corrupt_fraction={self.max_corrupt_fraction:g} allows; the last one: {faults[-1]}"
            )


class _Made(NamedTuple):
    """A micro-batch and one line for each sample of it that had to be replaced."""

    batch: Batch
    faults: list[str]


class _SampleViews(TorchDataset[_Made]):
    """What runs in a loader worker: a list of (epoch, sample id) to one finished micro-batch."""

    def __init__(self, dataset: Samples, makers: Sequence[ViewMaker], seed: int, *, replaces: bool) -> None:
        self.dataset, self.makers, self.seed, self.replaces = dataset, makers, seed, replaces

    def __getitems__(self, request: Request) -> _Made | DataError:
        """A data error is returned, not raised, since the loader would wrap its one line in a traceback."""
        try:
            made = self._micro_batch(request)
            if get_worker_info() is not None:
                share(made.batch)
            return made
        except DataError as error:
            return error

    def _micro_batch(self, request: Request) -> _Made:
        chosen, samples = request
        maker, ids = self.makers[chosen], [sample_id for _, sample_id in samples]
        seeds = [sample_seed(self.seed, epoch, sample_id) for epoch, sample_id in samples]
        faults: list[str] = []
        self.dataset.prefetch(ids)
        made = [self._views(maker, sample_id, seed, faults) for sample_id, seed in zip(ids, seeds, strict=True)]
        batch = maker.collate(made)
        batch["sample_id"] = torch.tensor(ids)
        batch["seed"] = torch.from_numpy(np.array(seeds, np.uint64).view(np.int64))
        return _Made(batch, faults)

    def _views(self, maker: ViewMaker, sample_id: int, seed: int, faults: list[str]) -> dict[str, Tensor]:
        """The views of a sample, or of the first sound one of its substitutes."""
        candidate = sample_id
        for attempt in range(_MAX_SUBSTITUTES):
            try:
                return self._views_of(maker, candidate, seed)
            except CorruptSampleError as error:
                if not self.replaces:
                    remedy = "data.max_corrupt_fraction=0.001 replaces such samples up to that share"
                    raise DataError(f"{error}; {remedy}") from None
                faults.append(str(error))
            candidate = key(self.seed, Purpose.SUBSTITUTE, sample_id, attempt) % self.dataset.num_samples
        raise DataError(
            f"sample {sample_id} and {_MAX_SUBSTITUTES - 1} substitutes are damaged; the last: {faults[-1]}"
        )

    def _views_of(self, maker: ViewMaker, sample_id: int, seed: int) -> dict[str, Tensor]:
        sample = self.dataset.read(sample_id)
        try:
            return maker(sample, seed)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"{self.dataset.where(sample_id)}, {error}") from None


def _as_is(batch: Any) -> Any:
    return batch
