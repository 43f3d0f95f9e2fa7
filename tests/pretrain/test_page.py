from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pretrain.errors import RequestError
from pretrain.record.events import (
    CheckpointPublished,
    Evaluated,
    EvaluationFailed,
    Failed,
    Finished,
    Metrics,
    Resumed,
    SourceOpened,
    Start,
    Taught,
    Visualizations,
    Warned,
)
from pretrain.record.journal import Journal
from pretrain.record.run_dir import RunDir
from pretrain.reporting.page import write_report
from tests.headless_browser import look_at

RECIPE = """
name: tiny
description: <b>MAE</b> on small photos
objective: {name: mae}
backbone: {name: vit_tiny_patch16_224}
data: {train: /data/photos/train-*.tar}
train: {steps: 400, global_batch_size: 64, workers: 2, zero_stage: 1, precision: fp32, seed: 0}
evaluation: {select: linear/photos/top1}
"""


def resumed(step: int) -> Resumed:
    counts = {"tensors": 1, "tensors_total": 1, "optimizer_step": step, "rng_states": 2, "saved_world_size": 2}
    return Resumed(step=step, samples_seen=64 * step, epoch=0, position=64 * step, **counts)


def scores(step: int, protocol: str, data: str, **metrics: float) -> Evaluated:
    return Evaluated(step=step, protocol=protocol, data=data, metrics=metrics, key="k", seconds=1.0, cached=False)


