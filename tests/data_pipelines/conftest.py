"""Shards to test with: tiny ones written on the spot, the demo data of the package, `../shared` where there is one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards import Dataset, open_dataset

REPOSITORY = Path(__file__).resolve().parents[2]

Members = Sequence[tuple[str, bytes]]


@pytest.fixture(autouse=True, scope="session")
def index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Indices of test shards go to a folder of their own, not to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETRAIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    def write(path: Path, members: Members) -> Path:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def tiny_dataset(tmp_path: Path, write_tar: Callable[[Path, Members], Path]) -> Callable[[Sequence[int]], Dataset]:
    """`tiny_dataset([3, 5])`: shards of 3 and 5 pictures of 8 x 8 random pixels, keyed by number, `cls` = number."""

    def make(counts: Sequence[int]) -> Dataset:
        rng, number = np.random.default_rng(0), 0
        for shard, count in enumerate(counts):
            members = []
            for _ in range(count):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(picture, "PNG")
                members += [(f"{number:05d}.png", picture.getvalue()), (f"{number:05d}.cls", str(number).encode())]
                number += 1
            write_tar(tmp_path / f"tiny-{shard:06d}.tar", members)
        return open_dataset(tmp_path / "tiny-*.tar")

    return make


@pytest.fixture(scope="session")
def demo_data() -> Path:
    return REPOSITORY / "pretrain" / "demo_data"


@pytest.fixture(scope="session")
def grocery(demo_data: Path) -> Dataset:
    return open_dataset(demo_data / "grocery" / "train-*.tar")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    return folder
