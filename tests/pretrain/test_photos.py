"""A plain folder of photos as `data.root`: packed once, used again, packed anew when it changed."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.cli.main import main
from pretrain.config.load import load_for_resume, load_plan
from pretrain.config.stages import plan_yaml
from pretrain.errors import RequestError, RunStopped
from pretrain.photos import listed, load, packed_plan, place_of
from pretrain.record.lock import hold


def write_photos(folder: Path, *classes: str, each: int = 12, side: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for name in classes or ("",):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{number}.jpg")
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_photos(tmp_path / "my photos [1]", "cat", "dog")


def test_load__packs_once_and_anew_when_a_file_changed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load("mae_photos", [f"data.root={photos}"]).recipe
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"data: packing 24 photos (0 MB) of {photos} into {first.data.root} (once, ")
    assert "2 classes" in said[1]
    shards = Path(first.data.root or "")
    assert shards.parent == tmp_path / "runs" / "shards"
    assert first.data.train == f"{shards}/train-*.tar" and first.evaluation.data == {"photos": str(shards)}
    assert [task.protocol for task in first.evaluation.tasks] == ["linear", "knn"]
    assert (shards / "test-000000.tar").exists()

    assert load("mae_photos", ["data.root=my photos [1]"]).recipe == first
    assert capsys.readouterr().out.startswith(f"data: the shards of {photos} in {shards}, as nothing has changed")

    os.utime(photos / "cat" / "cat0.jpg", (1e9, 1e9))  # older, of the same size: only its own time tells
    changed = load("mae_photos", [f"data.root={photos}"]).recipe.data.root
    assert changed not in (None, first.data.root) and shards.exists()
    assert "has changed since it was packed" in capsys.readouterr().out


def test_load__without_labels_leaves_evaluations_out_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flat = write_photos(tmp_path / "flat")
    epochs = ["train.epochs=16", "train.checkpoint_every_epochs=4", "optimizer.warmup_steps=1"]
    recipe = load("mae_photos", [f"data.root={flat}", *epochs]).recipe
    assert (recipe.evaluation.tasks, recipe.evaluation.data, recipe.evaluation.select) == ([], {}, None)
    assert (recipe.train.steps, recipe.train.checkpoint_every) == (3, 1)  # of 12 photos, 64 in a batch
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation")]
    assert said == [
        f"evaluation: without linear/photos, knn/photos, which need labels: {flat} has no folders of classes"
    ]


def test_load__of_a_suite_what_photos_have_labels_for(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = ["evaluation.tasks=[{suite: standard, data: photos, at: last}]", "evaluation.select=null"]
    recipe = load("mae_photos", [f"data.root={photos}", *suite]).recipe
    names = [task.protocol for task in recipe.evaluation.tasks]
    assert names == ["knn", "ridge", "spectrum", "linear", "logreg", "few_shot", "token_health"]
    assert "evaluation: without" not in capsys.readouterr().out


def test_load__too_few_photos_to_hold_some_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = write_photos(tmp_path / "few", "cat", "dog", each=1)
    assert load("mae_photos", [f"data.root={few}"]).recipe.evaluation.tasks == []
    assert "no photos that are held out" in capsys.readouterr().out


def test_load__keeps_the_splits_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "split" / "train", "cat", "dog", each=3)
    write_photos(tmp_path / "split" / "val", "cat", "dog", each=2)
    recipe = load("mae_photos", ["data.root=split"]).recipe
    names = sorted(path.name for path in Path(recipe.data.root or "").glob("*.tar"))
    assert names == ["train-000000.tar", "val-000000.tar"] and len(recipe.evaluation.tasks) == 2


def test_run__wrong_settings_are_refused_before_anything_is_packed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "mae_photos", f"data.root={photos}", "train.stepz=3"]) == 2
    assert "did you mean 'train.steps'?" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_load__refuses_runs_among_the_photos(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    with pytest.raises(RequestError, match=r"lies among the photos of .*name another place"):
        load("mae_photos", ["data.root=."])
    assert sorted(path.name for path in photos.iterdir()) == ["cat", "dog"]


def test_run__photos_that_are_damaged_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for number in range(3):
        (damaged / f"{number}.jpg").write_bytes(b"no picture")
    assert main(["run", "mae_photos", "data.root=damaged", "storage=new/runs"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: data.root={damaged}: 3 of 3 samples are damaged, 0 are allowed: 0.jpg: ")
    assert said.endswith("; repair or remove them (up to 5% are left out)") and "max_bad" not in said
    assert list(tmp_path.iterdir()) == [damaged]


def test_load__who_waited_packs_where_the_other_one_could_not(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"data.root={photos}"]
    draft = load_plan("mae_photos", settings, check_files=False)
    dest = place_of(photos, tmp_path / "runs", listed(photos, tmp_path / "runs"))
    dest.parent.mkdir(parents=True)
    path = dest.parent / f".{dest.name}.lock"
    other = hold(path)
    assert other is not None

    def give_up(seconds: float) -> None:
        path.unlink()
        other.close()

    monkeypatch.setattr("pretrain.photos.time.sleep", give_up)
    assert packed_plan("mae_photos", settings, photos, draft).recipe.data.root == str(dest)
    assert capsys.readouterr().out.startswith(f"data: another process is packing into {dest}; waiting for it")
    assert [path.name for path in dest.parent.iterdir()] == [dest.name]


def test_load__stopped_while_it_packs_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = write_photos(tmp_path / "photos", each=60, side=256)

    def begun() -> list[Path]:
        return list(tmp_path.glob("runs/shards/*/.packing/request.json"))

    def stop() -> None:
        while not begun():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped, match="the same command goes on where it was"):
        load("mae_photos", [f"data.root={photos}"])
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert begun() and not list(tmp_path.glob("runs/shards/*/*.tar"))
    recipe = load("mae_photos", [f"data.root={photos}"]).recipe
    assert "going on where packing was stopped" in capsys.readouterr().out
    assert Path(recipe.data.root or "", "dataset.json").exists() and not begun()


def test_load_for_resume__finds_the_shards_in_a_storage_that_moved(photos: Path, tmp_path: Path) -> None:
    plan = load("mae_photos", [f"data.root={photos}"])
    run = tmp_path / "runs" / "mae_photos-1"
    run.mkdir()
    (run / "recipe.yaml").write_text(plan_yaml(plan))
    assert load_for_resume(run / "recipe.yaml", []).recipe == plan.recipe
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    moved = load_for_resume(tmp_path / "elsewhere" / "mae_photos-1" / "recipe.yaml", []).recipe
    shards = tmp_path / "elsewhere" / "shards" / Path(plan.recipe.data.root or "").name
    assert moved.data.train == f"{shards}/train-*.tar" and moved.evaluation.data == {"photos": str(shards)}
