"""Scenes in every layout: the same cameras from all of them, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.radiance.scenes import Scene, find_scenes, read_scene, scene_name
from tests.analytic_scene import (
    FOCAL,
    photographs,
    png,
    write_blender,
    write_colmap,
    write_nerfstudio,
    write_npz,
    write_tar,
)

BALL = (0.5, -0.4, 0.6)
TAKEN = photographs(10, size=40, spheres=((BALL, 0.15, (0.9, 0.2, 0.1)),))

WRITERS: dict[str, Callable[[Path], Scene]] = {
    "blender": lambda folder: read_scene(write_blender(folder / "a", TAKEN)),
    "blender with val": lambda folder: read_scene(write_blender(folder / "a", TAKEN, num_val=2)),
    "nerfstudio": lambda folder: read_scene(write_nerfstudio(folder / "a", TAKEN)),
    "nerfstudio in axes of OpenCV": lambda folder: read_scene(
        write_nerfstudio(folder / "a", TAKEN, "opencv"), axes="opencv"
    ),
    "colmap": lambda folder: read_scene(write_colmap(folder / "a", TAKEN)),
    "colmap simple": lambda folder: read_scene(write_colmap(folder / "a", TAKEN, "SIMPLE_PINHOLE")),
    "npz": lambda folder: read_scene(write_npz(folder / "a.npz", TAKEN)),
    "tar": lambda folder: read_scene(write_tar(folder / "a.tar", write_blender(folder / "b", TAKEN))),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_read_scene__a_ball_is_where_its_camera_says(layout: str, tmp_path: Path) -> None:
    """The center of the ball, projected by the camera that was read, lies in the middle of its pixels."""
    scene = WRITERS[layout](tmp_path)
    assert scene.name == "a" and scene.up == "z" and len(scene.train) == (8 if scene.held_out else 10)
    for view in [*scene.train, *scene.held_out]:
        pixels, camera = scene.pixels(view, 400)
        ink = 255.0 - pixels[..., 1] if layout == "npz" else pixels[..., 3].astype(float)
        rows, columns = np.mgrid[:40, :40] + 0.5
        middle = [(columns * ink).sum() / ink.sum(), (rows * ink).sum() / ink.sum()]
        ((expected,), (depth,)) = camera.project(np.array([BALL]))
        assert depth > 0 and np.abs(expected - middle).max() < 0.2


def test_read_scene__all_layouts_give_the_same_cameras(tmp_path: Path) -> None:
    scenes = []
    for layout in WRITERS.keys() - {"blender with val"}:
        (tmp_path / layout).mkdir()
        scenes.append(WRITERS[layout](tmp_path / layout))
    for scene in scenes:
        assert len(scene.train) == 8 and len(scene.held_out) == 2
        for view, first in zip(scene.train, scenes[0].train, strict=True):
            np.testing.assert_allclose(view.camera.pose, first.camera.pose, atol=1e-6)
            assert (view.camera.fx, view.camera.cy) == pytest.approx((FOCAL * 40, 20))


def test_read_scene__up_turns_the_world(tmp_path: Path) -> None:
    folder = write_nerfstudio(tmp_path / "a", TAKEN)
    turned = read_scene(folder, up="y").train[0].camera
    point = np.array([0.1, 0.7, -0.3])  # y is up in the file: z here
    (pixel,), _ = turned.project(np.array([[-0.3, 0.1, 0.7]]))
    np.testing.assert_allclose(pixel, read_scene(folder).train[0].camera.project(point[None])[0][0])


def test_read_scene__held_out_are_those_of_val_else_every_eighth(tmp_path: Path) -> None:
    taken = photographs(20, size=8)
    scene = read_scene(write_blender(tmp_path / "a", taken, num_val=4))
    assert len(scene.train) == 16 and [view.name for view in scene.held_out] == [f"val/r_{n}.png" for n in range(4)]
    scene = read_scene(write_nerfstudio(tmp_path / "b", taken))
    assert [view.name for view in scene.held_out] == [f"images/{number:03d}.png" for number in (0, 8, 16)]
    named = {"train_filenames": ["images/000.png", "images/001.png"], "test_filenames": ["images/007.png"]}
    scene = read_scene(write_nerfstudio(tmp_path / "c", taken, **named))
    assert [view.name for view in (*scene.train, *scene.held_out)] == [
        f"images/{number:03d}.png" for number in (0, 1, 7)
    ]


def test_pixels__are_reduced_with_their_camera_and_colors_count_by_alpha(tmp_path: Path) -> None:
    folder = write_nerfstudio(tmp_path / "a", TAKEN)
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:, :, :3] = (0, 255, 0)  # below transparent parts, which nobody is to see
    pixels[::2, ::2] = (200, 100, 50, 255)
    (folder / "images" / "001.png").write_bytes(png(pixels))
    scene = read_scene(folder)
    small, camera = scene.pixels(scene.train[0], 20)
    assert small.shape == (20, 20, 4) and np.abs(small.astype(int) - (200, 100, 50, 64)).max() <= 2
    assert (camera.fx, camera.cx, camera.width) == pytest.approx((FOCAL * 20, 10, 20))
    assert scene.num_pixels(20) == 8 * 400


def test_digest__changes_with_a_picture_and_with_a_pose(tmp_path: Path) -> None:
    folder = write_nerfstudio(tmp_path / "a", TAKEN)
    first = read_scene(folder).digest
    (folder / "images" / "003.png").write_bytes(png(TAKEN[2].pixels))
    second = read_scene(folder).digest
    described = json.loads((folder / "transforms.json").read_text())
    described["frames"][3]["transform_matrix"] = described["frames"][4]["transform_matrix"]
    (folder / "transforms.json").write_text(json.dumps(described))
    assert len({first, second, read_scene(folder).digest}) == 3


def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    described = json.loads((folder / name).read_text())
    edit(described)
    (folder / name).write_text(json.dumps(described))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BLENDER_FAULTS = {
    "not json": (lambda s: (s / "transforms_train.json").write_text("{"), "transforms_train.json: not valid JSON: "),
    "no frames": (lambda s: change(s, "transforms_train.json", lambda d: d.pop("frames")), "frames is missing"),
    "no path": (
        lambda s: change(s, "transforms_train.json", lambda d: d["frames"][2].pop("file_path")),
        "transforms_train.json: frame 2 has no file_path",
    ),
    "no matrix": (
        lambda s: change(s, "transforms_train.json", lambda d: d["frames"][2].pop("transform_matrix")),
        "frame 2 (./train/r_2) has no transform_matrix",
    ),
    "scaled": (
        lambda s: change(s, "transforms_train.json", lambda d: d["frames"][1]["transform_matrix"][0].__setitem__(0, 9)),
        "transforms_train.json: frame 1 (./train/r_1): the rotation of the pose has the determinant ",
    ),
    "mask": (
        lambda s: change(s, "transforms_train.json", lambda d: d["frames"][1].update(mask_path="masks/1.png")),
        "frame 1 (./train/r_1) has a mask_path, which is not read; write the mask as alpha of the picture",
    ),
    "angle": (
        lambda s: change(s, "transforms_train.json", lambda d: d.update(camera_angle_x=39.6)),
        "camera_angle_x=39.6 is no angle of view in radians",
    ),
    "no focal": (
        lambda s: change(s, "transforms_train.json", lambda d: d.pop("camera_angle_x")),
        "neither fl_x nor camera_angle_x is given",
    ),
    "picture": (lambda s: (s / "train" / "r_1.png").unlink(), "frame 1 (./train/r_1): there is no picture "),
    "damaged": (lambda s: (s / "train" / "r_1.png").write_bytes(b"no png"), "train/r_1.png: not a JPEG or PNG or WEBP"),
    "outside": (
        lambda s: change(s, "transforms_train.json", lambda d: d["frames"][0].update(file_path="../secret")),
        "'../secret' lies outside of the scene",
    ),
    "twice": (
        lambda s: change(s, "transforms_train.json", lambda d: d.update(frames=d["frames"] * 2)),
        "frame 0 (./train/r_0) already; list each picture once",
    ),
    "too few": (
        lambda s: change(s, "transforms_train.json", lambda d: d.update(frames=d["frames"][:1])),
        "0 views to fit and 1 to hold out; a scene needs 3 or more",
    ),
}
NERFSTUDIO_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "fisheye": (
        {"camera_model": "OPENCV_FISHEYE"},
        "camera_model 'OPENCV_FISHEYE' is not supported, only pinholes are; undistort",
    ),
    "is fisheye": ({"is_fisheye": True}, "is_fisheye is not supported"),
    "distortion": ({"k1": 0.02}, "distortion k1=0.02 is not supported; undistort the pictures first"),
    "size": ({"w": 80}, "images/001.png has 40 x 40 pixels, its camera 80 x 40"),
    "no number": ({"fl_x": "50"}, "fl_x='50' is no number"),
    "focal": ({"fl_y": -1.0}, "a focal length of -1 pixels is not allowed"),
}


@pytest.mark.parametrize("case", BLENDER_FAULTS)
def test_blender__faults_are_named(case: str, tmp_path: Path) -> None:
    damage, said = BLENDER_FAULTS[case]
    folder = write_blender(tmp_path / "a", TAKEN)
    damage(folder)
    refused(folder, said)


@pytest.mark.parametrize("case", NERFSTUDIO_FAULTS)
def test_nerfstudio__faults_are_named(case: str, tmp_path: Path) -> None:
    facts, said = NERFSTUDIO_FAULTS[case]
    refused(write_nerfstudio(tmp_path / "a", TAKEN, **facts), said)


def test_nerfstudio__the_lens_of_a_frame_wins_over_that_of_the_file(tmp_path: Path) -> None:
    folder = write_nerfstudio(tmp_path / "a", TAKEN)
    change(folder, "transforms.json", lambda d: d["frames"][1].update(fl_x=33.0, cx=11.0))
    first, second = (view.camera for view in read_scene(folder).train[:2])
    assert (first.fx, first.cx, first.fy) == (33.0, 11.0, FOCAL * 40) and second.fx == FOCAL * 40


COLMAP_FAULTS = {
    "model": (
        ("cameras.txt", "PINHOLE", "OPENCV"),
        "cameras.txt line 3: camera model 'OPENCV' is not supported, SIMPLE_",
    ),
    "numbers": (("cameras.txt", "40 40", "40 x"), "is not 6 numbers"),
    "camera": (("images.txt", " 7 photo 003", " 9 photo 003"), "images.txt line 8: camera 9 is not in "),
    "words": (("images.txt", " 7 photo 000.png", ""), "images.txt line 2: 8 values, an image has 10"),
    "picture": (("images.txt", "photo 003.png", "photo 333.png"), "line 8: there is no picture "),
}


@pytest.mark.parametrize("case", COLMAP_FAULTS)
def test_colmap__faults_are_named(case: str, tmp_path: Path) -> None:
    (name, old, new), said = COLMAP_FAULTS[case]
    folder = write_colmap(tmp_path / "a", TAKEN)
    replace(folder / "sparse" / "0" / name, old, new)
    refused(folder, said)


@pytest.mark.parametrize("name", ["images.txt", "cameras.txt", "points3D.txt"])
def test_colmap__a_model_cut_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    """A copy that ended early, at any byte, between two pictures or within a number, trains on no part of a scene."""
    folder = write_colmap(tmp_path / "a", TAKEN[:3])
    path = folder / "sparse" / "0" / name
    if name == "points3D.txt":
        path.write_text(
            "# Number of points: 2, mean track length: 2\n"
            "4 1.0 2.0 3.0 9 9 9 0.1 1 2 2 1\n5 1.0 2.5 3.25 9 9 9 0.1 1 2 3 1\n"
        )
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1 if name != "cameras.txt" else whole.index(b"\n7") + 1
    read_scene(folder)
    for end in range(first, len(whole) - (name == "images.txt")):  # its last line is empty: nothing is lost with it
        path.write_bytes(whole[:end])
        with pytest.raises(DataError) as error:
            read_scene(folder)
        assert name in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 1])
    if name != "cameras.txt":
        num, noun = (2, "images") if name == "images.txt" else (1, "points")
        refused(folder, f"ends after {num} {noun}, and its '# Number of {noun}: {num + 1}' announces {num + 1}; ")


def test_colmap__points_of_a_picture_are_triples(tmp_path: Path) -> None:
    """Also of a file without COLMAP's own count of pictures, and of points."""
    folder = write_colmap(tmp_path / "a", TAKEN[:3])
    path = folder / "sparse" / "0" / "images.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:-1], "20.5 11.25 4 30.5 1"]) + "\n")
    refused(folder, "images.txt line 6: 5 values, the points of an image have 3 each: X Y POINT3D_ID; the file is cut")
    path.write_text("\n".join(lines[1:]) + "\n")
    (folder / "sparse" / "0" / "points3D.txt").write_text("4 1.0 2.0 3.0 9 9 9 0.1 1\n")
    refused(folder, "points3D.txt line 1: 9 values, a point has 8 and 2 for each image that shows it")


