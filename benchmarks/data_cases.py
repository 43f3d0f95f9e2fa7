"""The loaders that `data_pipeline` compares: ours, webdataset, torchvision's ImageFolder and separate files.

All read the same samples, shuffled unless they are called sequential, and all but `read` end in normalised float
batches in the main process.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from data_cost import Cost, Plan, cost_per_sample
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data_pipelines.decode import Photo, chosen_decoder
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.streaming.stream import Stream
from data_pipelines.views.base import View
from data_pipelines.views.specs import views_from

__all__ = ["Case", "SampleSet", "crop_rows", "dino_rows", "open_set", "read_cases", "view_cases"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORDER: dict[str, Any] = {"seed": 0, "block_size": 256, "window": 16, "num_streams": 8}
ENDLESS = 1 << 40
SHUFFLE_BUFFER = 1000  # samples, as in webdataset's own examples
PASSES = 10_000  # webdataset gets the list of shards so many times, which keeps its shuffle buffer full at the seams
_BICUBIC = transforms.InterpolationMode.BICUBIC

Start = Callable[[int, int], Iterator[Any]]  # (loader workers, batch size) -> endless batches


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    group: str
    name: str
    measure: Callable[[int], Cost]  # of so many loader workers
    role: str = ""  # "peer" or "limit": what the other rows of the group are compared with


@dataclass(frozen=True)
class SampleSet:
    """The same samples as shards and as separate files."""

    name: str
    dataset: Dataset
    shards: tuple[str, ...]
    files: Path  # `all/<sample id>.<field>`

    @property
    def sample_bytes(self) -> float:
        """Mean bytes of a sample, all fields together."""
        return sum(path.stat().st_size for path in self.files.glob("all/*")) / self.dataset.num_samples


def open_set(folder: Path, scratch: Path) -> SampleSet:
    """Open all shards of a folder and write their samples as files under `scratch`."""
    shards = tuple(str(path) for path in sorted(folder.resolve().glob("*.tar")))
    dataset = open_dataset(shards)
    files = scratch / folder.name
    (files / "all").mkdir(parents=True)
    for sample_id in range(dataset.num_samples):
        sample = dataset.read(sample_id)
        for field in dataset.fields:
            (files / "all" / f"{sample_id:06d}.{field}").write_bytes(sample[field])
    return SampleSet(folder.name, dataset, shards, files)


def read_cases(samples: SampleSet, plan: Plan) -> list[Case]:
    """Bytes of samples, without looking at them."""
    group = f"read {samples.name}, {samples.sample_bytes / 1000:.1f} KB"
    starts: dict[str, Start] = {
        "webdataset, sequential": partial(_webdataset_bytes, samples, 0),
        "webdataset, shuffle buffer": partial(_webdataset_bytes, samples, SHUFFLE_BUFFER),
        "separate files": partial(_file_bytes, samples),
        "ours, with CRC": partial(_our_bytes, samples),
    }
    roles = {"webdataset, sequential": "peer"}
    return [Case(group, name, _measured(start, plan), roles.get(name, "")) for name, start in starts.items()]


def view_cases(group: str, samples: SampleSet, rows: Mapping[str, Start], plan: Plan, limit_plan: Plan) -> list[Case]:
    """Decoding alone, by PIL and as we do (the limit), then `rows`, of which the first is the peer."""
    photos = [samples.dataset.read(sample_id)["jpg"] for sample_id in range(samples.dataset.num_samples)]
    by_pil, by_us = (_measured(partial(_decoded, photos, chosen_decoder(name)), limit_plan) for name in ("pil", "auto"))
    peer, *_ = rows
    return [
        Case(group, "decode only, PIL", by_pil),
        Case(group, "decode only", by_us, "limit"),
        *(Case(group, name, _measured(start, plan), "peer" if name == peer else "") for name, start in rows.items()),
    ]


def crop_rows(samples: SampleSet, size: int) -> dict[str, Start]:
    """One random resized crop, as MAE trains on."""
    views = views_from([{"name": "image", "size": size, "scale": (0.2, 1.0), "hflip": 0.5}])
    transform = transforms.Compose(
        [transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=_BICUBIC), *_torchvision_end()]
    )
    return {
        "ImageFolder + torchvision": partial(_image_folder, samples, transform),
        "webdataset + torchvision": partial(_webdataset_views, samples, transform),
        "ours, PIL decodes": partial(_stream, samples, views, {"decoder": "pil", "resampler": "pil"}, True),
        "ours, PIL resamples": partial(_stream, samples, views, {"resampler": "pil"}, True),
        "ours, torch resamples": partial(_stream, samples, views, {"resampler": "torch"}, True),
    }


def dino_rows(samples: SampleSet) -> dict[str, Start]:
    """Two global and eight local crops with the colour chain of DINO."""
    blur = transforms.GaussianBlur(9, sigma=(0.1, 2.0))
    linear, reference = (dino_views(mode) for mode in ("linear", "reference"))
    return {
        "ImageFolder + torchvision": partial(_image_folder, samples, DinoTransform(blur)),
        "same with PIL's blur": partial(_image_folder, samples, DinoTransform(pil_blur)),
        "ours, reference": partial(_stream, samples, reference, {"resampler": "pil"}, True),
        "ours, PIL resamples": partial(_stream, samples, linear, {"resampler": "pil"}, True),
        "ours, torch resamples": partial(_stream, samples, linear, {"resampler": "torch"}, True),
        "same, crops only": partial(_stream, samples, linear, {"resampler": "torch"}, False),
    }


def dino_views(mode: str) -> tuple[View, ...]:
    """The ten crops of DINO; the two global ones differ in blur and solarization."""
    jitter = {"jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "gray_p": 0.2}
    wide = {"size": 224, "scale": (0.4, 1.0)}
    colour = {**jitter, "mode": mode}
    return views_from(
        [
            {"name": "global_1", **wide, "photometric": {**colour, "blur_p": 1.0}},
            {"name": "global_2", **wide, "photometric": {**colour, "blur_p": 0.1, "solarize_p": 0.2}},
            {"name": "local", "size": 96, "count": 8, "scale": (0.05, 0.4), "photometric": {**colour, "blur_p": 0.5}},
        ]
    )


class DinoTransform:
    """One PIL image to the ten crops, by torchvision on PIL images; numbers from the code of DINO (Caron et al. 2021).

    Args:
        blur: of a PIL image. DINO's code has PIL's Gaussian, that of DINOv2 torchvision's with 9 taps.
    """

    def __init__(self, blur: Callable[[Any], Any]) -> None:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        colour = [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2)]
        end = _torchvision_end()

        def crop(size: int, scale: tuple[float, float], blur_p: float, *more: Any) -> Callable[[Any], Tensor]:
            first = transforms.RandomResizedCrop(size, scale=scale, interpolation=_BICUBIC)
            blurred = transforms.RandomApply([transforms.Lambda(blur)], p=blur_p)
            return transforms.Compose([first, end[0], *colour, blurred, *more, *end[1:]])

        local = crop(96, (0.05, 0.4), 0.5)
        solarize = transforms.RandomSolarize(128, p=0.2)
        self.crops = [crop(224, (0.4, 1.0), 1.0), crop(224, (0.4, 1.0), 0.1, solarize), *[local] * 8]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [crop(image) for crop in self.crops]


def pil_blur(image: Image.Image) -> Image.Image:
    """The blur of DINO's code."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def _torchvision_end() -> list[Callable[[Any], Any]]:
    return [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]


