"""Embeddings: what evaluation sees of every sample, by its key; killed and started again, nothing twice."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from backbones.io import save_backbone
from backbones.registry import create_backbone
from data_pipelines.packing.pack import pack
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.views.crops import eval_view
from pretrain import evaluate
from pretrain.checkpoints.references import load_backbone
from pretrain.cli.main import main
from pretrain.embeddings import embed as module
from pretrain.embeddings.embed import Embedded, embed
from pretrain.errors import RequestError, RunStopped
from tests.pretrain.conftest import write_manifest

NUM_PHOTOS = 22
Vectors = dict[str, npt.NDArray[Any]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of two classes with odd names and a hidden file, of sizes other than the backbone's."""
    rng = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        photo = tmp_path / "photos" / ("ant", "bee")[number % 2] / f"{number} ü#.{('png', 'webp')[number % 3 == 0]}"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(photo, lossless=True)
    (tmp_path / "photos" / "ant" / "._0.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.fixture
def checkpoint(tmp_path: Path, make_checkpoint: Callable[[Path, int], Path]) -> Callable[..., Path]:
    """`checkpoint(step=7, **options)`: one whose weights depend on the step."""

    def make(step: int = 7, **options: Any) -> Path:
        torch.manual_seed(step)
        options = {"depth": 1, "embed_dim": 24, "num_heads": 2, **options}
        backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=options)
        directory = make_checkpoint(tmp_path / "runs" / "run-1", step)
        save_backbone(directory / "backbone.safetensors", backbone.weights(), backbone.spec)
        write_manifest(directory, step, "run-1")
        return directory

    return make


def expected(checkpoint: Path, pictures: Sequence[Path | io.BytesIO]) -> Vectors:
    backbone: Any = load_backbone(checkpoint)
    views = [eval_view(np.asarray(Image.open(picture).convert("RGB")), 16) for picture in pictures]
    with torch.inference_mode():
        features = backbone.features(backbone.preprocess(torch.stack(views)))
    return {"cls": features.cls.numpy(), "patch_mean": features.patches.mean(1).numpy()}


def read_npy(folder: Path) -> tuple[list[str], Vectors]:
    assert {file.name for file in folder.iterdir()} == {"_embedding.json", "keys.npy", "cls.npy", "patch_mean.npy"}
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("keys", "cls", "patch_mean")}
    return arrays.pop("keys").tolist(), arrays


def read_parquet(folder: Path) -> tuple[list[str], Vectors]:
    table = parquet.read_table(folder)  # a folder of Parquet files, as readers take it
    vectors = {name: np.array(table[name].to_pylist(), np.float32) for name in table.column_names[2:]}
    return table["key"].to_pylist(), vectors


def assert_close(found: Vectors, wanted: Vectors) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-6)