def test_colmap__a_quaternion_has_the_length_1(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "a", TAKEN)
    path = folder / "sparse" / "0" / "images.txt"
    lines = path.read_text().splitlines()
    words = lines[1].split(" ")
    lines[1] = " ".join([words[0], *(str(2 * float(word)) for word in words[1:5]), *words[5:]])
    path.write_text("\n".join(lines))
    refused(folder, "images.txt line 2: the quaternion has the length 2, that of a rotation is 1")


def test_colmap__points_are_read_and_turned_with_the_world(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "a", TAKEN)
    (folder / "sparse" / "0" / "points3D.txt").write_text("# points\n4 1.0 2.0 3.0 9 9 9 0.1 1 2\n")
    assert np.asarray(read_scene(folder).points).tolist() == [[1, 2, 3]]
    assert np.asarray(read_scene(folder, up="-y").points).tolist() == [[3, -1, -2]]


def test_colmap__a_binary_model_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "sparse" / "0").mkdir(parents=True)
    (tmp_path / "sparse" / "0" / "cameras.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"cameras\.bin is binary: run colmap model_converter with --output_type TXT"):
        find_scenes(tmp_path)


NPZ_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "lacks": ({"focal": None}, "has no array 'focal' but images, poses"),
    "count": ({"poses": np.zeros((3, 4, 4))}, "3 poses for 10 images"),
    "shape": ({"images": np.zeros((10, 8, 8))}, "images has the shape (10, 8, 8)"),
    "range": ({"images": np.full((10, 8, 8, 3), 255.0)}, "image 0: holds float64 in [255, 255]"),
    "focal": ({"focal": np.array(0.0)}, "focal=0.0 is no length in pixels"),
    "endless focal": ({"focal": np.array(np.inf)}, "focal=inf is no length in pixels"),
    "pose": ({"poses": np.zeros((10, 4, 4))}, "image 0: the last row of the pose is 0 0 0 0"),
}


