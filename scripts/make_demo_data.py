"""Make the demo data that ships inside the package: `pretrain/demo_data/`, at most 6 MB of real pictures.

    python scripts/make_demo_data.py                    # from ../shared/data into pretrain/demo_data

`grocery`: photos of the Grocery Store Dataset subset, shorter side 96 px, for pretraining and classification probes.
`chair`: renders of one chair with true masks, for a dense score. A render on white would be solved by "white is
background", a centred one by position and a single chair by its green, so each chair gets a hue, a size and a place at
random, on a random crop of a grocery photo: of a train photo in the train split, of a test photo in the test split.

Running it again with the same Pillow gives the same bytes: every choice is a hash of split and number, and the tars are
USTAR without times and owners. Not here: the downloads; the source folder is described in its own README.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.decode import open_image
from data_pipelines.errors import DataError
from data_pipelines.order import key, permutation
from data_pipelines.randomness import ViewRandom
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.views.kinds.images import ImageView, random_resized_crop

Sample = dict[str, bytes]  # field -> bytes, and "__key__" as bytes

SIZE = 96
PHOTO_QUALITY = 86
COMPOSITE_QUALITY = 90
MAX_TOTAL_BYTES = 6_000_000
TRAIN, TEST = 0, 1  # first part of every hash

NOTICE = """\
# Notices for the demo data

## grocery/ and the backgrounds of chair/

Photos from the Grocery Store Dataset, https://github.com/marcusklasson/GroceryStoreDataset (commit fc80ba9), see
M. Klasson, C. Zhang, H. Kjellström: "A Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels",
WACV 2019.

Changed: 640 train and 200 test photos of 20 coarse classes were selected, resized to a shorter side of 96 pixels and
encoded again as JPEG; for chair/, random crops of them were resized to 96 x 96 pixels and overlaid with a render.

The data set is under this licence:

    MIT License

    Copyright (c) 2019 Marcus Klasson

    Permission is hereby granted, free of charge, to any person obtaining a copy
    of this software and associated documentation files (the "Software"), to deal
    in the Software without restriction, including without limitation the rights
    to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
    copies of the Software, and to permit persons to whom the Software is
    furnished to do so, subject to the following conditions:

    The above copyright notice and this permission notice shall be included in all
    copies or substantial portions of the Software.

    THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
    IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
    FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
    AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
    LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
    OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
    SOFTWARE.

## chair/

Renders of the "chair" scene of the NeRF synthetic data release (Mildenhall et al., "NeRF: Representing Scenes as
Neural Radiance Fields for View Synthesis", ECCV 2020). The README of that release names the author of the model and its
licence: chair by 1DInc, CC0 (Creative Commons Zero, no rights reserved).

Changed: the renders were reduced in size, cropped to the chair, turned in hue, scaled and placed at random over the
photos named above; masks were made from their alpha channel.
"""


def grocery_samples(photos: Dataset) -> Iterator[Sample]:
    """All photos in the order of the source (interleaved over classes), resized."""
    for number in range(photos.num_samples):
        sample = photos.read(number)
        photo = open_image(sample["jpg"])
        scale = SIZE / min(photo.size)
        small = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
        yield {"__key__": sample["__key__"].encode(), "jpg": _jpeg(small, PHOTO_QUALITY), "cls": sample["cls"]}


def chair_samples(renders: Sequence[tuple[str, bytes]], photos: Dataset, split: int) -> Iterator[Sample]:
    """Each render over a crop of a photo of its own, with its mask: 0 background, 1 chair."""
    background = ImageView("background", SIZE, scale=(0.25, 1.0), ratio=(1.0, 1.0))
    photo_of = permutation(photos.num_samples, key(split)).tolist()
    for number, (name, render) in enumerate(renders):
        rng = ViewRandom(key(split, number))
        photo = open_image(photos.read(photo_of[number])["jpg"])
        pixels = random_resized_crop(photo, background, rng).permute(1, 2, 0).numpy().astype(np.float32)
        chair = _placed(Image.open(io.BytesIO(render), formats=["PNG"]), rng)  # (SIZE, SIZE, 4), premultiplied
        alpha = chair[..., 3:]
        composite = np.clip(np.rint(chair[..., :3] + pixels * (1 - alpha / 255)), 0, 255).astype(np.uint8)
        mask = (alpha[..., 0] >= 127.5).astype(np.uint8)
        yield {
            "__key__": name.encode(),
            "jpg": _jpeg(Image.fromarray(composite), COMPOSITE_QUALITY),
            "seg.png": _png(Image.fromarray(mask)),
        }


def _placed(render: Image.Image, rng: ViewRandom) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The chair cut out, its longer side scaled to 50..95 % of the picture, somewhere inside it."""
    # Premultiplied, since resizing straight alpha would bleed the invisible colour behind the edge.
    chair = _recoloured(render, rng.below(256)).convert("RGBa").crop(render.getchannel("A").getbbox())
    scale = SIZE * rng.uniform(0.5, 0.95) / max(chair.size)
    width, height = round(chair.width * scale), round(chair.height * scale)
    left, top = rng.below(SIZE - width + 1), rng.below(SIZE - height + 1)
    canvas = np.zeros((SIZE, SIZE, 4), np.float32)
    resized = chair.resize((width, height), Image.Resampling.BICUBIC)
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    return canvas


def _recoloured(render: Image.Image, turn: int) -> Image.Image:
    """The chair with its hues turned by turn / 256 of a circle."""
    hue, saturation, value = render.convert("RGB").convert("HSV").split()
    turned = Image.merge("HSV", (hue.point(lambda level: (level + turn) % 256), saturation, value)).convert("RGB")
    turned.putalpha(render.getchannel("A"))
    return turned


def _renders(archive: Path, split: str) -> list[tuple[str, bytes]]:
    """(key, PNG bytes) of the views of a split in the order of their number; depth and normal pictures are left out."""
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if name.startswith(f"{split}/") and name.count("_") == 1]
        names.sort(key=_view_number)
        found = []
        for name in names:
            member = tar.extractfile(name)
            assert member is not None, name
            found.append((f"{split}_{_view_number(name):03d}", member.read()))
    return found


