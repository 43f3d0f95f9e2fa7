"""Evaluate checkpoints: the same function by hand (`pretrain evaluate`), from Python, and as a task of a run.

Which checkpoints of a run are evaluated (`due`, by the run itself and by a schedule), and which keep their training
state (`retention`), is decided here.

Not here: the protocols (`evaluation`), starting evaluations and pruning (`pretrain.driver`).
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from data_pipelines.cores import usable_cores
from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json
from data_pipelines.storage.locations import is_local
from evaluation.protocol import FLOORS, BrokenError, EvaluationError, Metric, ranked
from pretrain.config.schema import EvaluationTask, Recipe, TrainConfig
from pretrain.config.stages import Plan, written_stages
from pretrain.config.values import parse_yaml
from pretrain.errors import RequestError, last_line
from pretrain.record.events import Evaluated, EvaluationFailed, Warned, from_json
from pretrain.record.journal import read_events
from pretrain.record.pictures import Drawn
from pretrain.record.remote_runs import brought, push_results
from pretrain.record.run_dir import RECIPE, runs_in
from pretrain.remote.folder import answering
from pretrain.remote.places import shown_storage
from pretrain.screen import say as say_line

if TYPE_CHECKING:
    from evaluation.runner import EvaluationResult
    from evaluation.threads import Threads

__all__ = [
    "Place",
    "due",
    "evaluate",
    "evaluate_tasks",
    "excerpt",
    "leaderboard",
    "retention",
    "suitable_protocols",
]

log = logging.getLogger(__name__)


def evaluate_tasks(
    checkpoint: str,
    step: int,
    tasks: Sequence[EvaluationTask],
    directory: str,
    storage: str,
    *,
    device: str | None,
    threads: int,
    training: str,
    half_features: bool = False,
    told: str | None = None,
) -> list[Evaluated | EvaluationFailed | Drawn | Warned]:
    """Run the evaluation tasks of a checkpoint on one data set in a process of their own, which shares the features.

    One after the other; one that fails stops no other. What a suite has that is nothing for the checkpoint or the data
    is left out, with the reason. Then pictures for people are drawn, unless all have failed; what
    stops one of them is a warning. While `training` exists, one thread of low priority computes.

    Args:
        checkpoint: A checkpoint directory or URI.
        step: Its optimizer step.
        tasks: Protocols and sizes.
        directory: Where the data lies.
        storage: Root of runs and evaluations.
        device: "cpu" where every GPU belongs to a trainer; None: CUDA if this process sees a device, else the CPU.
        threads: How many may compute on the CPU.
        training: A file that is there while trainers are at work.
        half_features: Store features of samples in half precision.
        told: A file that gets lines about long work; None: they are printed.

    Returns:
        What the run records about each task, and the pictures that it keeps.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    from evaluation.progress import telling
    from evaluation.threads import Threads
    from pretrain.checkpoints.references import resolve

    computing = Threads(threads, beside_trainers=Path(training).exists)
    computing.run(import_module, "evaluation.runner")
    events: list[Evaluated | EvaluationFailed | Drawn | Warned] = []
    results: list[EvaluationResult] = []
    try:
        path = resolve(checkpoint, Path(storage))
    except RequestError as error:
        is_gone = is_local(checkpoint) and not Path(checkpoint).exists()  # the run itself names it, so it was there
        said = f"its checkpoint {checkpoint} is gone" if is_gone else last_line(error)
        return [EvaluationFailed(step=step, protocol=task.protocol, data=task.data, error=said) for task in tasks]
    for task in tasks:
        try:
            with telling(partial(_say, told, f"step {step} {task.protocol}/{task.data}")):
                options: dict[str, Any] = {"device": device, "threads": computing, "half_features": half_features}
                result = _evaluate(path, task, Path(directory), Path(storage), **options)
            results.append(result)
            events.append(_event(step, result))
        except Exception as error:  # of any type: protocols of other packages raise what they like
            left_out = is_left_out(task, error)
            said = last_line(error) if left_out else f"{type(error).__name__}: {last_line(error)}"
            failed = EvaluationFailed(step=step, protocol=task.protocol, data=task.data, error=said, left_out=left_out)
            events.append(failed)
    if results:
        try:
            for shows, png in _pictures(path, tasks[0], Path(directory), results, Path(storage), device, computing):
                events.append(Drawn(step, tasks[0].data, shows, png))
        except Exception as error:  # whatever it is, the scores count
            said = f"a picture of {tasks[0].data} is not drawn: {type(error).__name__}: {last_line(error)}"
            events.append(Warned(step=step, about="pictures", text=said))
    return events