class Page(HTMLParser):
    """The cells of the tables, the sources of the images and everything that would be loaded from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.images: list[str] = []
        self.external: list[str] = []
        self.rows: list[list[str]] = []
        self._open = ""
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag if tag in ("td", "th", "small") else self._open
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if str(value).startswith("data:image/") else self.external).append(str(value))
        if tag in ("script", "link", "iframe"):
            self.external.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[[Path, int], Path]) -> Path:
    """A run of 400 steps with a restart at 250, checkpoints, scores with and without intervals, and pictures."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny-20260101-000000-0001"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(RECIPE)
    rng = np.random.default_rng(0)
    with Journal(run_dir / "journal.jsonl") as journal:
        journal.write(Start(world_size=2, total_steps=400, step=0, device="cpu"))
        for name, share, left_out in (("web", 0.75, {"duplicates": 12, "rejected": 3}), ("own", 0.25, {})):
            source = {"name": name, "shards": f"/data/{name}/train-*.tar", "share": share, "digest": name * 20}
            numbers = {"num_shards": 2, "samples": 9600, "splits": {"train": 9600, "test": 400}}
            journal.write(SourceOpened(step=0, stage="", **source, **numbers, **left_out))
        journal.write(Taught(step=0, stage="", teacher="runs:/large/90: step 90"))
        before = -1
        for step in [*range(0, 250, 10), *range(210, 401, 10)]:
            if step < before:
                journal.write(resumed(200))
            before = step
            loss = 0.5 + math.exp(-step / 90) + 0.01 * rng.standard_normal()
            values = {"loss": loss, "lr": 1e-3 * min(1, step / 40), "grad_norm": loss * 2, "samples_per_s": 300.0}
            values |= {"samples_seen": 64.0 * step, "corrupt_samples": step // 200}
            journal.write(Metrics(step=step, values=values))
            if step % 100 == 0:
                path = make_checkpoint(run_dir, step)
                journal.write(CheckpointPublished(step=step, path=str(path.relative_to(run_dir))))
                picture = RunDir(run_dir).visualizations(step)
                picture.parent.mkdir(exist_ok=True)
                names = PngInfo()
                names.add_text("rows", "clean, <masked>")
                noise = Image.fromarray(rng.integers(0, 255, (32, 96, 3), dtype=np.uint8))
                noise.resize((384, 128), 0).save(picture, pnginfo=names)
                journal.write(Visualizations(step=step, path=str(picture.relative_to(run_dir))))
        journal.write(Finished(step=400))
    with Journal(run_dir / "evaluations.jsonl") as evaluations:
        for step, top1, miou in ((0, 0.312, 0.41), (100, 0.4, 0.45), (300, 0.56, 0.6), (400, 0.531, 0.62)):
            top = {"top1": top1, "top1_ci_low": top1 - 0.03, "top1_ci_high": top1 + 0.03, "top5": 0.9}
            evaluations.write(scores(step, "linear", "photos", **top))
            evaluations.write(scores(step, "segmentation", "chair", miou=miou, miou_position_prior=0.2))
            for shows in ("tokens", "knn_confusion", "knn_unheard"):
                sheet = RunDir(run_dir).visualizations(step, "photos", shows)
                Image.new("RGB", (8, 4), (step // 2, 0, 0)).save(sheet)
                path = str(sheet.relative_to(run_dir))
                evaluations.write(Visualizations(step=step, path=path, data="photos", shows=shows))
        evaluations.write(EvaluationFailed(step=400, protocol="knn", data="photos", error="out of <memory>"))
        evaluations.write(Warned(step=300, about="regression", text="worse <beyond> noise"))
    return run_dir


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path)


def test_write_report__one_self_contained_page(page: Page) -> None:
    assert page.external == [] and "http" not in page.text.replace("http-equiv", "")
    assert len(page.images) == 2 + 1 + 4 + 5 + 4  # headlines, top5, training, pictures of training and of checkpoints
    for image in page.images:
        content = base64.b64decode(image.partition("base64,")[2], validate=True)
        assert content.startswith((b"\x89PNG", b"<svg"))
    assert 'class="badge finished"' in page.text and "<dd>1 x</dd>" in page.text
    assert page.text.count("<figcaption>step 300; rows: clean, &lt;masked&gt;</figcaption>") == 1
    assert "torch 2.15.0" in page.text and "global_batch_size: 64" in page.text
    assert "<dt>teacher</dt><dd>runs:/large/90: step 90</dd>" in re.sub(r">\s+<", "><", page.text)
    assert "<dd>0 min 8 s in all; the last ended 0 min 0 s after training</dd>" in page.text


def test_write_report__table_of_checkpoints_and_scores(page: Page) -> None:
    assert page.rows[0] == ["step", "linear/photos top1", "segmentation/chair miou", "knn/photos "]
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["0 random backbone"] == ["31.2% 28.2% to 34.2%", "41.0%", "not evaluated"]
    assert rows["300 best"][0] == "56.0% 53.0% to 59.0%"
    assert rows["200 "] == ["not evaluated"] * 3
    assert rows["400 "] == ["53.1% 50.1% to 56.1%", "62.0%", "failed"]


def test_write_report__baseline_is_the_floor_of_the_chart(page: Page) -> None:
    charts = [base64.b64decode(i.partition("base64,")[2]).decode() for i in page.images if "svg" in i[:20]]
    dashed = [re.findall(r"<path[^>]* stroke-width=[^>]* stroke-dasharray", chart) for chart in charts]
    assert [len(lines) for lines in dashed] == [1, 2, 1, *[0] * 4], "random, and of mIoU what positions alone get"
    assert "position prior 20.0%" in charts[1] and "random backbone 41.0%" in charts[1] and "top5" in charts[2]
    assert "21.9 points above the random backbone" in page.text


@pytest.mark.parametrize("title", ["What patch features look like: photos", "What is taken for what: photos, knn"])
def test_write_report__pictures_of_the_first_and_the_newest_checkpoint_stand_side_by_side(
    page: Page, title: str
) -> None:
    assert "unheard" not in page.text, "a kind that this page has no words for"
    section = page.text.partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", section) == ["step 0", "step 400"]
    shown = [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r'base64,([^"]*)"', section)]
    assert [image.getpixel((0, 0)) for image in shown] == [(0, 0, 0), (200, 0, 0)]
    assert section.count('loading="lazy"') == 2


def test_write_report__on_a_phone_each_cell_has_the_name_of_its_column(page: Page) -> None:
    names = re.findall(r'<td data-name="([^"]*)"', page.text)
    heads = ("step", "trained on", "evaluated on")
    assert len(names) == sum(len(row) for row in page.rows if row[0] not in heads), "every cell"
    assert names[:4] == page.rows[0], "as the head of the table, which a phone does not show"
    assert "@media (prefers-color-scheme: dark)" in page.text and "@media (max-width: 640px)" in page.text


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390], ids=["wide", "phone"])
def test_write_report__in_a_browser_nothing_is_cut_off_or_faint(
    run_dir: Path, storage: Path, tmp_path: Path, browser: str, width: int, is_dark: bool
) -> None:
    plain = storage / "a_run_with_a_name_that_is_longer_than_a_phone_is_wide-20260101-000000-0002"
    plain.mkdir()
    (plain / "recipe.yaml").write_text(RECIPE)
    with Journal(plain / "journal.jsonl") as journal:
        journal.write(Metrics(step=10, values={"loss": math.nan, "samples_per_s": 3.0}))
        journal.write(Failed(error="/a/path/that/is/longer/than/a/phone/is/wide/" + "folder/" * 20))
    with Journal(plain / "evaluations.jsonl") as evaluations:
        for step in (0, 10):
            evaluations.write(
                scores(step, "masked_reconstruction", "volumes_with_a_long_name", psnr=12.0, psnr_constant=11.0)
            )
    for run in (run_dir, plain):
        seen = look_at(browser, write_report(run), width=width, is_dark=is_dark)
        (tmp_path / f"{run.name}.png").write_bytes(seen.png)
        assert (seen.complaints, seen.cut_off, seen.faint) == ([], [], [])
        assert seen.brightness < 60 if is_dark else seen.brightness > 200
        with Image.open(io.BytesIO(seen.png)) as screenshot:
            assert screenshot.width == width and screenshot.height > 800


