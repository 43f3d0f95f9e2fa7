"""docs/example_plugin and docs/series_plugin as a stranger would have them: distributions installed into environments.

The environment is made here. It sees the packages of the interpreter that runs the tests, pretrain among them, and has
the plug-in besides; the interpreter of the tests never sees the plug-in.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from backbones import BackboneError, load_backbone
from evaluation import registry as evaluations
from pretrain.cli.main import main
from pretrain.record.events import Metrics
from pretrain.record.journal import read_events

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "example_plugin"
SERIES = ROOT / "docs" / "series_plugin"
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


@pytest.mark.long
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
    known = ", ".join(sorted(["class_mean", *evaluations.names()]))
    assert protocol.endswith(f"known are {known}; did you mean 'class_mean'?")
    done = environment.run("-m", "pretrain", "run", "demo", "objective.name=color")
    assert done.returncode == 2
    assert re.search(r"known are colour, .*mae.*did you mean 'colour'\?", done.stderr)


@pytest.mark.long
@pytest.mark.integration
def test_plugin__keeps_to_the_contract_of_objectives(environment: Environment) -> None:
    code = """
import torch
from backbones.registry import create_backbone
from objectives import contract
from pretrain_colour.objective import Colour, ColourConfig

torch.manual_seed(0)
backbone = create_backbone("patch_conv", image_size=32, options={"dim": 32, "depth": 2})
batch = {"image": torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), "seed": torch.arange(4)}
for check in contract.CHECKS:
    check(Colour(backbone, ColourConfig()), batch)
"""
    done = environment.run("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_plugin__trains(trained: Path) -> None:
    values = [event.values for event in read_events(trained / "journal.jsonl")[0] if isinstance(event, Metrics)]
    assert len(values) == STEPS
    early, late = values[:4], values[-4:]
    assert sum(value["loss"] for value in late) < 0.6 * sum(value["loss"] for value in early)
    assert sum(value["explained"] for value in late) / 4 > 0.25  # 0: as good as one colour for all
    assert (trained / f"visualizations/step-{STEPS:08}.png").is_file()


@pytest.mark.integration
def test_plugin__checkpoint_is_loaded_and_graded(environment: Environment, trained: Path) -> None:
    code = """
import sys
import torch
from safetensors.torch import load_file
from backbones import load_backbone
from pretrain.cli.main import main

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


SERIES_STEPS = 60
SERIES_RECIPE = """
objective: {name: masked_series}
backbone: {kind: series, in_chans: 2, dim: 24}
data: {train: DATA/train-*.tar, loader_workers: 0}
optimizer: {lr: 1.0e-2, warmup_steps: 2, layer_decay: 0.9}
train: {steps: STEPS, global_batch_size: 32, workers: 1, log_every: 1, checkpoint_every: STEPS}
evaluation:
  data: {waves: DATA}
  tasks: [{protocol: knn, data: waves}, {protocol: linear, data: waves}]
"""