@pytest.mark.parametrize(("form", "read"), [("parquet", read_parquet), ("npy", read_npy)])
def test_embed__a_folder_of_photos(
    form: str,
    read: Callable[[Path], tuple[list[str], Vectors]],
    photos: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = checkpoint()
    dest = tmp_path / "new" / "out"
    arguments = ["embed", "runs:/run-1/7", str(photos), str(dest), "--format", form, "--batch-size", "5"]
    (tmp_path / "runs" / "run-1" / "recipe.yaml").write_text("name: tiny\n")
    assert main([*arguments, "--storage", str(tmp_path / "runs")]) == 0
    begins, ends = capsys.readouterr().out.splitlines()
    assert begins == f"embedding {NUM_PHOTOS} samples of {photos} by runs:/run-1/7"
    assert ends.startswith(f"{NUM_PHOTOS} samples are in {dest}, ")
    keys, vectors = read(dest)
    pictures = sorted(path for path in photos.rglob("*.*") if not path.name.startswith("."))
    assert keys == [str(path.relative_to(photos)) for path in pictures] and len(keys) == NUM_PHOTOS
    assert_close(vectors, expected(where, pictures))
    assert os.listdir(dest.parent) == ["out"]
    told = json.loads((dest / "_embedding.json").read_text())
    assert (told["num_samples"], told["width"], told["columns"]) == (NUM_PHOTOS, 24, ["cls", "patch_mean"])
    # The same request finds it done; others are refused and change nothing.
    assert main([*arguments, "--storage", str(tmp_path / "runs")]) == 0
    assert f"({NUM_PHOTOS} from before)" in capsys.readouterr().out
    other = checkpoint(8)
    (photos / "bee" / "new.png").write_bytes(pictures[0].read_bytes())
    for changed, said in (
        (["embed", str(other), *arguments[2:]], "an embedding of another checkpoint"),
        (arguments, "an embedding of other data"),
        ([*arguments, "--tokens", "cls", "--format", "npy" if form == "parquet" else "parquet"], "of other data"),
    ):
        assert main([*changed, "--storage", str(tmp_path / "runs")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {dest}: holds ") and said in line and line.endswith("or remove it")
    assert_close(read(dest)[1], vectors)


def test_embed__shards_and_what_an_evaluation_has_stored(
    photos: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    where, shards = checkpoint(), tmp_path / "shards"
    pack(photos, shards, workers=1, splits={"train": 0.7, "test": 0.3}, shard_samples=4)
    storage = tmp_path / "runs"
    computed = embed(where, shards, tmp_path / "computed", storage=storage, batch_size=4)
    assert (computed.num_samples, computed.num_known) == (NUM_PHOTOS, 0)
    evaluate(where, ["knn"], {"mine": shards}, storage=storage)
    known = embed(where, shards, tmp_path / "known", storage=storage)
    assert known.num_known == NUM_PHOTOS
    (keys, vectors), (same_keys, same_vectors) = read_parquet(tmp_path / "computed"), read_parquet(tmp_path / "known")
    assert keys == same_keys and len(set(keys)) == NUM_PHOTOS
    assert_close(same_vectors, vectors)
    dataset = open_dataset(shards)
    samples = [dataset.read(row) for row in range(NUM_PHOTOS)]
    field = dataset.require_field("jpg", "png", "webp")
    assert keys == [sample["__key__"] for sample in samples]
    by_name = expected(where, [io.BytesIO(sample[field]) for sample in samples])
    assert_close(vectors, by_name)
    table = parquet.read_table(tmp_path / "known")
    assert set(table["shard"].to_pylist()) == {path.name for path in shards.glob("*.tar")}
    # Part of the shards is another data set: nothing is known of it, and rows are those of the whole.
    part = embed(where, f"{shards}/train-*.tar", tmp_path / "part", storage=storage, tokens="patch")
    chosen = [shard.startswith("train") for shard in table["shard"].to_pylist()]
    assert part.num_known == 0
    assert_close(read_parquet(tmp_path / "part")[1], {"patch_mean": vectors["patch_mean"][chosen]})


def test_embed__a_killed_one_goes_on(
    photos: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    warm_start: BaseContext,
) -> None:
    """SIGKILL behind row 9, when rows of the next batch are half in the files; then SIGTERM; then to the end."""
    where = checkpoint()
    whole = embed(where, photos, tmp_path / "whole", form="npy", batch_size=3)
    dest, work = tmp_path / "out", tmp_path / ".out.embedding"
    process = warm_start.Process(target=_embed_up_to, args=(dict(os.environ), where, photos, dest, 9))
    process.start()
    saved = 0
    while saved < 9 and process.is_alive():
        time.sleep(0.01)
        saved = json.loads((work / "progress.json").read_text())["rows"] if (work / "progress.json").exists() else 0
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert saved == 9 and not dest.exists()
    for name in ("cls.npy", "keys.jsonl"):
        with open(work / name, "ab") as file:
            file.write(b"half of a row")

    def interrupt(done: int, total: int) -> None:
        if done >= 15:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunStopped, match=f"stopped after 15 of {NUM_PHOTOS} samples; the same command goes on"):
        embed(where, photos, dest, form="npy", batch_size=3, progress=interrupt)
    assert not dest.exists()
    seen: list[int] = []
    made = embed(where, photos, dest, form="npy", batch_size=3, progress=lambda done, total: seen.append(done))
    assert made == Embedded(dest, NUM_PHOTOS, num_kept=15, num_known=0) and seen == [18, 21, NUM_PHOTOS]
    for name in ("keys.npy", "cls.npy", "patch_mean.npy"):
        assert (dest / name).read_bytes() == (whole.dest / name).read_bytes()
    assert not work.exists()


def _embed_up_to(environment: dict[str, str], checkpoint: Path, photos: Path, dest: Path, rows: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    module.SAVE_EVERY_S = 0.0
    embed(checkpoint, photos, dest, form="npy", batch_size=3, progress=lambda done, _: done < rows or signal.pause())


def test_embed__says_how_far_it_is_where_there_is_no_terminal(
    photos: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pretrain.reporting.progress.SAID_EVERY_S", 0.0)
    assert (
        main(["embed", str(checkpoint()), str(photos), str(tmp_path / "out"), "--batch-size", str(NUM_PHOTOS - 1)]) == 0
    )
    expected = [f"embedding: {done} of {NUM_PHOTOS}" for done in (NUM_PHOTOS - 1, NUM_PHOTOS)]
    assert capsys.readouterr().err.splitlines() == expected


def test_embed__another_request_does_not_go_on_with_a_killed_one(
    photos: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    where = checkpoint()

    def interrupt(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunStopped):
        embed(where, photos, tmp_path / "out", batch_size=3, progress=interrupt)
    assert main(["embed", str(checkpoint(8)), str(photos), str(tmp_path / "out")]) == 2
    assert json.loads((tmp_path / ".out.embedding" / "progress.json").read_text())["rows"] == 3
    assert embed(where, photos, tmp_path / "out", batch_size=50).num_kept == 3


def test_embed__wrong_requests_are_one_line_and_leave_nothing(
    photos: Path, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, bare = str(checkpoint()), str(checkpoint(8, class_token=False))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    out, data = str(tmp_path / "out"), str(photos)
    before = sorted(tmp_path.iterdir())
    for arguments, said in (
        (["nowhere", data, out], "checkpoint nowhere: no such directory; expected a directory or URI"),
        ([where, "nothing", out], "DATA nothing: no such file or directory"),
        ([where, str(tmp_path / "empty"), out], f"{tmp_path / 'empty'}: no shards (.tar) and no photos (.jpg .jpeg"),
        ([where, data, str(tmp_path / "full")], f"{tmp_path / 'full'}: is not empty and holds no embedding; choose"),
        (
            [where, data, str(tmp_path / "full" / "mine.txt")],
            f"{tmp_path / 'full' / 'mine.txt'}: already exists and is",
        ),
        ([where, data, "/"], "/: is not empty and holds no embedding; choose another"),
        ([where, data, "s3://bucket/a"], "s3://bucket/a: an embedding is written to a local disk"),
        ([where, data, out, "--device", "tpu"], "device tpu: expected auto, cpu, cuda or cuda:N"),
        ([where, data, out, "--device", "cuda:999"], "device cuda:999: this process sees "),
        ([where, data, out, "--format", "csv"], "Invalid value for '--format': 'csv' is not one of"),
        ([where, data, out, "--batch-size", "0"], "Invalid value for '--batch-size': 0 is not in the range"),
        ([bare, data, out, "--tokens", "cls"], "tokens cls: backbone 'vit_tiny_patch16_224' has no class token; use"),
    ):
        assert main(["embed", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}"), line
    (photos / "ant" / "zz.jpg").write_bytes(b"no picture")
    assert main(["embed", where, data, out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {photos / 'ant' / 'zz.jpg'}: not a JPEG")
    assert sorted(tmp_path.iterdir()) == before
    (photos / "ant" / "zz.jpg").unlink()
    assert embed(bare, data, out, form="npy").num_samples == NUM_PHOTOS
    assert sorted(os.listdir(out)) == ["_embedding.json", "keys.npy", "patch_mean.npy"]


def test_embed__data_by_the_name_that_the_recipe_has(
    photos: Path, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = checkpoint()
    (where / "recipe.yaml").write_text(
        "objective: {name: mae}\nbackbone: {name: vit_tiny_patch16_224}\n"
        "data: {train: x}\ntrain: {steps: 1, checkpoint_every: 1, global_batch_size: 8, workers: 1}\n"
        "optimizer: {lr: 1}\n"
        f"evaluation: {{data: {{mine: {photos}}}, tasks: []}}\n"
    )
    write_manifest(where, 7, "run-1")
    monkeypatch.chdir(tmp_path)
    assert embed(where, "mine", tmp_path / "out").num_samples == NUM_PHOTOS
    with pytest.raises(
        RequestError, match="DATA min: no such file or directory; the recipe of the checkpoint names mine"
    ):
        embed(where, "min", tmp_path / "other")
