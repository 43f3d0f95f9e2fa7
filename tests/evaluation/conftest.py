"""Golden inputs, a tiny backbone, and small labelled shards written on the spot."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from backbones.io import save_backbone
from backbones.registry import create_backbone
from data_pipelines.decode import decode_image
from data_pipelines.shards.dataset import Dataset, open_dataset
from evaluation.data import DepthMaps, EvaluationData, LabelMaps
from evaluation.extraction.images import Dense, Pooled
from evaluation.protocol import LABELS

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE_PX = 16  # of the tiny images
TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(autouse=True, scope="session")
def index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REPOSITORY / "tests/golden/evaluation.json").read_text())
    return content


@pytest.fixture(scope="session")
def golden_splits(golden: dict[str, Any]) -> tuple[Pooled, Pooled]:
    """(train, test) of block A in float64; the recipe is in the golden file's `_about`."""

    def split(num_rows: int, phase: float) -> Pooled:
        i, j = np.meshgrid(np.arange(num_rows), np.arange(golden["A_features"]["dim"]), indexing="ij")
        labels = (7 * i[:, 0] + i[:, 0] // 3) % 4
        x = (
            np.sin(0.37 * (i + 1) * (j + 1) + phase)
            + 0.55 * np.cos(2 * math.pi * (labels[:, None] + 1) * (j + 1) / 4)
            + 0.2 * np.cos(1.7 * (i + 1) + 0.9 * j)
        )
        return Pooled(cls=None, patch_mean=torch.from_numpy(x), labels=torch.from_numpy(labels))

    return split(golden["A_features"]["n_train"], 0.0), split(golden["A_features"]["n_test"], 0.5)


@pytest.fixture(scope="session")
def golden_patches() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Patches (6, 8, 10) of block E_ncut, and which of them (6, 8) are of the object."""
    y, x, c = np.meshgrid(np.arange(6), np.arange(8), np.arange(10), indexing="ij")
    is_object = (y >= 2) & (y <= 4) & (x >= 3) & (x <= 6)
    own = np.where(is_object, np.cos(0.9 * (c + 1)), np.sin(0.9 * (c + 1)))
    return own + 0.8 * np.sin(1.3 * (c + 1) * (x + 1) + 0.7 * y * (c + 1)), is_object[..., 0]


@pytest.fixture(scope="session")
def demo_data() -> Path:
    return REPOSITORY / "pretrain" / "demo_data"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(seed=0, edit=None, **options)`: directory with a random one-block ViT on 16 px images, patch 8."""

    def make(seed: int = 0, edit: Callable[[dict[str, Tensor]], None] | None = None, **options: Any) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            backbone = create_backbone(
                "vit_tiny_patch16_224", image_size=SIZE_PX, patch_size=8, options={**TINY, **options}
            )
        tensors = {name: tensor.clone() for name, tensor in backbone.timm_state_dict().items()}
        if edit is not None:
            edit(tensors)
        directory = tmp_path / f"checkpoint-{len(list(tmp_path.glob('checkpoint-*')))}"
        directory.mkdir()
        save_backbone(directory / "backbone.safetensors", tensors, backbone.spec)
        return directory

    return make


@pytest.fixture(scope="session")
def png() -> Callable[[npt.NDArray[Any]], bytes]:
    def encode(pixels: npt.NDArray[Any]) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_shards() -> Callable[[Path, str, Sequence[Mapping[str, bytes]]], None]:
    """`write_shards(root, split, samples)`: one tar of samples given as field -> bytes."""

    def write(root: Path, split: str, samples: Sequence[Mapping[str, bytes]]) -> None:
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / f"{split}-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in enumerate(samples):
                for field, content in sample.items():
                    member = tarfile.TarInfo(f"{split}{number:04d}.{field}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    return write


@pytest.fixture
def colours(
    tmp_path: Path, png: Callable[[npt.NDArray[Any]], bytes], write_shards: Callable[..., None]
) -> EvaluationData:
    """Three classes of noisy one-coloured images: 60 train, 23 test."""
    rng = np.random.default_rng(0)
    root = tmp_path / "colours"
    for split, count in (("train", 60), ("test", 23)):
        samples = []
        for number in range(count):
            picture = rng.integers(0, 90, (SIZE_PX, SIZE_PX, 3), np.uint8)
            picture[:, :, number % 3] += 120
            samples.append({"png": png(picture), "cls": str(number % 3).encode()})
        write_shards(root, split, samples)
    (root / "dataset.json").write_text(json.dumps({"classes": ["red", "green", "blue"]}))
    return EvaluationData("colours", root)


@pytest.fixture
def noise(
    tmp_path: Path, png: Callable[[npt.NDArray[Any]], bytes], write_shards: Callable[..., None]
) -> EvaluationData:
    """Noise, and classes that say nothing of it, so that a score is chance and shows each image: 60 train, 23 test."""
    rng = np.random.default_rng(0)
    root = tmp_path / "noise"
    for split, count in (("train", 60), ("test", 23)):
        pictures = rng.integers(0, 256, (count, SIZE_PX, SIZE_PX, 3), np.uint8)
        samples = [{"png": png(one), "cls": str(number % 3).encode()} for number, one in enumerate(pictures)]
        write_shards(root, split, samples)
    (root / "dataset.json").write_text(json.dumps({"classes": ["red", "green", "blue"]}))
    return EvaluationData("noise", root)


@pytest.fixture
def halves(
    tmp_path: Path, png: Callable[[npt.NDArray[Any]], bytes], write_shards: Callable[..., None]
) -> EvaluationData:
    """Bright squares of 8 px on dark ground with their masks at 24 x 20 (other than the image): 12 train, 7 test."""
    rng = np.random.default_rng(1)
    root = tmp_path / "halves"
    for split, count in (("train", 12), ("test", 7)):
        samples = []
        for _ in range(count):
            picture = rng.integers(0, 60, (SIZE_PX, SIZE_PX, 3), np.uint8)
            row, col = rng.integers(0, 2, 2)
            picture[8 * row : 8 * row + 8, 8 * col : 8 * col + 8] += 180
            mask = np.zeros((24, 20), np.uint8)
            mask[12 * row : 12 * row + 12, 10 * col : 10 * col + 10] = 1
            mask[0] = 255
            samples.append({"png": png(picture), "seg.png": png(mask)})
        write_shards(root, split, samples)
    (root / "dataset.json").write_text(json.dumps({"classes": ["ground", "square"], "ignore_index": 255}))
    return EvaluationData("halves", root)


class StoredMaps:
    """Stands in for a `Dataset` of masks that were never written to disk."""

    def __init__(self, masks: Sequence[npt.NDArray[Any]], encode: Callable[[npt.NDArray[Any]], bytes]) -> None:
        self._masks, self._encode = masks, encode
        self.num_samples = len(masks)

    def read(self, sample_idx: int) -> dict[str, Any]:
        return {"__key__": f"k{sample_idx}", "seg.png": self._encode(self._masks[sample_idx])}


@pytest.fixture
def dense(png: Callable[[npt.NDArray[Any]], bytes]) -> Callable[..., Dense]:
    """`dense(patches, masks, num_classes, ignore_index=255, sequences={})` as a head gets it."""

    def make(
        patches: npt.NDArray[Any],
        masks: Sequence[npt.NDArray[Any]],
        num_classes: int,
        ignore_index: int | None = 255,
        sequences: dict[str, str] | None = None,
    ) -> Dense:
        stored: Any = StoredMaps(masks, png)
        maps = LabelMaps(stored, num_classes=num_classes, ignore_index=ignore_index, sequences=sequences or {})
        return Dense(patches.astype(np.float16), maps)

    return make


class PickedSamples:
    """Some samples of a `Dataset`, for tests that have no time for all of them."""

    def __init__(self, dataset: Dataset, numbers: Sequence[int]) -> None:
        self._dataset, self._numbers = dataset, numbers
        self.num_samples = len(numbers)

    def read(self, sample_idx: int) -> dict[str, Any]:
        return self._dataset.read(self._numbers[sample_idx])

    def where(self, sample_idx: int) -> str:
        return self._dataset.where(self._numbers[sample_idx])

    def require_field(self, *candidates: str) -> str:
        return self._dataset.require_field(*candidates)


@pytest.fixture
def pixel_patches(shared_data: Path) -> Callable[..., Dense[Any]]:
    """`pixel_patches(set, split, numbers, grid)`: real images, whose tokens are 4 x 4 colors, and their labels."""

    def make(name: str, split: str, numbers: Sequence[int], grid: tuple[int, int]) -> Dense[Any]:
        description = json.loads((shared_data / name / "dataset.json").read_text())
        samples: Any = PickedSamples(open_dataset(str(shared_data / name / f"{split}-*.tar")), numbers)
        sequences = description["splits"][split].get("sequences", {})
        of_key = {key: sequence for sequence, keys in sequences.items() for key in keys}
        labels: LabelMaps | DepthMaps
        if "classes" in description:
            num_classes = len(description["classes"])
            ignored = description["ignore_index"]
            labels = LabelMaps(samples, num_classes=num_classes, ignore_index=ignored, sequences=of_key)
        else:
            labels = DepthMaps(samples, label=LABELS["depth.png"], scale=0.001, sequences=of_key)
        tokens = []
        for number in range(len(numbers)):
            image = Image.fromarray(decode_image(samples.read(number)["jpg"]))
            pixels = np.asarray(image.resize((4 * grid[1], 4 * grid[0]), Image.Resampling.BICUBIC)) / 255 - 0.5
            tokens.append(pixels.reshape(grid[0], 4, grid[1], 4, 3).swapaxes(1, 2).reshape(*grid, 48))
        return Dense(np.stack(tokens).astype(np.float16), labels)

    return make