def _view_number(name: str) -> int:
    return int(Path(name).stem.rpartition("_")[2])


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_split(folder: Path, split: str, samples: Sequence[Sample], num_shards: int) -> dict[str, Any]:
    """Write equal consecutive slices of `samples` as shards; what `dataset.json` says about them is returned."""
    per_shard = -(-len(samples) // num_shards)
    shards = []
    for number in range(num_shards):
        chosen = samples[number * per_shard : (number + 1) * per_shard]
        content = _tar(chosen)
        name = f"{split}-{number:06d}.tar"
        _write(folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"file": name, "samples": len(chosen), "bytes": len(content), "sha256": digest})
    return {"samples": len(samples), "shards": shards}


def _tar(samples: Sequence[Sample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            stem = sample["__key__"].decode()
            if "." in stem:
                raise DataError(f"key {stem!r} has a dot; the field name begins at the first dot")
            for field in sorted(sample.keys() - {"__key__"}):
                member = tarfile.TarInfo(f"{stem}.{field}")  # mtime, uid and gid are 0, owner names empty
                member.size, member.mode = len(sample[field]), 0o444
                tar.addfile(member, io.BytesIO(sample[field]))
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def make(source: Path, destination: Path) -> int:
    """Write both sets and the notice; returns the bytes written."""
    photos = {split: open_dataset(source / "photos_grocery" / f"{split}-*.tar") for split in ("train", "test")}
    grocery, chair = destination / "grocery", destination / "chair"
    for folder in (grocery, chair):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.tar*"):
            stale.unlink()

    described = photos["train"].description
    grocery_json = {
        "name": "grocery",
        "licence": "MIT, (c) 2019 Marcus Klasson (see ../NOTICE.md)",
        "origin": described["origin"],
        "upstream": described["upstream"],
        "changes": f"shorter side {SIZE} px (bicubic), JPEG quality {PHOTO_QUALITY}",
        "subset_rule": described["subset_rule"],
        "fields": {"jpg": "RGB photo", "cls": "class index in ASCII"},
        "classes": described["classes"],
        "splits": {
            "train": write_split(grocery, "train", list(grocery_samples(photos["train"])), 4),
            "test": write_split(grocery, "test", list(grocery_samples(photos["test"])), 1),
        },
    }

    archive = source / "nerf_synthetic" / "chair.tar"
    train = list(chair_samples(_renders(archive, "train"), photos["train"], TRAIN))
    test = list(chair_samples(_renders(archive, "val") + _renders(archive, "test"), photos["test"], TEST))
    scenes = json.loads((source / "nerf_synthetic" / "dataset.json").read_text())["scenes"]
    chair_json = {
        "name": "chair",
        "licence": "chair by 1DInc, CC0; photos behind it MIT, (c) 2019 Marcus Klasson (see ../NOTICE.md)",
        "origin": next(scene["origin"] for scene in scenes if scene["name"] == "chair"),
        "background_origin": described["origin"],
        "changes": f"composited at random scale and place on {SIZE} x {SIZE} crops of grocery photos of the same "
        f"split, JPEG quality {COMPOSITE_QUALITY}; test = val and test views",
        "fields": {"jpg": "RGB composite", "seg.png": "8-bit class index, alpha >= 0.5"},
        "classes": ["background", "chair"],
        "ignore_index": 255,
        "splits": {"train": write_split(chair, "train", train, 2), "test": write_split(chair, "test", test, 1)},
    }
    for folder, description in ((grocery, grocery_json), (chair, chair_json)):
        _write(folder / "dataset.json", (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())
    _write(destination / "NOTICE.md", NOTICE.encode())
    return sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())


def main() -> int:
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="make the demo data that ships inside the package")
    parser.add_argument(
        "--source", type=Path, default=repository.parent / "shared" / "data", help="folder of data sets"
    )
    parser.add_argument("--destination", type=Path, default=repository / "pretrain" / "demo_data")
    arguments = parser.parse_args()
    try:
        total = make(arguments.source, arguments.destination)
    except DataError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.destination}: {total} bytes")
    if total > MAX_TOTAL_BYTES:
        print(f"make_demo_data: {total} bytes exceed the limit of {MAX_TOTAL_BYTES}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
