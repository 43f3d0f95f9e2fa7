"""`pretrain data ...`: requests, exit codes, what is printed; from a folder of photos to a contact sheet."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from pretrain.cli.data import KINDS, data
from pretrain.cli.main import main

ROOT = Path(__file__).parents[2]
GROCERY = ROOT / "pretrain" / "demo_data" / "grocery"

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("stats", ...)` in an empty directory -> exit code, standard output, lines of standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str, list[str]]:
        code = main(["data", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return call


def test_data__surface_is_frozen() -> None:
    """A new command or option is a promise to users: it has to be added here as well."""
    surface = {
        name: [
            max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.name
            for parameter in command.params
        ]
        for name, command in data.commands.items()
    }
    assert surface == {
        "pack": [
            *("src", "dest", "--kind", "--split", "--seed", "--shard-mb", "--shard-samples", "--size", "--reencode"),
            *("--masks", "--classes", "--ignore-index", "--channels", "--name", "--dedupe", "--max-bad", "--workers"),
        ],
        "radiance": [
            *(
                "src",
                "dest",
                "--resolution",
                "--steps",
                "--rays",
                "--size",
                "--bound",
                "--box",
                "--background",
                "--axes",
                "--up",
            ),
            *("--min-psnr", "--dtype", "--cuts", "--cut-size", "--test", "--seed", "--name", "--address", "--workers"),
        ],
        "verify": ["sources", "--no-decode", "--workers"],
        "stats": ["sources", "--limit", "--json", "--workers"],
        "show": ["source", "ids", "--first", "--field", "--output", "--size"],
    }


def test_data__kinds_are_those_of_pack() -> None:
    from data_pipelines.packing import pack

    assert pack.KINDS == KINDS


WRONG = {
    "no such shards": (["verify", "nowhere.tar"], "no such shard: "),
    "no source": (["verify"], "Missing argument 'SOURCE...'"),
    "a command": (["stats", "pipe:cat a.tar"], "data source"),
    "a scheme": (["stats", "ftp://host/a.tar"], "data source with scheme"),
    "limit": (["stats", ".", "--limit", "0"], "Invalid value for '--limit'"),
    "workers": (["verify", ".", "--workers", "none"], "Invalid value for '--workers'"),
    "option": (["stats", ".", "--jsn"], "No such option '--jsn'"),
    "command": (["pak", "a", "b"], "No such command 'pak'"),
    "sample id": (["show", "{}/train-000000.tar", "-1"], "No such option '-1'"),
    "ids and first": (["show", "{}/train-000000.tar", "1", "--first", "2"], "--first 2: IDS are given as well"),
    "sheet name": (["show", "{}/train-000000.tar", "-o", "sheet.jpg"], "--output sheet.jpg: expected a name that ends"),
    "sheet folder": (["show", "{}/train-000000.tar", "-o", "no/s.png"], "--output no/s.png: there is no directory"),
    "nothing to pack": (["pack", "nowhere", "out"], "SRC nowhere: no such file or directory"),
    "no masks": (["pack", ".", "out", "--masks", "nowhere"], "--masks nowhere: no such file or directory"),
    "kind": (["pack", ".", "out", "--kind", "image"], "Invalid value for '--kind': 'image' is not one of 'auto',"),
    "shares": (["pack", ".", "out", "--split", "train=0.9,test=0.2"], "--split train=0.9,test=0.2: the shares add up"),
    "share": (["pack", ".", "out", "--split", "train=1,test=0"], "--split train=1,test=0: share 0 of test is not in"),
    "no share": (["pack", ".", "out", "--split", "train"], "--split train: '' is no number; expected NAME=SHARE"),
    "split name": (["pack", ".", "out", "--split", "a/b=1"], "--split a/b=1: 'a/b' is no name of letters, digits"),
    "split twice": (["pack", ".", "out", "--split", "a=0.5,a=0.5"], "--split a=0.5,a=0.5: a is named twice"),
    "not a number": (["pack", ".", "out", "--split", "a=nan"], "--split a=nan: share nan of a is not in (0, 1]"),
    "max bad": (["pack", ".", "out", "--max-bad", "1"], "Invalid value for '--max-bad'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_data__wrong_request_is_2_with_one_line(case: str, run: Run, tmp_path: Path) -> None:
    arguments, said = WRONG[case]
    code, out, lines = run(*(argument.format(GROCERY) for argument in arguments))
    assert (code, out, len(lines)) == (2, "", 1), lines
    assert lines[0].startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_data__both_missing_inputs_are_named(run: Run) -> None:
    code, _, lines = run("pack", "nowhere", "out", "--masks", "neither")
    assert code == 2 and [line.split(":")[1] for line in lines] == [" SRC nowhere", " --masks neither"]


def test_data__wrong_requests_and_help_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pretrain.cli.main import main\n"
        "for request in (['--help'], ['pack', '--help'], ['verify', 'no.tar'], ['stats', 's3://'], ['show', 'no.tar'],"
        " ['pack', 'no', 'out'], ['radiance', 'no', 'out'], ['radiance', '--help'],"
        " ['pack', '.', 'out', '--split', 'x']):\n"
        "    main(['data', *request])\n"
        "print([name for name in ('torch', 'numpy', 'PIL', 'ray', 'fsspec') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", data.commands)
def test_data__help_has_a_line_per_option_and_examples(command: str, run: Run) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and out.count(f"  pretrain data {command} ") >= 2
    assert all(option.help for option in data.commands[command].params if isinstance(option, click.Option))
    assert max(map(len, out.splitlines())) <= 120


def test_verify__clean_and_damaged(run: Run, tmp_path: Path) -> None:
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes((GROCERY / shard.name).read_bytes())
    code, out, lines = run("verify", str(shard), "--workers", "1")
    assert (code, lines) == (0, []) and out.startswith("no findings in 1 shards, ") and out.count("\n") == 1
    content = bytearray(shard.read_bytes())
    content[:512] = bytes(512)
    shard.write_bytes(content)
    code, out, lines = run("verify", str(shard), "--workers", "1", "--no-decode")
    found, summary = out.splitlines()
    assert (code, lines) == (1, [])
    assert found.startswith(f"{shard} at offset 0: zeroed header; the next readable one is at offset ")
    assert summary.startswith("1 finding in 1 shards, ")


def test_verify__says_what_it_did_not_read(run: Run, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.pkl", "a.flac"):
            archive.addfile(tarfile.TarInfo(name))
    code, out, _ = run("verify", "a.tar")
    assert code == 0 and "(flac 1, pkl 1; not decoded: flac; never read (pickles): pkl)" in out


def test_stats__text_and_json(run: Run) -> None:
    code, out, lines = run("stats", f"{GROCERY}/train-*.tar", "--limit", "50")
    assert (code, lines) == (0, []) and "below: the first 50 of them" in out
    assert "for the recipe: backbone.pixel_mean=[0." in out
    code, out, _ = run("stats", f"{GROCERY}/train-*.tar", "--limit", "50", "--json", "--workers", "1")
    found = json.loads(out)
    assert code == 0 and found["read"] == 50 and found["fields"]["jpg"]["count"] == 50


def test_show__text_and_sheet(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("show", f"{GROCERY}/train-*.tar", "0", "5", "--field", "jpg")
    assert code == 0 and [line[:2] for line in out.splitlines()] == ["0:", "  ", "5:", "  "]
    code, out, _ = run("show", f"{GROCERY}/train-*.tar", "--first", "3", "-o", "sheet.png", "--size", "48")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert f"are in sheet.png ({sheet.width} x {sheet.height})" in out and sheet.width == 3 * 54 + 6
    code, _, lines = run("show", f"{GROCERY}/train-*.tar", "99999")
    assert code == 2 and lines[0].startswith("error: sample id 99999 is outside 0..")


def test_pack__to_verify_stats_and_show(run: Run, tmp_path: Path) -> None:
    """Folder of classes -> shards in two splits, one photo twice -> every other command."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
            photo.save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "bee" / "copy.png").write_bytes((tmp_path / "photos" / "bee" / "0.png").read_bytes())
    request = ("pack", "photos", "shards", "--split", "train=0.8,test=0.2", "--shard-samples", "30", "--size", "20")
    code, out, lines = run(*request, "--reencode", "png", "--dedupe", "--workers", "1")
    assert (code, lines) == (0, [])
    packed, took, following = out.splitlines()
    description = json.loads((tmp_path / "shards" / "dataset.json").read_bytes())
    sizes = {name: split["samples"] for name, split in description["splits"].items()}
    assert sum(sizes.values()) == 40 and packed.startswith(
        f"packed train {sizes['train']}, test {sizes['test']} samples"
    )
    assert "; 1 duplicates and 0 broken ones left out" in packed
    assert took == "took SRC as images (each sample has cls, json, png), 2 classes: ant 0, bee 1"
    assert following == "next: pretrain data verify shards"

    code, out, _ = run("verify", "shards", "--workers", "1")
    assert code == 0 and out.startswith("no findings in ") and " 40 samples, " in out
    code, out, _ = run("stats", "shards", "--json", "--workers", "1")
    found = json.loads(out)
    assert found["fields"]["png"]["values"]["mean"] == pytest.approx(description["stats"]["mean"], rel=1e-12)
    assert found["fields"]["png"]["values"]["std"] == pytest.approx(description["stats"]["std"], rel=1e-12)
    assert found["fields"]["png"]["values"]["height"]["max"] == 20 and found["duplicates"] == 0
    assert found["class_names"] == ["ant", "bee"]
    code, out, _ = run("show", "shards", "0")
    assert code == 0 and "image 30 x 20" in out and (" ant (0)" in out or " bee (1)" in out)
    code, out, _ = run("show", "shards", "-o", "sheet.png")
    assert code == 0 and out.startswith("8 of 40 samples are in sheet.png (")

    before = {path: path.read_bytes() for path in (tmp_path / "shards").iterdir() if path.is_file()}
    code, _, lines = run("pack", "photos", "shards", "--seed", "1", "--workers", "1")
    assert code == 2 and len(lines) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "shards").iterdir() if path.is_file()} == before


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number:02d}.png")
    return folder