def test_write_report__findings_of_training_and_of_evaluations(page: Page, storage: Path) -> None:
    assert "<li>step 300: worse &lt;beyond&gt; noise</li>" in page.text
    run_dir = storage / "dropped"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(RECIPE)
    assert "<h2>Findings</h2>" not in write_report(run_dir).read_text()
    with Journal(run_dir / "journal.jsonl") as journal:
        journal.write(Metrics(step=10, values={"loss": 1.0, "corrupt_samples": 3.0}))
    with Journal(run_dir / "evaluations.jsonl") as evaluations:
        for step in (0, 10):
            of = {"step": step, "protocol": "few_shot", "data": "photos"}
            evaluations.write(EvaluationFailed(**of, error="too few", left_out=True))
    text = write_report(run_dir).read_text()
    assert "<li>3 samples could not be read and were left out</li>" in text
    assert text.count("few_shot/photos is left out of its suite: too few") == text.count("few_shot") == 1


def test_write_report__data_by_source_with_what_was_left_out(page: Page, storage: Path) -> None:
    rows = {row[0]: row[1:] for row in page.rows}
    counted = "9600 in 2 shards (packed: train 9600, test 400)"
    seen = "19200, 2 passes", "6400, 0.667 passes"
    assert rows["web: /data/web/train-*.tar"] == [counted, seen[0], "12 duplicates, 3 damaged", "webwebwebweb"]
    assert rows["own: /data/own/train-*.tar"] == [counted, seen[1], "not recorded", "ownownownown"]
    assert "could not read and replaced by others: 2." in page.text
    assert rows["photos"] == ["linear", "not recorded", "not recorded", "not recorded", "not recorded"]

    run_dir = storage / "evaluated"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(RECIPE)
    counts = {"num_train": 900, "num_test": 100, "num_test_in_train": 7, "data_digest": "0123456789abcdef"}
    with Journal(run_dir / "evaluations.jsonl") as evaluations:
        for protocol, known in (("knn", counts), ("linear", counts), ("spectrum", {**counts, "data_digest": "f" * 64})):
            evaluations.write(replace(scores(10, protocol, "photos", top1=0.5, rankme=2.0), **known))
    rows_of_data = [row for row in Page(write_report(run_dir)).rows if row[0] == "photos"]
    assert rows_of_data == [
        ["photos", "knn, linear", "900", "100", "7", "0123456789ab"],
        ["photos", "spectrum", "900", "100", "7", "f" * 12],
    ]


def test_write_report__data_of_older_runs_are_as_their_checkpoints_know_them(
    storage: Path, make_checkpoint: Callable[[Path, int], Path]
) -> None:
    run_dir = storage / "older"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(RECIPE)
    row = ["/data/photos/train-*.tar", "?", "0", "not recorded", "?"]
    assert row in Page(write_report(run_dir)).rows, "no checkpoint yet"
    manifest = make_checkpoint(run_dir, 10) / "checkpoint.json"
    order = {"dataset": "0123456789abcdef", "num_samples": 90}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "stream": {"order": order}}))
    with Journal(run_dir / "journal.jsonl") as journal:
        journal.write(Metrics(step=10, values={"loss": 1.0, "samples_seen": 640.0}))
    page = Page(write_report(run_dir))
    assert ["/data/photos/train-*.tar", "90", "640", "not recorded", "0123456789ab"] in page.rows


def test_write_report__nothing_from_the_run_becomes_markup(page: Page) -> None:
    assert "<b>MAE</b>" not in page.text and "&lt;b&gt;MAE&lt;/b&gt;" in page.text
    assert "out of <memory>" not in page.text and "out of &lt;memory&gt;" in page.text


