"""Protocol names and facts, plug-ins, sizes; none of it needs torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from evaluation import protocols, registry
from evaluation.extraction.images import image_size_px
from evaluation.extraction.recipe import EXTRACTIONS, extraction_of
from evaluation.protocol import EvaluationError, Metric, Protocol
from evaluation.registry import PROTOCOLS

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = replace(PROTOCOLS["knn"], name="mine", target="math:sqrt")


def _install(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in entries]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


def test_import__needs_no_torch() -> None:
    code = (
        "import sys, evaluation, evaluation.registry as r; r.names(); r.protocol('linear'); "
        "print([m for m in ('torch', 'numpy', 'timm') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["linear", "knn", "segmentation"])
def test_protocol__states_what_it_needs_and_gives(name: str) -> None:
    spec = registry.protocol(name)
    assert spec.headline.name == ("miou" if name == "segmentation" else "top1")
    assert spec.label == ("seg.png" if name == "segmentation" else "cls")
    assert callable(registry.load_head(spec))


@pytest.mark.parametrize("kind", sorted(EXTRACTIONS))
def test_extractions__are_what_is_known_of_them_without_torch(kind: str) -> None:
    known, extraction = EXTRACTIONS[kind], extraction_of(kind)
    assert (known.tokens, known.axes) == (extraction.tokens, extraction.axes)


def test_fitting__protocols_of_each_kind() -> None:
    pooled = {name for name, spec in PROTOCOLS.items() if spec.tokens == "pooled"}
    assert pooled | {"segmentation"} <= set(registry.fitting("image"))
    assert set(registry.fitting("points")) == pooled >= {"knn", "linear", "svm", "few_shot", "ridge", "logreg"}
    assert pooled <= set(registry.fitting("voxels")) and "segmentation" not in registry.fitting("voxels")
    assert registry.fitting("series") == tuple(PROTOCOLS)  # a kind of a plug-in, which is asked when it is used


def test_protocol__of_an_unknown_label_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"'knn': label='txt'; known are cls, labels\.json, seg\.png, seg\.npy"):
        replace(PROTOCOLS["knn"], label="txt")


def test_protocol__unknown_name_gets_the_nearest() -> None:
    with pytest.raises(EvaluationError, match=r"unknown evaluation protocol 'liner'; known: .*; did you mean 'linear'"):
        registry.protocol("liner")


def test_plugins__are_listed_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("plugin_of_a_test")
    module.SPEC = PLUGIN
    monkeypatch.setitem(sys.modules, "plugin_of_a_test", module)
    _install(monkeypatch, ("mine", "plugin_of_a_test:SPEC"))
    assert "mine" in registry.names()
    assert registry.protocol("mine") is PLUGIN
    assert registry.load_head(PLUGIN)(9.0) == 3.0


def test_plugins__may_not_take_a_known_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, ("knn", "elsewhere:SPEC"))
    with pytest.raises(
        EvaluationError, match=r"'knn' of elsewhere:SPEC is already taken by evaluation.protocols.knn.s"
    ):
        registry.names()


def test_plugins__must_be_a_protocol_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, ("mine", "math:pi"))
    with pytest.raises(EvaluationError, match="math:pi must be a Protocol named 'mine'"):
        registry.protocol("mine")


def test_image_size__default_square_and_pair() -> None:
    assert image_size_px(None, 96, 8) == (96, 96)
    assert image_size_px(224, 96, 16) == (224, 224)
    assert image_size_px((240, 320), 224, 16) == (240, 320)


@pytest.mark.parametrize(("size", "nearest"), [(100, "96 or 112"), (8, "16 or 32"), (0, "16 or 32")])
def test_image_size__patches_must_tile_it(size: int, nearest: str) -> None:
    with pytest.raises(EvaluationError, match=f"height {size} is not a multiple of .* 16; nearest allowed: {nearest}"):
        image_size_px(size, 224, 16)


def test_builtin_protocols__are_the_folders_with_both_files() -> None:
    folders = {path.parent.name for path in (REPOSITORY / "evaluation/protocols").glob("*/score.py")}
    assert set(PROTOCOLS) == folders >= {"knn", "linear", "segmentation"}
    for name, spec in PROTOCOLS.items():
        assert isinstance(spec, Protocol) and spec.name == name
        assert spec.target == f"evaluation.protocols.{name}.score:score"


def test_builtin_protocols__a_new_folder_is_found_without_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, files in (("depth_of_a_test", ("spec.py", "score.py")), ("half_of_one", ("spec.py",))):
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_text(
                "from dataclasses import replace\n"
                "from evaluation.protocols.knn.spec import SPEC as KNN\n"
                f"SPEC = replace(KNN, name={folder!r})\n"
            )
    monkeypatch.setattr(protocols, "__path__", [*protocols.__path__, str(tmp_path)])
    found = registry._built_in()
    assert set(found) == {*PROTOCOLS, "depth_of_a_test"}
    assert found["depth_of_a_test"].name == "depth_of_a_test"
    monkeypatch.delitem(sys.modules, "evaluation.protocols.depth_of_a_test.spec")


def test_describe__records_of_older_versions_mean_what_their_protocol_says() -> None:
    low, top1 = registry.describe("knn", ["top1_ci_low", "top1"])
    assert (low.better, top1.better, top1.headline) == (None, "higher", True)
    gone = registry.describe("of_a_package_that_was_removed", ["score", "other"])
    assert gone == (Metric("score", headline=True), Metric("other"))