def test_pack__warnings_are_plain_lines(run: Run, photos: Path) -> None:
    (photos / "notes.md").write_text("of another type")
    (photos / "07.png").write_bytes(b"no picture")
    code, out, lines = run("pack", "photos", "shards", "--max-bad", "0.1", "--workers", "1")
    assert code == 0 and "0 duplicates and 1 broken ones left out" in out
    skipped, damaged = lines
    assert skipped == "warning: left out of photos, not images: 1 .md"
    assert damaged.startswith("warning: left out 1 damaged samples: 07.png: ")


def test_pack__a_worker_that_died_is_1_with_one_line(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipelines.packing import pack
    from data_pipelines.worker_pool import WorkerDied

    def die(*_: object) -> Iterator[None]:
        raise WorkerDied("a worker process ended early: killed for want of memory")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(pack, "run_jobs", die)
        code, out, lines = run("pack", "photos", "shards", "--workers", "2")
    assert (code, out) == (1, "")
    assert lines == ["error: a worker process ended early: killed for want of memory"]
    code, out, _ = run("pack", "photos", "shards", "--workers", "1")  # the same command goes on
    assert code == 0 and out.startswith("packed train 20 samples")


def test_data__a_shard_that_is_listed_but_gone_is_named_by_every_command(run: Run, tmp_path: Path) -> None:
    photos, shards = tmp_path / "photos", tmp_path / "[2024] set"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / f"{number}.png")
    assert run("pack", str(photos), str(shards), "--shard-samples", "1", "--workers", "1")[0] == 0
    assert run("stats", f"{shards}/train-*.tar", "--workers", "1")[0] == 0
    (shards / "train-000001.tar").unlink()
    said = f"1 of the 3 shards that {shards}/dataset.json lists are missing: train-000001.tar; copy them again"
    for arguments in (["stats", str(shards)], ["show", f"{shards}/*.tar"], ["pack", str(shards), "again"]):
        code, out, lines = run(*arguments)
        assert (code, out, len(lines)) == (2, "", 1) and said in lines[0]
    code, out, _ = run("verify", str(shards), "--workers", "1")
    assert code == 1 and "train-000001.tar: missing, though dataset.json lists it" in out
