"""The maker: bit-identical crops, aligned maps, overlaps that hold, values that survive, one line for what is wrong."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.decode import decode_array, decode_image, decode_mask, open_image
from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.order import key
from data_pipelines.randomness import ViewRandom, sample_seed
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.views.kinds.images import random_resized_crop
from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.photometric import NUM_PARAMS, Photometric, finish, reference
from data_pipelines.views.specs import views_from

JITTER = {"jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "blur_p": 0.5}


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def saved(**arrays: np.ndarray) -> bytes:
    """An npz of the arrays, or an npy of the one called `npy`."""
    file = io.BytesIO()
    if "npy" in arrays:
        np.save(file, arrays["npy"])
    else:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def maker(specs: Sequence[dict[str, Any]], fields: Sequence[str], **settings: Any) -> ViewMaker:
    return ViewMaker(views_from(specs), frozenset(fields), **settings)


@pytest.fixture(scope="module")
def scene() -> dict[str, bytes]:
    """A picture of 60 x 80 whose red names the place (2 levels per column, 1 per row), and maps of that red."""
    rows, cols = np.mgrid[:60, :80]
    red = (2 * cols + rows).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80), np.uint8)
    picture = np.stack([red, noise, noise.T.reshape(60, 80)], axis=-1)
    half = red[::2, ::2]
    return {
        "png": encoded(picture),
        "seg.png": encoded(red),
        "depth.png": encoded(red.astype(np.uint16) * 100),
        "half.png": encoded(half),
        "other.png": encoded(red[:40]),
        "bands.npy": saved(npy=np.stack([red.astype(np.uint16) * k for k in range(1, 6)])),
        "cls": b"7",
    }


def test_view_maker__image_views_are_bit_for_bit_random_resized_crops(grocery: Dataset) -> None:
    """The crops of one view come one after the other from its own generator, whatever else is asked for."""
    specs = [
        {"name": "global", "size": 48, "count": 2, "scale": [0.3, 1.0], "photometric": JITTER, "return_box": True},
        {"name": "local", "size": 24, "count": 3, "scale": [0.05, 0.3]},
        {"name": "one", "size": 8, "hflip": 0},
    ]
    views = views_from(specs)
    make = ViewMaker(views, grocery.fields)
    for sample_id in range(5):
        sample, seed = grocery.read(sample_id), sample_seed(9, 2, sample_id)
        made, image = make(sample, seed), open_image(sample["jpg"])
        for number, view in enumerate(views):
            rng = ViewRandom(key(number, base=seed))
            crops = torch.stack([random_resized_crop(image, view, rng) for _ in range(view.times or 1)])
            assert torch.equal(made[view.name], crops if view.times else crops[0])


def test_view_maker__same_sample_same_views_in_any_order(grocery: Dataset) -> None:
    make = maker([{"name": "v", "size": 24, "count": 2, "photometric": JITTER}], ["jpg"])
    copy = pickle.loads(pickle.dumps(make))  # what a spawned worker gets
    first = [make(grocery.read(i), i) for i in range(6)]
    again = {i: copy(grocery.read(i), i) for i in reversed(range(6))}
    for i in range(6):
        assert all(torch.equal(first[i][name], again[i][name]) for name in ("v", "v.photometric"))
    assert not torch.equal(first[0]["v"], make(grocery.read(0), 1)["v"])


def test_collate__shapes_types_and_order(grocery: Dataset) -> None:
    specs = [
        {"name": "global", "size": 32, "count": 2, "return_box": True, "photometric": JITTER},
        {"name": "one", "size": 16, "return_box": True, "photometric": JITTER},
        {"name": "label", "kind": "label"},
    ]
    make = maker(specs, ["jpg", "cls"])
    samples = [make(grocery.read(i), i) for i in range(3)]
    batch = make.collate(samples)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "global": ((2, 3, 3, 32, 32), torch.uint8),
        "global.box": ((2, 3, 5), torch.float32),
        "global.photometric": ((2, 3, NUM_PARAMS), torch.float32),
        "one": ((3, 3, 16, 16), torch.uint8),
        "one.box": ((3, 5), torch.float32),
        "one.photometric": ((3, NUM_PARAMS), torch.float32),
        "label": ((3,), torch.int64),
    }
    assert all(t.is_contiguous() for t in batch.values())
    assert torch.equal(batch["global"][1, 2], samples[2]["global"][1])
    assert batch["label"].tolist() == [int(grocery.read(i)["cls"]) for i in range(3)]
    finished = finish(batch, make.views)
    assert finished["global"].dtype == torch.float32 and "one.photometric" not in finished


RANKS: tuple[tuple[dict[str, Any], dict[str, tuple[int, ...]]], ...] = (
    (
        {"size": 8, "return_box": True, "photometric": JITTER},
        {"v": (3, 8, 8), "v.box": (5,), "v.photometric": (NUM_PARAMS,)},
    ),
    ({"size": 8, "photometric": {**JITTER, "mode": "reference"}}, {"v": (3, 8, 8)}),
    ({"kind": "points", "num_points": 4}, {"v": (4, 3)}),
    ({"kind": "volume", "size": [4, 3, 2], "return_size": True}, {"v": (1, 4, 3, 2), "v.size": (3,)}),
)


@pytest.mark.parametrize("count", [None, 1, 2])
@pytest.mark.parametrize(("spec", "shapes"), RANKS, ids=["image", "reference", "points", "volume"])
def test_count__a_view_that_states_one_has_a_dimension_of_it_also_when_it_is_1(
    spec: dict[str, Any], shapes: dict[str, tuple[int, ...]], count: int | None, scene: dict[str, bytes]
) -> None:
    sample = scene | {
        "points.npy": saved(npy=np.random.default_rng(0).random((9, 3))),
        "volume.npy": saved(npy=np.zeros((5, 5, 5), np.uint8)),
    }
    make = maker([{"name": "v", **spec} | ({} if count is None else {"count": count})], list(sample))
    batch = make.collate([make(sample, seed) for seed in range(3)])
    shown = () if count is None else (count,)
    assert {name: tuple(entry.shape) for name, entry in batch.items()} == {
        name: (*shown, 3, *shape) for name, shape in shapes.items()
    }
    if count is not None:
        (alone,) = views_from([{"name": "v", **spec}])
        first = ViewMaker([alone], frozenset(sample))(sample, 1)
        assert all(torch.equal(batch[name][0, 1], entry) for name, entry in first.items() if name != "v.photometric")
        assert alone.times is None


@pytest.mark.parametrize("resampler", ["pil", "torch"])
def test_same_crop_as__masks_show_the_pixels_of_the_image(scene: dict[str, bytes], resampler: str) -> None:
    """Red of a crop minus that of its map: at most the distance of a pixel's centre to the nearest stored one."""
    nearest: dict[str, Any] = {"resize": "nearest", "same_crop_as": "image"}
    specs = [
        {"name": "image", "size": 40, "count": 2, "scale": [0.2, 0.6]},
        {"name": "seg", "size": 40, "field": "seg.png", **nearest},
        {"name": "depth", "size": 20, "field": "depth.png", **nearest},
        {"name": "half", "size": 40, "field": "half.png", **nearest},
        {"name": "large", "size": 80, "same_crop_as": "image"},
        {"name": "bands", "size": 40, "field": "bands.npy", "channels": [4, 0], "same_crop_as": "image"},
    ]
    make = maker(specs, list(scene), resampler=resampler)
    for seed in range(25):
        made = make(scene, seed)
        assert (made["seg"].dtype, made["depth"].dtype, made["bands"].dtype) == (
            torch.uint8,
            torch.uint16,
            torch.uint16,
        )
        inside = (..., slice(3, -3), slice(3, -3))  # at the border PIL sees the pixels beside the crop, torch does not
        red, seg, depth, half, large, bands = (made[s["name"]].int() for s in specs)
        assert bool((red[:, 0] - seg[:, 0]).abs()[inside].max() <= 2)
        assert bool((depth % 100 == 0).all()) and bool((depth[:, 0] // 100 - seg[:, 0, 1::2, 1::2]).abs().max() <= 3)
        assert bool((half[:, 0] - seg[:, 0]).abs().max() <= 6)
        assert bool((large[:, 0, 1::2, 1::2] - red[:, 0]).abs()[inside].max() <= 3)
        assert bands.shape == (2, 2, 40, 40) and bool((bands[:, 1] - red[:, 0]).abs()[inside].max() <= 1)
        assert bool((bands[:, 0] - 5 * bands[:, 1]).abs().max() <= 5)


def test_same_crop_as__camvid_of_shared_data(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "camvid" / "val-000000.tar")
    specs = [
        {"name": "image", "size": 96},
        {"name": "seg", "size": 96, "field": "seg.png", "resize": "nearest", "same_crop_as": "image"},
    ]
    make = ViewMaker(views_from(specs), dataset.fields)
    for i in range(3):
        made, classes = make(dataset.read(i), i), decode_mask(dataset.read(i)["seg.png"])
        assert made["seg"].shape == (1, 96, 96) and set(made["seg"].unique().tolist()) <= set(
            np.unique(classes).tolist()
        )


def test_same_crop_as__another_aspect_is_a_damaged_sample(scene: dict[str, bytes]) -> None:
    specs = [
        {"name": "image", "size": 40},
        {"name": "seg", "size": 40, "field": "other.png", "resize": "nearest", "same_crop_as": "image"},
    ]
    for scaled in (False, True):
        with pytest.raises(CorruptSampleError, match=r"^field other.png: 80 x 40 pixels do not show the same frame"):
            maker(specs, list(scene), scaled=scaled)(scene, 0)
    photos = [{"name": "a", "size": 9}, {"name": "b", "size": 9, "field": "other.png", "same_crop_as": "a"}]
    with pytest.raises(CorruptSampleError, match=r"^field other.png: 80 x 40 pixels do not show the same frame"):
        maker(photos, list(scene), scaled=True)(scene, 0)


def boxes_of(made: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """(count, 4) edges."""
    left, top, width, height = made[f"{name}.box"].reshape(-1, 5)[:, :4].unbind(1)
    return torch.stack([left, top, left + width, top + height], 1).numpy().astype(float)


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_overlap_with__holds_for_every_pair(scene: dict[str, bytes], share: float) -> None:
    specs = [
        {"name": "a", "size": 8, "scale": [0.05, 0.4], "count": 2, "return_box": True},
        {"name": "b", "size": 8, "scale": [0.05, 0.4], "count": 2, "return_box": True}
        | {"overlap_with": "a", "min_overlap": share},
    ]
    make = maker(specs, ["png"])
    for seed in range(100):
        made = make(scene, seed)
        for a, b in zip(boxes_of(made, "a"), boxes_of(made, "b"), strict=True):
            sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            smaller = min(np.prod(box[2:] - box[:2]) for box in (a, b))
            assert sides.min() > 0 and sides.prod() >= share * smaller - 1e-6
            assert b.min() >= 0 and b.max() <= 1 + 1e-6


def test_return_box__says_where_the_pixels_are(scene: dict[str, bytes]) -> None:
    pixels = decode_image(scene["png"])
    make = maker([{"name": "v", "size": 32, "return_box": True}], ["png"])
    for seed in range(30):
        made = make(scene, seed)
        left, top, width, height, flipped = made["v.box"].tolist()
        box = [round(v) for v in (left * 80, top * 60, (left + width) * 80, (top + height) * 60)]
        expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC, box=tuple(box))
        crop = made["v"].permute(1, 2, 0).numpy()
        assert np.array_equal(crop[:, ::-1] if flipped else crop, np.asarray(expected))


def test_crops__do_not_depend_on_other_requests(scene: dict[str, bytes]) -> None:
    plain = maker([{"name": "v", "size": 32, "count": 2}], ["png"])
    rich = maker([{"name": "v", "size": 32, "count": 2, "return_box": True, "photometric": JITTER}], ["png"])
    for seed in range(10):
        assert torch.equal(plain(scene, seed)["v"], rich(scene, seed)["v"])


def test_photometric__reference_mode_changes_pixels_in_the_worker(grocery: Dataset) -> None:
    spec = {**JITTER, "mode": "reference"}
    make = maker([{"name": "v", "size": 32, "count": 2, "photometric": spec}], ["jpg"])
    plain = maker([{"name": "v", "size": 32, "count": 2}], ["jpg"])
    made, before = make(grocery.read(0), 5), plain(grocery.read(0), 5)["v"]
    assert made.keys() == {"v"} and made["v"].dtype == torch.uint8 and not torch.equal(made["v"], before)
    rng = ViewRandom(key(0, 1, base=5))
    expected = [reference(crop, Photometric.from_mapping(spec), rng) for crop in before]
    assert torch.equal(made["v"], torch.stack(expected))


def test_arrays__multispectral_chip_of_shared_data(shared_data: Path) -> None:
    data = (shared_data / "multispectral_sen1floods11" / "spain_7370579.npz").read_bytes()
    whole = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0, "field": "npz"}
    specs: list[dict[str, Any]] = [
        {"name": "s2", "size": 512, "array": "s2", **whole},
        {"name": "label", "size": 512, "array": "label", "field": "npz", "resize": "nearest", "same_crop_as": "s2"},
        {"name": "crop", "size": 64, "array": "s2", "channels": [3, 2, 1], "field": "npz", "count": 2},
        {"name": "radar", "size": 64, "array": "s1", "field": "npz", "same_crop_as": "crop"},
    ]
    made = maker(specs, ["npz"])({"npz": data}, 3)
    assert made["s2"].dtype == torch.uint16 and made["label"].dtype == torch.int8
    assert np.array_equal(made["s2"].numpy(), decode_array(data, "s2"))
    assert np.array_equal(made["label"][0].numpy(), decode_array(data, "label"))
    assert made["crop"].shape == (2, 3, 64, 64) and made["crop"].dtype == torch.uint16
    assert made["radar"].shape == (2, 2, 64, 64) and made["radar"].dtype == torch.float32


def test_arrays__plain_npy_is_the_default_when_there_is_no_photo(scene: dict[str, bytes]) -> None:
    sample = {"npy": saved(npy=np.full((5, 30, 20), 9, np.uint8))}
    made = maker([{"name": "v", "size": 8}], ["npy", "cls"])(sample, 0)
    assert made["v"].shape == (5, 8, 8) and (made["v"] == 9).all()


def test_arrays__pose_as_stored(scene: dict[str, bytes]) -> None:
    pose = np.arange(16, dtype=np.float32).reshape(4, 4)
    make = maker([{"name": "pose", "kind": "array", "field": "pose.npy"}], ["pose.npy"])
    batch = make.collate([make({"pose.npy": saved(npy=pose * k)}, 0) for k in (1, 2)])
    assert torch.equal(batch["pose"], torch.from_numpy(np.stack([pose, 2 * pose])))
    with pytest.raises(DataError, match=r"view 'pose' cannot be stacked: .* \(2,\) torch.float64 and \(3,\) torch"):
        make.collate([make({"pose.npy": saved(npy=np.zeros(k))}, 0) for k in (2, 3)])


def test_scaled__only_when_no_crop_would_be_enlarged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    sample = {"jpg": file.getvalue()}
    small = {"name": "v", "size": 64, "scale": [0.5, 1.0]}
    large = {"name": "w", "size": 500, "scale": [0.5, 1.0]}
    for specs, is_changed in (([small], True), ([small, large], False)):
        exact, scaled = maker(specs, ["jpg"])(sample, 1), maker(specs, ["jpg"], scaled=True)(sample, 1)
        difference = (exact["v"].float() - scaled["v"].float()).abs()
        assert (difference.max() > 0) == is_changed and difference.mean() < 10


@pytest.mark.parametrize("decoder", ["pil", "simplejpeg"])
def test_view_maker__decoders_and_their_names(grocery: Dataset, decoder: str) -> None:
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    make = maker([{"name": "v", "size": 40, "count": 2}], ["jpg"], decoder=decoder)
    auto = maker([{"name": "v", "size": 40, "count": 2}], ["jpg"])
    assert make.decoder == decoder and auto.decoder in ("pil", "simplejpeg")
    assert torch.equal(make(grocery.read(0), 1)["v"], auto(grocery.read(0), 1)["v"])
    with pytest.raises(CorruptSampleError, match=r"^field jpg: cannot decode image of 2000 bytes"):
        make({"jpg": grocery.read(0)["jpg"][:2000]}, 1)
    with pytest.raises(CorruptSampleError, match=r"^field jpg: not a JPEG or PNG or WEBP image"):
        make({"jpg": b"<html>"}, 1)


def test_view_maker__pickles_are_not_read() -> None:
    make = maker([{"name": "a", "kind": "array", "field": "x.npy"}], ["x.npy"])
    for data in (pickle.dumps([1]), saved(npy=np.array([{"a": 1}], dtype=object))):
        with pytest.raises(CorruptSampleError, match=r"^field x.npy: ") as caught:
            make({"x.npy": data}, 0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            [{"name": "v", "size": 8, "field": "jgp"}],
            "view 'v': no field jgp in every sample; every sample has cls",
        ),
        ([{"name": "v", "size": 8, "field": "jgp"}], "did you mean 'jpg'?"),
        ([{"name": "v", "size": 8, "field": "cls"}], "field 'cls' does not end in jpg, jpeg, png, webp, npy, npz"),
        ([{"name": "v", "size": 8, "field": "jpg", "resize": "nearest"}], "field 'jpg' does not end in png, npy, npz"),
        ([{"name": "v", "size": 8, "resize": "nearest"}], "resize='nearest' needs field"),
        ([{"name": "v", "size": 8, "channels": [0]}], "channels and array are for npy and npz fields; field is 'jpg'"),
        ([{"name": "v", "size": 8, "field": "npz", "photometric": {}}], "photometric is for RGB photos"),
        ([{"name": "p", "kind": "points", "num_points": 4, "field": "jpg"}], "does not end in npy, npz"),
        ([{"name": "l", "kind": "label", "field": "class"}], "no field class in every sample"),
    ],
)
def test_view_maker__refuses_fields(specs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        maker(specs, ["jpg", "cls", "npz"])


def test_view_maker__refuses_settings() -> None:
    with pytest.raises(DataError, match=r"decoder='simplejpg' is not allowed; .* did you mean 'simplejpeg'"):
        maker([{"name": "v", "size": 8}], ["jpg"], decoder="simplejpg")
    with pytest.raises(DataError, match="resampler='cv2' is not allowed; it is one of pil, torch"):
        maker([{"name": "v", "size": 8}], ["jpg"], resampler="cv2")


def test_view_maker__missing_channels_and_arrays_are_damaged_samples() -> None:
    sample = {"npz": saved(a=np.zeros((2, 9, 9), np.uint8), b=np.zeros(3))}
    for spec, message in (
        ({"array": "a", "channels": [2]}, "there is no channel 2; the array has 2"),
        ({"array": "c"}, "npz has no array 'c'; it has a, b"),
        ({}, "npz has several arrays, a, b, and nothing says which to read"),
        ({"array": "b"}, r"array of shape (3,) is no picture (H, W) or (C, H, W)"),
    ):
        with pytest.raises(CorruptSampleError, match=re.escape(f"field npz: {message}")):
            maker([{"name": "v", "size": 4, "field": "npz", **spec}], ["npz"])(sample, 0)


def test_volume__reads_a_radiance_grid_under_its_own_name() -> None:
    grid = np.random.default_rng(0).random((4, 3, 5, 2)).astype(np.float16)
    spec = {"name": "grid", "kind": "volume", "size": (4, 4, 4), "return_size": True}
    entries = maker([spec], ["json", "grid.npy"])({"json": b"{}", "grid.npy": saved(npy=grid)}, 1)
    assert entries["grid"].dtype == torch.float16 and entries["grid.size"].tolist() == [3, 4, 2]
    assert not entries["grid"][:, 3:].any() and not entries["grid"][..., 2:].any()