def evaluate(
    checkpoint: str | os.PathLike[str],
    protocols: Sequence[str] | None = None,
    data: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    storage: str | os.PathLike[str] = "runs",
    batch_size: int | None = None,
    device: str | None = None,
    suite: str | None = None,
    again: bool = False,
    half_features: bool | None = None,
    pictures: str | os.PathLike[str] | None = None,
    said: Callable[[str], None] = lambda _: None,
) -> list[EvaluationResult]:
    """Evaluate a checkpoint.

    Args:
        checkpoint: A directory or URI, `runs:/ID[/step]`, `models:/NAME@ALIAS`, an exported FILE.safetensors, or
            weights of others as `timm:NAME` and `timm:NAME@FILE`; see `pretrain.checkpoints.gradable`.
        protocols: Names of protocols; default: those of the checkpoint's recipe, else those usual for the backbone
            whose labels the data has.
        data: Name -> directory with train-*.tar and test-*.tar; default: the data of the checkpoint's recipe.
        storage: Root of runs and evaluations, a directory or URI.
        batch_size: Samples at a time; decides speed and memory, no score. None: as suits the device.
        device: As torch names it; None: CUDA if this process sees a device, else the CPU.
        suite: One of `evaluation.suites.SUITES`, in the place of `protocols`: those of it that fit the backbone and the
            labels of the data.
        again: Compute what is known as well, and replace it; frozen features are kept.
        half_features: Store features of samples in half precision; None: as the recipe says whose tasks are run, else
            in single precision.
        pictures: A directory for pictures of what the checkpoint makes of test samples, `DATA-KIND.png`; None: none
            are drawn. What keeps one from being drawn is told to `said`.
        said: Is told what is under way.

    Returns:
        One result per protocol and data set, in the order asked for. Known results are not computed again. Protocols
        that were not named and that the data turn out to be too few for are left out, and `said` is told why.

    Raises:
        RequestError: An unknown checkpoint, protocol, data set or device.
        EvaluationError, DataError: Data that a protocol which was named, or every one, cannot use.
    """
    from evaluation.progress import telling
    from evaluation.registry import names
    from pretrain.checkpoints.gradable import gradable
    from pretrain.config.load import in_storage

    root = brought(storage)
    path = gradable(str(checkpoint), root)
    if suite is not None:
        data = data or dict(_data_of(path, root))
    if unknown := [name for name in protocols or () if name not in names()]:
        raise RequestError(*(f"protocol {name!r} is unknown; there are: {', '.join(names())}" for name in unknown))
    if data is not None:
        asked = [
            (EvaluationTask(protocol, name), Path(directory))
            for name, directory in data.items()
            for protocol in protocols or suitable_protocols(path, Path(directory), suite)
        ]
    else:
        recipe = _recipe_of(path)
        half_features = recipe.evaluation.half_features if half_features is None else half_features
        tasks = [task for task in recipe.evaluation.tasks if not protocols or task.protocol in protocols]
        asked = [
            (task, Path(in_storage(recipe.evaluation.data[task.data], recipe.storage, str(root)))) for task in tasks
        ]
    if not asked and data is not None:
        raise RequestError(f"{path}: no protocol is usual for this backbone and the labels of the data; name one")
    if not asked:
        raise RequestError(f"{path}: its recipe has no such evaluation task; give --data NAME=DIRECTORY")
    if device is not None:
        _require_device(device)
    results: list[EvaluationResult] = []
    refused: list[EvaluationError] = []
    for number, (task, directory) in enumerate(asked, start=1):
        if len(asked) > 1:
            said(f"{number}/{len(asked)}: {task.protocol} on {task.data}")
        try:
            with telling(_about(f"{task.protocol} on {task.data}", said)):
                options: dict[str, Any] = {"batch_size": batch_size, "device": device, "force": again}
                result = _evaluate(path, task, directory, root, **options, half_features=bool(half_features))
            results.append(result)
        except EvaluationError as error:
            if protocols or (data is None and not is_left_out(task, error)):  # by name, here or in the recipe
                raise
            refused.append(error)
            said(f"warning: {task.protocol} on {task.data} is left out: {error}")
    if refused and not results:
        raise refused[0]
    if pictures is not None:
        for task, directory in {task.data: (task, directory) for task, directory in reversed(asked)}.values():
            of_data = [result for result in results if result.data == task.data]
            _draw(path, task, directory, of_data, root, device, Path(pictures), said)
    with answering(shown_storage(root)):
        push_results(root)
    return results


