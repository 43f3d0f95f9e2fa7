"""Whether the workers of a run fit on this machine: asked before a private Ray starts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.cores import usable_cores
from pretrain import machine
from pretrain.cli.main import main
from pretrain.config.load import load_recipe
from pretrain.machine import Machine, misfit, this_machine


@pytest.mark.parametrize(
    ("has", "settings", "text", "is_refused"),
    [
        ((2, 0), ["train.workers=2"], None, False),
        ((1, 0), ["train.workers=2"], None, False),
        (
            (1, 0),
            ["train.workers=4"],
            "train.workers=4: this machine has 1 CPU and no GPU, and they would train on CPUs; "
            "use train.workers=1, or --address of a cluster",
            False,
        ),
        ((2, 0), ["train.workers=8"], "train.workers=8: this machine has 2 CPUs and no GPU", False),
        ((2, 0), ["train.workers=32"], "train.workers=32: this machine has 2 CPUs and no GPU", True),
        ((2, 32), ["train.workers=32"], None, False),
        (
            (2, 32),
            ["train.workers=32", "train.device=cpu"],
            "train.workers=32: this machine has 2 CPUs and 32 GPUs",
            True,
        ),
        ((64, 32), ["train.workers=32", "train.device=cpu"], None, False),
        (
            (64, 2),
            ["train.workers=4"],
            "train.workers=4: this machine has 64 CPUs and 2 GPUs, not one GPU for each worker; use train.workers=2, "
            "train.device=cpu, or --address of a cluster",
            True,
        ),
        ((64, 2), ["train.workers=4", "cluster.gpus_per_worker=0"], None, False),
        (
            (64, 4),
            ["train.workers=4", "cluster.gpus_per_worker=2"],
            "not 2 GPUs for each worker; use train.workers=2",
            True,
        ),
        (
            (64, 0),
            ["train.device=cuda"],
            "train.device=cuda: this machine has no GPU; use train.device=cpu or auto",
            True,
        ),
        ((1, None), ["train.workers=32"], None, False),
        ((1, 0), ["train.workers=32", "cluster.address=head:6379"], None, False),
    ],
)
def test_misfit__crowds_are_warned_of_and_what_cannot_be_meant_is_refused(
    has: tuple[int, int | None],
    settings: list[str],
    text: str | None,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = misfit(load_recipe("demo", [*settings, "train.global_batch_size=64"]), Machine(*has))
    if text is None:
        assert found is None
    else:
        assert found is not None and text in found.text and found.is_refused == is_refused


@pytest.mark.parametrize(
    ("files", "visible", "gpus"),
    [
        ([], None, 0),
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], None, 2),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["kfd"], None, None),
        (["dxg"], None, None),
    ],
)
def test_this_machine__counts_without_libraries(
    files: list[str], visible: str | None, gpus: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine() == Machine(usable_cores(), gpus)


def test_run__of_more_workers_than_can_be_meant_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty-two workers on two cores were started without a word. A dry run, which may be of any machine, says it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pretrain.driver.placement.this_machine", lambda: Machine(2, 0))
    monkeypatch.setattr("pretrain.cli.dry_run.this_machine", lambda: Machine(2, 0))
    request = ["run", "demo", "train.workers=32", f"storage={tmp_path}/runs"]
    assert main(request) == 2
    said = "train.workers=32: this machine has 2 CPUs and no GPU, and they would train on CPUs; use train.workers=2"
    assert capsys.readouterr().err == f"error: {said}, or --address of a cluster\n"
    assert main([*request, "--dry-run"]) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "a private Ray on this machine, which has 2 CPUs and no GPU; 32 workers x micro-batch" in screen
    assert f"device auto, which is cpu here would be refused: {said}" in screen
    assert list(tmp_path.iterdir()) == []
