"""docs/example_plugin as a stranger would have it: a distribution of its own, installed into an environment.

The environment is made here. It sees the packages of the interpreter that runs the tests, pretrain among them, and has
the plug-in besides; the interpreter of the tests never sees the plug-in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from backbones import BackboneError, load_backbone
from pretrain.cli.main import main
from pretrain.record.events import Metrics
from pretrain.record.journal import read_events

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "example_plugin"
STEPS = 48
SMALL = (
    f"train.steps={STEPS}",
    f"train.checkpoint_every={STEPS}",
    "train.workers=1",
    "train.global_batch_size=32",
    "train.log_every=1",
    "optimizer.warmup_steps=2",
    "optimizer.base_lr=0.02",
    "backbone.image_size=32",
    "backbone.options={dim: 32, depth: 2}",
    "data.loader_workers=0",
)


class Environment:
    """A virtual environment on top of the running one."""

    def __init__(self, directory: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        self.directory = directory
        self.python = directory / "bin" / "python"
        packages = next(directory.glob("lib/python*/site-packages"))
        outer = sysconfig.get_paths()
        # `addsitedir`, so that editable installations count too; the last line is for a checkout on PYTHONPATH.
        places = [f"import site; site.addsitedir({outer[kind]!r})" for kind in ("purelib", "platlib")]
        (packages / "outer.pth").write_text("\n".join([*places, str(ROOT)]))

    def install(self, distribution: Path) -> None:
        """From a copy, because a build leaves files in the source."""
        source = self.directory / "sources" / distribution.name
        shutil.copytree(distribution, source)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-index"]
        uv = ["uv", "pip", "install", "--quiet", "--offline", "--python", str(self.python)]
        command = [*(pip if find_spec("pip") else uv), "--no-deps", "--no-build-isolation", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", **variables}
        command = [str(part) for part in (self.python, *arguments)]
        return subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("plugin") / "environment")
    made.install(EXAMPLE)
    return made


@pytest.fixture(scope="module")
def trained(environment: Environment) -> Path:
    """Directory of a run of the example's recipe with the plug-in's objective and backbone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run_dir = environment.directory / "run"
    done = environment.run(
        "-m", "pretrain.worker", EXAMPLE / "colour.yaml", *SMALL, "--run-dir", run_dir, **place
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


@pytest.mark.integration
def test_plugin__names_are_known_and_settings_are_checked(environment: Environment) -> None:
    done = environment.run(
        "-m", "pretrain", "run", EXAMPLE / "colour.yaml",
        "objective.mask_ratio=3", "objective.mask=1", "backbone.name=patch_con",
        "evaluation.tasks[0].protocol=class_meen",
    )  # fmt: skip
    assert done.returncode == 2
    unknown, out_of_range, backbone, protocol = done.stderr.splitlines()
    assert unknown.endswith("objective.mask=1: unknown setting; did you mean 'objective.mask_ratio'?")
    assert out_of_range.endswith("objective.mask_ratio=3.0: expected a number in [0.01, 0.99]")
    assert backbone.endswith("did you mean 'patch_conv'?")
    assert protocol.endswith("known are class_mean, knn, linear, segmentation; did you mean 'class_mean'?")
    done = environment.run("-m", "pretrain", "run", "demo", "objective.name=color")
    assert done.returncode == 2
    assert re.search(r"known are colour, .*mae.*did you mean 'colour'\?", done.stderr)


@pytest.mark.integration
def test_plugin__trains(trained: Path) -> None:
    values = [event.values for event in read_events(trained / "journal.jsonl")[0] if isinstance(event, Metrics)]
    assert len(values) == STEPS
    early, late = values[:4], values[-4:]
    assert sum(value["loss"] for value in late) < 0.6 * sum(value["loss"] for value in early)
    assert sum(value["explained"] for value in late) / 4 > 0.25  # 0: as good as one colour for all
    assert (trained / f"pictures/step-{STEPS:08}.png").is_file()


@pytest.mark.integration
def test_plugin__checkpoint_is_loaded_and_graded(environment: Environment, trained: Path) -> None:
    code = """
import sys
import torch
from safetensors.torch import load_file
from backbones import load_backbone
from pretrain.cli import main

checkpoint, storage = sys.argv[1:]
backbone, weights = load_backbone(checkpoint), load_file(checkpoint + "/backbone.safetensors")
assert type(backbone.network).__module__ == "pretrain_colour.backbone"
assert backbone.network.state_dict().keys() == weights.keys()
assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.network.state_dict().items())
features = backbone.features(backbone.preprocess(torch.zeros(2, 3, 48, 64, dtype=torch.uint8)))
assert (features.patches.shape, features.grid, features.cls) == ((2, 48, 32), (6, 8), None)
assert set(backbone.layer_ids().values()) == {0, 1, 2}, backbone.layer_ids()
raise SystemExit(main(["evaluate", checkpoint, "--protocol", "class_mean", "--storage", storage]))
"""
    storage = environment.directory / "storage"
    done = environment.run("-c", code, trained / f"checkpoints/step-{STEPS:08}", storage)
    assert done.returncode == 0, done.stderr
    assert re.search(r"class_mean\s+grocery\s+top1\s+\d+\.\d%", done.stdout)
    (result,) = [json.loads(path.read_text()) for path in (storage / "evaluations").glob("*.json")]
    assert result["metrics"]["top1"] > 0.1  # of 20 classes
    assert 0 < result["metrics"]["rank_share"] < 1


@pytest.mark.integration
def test_plugin__checkpoint_of_one_that_is_not_installed(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the interpreter of the tests, which does not have it."""
    checkpoint = trained / f"checkpoints/step-{STEPS:08}"
    message = (
        "backbone 'patch_conv' is not installed here; it is the plug-in pretrain_colour.backbone:patch_conv, so "
        "install the package with the module pretrain_colour"
    )
    with pytest.raises(BackboneError, match=re.escape(message)):
        load_backbone(checkpoint)
    assert main(["evaluate", str(checkpoint)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("unknown" in line for line in lines)
    assert "objective.name=colour" in lines[0]


@pytest.fixture
def clashing(environment: Environment, tmp_path: Path) -> Iterator[Environment]:
    """The environment with a second distribution that has plug-ins of the same names, until the test ends."""
    packages = next(environment.directory.glob("lib/python*/site-packages"))
    before = set(packages.iterdir())
    source = tmp_path / "other"
    source.mkdir()
    (source / "other_colour.py").write_text("")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "other-colour"\nversion = "1"\n'
        '[project.entry-points."pretrain.objectives"]\ncolour = "other_colour:Colour"\n'
        '[project.entry-points."pretrain.backbones"]\npatch_conv = "other_colour:patch_conv"\n'
        '[project.entry-points."pretrain.evaluations"]\nclass_mean = "other_colour:CLASS_MEAN"\n'
        '[tool.setuptools]\npy-modules = ["other_colour"]\n'
    )
    environment.install(source)
    yield environment
    for path in set(packages.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.integration
def test_plugin__two_packages_with_one_name(clashing: Environment) -> None:
    done = clashing.run("-m", "pretrain", "run", "demo")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: objective 'colour' of ")
    assert "is already taken by " in line
    assert "pretrain_colour.objective:Colour (package pretrain-colour)" in line
    assert "other_colour:Colour (package other-colour)" in line
    for module, name in (("backbones.images.timm_names", "model_names"), ("evaluation.registry", "names")):
        done = clashing.run("-c", f"from {module} import {name}; {name}()")
        assert re.search(r"Error: (backbone 'patch_conv'|protocol 'class_mean') of .* already taken by", done.stderr)


def test_docs__show_the_files_as_they_are() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"`example_plugin/([\w./]+)`:\n\n```\w+\n(.*?)```\n", page, flags=re.DOTALL))
    expected = [path for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".toml") and path.name != "__init__.py"]
    assert sorted(shown) == sorted(path.relative_to(EXAMPLE).as_posix() for path in expected)
    for name, text in shown.items():
        assert text == (EXAMPLE / name).read_text(encoding="utf-8"), f"docs/plugins.md shows another {name}"
