"""`pretrain data radiance`: from scenes to grids on the command line, in this process and as Ray tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.radiance.settings import FitSettings
from data_pipelines.worker_pool import Advance
from pretrain.cli.data import data
from pretrain.cli.main import main
from pretrain.errors import RequestError, RunFailed
from pretrain.radiance import run_on_ray
from tests.analytic_scene import SPHERES, photographs, write_blender, write_nerfstudio

ROOT = Path(__file__).parents[2]
FAST = ("--resolution", "16", "--steps", "60", "--rays", "128", "--bound", "1.2")


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    write_blender(tmp_path / "scenes" / "a", photographs(8, size=16))
    write_nerfstudio(tmp_path / "scenes" / "b", photographs(8, size=16, spheres=SPHERES[:1]))
    return tmp_path / "scenes"


def test_radiance__options_have_the_defaults_of_the_settings() -> None:
    defaults = {option.name: option.default for option in data.commands["radiance"].params}
    settings = FitSettings()
    shared = {name for name in defaults if hasattr(settings, str(name))} - {"bound", "box"}
    assert len(shared) == 8 and all(defaults[name] == getattr(settings, str(name)) for name in shared)


def test_radiance__in_this_process(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ["data", "radiance", "scenes", "grids", *FAST, "--workers", "1"]
    assert main([*request, "--min-psnr", "0", "--test", "b"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("a: ") and " dB on held-out views, fitted in " in out[0]
    assert out[2].startswith("wrote train 1, test 1 grids in ")
    assert main(["data", "verify", "grids", "--workers", "1"]) == 0
    assert capsys.readouterr().out.startswith("no findings in 2 shards, 2 samples")
    assert main([*request, "--min-psnr", "0", "--test", "b"]) == 0
    assert capsys.readouterr().out.startswith("grids holds them already: train 1, test 1 grids; 0 scenes were left out")
    assert main(["data", "show", "grids", "-o", "sheet.png", "--size", "48"]) == 0


def test_radiance__scenes_below_the_threshold_are_named_and_the_exit_code_is_1(
    scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "radiance", "scenes/a", "grids", *FAST, "--min-psnr", "60"]) == 1
    said = capsys.readouterr()
    left_out, nothing = said.err.splitlines()
    assert said.out == "" and not Path("grids").exists()
    assert (
        left_out.startswith("error: left out: scenes/a: ")
        and " is less than 60 dB; look at the cameras and at the box (-1.2 -1.2 -1.2) to (1.2 1.2 1.2)" in left_out
    )
    assert nothing == "error: no scene is left, nothing was written to grids"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "grids"], "SRC nowhere: no such file or directory"),
        ([".", "grids", "--cut-size", "8"], "--cut-size 8: there are no cuts without --cuts N"),
        ([".", "grids", "--bound", "0"], "Invalid value for '--bound'"),
        ([".", "grids", "--box", "a,b"], "--box a,b: expected six numbers X0,Y0,Z0,X1,Y1,Z1"),
        ([".", "grids", "--box", "0,0,0,1,1"], "box=0,0,0,1,1 is not allowed; it is X0,Y0,Z0,X1,Y1,Z1, each end above"),
        ([".", "grids", "--bound", "1", "--box", "0,0,0,1,1,1"], "bound=1 is not allowed beside a box"),
        ([".", "grids", "--axes", "opencl"], "Invalid value for '--axes'"),
        ([".", "grids", "--up", "w"], "Invalid value for '--up'"),
        ([".", "grids", "--resolution", "4"], "Invalid value for '--resolution'"),
        ([".", "grids"], ". is no scene and holds none; a scene has transforms_train.json, "),
    ],
)
def test_radiance__wrong_requests_are_2_with_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "radiance", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}") and list(tmp_path.iterdir()) == []


def test_radiance__a_scene_that_is_wrong_is_refused_without_torch(scenes: Path) -> None:
    (scenes / "b" / "images" / "002.png").unlink()
    code = (
        "import sys\nfrom pretrain.cli.main import main\n"
        "main(['data', 'radiance', 'scenes', 'grids'])\n"
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and not Path("grids").exists()
    assert done.stderr.startswith("error: scenes/b/transforms.json: frame 2 (images/002.png): there is no picture ")


def test_run_on_ray__one_job_runs_here() -> None:
    told: list[int] = []
    assert list(run_on_ray(None)(where_it_runs, [Path("x")], 4, told.append)) == [os.getpid()] and told == [5]


def test_run_on_ray__an_address_without_ray_is_a_wrong_request() -> None:
    with pytest.raises(RequestError, match=r"--address 127\.0\.0\.1:1: no Ray answers there"):
        list(run_on_ray("127.0.0.1:1")(where_it_runs, [Path("x")], 1, lambda done: None))


def where_it_runs(path: Path, advance: Advance) -> int:
    advance(5)
    return os.getpid()


@pytest.mark.integration
def test_radiance__scenes_as_ray_tasks_give_the_same_grids(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ["data", "radiance", "scenes", "--min-psnr", "0", "--cuts", "2", "--cut-size", "8", *FAST]
    assert main([*request[:3], "ray", *request[3:], "--workers", "2"]) == 0
    assert "wrote train 4 grids in " in capsys.readouterr().out
    kept = {path.name: np.load(path)["grid"].tobytes() for path in Path("cache/radiance").glob("*.npz")}
    for path in Path("cache/radiance").glob("*.npz"):
        path.unlink()
    assert main([*request[:3], "here", *request[3:], "--workers", "1"]) == 0
    assert len(kept) == 2
    assert kept == {path.name: np.load(path)["grid"].tobytes() for path in Path("cache/radiance").glob("*.npz")}


@pytest.mark.long
@pytest.mark.integration
def test_run_on_ray__a_job_that_fails_is_named() -> None:
    class Job:
        path = "scenes/a"

    with pytest.raises(RunFailed, match=r"scenes/a: .*is bad"):
        list(run_on_ray(None)(fail, [Job(), Job()], 1, lambda done: None))


def fail(job: object, advance: Advance) -> None:
    raise ValueError("this job is bad")