def test_write_report__a_run_that_has_only_begun(storage: Path) -> None:
    run_dir = storage / "young"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(RECIPE)
    page = Page(write_report(run_dir))
    assert page.images == [] and 'class="badge not-finished">not finished<' in page.text
    with Journal(run_dir / "journal.jsonl") as journal:
        journal.write(Start(world_size=2, total_steps=400, step=0, device="cpu"))
        journal.write(Metrics(step=10, values={"loss": math.nan}))
        journal.write(Failed(error="loss is not finite"))
    page = Page(write_report(run_dir))
    assert len(page.images) == 1 and "not finite at step 10" in page.text and 'class="badge failed"' in page.text


def test_write_report__an_evaluation_repaired_later_is_no_error(storage: Path) -> None:
    run_dir = storage / "repaired"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(RECIPE)
    with Journal(run_dir / "evaluations.jsonl") as evaluations:
        evaluations.write(EvaluationFailed(step=400, protocol="knn", data="photos", error="out of memory"))
        evaluations.write(scores(400, "knn", "photos", top1=0.5))
    page = Page(write_report(run_dir))
    assert "out of memory" not in page.text
    assert page.rows[1] == ["400 deleted", "50.0%"]


def test_write_report__refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"not a run directory; expected runs/RUN_ID with recipe\.yaml"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "recipe", ["a: [", "", "- x", "stages: 3", "train: {steps: x}\nstages: [{}, {name: b}]", "\xff", None]
)
def test_write_report__a_damaged_recipe_costs_only_what_it_says(
    storage: Path, recipe: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = storage / "damaged"
    run_dir.mkdir()
    if recipe is None:
        recipe = "a" * 5000 + ": " + "[" * 5000
    (run_dir / "recipe.yaml").write_text(recipe, encoding="latin-1")
    (run_dir / "journal.jsonl").write_text(
        '{"time": 1e300, "kind": "finished", "step": 20}\n'
        '{"time": 1, "kind": "visualizations", "step": 20, "path": "/etc/passwd"}\n'
        '{"time": 1, "kind": "metrics", "step": 20, "values": {"loss": 0.25}}\n'
    )
    page = Page(write_report(run_dir))
    assert "<b>0.25</b>" in page.text and "20 of ?" in page.text
    has_shape = recipe.startswith("train:")  # of a recipe, though not with the settings of one
    assert has_shape or f"{run_dir / 'recipe.yaml'} is damaged: " in caplog.text
    assert "data:image/png;base64,cm9vd" not in page.text, "a file of another place is in the page"


def test_write_report__damaged_lines_cost_nothing_but_themselves(storage: Path) -> None:
    """Neither a line that lacks a field nor one of a newer version takes the page down."""
    run_dir = storage / "damaged"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(RECIPE)
    (run_dir / "journal.jsonl").write_text(
        '{"time": 1, "kind": "metrics", "values": {"loss": 1.0}}\n'
        '{"time": 1, "kind": "metrics", "step": 10, "values": null}\n'
        '{"time": 1, "kind": "telemetry", "watts": 3}\n'
        '{"time": 1, "kind": "metrics", "step": 20, "values": {"loss": 0.25}, "gpu": 3}\n'
        '{"kind": "warning"}\n{"time": 1, "kind": "finished", "step": 20}\n'
    )
    (run_dir / "evaluations.jsonl").write_text('{"time": 1, "kind": "evaluation", "step": 20, "protocol": "knn"}\n')
    page = Page(write_report(run_dir))
    assert 'class="badge finished"' in page.text and "<b>0.25</b>" in page.text


def test_write_report__runs_of_before_the_renames_can_be_read(storage: Path) -> None:
    run_dir = storage / "old"
    (run_dir / "pictures").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(RECIPE)
    (run_dir / "pictures" / "step-00000010.png").write_bytes(b"\x89PNG")
    (run_dir / "journal.jsonl").write_text(
        '{"time": 1.0, "kind": "start", "step": 0, "total_steps": 10, "world_size": 2, "device": "cpu"}\n'
        '{"time": 2.0, "kind": "metrics", "step": 10, "values": {"loss": 0.5, "images_per_s": 321.0}}\n'
        '{"time": 2.0, "kind": "pictures", "step": 10, "path": "pictures/step-00000010.png"}\n'
    )
    page = Page(write_report(run_dir))
    assert "<b>321</b>" in page.text and sum("image/png" in image[:20] for image in page.images) == 1