def write_waves(root: Path) -> None:
    """Series (2, 64) of four classes: waves of 2, 3, 5 or 8 periods with a random phase, and some noise."""
    root.mkdir()
    rng = np.random.default_rng(0)
    time = np.arange(64) / 64
    for split, count in (("train", 128), ("test", 64)):
        with tarfile.open(root / f"{split}-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(count):
                label, phases = number % 4, rng.uniform(0, 2 * np.pi, (2, 1))
                waves = np.sin(2 * np.pi * (2, 3, 5, 8)[label] * time + phases) + rng.normal(0, 0.1, (2, 64))
                stored = io.BytesIO()
                np.save(stored, waves.astype(np.float32))
                for suffix, content in (("series.npy", stored.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{split}{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def series_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("series") / "environment")
    made.install(SERIES)
    write_waves(made.directory / "waves")
    recipe = SERIES_RECIPE.replace("DATA", str(made.directory / "waves")).replace("STEPS", str(SERIES_STEPS))
    (made.directory / "series.yaml").write_text(recipe)
    return made


@pytest.fixture(scope="module")
def trained_series(series_environment: Environment) -> Path:
    """Directory of a run of the recipe above."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run_dir = series_environment.directory / "run"
    done = series_environment.run("-m", "pretrain.worker", "series.yaml", "--run-dir", run_dir, **place)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


@pytest.mark.long
@pytest.mark.integration
def test_kind__trains(trained_series: Path) -> None:
    events = read_events(trained_series / "journal.jsonl")[0]
    values = [event.values for event in events if isinstance(event, Metrics)]
    assert len(values) == SERIES_STEPS
    assert sum(value["explained"] for value in values[-4:]) / 4 > 0.3  # 0: as good as one number for all
    assert (trained_series / f"visualizations/step-{SERIES_STEPS:08}.png").is_file()


@pytest.mark.long
@pytest.mark.integration
def test_kind__checkpoint_is_loaded_and_evaluated(series_environment: Environment, trained_series: Path) -> None:
    code = """
import sys
import torch
import pretrain
from safetensors.torch import load_file
from pretrain.cli.main import main

checkpoint, storage = sys.argv[1:]
backbone, weights = pretrain.load_backbone(checkpoint), load_file(checkpoint + "/backbone.safetensors")
assert (backbone.kind, type(backbone).__module__) == ("series", "pretrain_series.encoder")
assert backbone.weights().keys() == weights.keys()
assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.weights().items())
features = backbone.tokens(torch.zeros(3, 2, 32))
assert (features.tokens.shape, features.grid, features.pooled.shape) == ((3, 4, 24), (4,), (3, 24))
protocols = ["--protocol", "knn", "--protocol", "linear"]
raise SystemExit(main(["evaluate", checkpoint, *protocols, "--storage", storage]))
"""
    storage = series_environment.directory / "storage"
    done = series_environment.run("-c", code, trained_series / f"checkpoints/step-{SERIES_STEPS:08}", storage)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(path.read_text()) for path in (storage / "evaluations").glob("*.json")]
    assert sorted(result["protocol"] for result in results) == ["knn", "linear"]
    for result in results:
        assert result["metrics"]["top1"] > 0.5, result  # of four classes


@pytest.mark.long
@pytest.mark.integration
def test_kind__mistakes_are_one_line_each(series_environment: Environment, trained_series: Path) -> None:
    done = series_environment.run(
        "-m", "pretrain", "run", "series.yaml", "backbone.dim=0", "backbone.image_size=32", "objective.mask_ratio=2"
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert any(line.endswith("backbone.dim=0: expected a whole number in [1, 4096]") for line in lines)
    assert any("backbone.image_size=32: unknown setting" in line for line in lines)
    done = series_environment.run("-m", "pretrain", "run", "series.yaml", "backbone.kind=serie")
    assert done.returncode == 2
    assert re.search(
        r"backbone\.kind=serie: unknown kind .*; known are image, .*series.*; did you mean 'series'\?", done.stderr
    )


@pytest.mark.long
@pytest.mark.integration
def test_kind__checkpoint_of_one_that_is_not_installed(trained_series: Path) -> None:
    """In the interpreter of the tests, which does not have it."""
    message = (
        "backbone 'conv' of kind 'series' is not installed here; it is the plug-in "
        "pretrain_series.encoder:SeriesEncoder, so install the package with the module pretrain_series"
    )
    with pytest.raises(BackboneError, match=re.escape(message)):
        load_backbone(trained_series / f"checkpoints/step-{SERIES_STEPS:08}")


def test_docs__show_the_files_as_they_are() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for plugin, left_out in ((EXAMPLE, {"__init__.py"}), (SERIES, {"__init__.py", "objective.py"})):
        pattern = rf"`{plugin.name}/([\w./]+)`:\n\n```\w+\n(.*?)```\n"
        shown = dict(re.findall(pattern, page, flags=re.DOTALL))
        expected = [path for path in plugin.rglob("*") if path.suffix in (".py", ".toml") and path.name not in left_out]
        assert sorted(shown) == sorted(path.relative_to(plugin).as_posix() for path in expected)
        for name, text in shown.items():
            assert text == (plugin / name).read_text(encoding="utf-8"), f"docs/plugins.md shows another {name}"
