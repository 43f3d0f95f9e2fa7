"""Trackers beside MLflow (`tracking.also`): the same events, in TensorBoard's files or in Weights & Biases.

The driver passes on every event of a run, those of before a resume first. TensorBoard's files, `RUN_DIR/tensorboard`,
are written anew by each driver; W&B goes on with the run of that name. Of steps that were trained twice the first
counts. A tracker that fails is given up with one line in the log: nothing here can stop a run.

Not here: whether the packages are installed (`pretrain.config.checks.places`), MLflow (`pretrain.tracking.sync`).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pretrain.record.events import Evaluated, Event, Metrics, Visualizations, Warned
from pretrain.record.run_dir import RunDir

__all__ = ["Mirrors"]

log = logging.getLogger(__name__)


class Mirror(Protocol):
    """A tracker that takes numbers, pictures and texts by step."""

    def numbers(self, values: Mapping[str, float], step: int, time: float) -> None: ...
    def picture(self, name: str, path: Path, step: int, time: float) -> None: ...
    def text(self, name: str, text: str, step: int, time: float) -> None: ...
    def close(self) -> None: ...


class Mirrors:
    """Passes the events of a run on to the trackers that its recipe names.

    Args:
        names: Of `tracking.also`.
        run_dir: Of the run.
        project: What W&B calls the experiment.
        settings: The resolved recipe, without credentials.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, project: str, settings: Mapping[str, Any]) -> None:
        self._run = RunDir(run_dir)
        self._project, self._settings = project, settings
        self._open: dict[str, Mirror] = {}
        self._last_step: dict[str, int] = {}
        for name in names:
            self._try(name, lambda name=name: self._open.update({name: self._opened(name)}))

    def show(self, events: Iterable[Event]) -> None:
        """Pass events on, in their order."""
        for event in events:
            match event:
                case Metrics():
                    self._numbers({f"train/{name}": value for name, value in event.values.items()}, event)
                case Evaluated():
                    scores = {f"eval/{event.task}/{name}": value for name, value in event.metrics.items()}
                    self._numbers(scores, event)
                case Visualizations() if (path := self._run.inside(event.path)).is_file():
                    name = "/".join(filter(None, ("visualizations", event.data, event.shows)))
                    self._each("picture", name, path, event.step, event.time)
                case Warned():
                    self._each("text", f"warning/{event.about}", event.text, event.step, event.time)

    def close(self) -> None:
        """Write what is left."""
        self._each("close")
        self._open.clear()

    def _opened(self, name: str) -> Mirror:
        if name == "tensorboard":
            return _TensorBoard(self._run.path / "tensorboard")
        return _Wandb(self._run, self._project, self._settings)

    def _numbers(self, values: Mapping[str, float], event: Metrics | Evaluated) -> None:
        new = {name: value for name, value in values.items() if event.step > self._last_step.get(name, -1)}
        self._last_step.update(dict.fromkeys(new, event.step))
        if new:
            self._each("numbers", new, event.step, event.time)

    def _each(self, method: str, *arguments: Any) -> None:
        for name, mirror in list(self._open.items()):
            self._try(name, lambda mirror=mirror: getattr(mirror, method)(*arguments))

    def _try(self, name: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # of a package that is not ours, and of its server
            self._open.pop(name, None)
            reason = str(error).partition("\n")[0]
            log.warning("%s gets nothing more of this run: %s: %s", name, type(error).__name__, reason)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        package = "tensorboardX" if find_spec("tensorboardX") else "torch.utils.tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = import_module(package).SummaryWriter(str(folder))

    def numbers(self, values: Mapping[str, float], step: int, time: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def picture(self, name: str, path: Path, step: int, time: float) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, walltime=time, dataformats="HWC")

    def text(self, name: str, text: str, step: int, time: float) -> None:
        self._writer.add_text(name, text, step, walltime=time)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Offline unless WANDB_MODE or WANDB_API_KEY says otherwise: without a key it would ask for one."""

    def __init__(self, run: RunDir, project: str, settings: Mapping[str, Any]) -> None:
        self._wandb = import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = self._wandb.init(
            project=project,
            id=run.run_id,
            name=run.run_id,
            dir=str(run.path),
            config=dict(settings),
            resume="allow",
            mode=mode,
        )

    def numbers(self, values: Mapping[str, float], step: int, time: float) -> None:
        self._run.log({**values, "step": step})  # not as its own step, which must not go back: scores come late

    def picture(self, name: str, path: Path, step: int, time: float) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "step": step})

    def text(self, name: str, text: str, step: int, time: float) -> None:
        self._run.summary[name] = f"step {step}: {text}"

    def close(self) -> None:
        self._run.finish()