def _measured(start: Start, plan: Plan) -> Callable[[int], Cost]:
    return lambda workers: cost_per_sample(partial(start, workers, plan.batch_size), plan)


class _Mapped(TorchDataset[Any]):
    """`function(sample id)` as a dataset."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitem__(self, sample_id: int) -> Any:
        return self.function(sample_id)


def _loader(function: Callable[[int], int], requests: Iterator[list[int]], workers: int) -> Iterator[int]:
    """`function` of every sample in the workers; only the sum over a batch travels."""
    return iter(DataLoader(_Mapped(function), batch_sampler=requests, num_workers=workers, collate_fn=sum))


def _shuffled(num_samples: int, batch_size: int) -> Iterator[list[int]]:
    ids = itertools.cycle(np.random.RandomState(0).permutation(num_samples).tolist())
    while True:
        yield list(itertools.islice(ids, batch_size))


def _our_bytes(samples: SampleSet, workers: int, batch_size: int) -> Iterator[int]:
    order, dataset = samples.dataset.sample_order(**ORDER), samples.dataset
    requests = (order(np.arange(first, first + batch_size))[1].tolist() for first in itertools.count(0, batch_size))
    return _loader(lambda sample_id: len(dataset.read(sample_id)), requests, workers)


def _file_bytes(samples: SampleSet, workers: int, batch_size: int) -> Iterator[int]:
    folder, fields, count = samples.files / "all", sorted(samples.dataset.fields), samples.dataset.num_samples

    def read(sample_id: int) -> int:
        sample = {}
        for field in fields:
            with open(f"{folder}/{sample_id:06d}.{field}", "rb", buffering=0) as file:
                sample[field] = file.read()
        return len(sample)

    return _loader(read, _shuffled(count, batch_size), workers)


def _webdataset(samples: SampleSet, buffer: int) -> Any:
    shuffles = {"shardshuffle": 100} if buffer else {"shardshuffle": False}
    source = webdataset.WebDataset(list(samples.shards) * PASSES, **shuffles)
    return source.shuffle(buffer, initial=buffer) if buffer else source


def _webdataset_bytes(samples: SampleSet, buffer: int, workers: int, batch_size: int) -> Iterator[int]:
    source = _webdataset(samples, buffer).map(len)
    return iter(DataLoader(source, batch_size=batch_size, num_workers=workers, collate_fn=sum))


def _webdataset_views(
    samples: SampleSet, transform: Callable[[Any], Any], workers: int, batch_size: int
) -> Iterator[Any]:
    crops = _webdataset(samples, SHUFFLE_BUFFER).map(lambda sample: transform(_pil(sample["jpg"])))
    return iter(DataLoader(crops, batch_size=batch_size, num_workers=workers))


def _pil(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")  # what ImageFolder does with a file


def _image_folder(samples: SampleSet, transform: Callable[[Any], Any], workers: int, batch_size: int) -> Iterator[Any]:
    folder = ImageFolder(str(samples.files), transform, is_valid_file=lambda path: path.endswith(".jpg"))
    sampler = RandomSampler(folder, replacement=True, num_samples=ENDLESS)
    return iter(DataLoader(folder, batch_size=batch_size, sampler=sampler, num_workers=workers))


def _decoded(photos: list[bytes], decoder: str, workers: int, batch_size: int) -> Iterator[int]:
    """Whole images by our decoder, from bytes that are in memory already."""

    def decode(sample_id: int) -> int:
        return len(Photo(photos[sample_id], decoder).pixels)

    return _loader(decode, _shuffled(len(photos), batch_size), workers)


def _stream(
    samples: SampleSet,
    views: Sequence[View],
    options: Mapping[str, Any],
    is_finished: bool,
    workers: int,
    batch_size: int,
) -> Iterator[Any]:
    """Our stream; `is_finished` adds what a training step does on its device, here on the CPU of the main process."""
    sizes: dict[str, Any] = {
        "global_batch_size": batch_size,
        "micro_batch_size": batch_size,
        "rank": 0,
        "world_size": 1,
    }
    stream = Stream(samples.dataset, views, **sizes, **ORDER, num_workers=workers, **options)
    return map(partial(_finish, stream), stream) if is_finished else iter(stream)


def _finish(stream: Stream, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = stream.finish(batch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for view in stream.views:
        pixels = batch[view.name]
        pixels = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
        batch[view.name] = pixels.sub_(mean).div_(std)
    return batch
