"""Scenes to shards: what is written, what is left out, and that nothing is fitted twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.inspection.verify import verify
from data_pipelines.radiance import fit
from data_pipelines.radiance.make import Writing, make_grids
from data_pipelines.radiance.settings import FitSettings
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.worker_pool import run_jobs
from tests.analytic_scene import SPHERES, photographs, write_blender, write_colmap, write_nerfstudio

ROOT = Path(__file__).parents[2]
FAST = FitSettings(resolution=16, steps=60, rays=128, bound=1.2)
BOXED = FitSettings(resolution=16, steps=60, rays=128, box=(-1.2, -1.2, -1.2, 1.2, 1.2, 0.0))
KEEP_ALL = Writing(min_psnr=0.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small scenes in three layouts."""
    folder = tmp_path_factory.mktemp("scenes")
    write_blender(folder / "a", photographs(8, size=16), num_val=2)
    write_nerfstudio(folder / "b", photographs(8, size=16, spheres=SPHERES[:1]))
    write_colmap(folder / "c", photographs(8, size=16, spheres=SPHERES[1:]))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "radiance"


def samples(dataset: Dataset) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    read = (dataset.read(number) for number in range(dataset.num_samples))
    return {sample["__key__"]: (np.load(io.BytesIO(sample["grid.npy"])), json.loads(sample["json"])) for sample in read}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_make_grids__a_grid_and_its_description_per_scene(scenes: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = make_grids(
        scenes, tmp_path / "out", FAST, Writing(test=("b",), min_psnr=0.0), progress=lambda *now: told.append(now)
    )
    assert told[0] == (0, 180) and told[-1] == (180, 180)
    assert [(scene.name, scene.problem) for scene in made.scenes] == [("a", None), ("b", None), ("c", None)]
    assert made.manifest is not None and made.manifest.fields == {"grid.npy": "volume", "json": "json"}
    assert {name: split.samples for name, split in made.manifest.splits.items()} == {"train": 2, "test": 1}
    found = samples(open_dataset(tmp_path / "out"))
    assert sorted(found) == ["a", "b", "c"] and list(samples(open_dataset(str(tmp_path / "out/test-*.tar")))) == ["b"]
    for report in made.scenes:
        grid, facts = found[report.name]
        assert grid.shape == (4, 16, 16, 16) and grid.dtype == np.uint8 and grid[3].max() > 3
        assert facts["scene"] == facts["source"] == report.name and facts["resolution"] == [16, 16, 16]
        assert facts["density_kind"] == "alpha" and facts["alpha_step_vox"] == 1.6 and facts["up_axis"] == "z"
        assert facts["bbox_min"] == [-1.2] * 3 and facts["bbox_max"] == [1.2] * 3 and facts["box_rule"] == "bound"
        assert facts["psnr_heldout"] == report.psnr and facts["fit"]["steps"] == 60
    assert [found[name][1]["layout"] for name in "abc"] == ["blender", "nerfstudio", "colmap"]
    assert [found[name][1]["n_images"] for name in "abc"] == [6, 7, 7]
    assert verify([str(tmp_path / "out")]).findings == []


def test_make_grids__the_same_again_costs_no_fit_and_other_options_are_refused(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_grids(scenes / "a", tmp_path / "out", FAST, KEEP_ALL)
    before = bytes_of(tmp_path / "out")
    monkeypatch.setattr(fit, "fit_scene", forbidden)
    again = make_grids(scenes / "a", tmp_path / "out", FAST, KEEP_ALL)
    assert again.scenes == () and again.manifest is not None
    with pytest.raises(DataError, match="holds a data set packed with dtype='uint8', this request has 'float16'"):
        make_grids(scenes / "a", tmp_path / "out", FAST, Writing(min_psnr=0.0, dtype="float16"))
    assert bytes_of(tmp_path / "out") == before
    made = make_grids(scenes / "a", tmp_path / "halves", FAST, Writing(min_psnr=0.0, dtype="float16"))
    ((grid, _),) = samples(open_dataset(tmp_path / "halves")).values()
    assert made.scenes[0].problem is None and grid.dtype == np.float16


def forbidden(*_: object) -> None:
    raise AssertionError("fitted again")


def test_make_grids__of_a_declared_box_twice(scenes: Path, tmp_path: Path) -> None:
    make_grids(scenes / "b", tmp_path / "out", BOXED, KEEP_ALL)
    assert make_grids(scenes / "b", tmp_path / "out", BOXED, KEEP_ALL).scenes == ()
    ((grid, facts),) = samples(open_dataset(tmp_path / "out")).values()
    assert grid.shape == (4, 16, 16, 10) and facts["resolution"] == [16, 16, 10] and facts["box_rule"] == "box"
    assert facts["bbox_min"][2] <= -1.2 and facts["bbox_max"][2] >= 0


def test_make_grids__a_second_one_into_the_same_folder_is_refused_in_one_line(scenes: Path, tmp_path: Path) -> None:
    dest, refused = tmp_path / "out", []

    def second(done: int, total: int) -> None:
        if done == 60:
            with pytest.raises(DataError, match=f"^another process is packing into {dest}; wait for it or") as failure:
                make_grids(scenes, dest, FAST, KEEP_ALL)
            refused.append(str(failure.value))

    made = make_grids(scenes / "a", dest, FAST, KEEP_ALL, progress=second)
    assert len(refused) == 1 and made.manifest is not None
    assert sorted(bytes_of(dest)) == ["dataset.json", "train-000000.tar", "train-000000.tar.index"]


def test_make_grids__goes_on_where_a_killed_one_stopped(scenes: Path, tmp_path: Path, cache: Path) -> None:
    """The second process fits what the first had not, and both together write the bytes of a single one."""
    code = (
        "import os, signal, sys\n"
        "from tests.data_pipelines.test_make import FAST, KEEP_ALL, killed_after_first\n"
        "from data_pipelines.radiance.make import make_grids\n"
        "make_grids(sys.argv[1], sys.argv[2], FAST, KEEP_ALL, run_jobs=killed_after_first)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(scenes), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert len(list(cache.glob("*.npz"))) == 1 and not (tmp_path / "out" / "dataset.json").exists()
    told: list[int] = []
    make_grids(scenes, tmp_path / "out", FAST, KEEP_ALL, progress=lambda done, total: told.append(total))
    assert set(told) == {120}
    for path in cache.glob("*.npz"):
        path.unlink()
    make_grids(scenes, tmp_path / "once", FAST, KEEP_ALL)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "once")
    assert not (tmp_path / "out" / ".packing").exists()


def test_make_grids__interrupted_while_it_fits_leaves_no_trace_in_dest(scenes: Path, tmp_path: Path) -> None:
    def interrupted(*arguments: Any) -> Iterator[Any]:
        yield next(run_jobs(*arguments))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_grids(scenes, tmp_path / "out", FAST, KEEP_ALL, run_jobs=interrupted)
    assert not (tmp_path / "out").exists()
    made = make_grids(scenes / "b", tmp_path / "out", BOXED, KEEP_ALL)  # another request is free to take its place
    assert made.manifest is not None


def killed_after_first(*arguments: Any) -> Iterator[Any]:
    yield next(run_jobs(*arguments))
    os.kill(os.getpid(), signal.SIGKILL)


def test_make_grids__leaves_out_what_is_not_good_enough(scenes: Path, tmp_path: Path, cache: Path) -> None:
    made = make_grids(scenes, tmp_path / "all", FAST, KEEP_ALL)
    scores = sorted(scene.psnr or 0.0 for scene in made.scenes)
    threshold = (scores[0] + scores[1]) / 2
    made = make_grids(scenes, tmp_path / "out", FAST, Writing(min_psnr=threshold))
    (refused,) = [scene for scene in made.scenes if scene.problem]
    assert refused.psnr == scores[0] and refused.name not in samples(open_dataset(tmp_path / "out"))
    said = f"{scenes / refused.name}: {scores[0]:.1f} dB on 1 held-out views is less than {threshold:g} dB; "
    assert str(refused.problem).startswith(said.replace("on 1", "on 2" if refused.name == "a" else "on 1"))
    assert made.manifest is not None and made.manifest.rejected == 1
    nothing = make_grids(scenes, tmp_path / "none", FAST, Writing(min_psnr=99.0))
    assert nothing.manifest is None and not (tmp_path / "none").exists()


def test_make_grids__a_scene_that_cannot_be_fitted_stops_no_other(scenes: Path, tmp_path: Path) -> None:
    """The header of a picture is whole, and what follows is not."""
    source = tmp_path / "source"
    write_nerfstudio(source / "broken", photographs(8, size=16))
    write_nerfstudio(source / "whole", photographs(8, size=16))
    picture = source / "broken" / "images" / "003.png"
    picture.write_bytes(picture.read_bytes()[:-60])
    made = make_grids(source, tmp_path / "out", FAST, KEEP_ALL)
    broken, whole = made.scenes
    assert whole.problem is None and list(samples(open_dataset(tmp_path / "out"))) == ["whole"]
    assert str(broken.problem).startswith(f"{source / 'broken'}: images/003.png: cannot decode image of ")


def test_make_grids__cuts(scenes: Path, tmp_path: Path) -> None:
    writing = Writing(test=("b",), min_psnr=0.0, cuts=4, cut_size=8)
    make_grids(scenes, tmp_path / "out", FAST, writing)
    make_grids(scenes, tmp_path / "again", FAST, writing)
    make_grids(scenes, tmp_path / "whole", FAST, KEEP_ALL)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")
    found, whole = samples(open_dataset(tmp_path / "out")), samples(open_dataset(tmp_path / "whole"))
    assert sorted(found) == [f"{scene}_{number:04d}" for scene in "abc" for number in range(4)]
    for grid, facts in found.values():
        x, y, z = facts["origin"]
        part = whole[facts["scene"]][0][:, x : x + 8, y : y + 8, z : z + 8]
        flips = [axis + 1 for axis, is_flipped in enumerate(facts["flip"]) if is_flipped]
        part = np.flip(np.rot90(part, facts["quarter_turns"], axes=(1, 2)), flips)
        np.testing.assert_array_equal(grid, part)
        np.testing.assert_allclose(facts["bbox_min"], np.array([x, y, z]) * 0.16 - 1.2, atol=1e-5)
        np.testing.assert_allclose(facts["bbox_max"], np.array([x + 7, y + 7, z + 7]) * 0.16 - 1.2, atol=1e-5)


WRONG = {
    "test scene": (Writing(test=("d",)), "test=d: .* has no such scene; it has a, b, c"),
    "all are test": (Writing(test=("a", "b", "c")), "no scene of .* is left for the split train"),
    "cut size": (
        Writing(cuts=2, cut_size=17),
        "cut_size=17 is not allowed; cuts are cubes of grids with resolution=16",
    ),
    "dtype": (Writing(dtype="int8"), "dtype='int8' is not allowed; use uint8 or float16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_make_grids__wrong_requests_leave_nothing(case: str, scenes: Path, tmp_path: Path) -> None:
    writing, said = WRONG[case]
    with pytest.raises(DataError, match=said):
        make_grids(scenes, tmp_path / "out", FAST, writing)
    assert list(tmp_path.iterdir()) == []


def test_make_grids__a_damaged_fit_is_made_again(scenes: Path, tmp_path: Path, cache: Path) -> None:
    make_grids(scenes / "a", tmp_path / "out", FAST, KEEP_ALL)
    (kept,) = cache.glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-50])
    made = make_grids(scenes / "a", tmp_path / "again", FAST, KEEP_ALL)
    assert made.scenes[0].problem is None
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")