def _about(what: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """`say`, with what its lines are about before them."""
    return lambda text: say(f"{what}: {text}")


def _say(path: str | None, what: str, text: str) -> None:
    """A line with the time, at the end of a file or on standard output; a full disk costs no score."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}: {text}"
    if path is None:
        say_line(line)
        return
    with suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def is_left_out(task: EvaluationTask, error: Exception) -> bool:
    """Whether a task that was not named, but is one of a suite, turned out to be nothing for its checkpoint or data."""
    is_unfit = isinstance(error, EvaluationError) and not isinstance(error, BrokenError)
    return task.suite is not None and is_unfit


def due(
    plan: Plan,
    steps: Iterable[int],
    done: Container[tuple[int, str, str]],
    tasks: Sequence[EvaluationTask] | None = None,
) -> Iterator[tuple[int, EvaluationTask]]:
    """What is still to be evaluated of a run: (step, task), in the order of `steps`.

    That is every `evaluation.every`-th checkpoint of a stage and its last one, unless the task says how often or that
    the last one of the run is enough, and the backbone that the run began with (step 0) if it is asked for.

    Args:
        plan: Of the run.
        steps: Of its published checkpoints.
        done: (step, protocol, data) of the scores there are.
        tasks: Of a schedule; None: those of the run's recipe, if it evaluates at all.
    """
    evaluation = plan.recipe.evaluation
    if tasks is None:
        tasks = evaluation.tasks if evaluation.enabled else ()
    for step in steps:
        stage = plan.stages[plan.index_at(step)]
        number = -(-(step - stage.first_step) // stage.recipe.train.checkpoint_every)
        for task in tasks:
            if step == 0:
                is_due = evaluation.baseline
            elif task.at == "last":
                is_due = step == plan.total_steps
            else:
                is_due = step == stage.last_step or number % (task.every or evaluation.every) == 0
            if is_due and (step, task.protocol, task.data) not in done:
                yield step, task


def retention(train: TrainConfig, trained: Sequence[int], best: Iterable[int]) -> set[int]:
    """The steps of a run whose training state is kept: the newest ones and the best ones.

    Args:
        train: Of the run; `keep_last` and `keep_best` decide.
        trained: Steps of its published checkpoints but the random backbone, ascending.
        best: The same from the best to the worst, as far as they have scores; no more than needed are taken from it.
    """
    return {*trained[-train.keep_last :], *islice(best, train.keep_best)}


@dataclass(frozen=True)
class Place:
    """One line of the leaderboard.

    Attributes:
        protocol, data, metric: What was asked, and its headline.
        score: The headline's value.
        interval: Its 95 % interval, for people; empty where none was recorded.
        num_test: Test samples that the score is of; 0: not recorded.
        run: Whose checkpoint it is; of weights of other tools what they were given as, and "(by hand)".
        step: None for such weights.
        recipe: Of the run.
        by_hand: Evaluated outside the run.
        data_digest: What the data were; empty: not recorded.
        bounds: Of the interval; None where none was recorded.
    """

    protocol: str
    data: str
    metric: Metric
    score: float
    interval: str
    num_test: int
    run: str
    step: int | None
    recipe: Path | None = None
    by_hand: bool = False
    data_digest: str = ""
    bounds: tuple[float, float] | None = None

    @property
    def shown_run(self) -> str:
        """The run for people, who see there as well what was evaluated outside of it."""
        return f"{self.run} (by hand)" if self.by_hand and self.step is not None else self.run

    @property
    def is_floor(self) -> bool:
        """Whether it is of no backbone at all."""
        return self.run in FLOORS.values()

    @property
    def start(self) -> str:
        """Of step 0, what the run began with: "random" or, where it was given weights, "initial"; else empty.

        This reads the recipe: most places are never shown.
        """
        return "" if self.step != 0 or self.recipe is None else _began_with(self.recipe)


def leaderboard(storage: str | os.PathLike[str] = "runs") -> list[Place]:
    """All headline scores under `storage`, of runs and by hand: by protocol and data, the best first.

    Of equal scores that of the newest run comes first. Scores in different units are listed apart, and so are scores on
    other samples, whatever the data were called: data have the name by which the newest run knows them, and the
    beginning of their digest where that name is of other data as well.
    """
    groups: dict[tuple[str, str, Metric], list[Place]] = {}
    for place in _with_one_name(list(_places(brought(storage)))):
        groups.setdefault((place.protocol, place.data, place.metric), []).append(place)
    order = sorted(groups, key=lambda group: (group[0], group[1], group[2].name, group[2].unit))
    return [
        groups[group][idx]
        for group in order
        for idx in ranked({idx: place.score for idx, place in enumerate(groups[group])}, group[2])
    ]


def excerpt(places: Sequence[Place], number: int) -> list[Place]:
    """Of one group of the leaderboard the best `number`, and what their runs began with.

    Where none of these runs was evaluated at step 0, the best of the others' is there to compare with.
    """
    shown = list(places[:number])
    runs = {place.run for place in shown}
    starts = [place for place in places[number:] if place.step == 0]
    shown += [place for place in starts if place.run in runs]
    return shown if any(place.step == 0 for place in shown) else shown + starts[:1]


def _places(storage: Path) -> list[Place]:
    """Newest runs first, then what was evaluated by hand."""
    found: list[Place] = []
    of_runs: set[str] = set()
    owners: dict[str, Place] = {}  # of weights
    for run in reversed(runs_in(storage)):
        try:
            events, _ = read_events(run.evaluations)
        except OSError as error:
            log.warning("%s: not readable, passed over (%s)", run.evaluations, error.strerror)
            continue
        scores = [event for event in events if isinstance(event, Evaluated)]
        of_runs.update(event.key for event in scores)
        newest = {(event.step, event.task): event for event in scores}  # a run and a schedule may both tell of one
        for event in newest.values():
            known = event if event.data_digest else _with_digests(event, storage)
            place = _place(known, run.run_id, event.step, run.recipe)
            found.append(place)
            owners.setdefault(known.weights_digest, place)
    owners.pop("", None)
    for path in sorted((storage / "evaluations").glob("*.json")):
        if path.stem in of_runs:
            continue
        try:
            record = parse_json(path.read_text())
            of_an_event = {"kind": Evaluated.kind, "time": 0, "step": 0}
            num_test = _num_scored(record.get("details") or {})
            scored = from_json({"seconds": 0.0, "cached": True, "num_test": num_test, **record, **of_an_event})
            if not isinstance(scored, Evaluated):
                raise ValueError("without metrics")
        except (ValueError, TypeError, AttributeError, OSError) as error:
            log.warning("%s: not an evaluation, passed over (%s: %s)", path, type(error).__name__, error)
            continue
        owner = owners.get(scored.weights_digest)
        if owner is not None:
            found.append(_place(scored, owner.run, owner.step, owner.recipe, by_hand=True))
        else:
            whose, step = _known_as((record.get("details") or {}).get("known_as"))
            found.append(_place(scored, FLOORS.get(scored.weights_digest, whose), step, by_hand=True))
    return found


def _known_as(recorded: Any) -> tuple[str, int | None]:
    """Whose weights a result by hand says that it is of: a run and a step, or what was given to `evaluate`."""
    match recorded:
        case {"run_id": str(run), "step": int(step)}:
            return run, step
        case {"reference": str(reference)}:
            return f"{reference} (by hand)", None
    return "(by hand)", None


def _with_digests(event: Evaluated, storage: Path) -> Evaluated:
    """With those of data and weights, as the store of results has them: records of older runs do not say."""
    try:
        record = parse_json((storage / "evaluations" / f"{event.key}.json").read_text())
        data, weights = str(record.get("data_digest", "")), str(record.get("weights_digest", ""))
    except (OSError, ValueError, AttributeError):
        return event
    return replace(event, data_digest=data, weights_digest=weights)


def _with_one_name(places: Sequence[Place]) -> list[Place]:
    """The same places, each data set by one name, and no two of a protocol by the same.

    Protocols that read other samples or fields of one data set have other digests of it, and it is no other for that.
    """
    name_of: dict[str, str] = {}
    for place in places:
        name_of.setdefault(place.data_digest or f"named {place.data}", place.data)
    data_of = {(place.protocol, place.data_digest or f"named {place.data}") for place in places}
    count = Counter((protocol, name_of[data]) for protocol, data in data_of)

    def named(place: Place) -> str:
        name = name_of[place.data_digest or f"named {place.data}"]
        is_shared = count[place.protocol, name] > 1 and place.data_digest
        return f"{name}:{place.data_digest[:8]}" if is_shared else name

    return [replace(place, data=named(place)) for place in places]


def _place(event: Evaluated, run: str, step: int | None, recipe: Path | None = None, *, by_hand: bool = False) -> Place:
    headline = event.headline
    return Place(
        event.protocol,
        event.data,
        headline,
        event.metrics[headline.name],
        event.interval,
        event.num_test,
        run,
        step,
        recipe,
        by_hand,
        event.data_digest,
        event.bounds,
    )


@cache  # by protocol and data, the leaderboard asks several times
def _began_with(recipe: Path) -> str:
    """What the closing table of a run, too, calls the weights of its step 0."""
    try:
        first = written_stages(parse_yaml(recipe.read_text(encoding="utf-8")))[0]
    except (ValueError, OSError, YAMLError):
        return "initial"
    return "random" if first.get("init_from") is None else "initial"


def _evaluate(path: Path, task: EvaluationTask, directory: Path, storage: Path, **options: Any) -> EvaluationResult:
    """`options` as `evaluation.runner.evaluate` takes them."""
    from evaluation.data import EvaluationData
    from evaluation.runner import evaluate as run_protocol
    from pretrain.checkpoints.gradable import known_as
    from pretrain.checkpoints.reads import trained_on

    return run_protocol(
        path,
        task.protocol,
        EvaluationData(task.data, directory),
        store=storage,
        image_size=task.size,
        reads=trained_on(path),
        known_as=known_as(path),
        **options,
    )


def _draw(
    path: Path,
    task: EvaluationTask,
    directory: Path,
    results: Sequence[EvaluationResult],
    storage: Path,
    device: str | None,
    dest: Path,
    said: Callable[[str], None],
) -> None:
    """Pictures of a checkpoint and its results on one data set, in `dest`; whatever stops one, the scores count."""
    from evaluation.threads import Threads

    dest.mkdir(parents=True, exist_ok=True)
    drawn = _pictures(path, task, directory, results, storage, device, Threads(usable_cores()))
    try:
        for shows, png in drawn:
            write_atomically(dest / f"{task.data}-{shows}.png", png)
            said(f"picture {dest / f'{task.data}-{shows}.png'}")
    except Exception as error:
        said(f"warning: a picture of {task.data} is not drawn: {type(error).__name__}: {last_line(error)}")


def _pictures(
    path: Path,
    task: EvaluationTask,
    directory: Path,
    results: Sequence[EvaluationResult],
    storage: Path,
    device: str | None,
    threads: Threads,
) -> Iterator[tuple[str, bytes]]:
    """What each picture shows and its PNG, one after the other, as `evaluation.pictures.draw` has them."""
    from evaluation.data import EvaluationData
    from pretrain.checkpoints.reads import trained_on

    drawn: Iterator[tuple[str, bytes]] = threads.run(import_module, "evaluation.pictures.draw").draw(
        path,
        EvaluationData(task.data, directory),
        results,
        store=storage,
        image_size=task.size,
        reads=trained_on(path),
        device=device,
        threads=threads,
    )
    return drawn


def _require_device(device: str) -> None:
    import torch

    try:
        torch.ones(1, device=device).item()  # "meta" has shapes and no numbers, and fails at this
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name or number, or another torch
        said = str(error).splitlines()[0].rstrip(".")  # behind it CUDA gives advice, other devices lists of kernels
        raise RequestError(f"--device {device}: {said}; cpu is always there") from None


def _event(step: int, result: EvaluationResult) -> Evaluated:
    return Evaluated(
        step=step,
        protocol=result.protocol,
        data=result.data,
        metrics=result.metrics,
        key=result.key,
        seconds=result.seconds,
        cached=result.cached,
        described=tuple(asdict(metric) for metric in result.described),
        num_test=_num_scored(result.details),
        num_train=int(result.details.get("num_train", 0)),
        num_test_in_train=int(result.details.get("num_test_in_train", -1)),
        data_digest=result.data_digest,
        weights_digest=result.weights_digest,
    )


def _recipe_of(checkpoint: Path) -> Recipe:
    from pretrain.config.load import load_recipe

    path = checkpoint / RECIPE
    if not path.is_file():
        raise RequestError(f"{checkpoint}: no {RECIPE} in it that names evaluation data; give --data NAME=DIRECTORY")
    return load_recipe(path, check_files=False)


def _data_of(checkpoint: Path, root: Path) -> Iterator[tuple[str, str]]:
    """The evaluation data of the recipe beside a checkpoint, by name."""
    from pretrain.config.load import in_storage

    recipe = _recipe_of(checkpoint)
    for name, directory in recipe.evaluation.data.items():
        yield name, in_storage(directory, recipe.storage, str(root))


def suitable_protocols(checkpoint: Path, directory: Path, suite: str | None = None) -> list[str]:
    """Protocols that fit the kind of backbone, and whose labels, or decoder, are there; without a suite usual ones.

    Labels have to be in both splits: data whose held-out samples have none are unlabelled to a protocol.
    """
    from backbones.io import heads_spec
    from data_pipelines.shards.dataset import open_dataset
    from data_pipelines.split_names import held_out
    from evaluation.extraction.recipe import extraction_of, fits
    from evaluation.registry import names, protocol
    from evaluation.runner import architecture_of
    from evaluation.suites import misfit, protocols_of

    kind = architecture_of(checkpoint).get("kind", "image")
    extraction = extraction_of(kind)
    splits = [open_dataset(str(directory / f"{split}-*.tar")) for split in ("train", held_out(directory))]
    return [
        name
        for name, spec in ((name, protocol(name)) for name in (names() if suite is None else protocols_of(suite, kind)))
        if (suite is not None or spec.usual_for is None or kind in spec.usual_for)
        and fits(spec, kind, extraction.tokens, extraction.axes)
        and misfit(name, kind, splits) is None
        and (spec.tokens != "decoded" or "decoder" in (heads_spec(checkpoint) or {}))
    ]


def _num_scored(details: Mapping[str, Any]) -> int:
    """Test samples that the headline of a result is of: all, unless its protocol left some out; 0: not recorded."""
    return int(details.get("num_scored", details.get("num_test", 0)))