@pytest.mark.parametrize("case", NPZ_FAULTS)
def test_npz__faults_are_named(case: str, tmp_path: Path) -> None:
    changed, said = NPZ_FAULTS[case]
    with np.load(write_npz(tmp_path / "a.npz", TAKEN)) as archive:
        arrays = {**archive, **changed}
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    refused(tmp_path / "a.npz", said)


def test_tar__damaged_or_without_a_scene(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    refused(tmp_path / "a.tar", "cannot be read as a tar")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("nothing")
    refused(write_tar(tmp_path / "b.tar", tmp_path / "b"), "holds no scene; a scene has transforms_train.json, ")


def refused(path: Path, said: str) -> None:
    with pytest.raises(DataError) as error:
        read_scene(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value) and "\n" not in str(error.value)


def test_find_scenes__itself_or_what_lies_in_it(tmp_path: Path) -> None:
    write_blender(tmp_path / "sub" / "b", TAKEN)
    write_npz(tmp_path / "sub" / "a.npz", TAKEN)
    (tmp_path / "sub" / "notes").mkdir()
    assert [path.name for path in find_scenes(tmp_path / "sub")] == ["a.npz", "b"]
    assert find_scenes(tmp_path / "sub" / "b") == [tmp_path / "sub" / "b"]
    shutil.copytree(tmp_path / "sub" / "b", tmp_path / "sub" / "a")
    with pytest.raises(DataError, match=r"a and a\.npz are both called a; rename one"):
        find_scenes(tmp_path / "sub")
    with pytest.raises(DataError, match="is no scene and holds none; a scene has transforms_train"):
        find_scenes(tmp_path / "sub" / "notes")
    with pytest.raises(DataError, match=r"no such file or folder of scenes: .*did you mean 'sub'"):
        find_scenes(tmp_path / "subb")


def test_scene_name__has_no_dots(tmp_path: Path) -> None:
    assert scene_name(tmp_path / "my chair.v2.tar") == "my_chair_v2"


def test_read_scene__real_ones(shared_data: Path) -> None:
    scene = read_scene(shared_data / "nerf_synthetic" / "chair.tar")
    assert (len(scene.train), len(scene.held_out), scene.layout) == (100, 7, "blender")
    assert scene.train[0].camera.fx == pytest.approx(222.22, abs=0.01)
    scene = read_scene(shared_data / "nerf_synthetic" / "lego.tar")
    assert (len(scene.train), len(scene.held_out)) == (90, 5)
    distances = [np.linalg.norm(view.camera.position) for view in scene.train]
    assert min(distances) == pytest.approx(4.031, abs=0.001) == max(distances)
    picture, _ = scene.pixels(scene.train[0], 100)
    assert Image.fromarray(picture).size == (100, 100)
