"""The exactly resumable stream: this rank's micro-batches, from any position, with nothing to save but two integers.

The samples of optimizer step t are global positions `t * global_batch ... (t + 1) * global_batch - 1`; positions run
on from epoch to epoch, so a batch may straddle two epochs and nothing is dropped or padded. Which sample a position
holds (`order`) and how it is cropped (`views`) depend on (seed, epoch, position) only: ids and pixels of a step are
the same for any number of ranks and loader workers, and a run goes on exactly where its last completed step ended,
whatever had been prefetched.

Loader workers (forked) read, decode and crop; the main process only computes the order. Not here: moving batches to a
device, per-pixel augmentation, masks (objectives make them on the device from the batch's `seed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data_pipelines.decode import IMAGE_FIELDS, open_image
from data_pipelines.errors import DataError
from data_pipelines.order import ORDER_VERSION, SampleOrder, key, rank_positions
from data_pipelines.randomness import ViewRandom, sample_seed
from data_pipelines.shards import Dataset
from data_pipelines.views import View, random_resized_crop, require_distinct

__all__ = ["Stream", "StreamState"]

Batch = dict[str, Tensor]
Request = list[tuple[int, int]]  # (epoch, sample id) of each sample of a micro-batch


@dataclass(frozen=True)
class StreamState:
    """Where a stream is: `position` samples of epoch `epoch` are consumed; samples seen = epoch * N + position."""

    epoch: int
    position: int


class Stream:
    """Endless micro-batches of one rank.

    Iterating yields dicts: each view's name -> uint8 (b, 3, size, size), or (count, b, 3, size, size) when
    `count > 1`; `"sample_id"` int64 (b,); `"seed"` int64 (b,), the hash of (seed, epoch, sample id) for whatever is
    random on the device. The `micro_batches_per_step` micro-batches of a step come consecutively. Each `iter()` begins
    at `state` with loader workers of its own, which end with the iterator.

    Args:
        dataset: opened shards; every sample has an image field.
        views: crops to make of each sample, see `views_from`.
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per batch yielded; `world_size * micro_batch_size` divides `global_batch_size`.
        rank: of this process, `0 <= rank < world_size`.
        world_size: number of ranks.
        seed: of order and crops, from 0.
        state: where to begin.
        num_workers: loader processes; 0 loads in this process.
        prefetch_batches: micro-batches each loader process keeps ready.
        block_size: consecutive samples read together, see `order`.
        window: blocks shuffled together.
        num_streams: segments interleaved.

    Raises:
        DataError: an argument is not allowed. While iterating: a sample cannot be read or decoded (names shard
            and key).
    """

    def __init__(
        self,
        dataset: Dataset,
        views: Sequence[View],
        *,
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
    ) -> None:
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("world_size", world_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch_batches", prefetch_batches, 1),
        ):
            if value < least:
                raise DataError(f"{name}={value} is not allowed; it is at least {least}")
        if global_batch_size % (world_size * micro_batch_size):
            raise DataError(
                f"global_batch_size={global_batch_size} is not a multiple of world_size * micro_batch_size = "
                f"{world_size} * {micro_batch_size} = {world_size * micro_batch_size}"
            )
        require_distinct(views)
        self._order = SampleOrder(
            dataset.counts, seed=seed, block_size=block_size, window=window, num_streams=num_streams
        )
        if state.epoch < 0 or not 0 <= state.position < dataset.num_samples:
            raise DataError(f"{state} is not allowed; epoch is from 0, position in 0..{dataset.num_samples - 1}")
        self._slots = rank_positions(global_batch_size, world_size, rank, num_streams)  # (global_batch / world,)
        self._samples = _SampleViews(dataset, views, seed)
        self.dataset = dataset
        self.state = state
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.micro_batches_per_step = global_batch_size // (world_size * micro_batch_size)
        self.num_workers, self.prefetch_batches = num_workers, prefetch_batches

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self._samples,
            batch_sampler=self._requests(),
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_batches if self.num_workers else None,
            multiprocessing_context="fork" if self.num_workers else None,
            collate_fn=_as_is,
            generator=torch.Generator(),  # else the loader draws a number from the global generator of the training
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def state_at(self, step: int) -> StreamState:
        """The state after `step` whole optimizer steps of a run that began at the first sample."""
        return StreamState(*divmod(step * self.global_batch_size, self.dataset.num_samples))

    @property
    def order_signature(self) -> dict[str, Any]:
        """What two integers of state mean something under; plain JSON, stored in checkpoints."""
        return {
            "version": ORDER_VERSION,
            "dataset": self.dataset.digest,
            "num_samples": self.dataset.num_samples,
            "seed": self._order.seed,
            "block_size": self._order.block_size,
            "window": self._order.window,
            "num_streams": self._order.num_streams,
        }

    def require_order(self, saved: Mapping[str, Any]) -> None:
        """Refuse to resume from a state that was recorded under another order.

        Raises:
            DataError: names every differing entry with its saved and present value.
        """
        present = self.order_signature
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
            for first in range(0, len(pairs), self.micro_batch_size):
                yield pairs[first : first + self.micro_batch_size]
            begin += self.global_batch_size


class _SampleViews(TorchDataset[Batch]):
    """What runs in a loader worker: a list of (epoch, sample id) to one finished micro-batch."""

    def __init__(self, dataset: Dataset, views: Sequence[View], seed: int) -> None:
        self.dataset, self.views, self.seed = dataset, tuple(views), seed
        self.image_field = dataset.require_field(*IMAGE_FIELDS)

    def __getitems__(self, request: Request) -> Batch | DataError:
        """A data error is returned, not raised, since the loader would wrap its one line in a traceback."""
        try:
            return self._micro_batch(request)
        except DataError as error:
            return error

    def _micro_batch(self, request: Request) -> Batch:
        seeds = [sample_seed(self.seed, epoch, sample_id) for epoch, sample_id in request]
        crops: dict[str, list[Tensor]] = {view.name: [] for view in self.views}
        for (_, sample_id), seed in zip(request, seeds, strict=True):
            image = self._image(sample_id)
            for number, view in enumerate(self.views):
                rng = ViewRandom(key(number, base=seed))
                crops[view.name] += [random_resized_crop(image, view, rng) for _ in range(view.count)]
        batch = {view.name: _stacked(crops[view.name], view) for view in self.views}
        batch["sample_id"] = torch.tensor([sample_id for _, sample_id in request])
        batch["seed"] = torch.from_numpy(np.array(seeds, np.uint64).view(np.int64))
        return batch

    def _image(self, sample_id: int) -> Any:
        content = self.dataset.read(sample_id)[self.image_field]
        try:
            return open_image(content)
        except DataError as error:
            raise DataError(f"{self.dataset.where(sample_id)}, field {self.image_field}: {error}") from None


def _stacked(crops: list[Tensor], view: View) -> Tensor:
    batch = torch.stack(crops)  # (b * count, 3, size, size), the crops of a sample adjacent
    if view.count == 1:
        return batch
    return batch.unflatten(0, (-1, view.count)).transpose(0, 1).contiguous()  # (count, b, 3, size, size)


def _as_is(batch: Any) -> Any:
    return batch
