"""Text of others on a terminal: a real one, which is sent what a person would see."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from evaluation.results import EvaluationResult
from pretrain.screen import escaping_console, printable

ROOT = Path(__file__).parents[2]
ORDERS = {
    "\x1b]0;owned\x07": "\\x1b]0;owned\\x07",  # changes the title
    "\x1b[2J": "\\x1b[2J",  # clears the screen
    "\x9b31m": "\\x9b31m",  # colours, in one byte of Latin-1
    "\r": "\\r",  # writes over the line
    "\u202e": "\\u202e",  # turns the direction of writing
}
HOSTILE = "".join(ORDERS)


@pytest.mark.parametrize(("text", "shown"), [*ORDERS.items(), ("a\nb", "a\\nb"), ("\udcff", "\\udcff")])
def test_printable__shows_orders_by_their_codes(text: str, shown: str) -> None:
    assert printable(text) == printable(shown) == shown


@pytest.mark.parametrize("text", ["", "runs/ä b\t[x]", "日本語 👩‍🔬", "العربية", "C:\\x1b", "\xa0"])
def test_printable__leaves_writing_alone(text: str) -> None:
    assert printable(text) == text


def test_escaping_console__knows_no_markup_and_keeps_its_own_orders() -> None:
    written = io.StringIO()
    console = escaping_console(written, force_terminal=True, width=80)
    console.print(f"[bold]{HOSTILE}[/no] :smile:\nnext", style="red")
    shown = written.getvalue()
    assert shown.startswith("\x1b[31m[bold]\\x1b]0;owned") and "[/no] :smile:" in shown and "next" in shown
    assert not any(order in shown for order in ORDERS)


_READER_GONE = """
import sys
from pretrain.screen import escaping_console
console = escaping_console(sys.stdout)
for number in range(20_000):
    console.print(number)
print("went on", file=sys.stderr)
"""


def test_escaping_console__a_reader_that_goes_ends_nothing() -> None:
    """`pretrain run | head` ended the run, as a closed terminal did, and Ray was blamed."""
    command = [sys.executable, "-c", _READER_GONE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "0\n"
        writer.stdout.close()
        assert writer.stderr is not None and writer.stderr.read() == "went on\n"
    assert writer.returncode == 0


def test_screen__is_the_only_room_that_writes_to_a_terminal() -> None:
    """Every other one gives it lines, or prints on a console of its making."""
    writers = {"print", "Console", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "pretrain").rglob("*.py")
        if path.name != "screen.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in writers
    ]
    assert found == []


WORK = """
import logging, sys, warnings
from pathlib import Path
from pretrain.cli.main import main
for arguments in (
    ["data", "show", "hostile", "0"],
    ["data", "verify", "hostile", "--workers", "1"],
    ["data", "stats", "hostile", "--workers", "1"],
    ["leaderboard", "--storage", "runs"],
    ["data", "show", "hostile", "--field", sys.argv[1]],
    ["run", "mae_photos", f"data.root={sys.argv[1]}", f"{sys.argv[1]}=3"],
    [sys.argv[1]],
):
    main(arguments)
warnings.warn(sys.argv[1])
logging.getLogger("any").warning("%s", sys.argv[1])
raise RuntimeError(sys.argv[1])
"""


def test_commands__text_of_others_is_not_obeyed(tmp_path: Path) -> None:
    """Names of shards, keys, fields and classes, texts, results, values of the command line, and what Python says."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    image = io.BytesIO()
    np.save(image, np.zeros(3))
    with tarfile.open(folder / f"a{HOSTILE}-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in ((f"{HOSTILE}.txt", HOSTILE), (f"{HOSTILE}.cls", "0"), (f"{HOSTILE}.x{HOSTILE}", "?")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content.encode())
            tar.addfile(entry, io.BytesIO(content.encode()))
    (folder / "dataset.json").write_text(json.dumps({"classes": [f"class{HOSTILE}"]}))
    results = tmp_path / "runs/evaluations"
    results.mkdir(parents=True)
    result = EvaluationResult("x", "knn", 1, f"data{HOSTILE}[/b]", "d", "w", {"top1": 0.5}, {}, 1.0)
    (results / "x.json").write_text(result.to_json())

    ours, theirs = pty.openpty()
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "4000", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORK, HOSTILE.replace("\r", "\r ")]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment)
    os.close(theirs)
    sent = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other side was closed
            break
        if not piece:
            break
        sent += piece
    os.close(ours)
    assert process.wait(60) == 1
    shown = sent.decode().replace("\r\n", "\n")
    for order, code in ORDERS.items():
        bars = order == "\r"  # a bar goes back to the begin of its line
        assert bars or order not in shown, (order, shown)
        assert shown.count(code) >= 10, (code, shown)
    for said in ("class\\x1b", "data\\x1b", "UserWarning: \\x1b", "RuntimeError: \\x1b", "No such command"):
        assert said in shown, (said, shown)
