"""Scenes to shards of radiance grids: `make_grids(source, dest)` fits each scene once and writes what is good enough.

A fitted scene is kept in `$PRETRAIN_CACHE/radiance`, by its pictures, cameras and settings. So a killed run goes on
with the scenes it had not fitted, and other cuts or another threshold cost no new fit. The shards themselves are those
of `packing`: the same scenes and options give the same bytes.

What is wrong with a request or a scene is found without torch, which takes seconds to import; a fit imports it.

Not here: reading (`scenes`), fitting (`fit`), what a sample holds (`grids`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import decode_arrays
from data_pipelines.errors import DataError, suggest
from data_pipelines.files import cache_root, write_atomically
from data_pipelines.packing.conversion import Conversion
from data_pipelines.packing.folder import PackFolder
from data_pipelines.packing.inputs import Item, Piece
from data_pipelines.packing.plan import plan_shards
from data_pipelines.packing.shard_writer import ShardJob, ShardRecord, finished_shard, write_shard
from data_pipelines.parsing import parse_json
from data_pipelines.radiance.grids import ALPHA_STEP_VOX, Cut, cut_grid, draw_cuts, grid_of, stored
from data_pipelines.radiance.scenes import Scene, find_scenes, read_scene, scene_name
from data_pipelines.radiance.settings import DTYPES, FitSettings
from data_pipelines.shards.manifest import Manifest, Split, split_digest
from data_pipelines.worker_pool import Advance, run_jobs

__all__ = ["FitJob", "Made", "SceneReport", "Writing", "make_grids"]

CREATED_BY = "pretrain data radiance 1"  # the number changes with the rules that determine the bytes
GRID_FIELD = "grid.npy"
_FIT_RULES = 1  # changes with what a fit computes, so that no older one is taken for it

RunJobs = Callable[..., Generator[Any, None, None]]  # as `worker_pool.run_jobs`


@dataclass(frozen=True)
class Writing:
    """What is written of the fitted scenes.

    Attributes:
        test: names of the scenes that go into the split `test`.
        min_psnr: dB on held-out views, below which a scene is left out.
        dtype: of the grids, one of `settings.DTYPES`.
        cuts: cubes that are cut from each scene, instead of its whole grid; 0: the whole grid.
        cut_size: voxels of a side of a cut.
        shard_mb: megabytes of a shard.
        name: of the data set; None: that of the source.
    """

    test: tuple[str, ...] = ()
    min_psnr: float = 20.0
    dtype: str = "uint8"
    cuts: int = 0
    cut_size: int = 32
    shard_mb: float = 256
    name: str | None = None


@dataclass(frozen=True)
class FitJob:
    """A scene to fit, and where the result is kept."""

    path: Path
    settings: FitSettings
    result: Path


@dataclass(frozen=True)
class SceneReport:
    """What became of a scene.

    Attributes:
        psnr: dB on held-out views; None where there is no fit.
        seconds: CPU time of the fit.
        problem: why it is left out, in one line that names it; None when it is written.
    """

    name: str
    psnr: float | None
    seconds: float | None
    problem: str | None


@dataclass(frozen=True)
class Made:
    """A data set of grids.

    Attributes:
        manifest: the content of `dataset.json`; None when every scene is left out.
        scenes: in the order of their names; empty when all was there already.
    """

    manifest: Manifest | None
    scenes: tuple[SceneReport, ...]


@dataclass(frozen=True)
class _Fitted:
    """What is kept of a fit."""

    grid: npt.NDArray[np.float16]  # (4, X, Y, Z)
    facts: Mapping[str, Any]


def make_grids(
    source: str | Path,
    dest: str | Path,
    settings: FitSettings,
    writing: Writing,
    *,
    workers: int = 1,
    run_jobs: RunJobs = run_jobs,
    progress: Callable[[int, int], None] | None = None,
) -> Made:
    """Fit scenes and write their grids as shards with a `dataset.json`.

    Args:
        source: a scene, or a folder of scenes (see `scenes`).
        dest: folder for the shards, new or left behind by a killed run of the same request.
        workers: scenes that are fitted at a time.
        run_jobs: what runs the fits, with the arguments of `worker_pool.run_jobs`; its jobs are `FitJob`.
        progress: called with steps done and in all.

    Returns:
        What was written, and what became of each scene.

    Raises:
        DataError: the request is wrong, a scene says what cannot be, or the destination holds something else.
    """
    source, dest = Path(source), Path(dest)
    scenes = [read_scene(path, axes=settings.axes, up=settings.up) for path in find_scenes(source)]
    _check(writing, settings, scenes, source)
    with PackFolder(dest, source) as folder:
        name = writing.name or scene_name(source)
        options = _options(scenes, settings, writing)
        request = {"created_by": CREATED_BY, "name": name, **options}
        complete = folder.held(request, (0, ""))
        if complete is not None:
            return Made(complete, ())
        problems = _fit_all(scenes, settings, workers, run_jobs, progress)
        reports, items = [], list[Item]()
        files = folder.unpacked()
        for scene in scenes:
            fitted = _kept(_result_of(scene, settings))
            report = _judged(scene, fitted, problems.get(scene.name), writing.min_psnr)
            reports.append(report)
            if fitted is not None and report.problem is None:
                split = "test" if scene.name in writing.test else "train"
                items += _items(scene, fitted, split, writing, settings, files)
        if not items:
            return Made(None, tuple(reports))
        folder.begin(
            request
        )  # from here on DEST is for this request; a run that ends while it fits leaves nothing there
        manifest = _write(folder, name, items, options, writing, sum(report.problem is not None for report in reports))
        folder.finish(manifest)
    return Made(manifest, tuple(reports))


def fit_to_cache(job: FitJob, advance: Advance) -> tuple[str, str | None]:
    """Fit a scene and keep the result.

    Returns:
        The name of the scene, and what is wrong with it if something is.
    """
    from data_pipelines.radiance.fit import fit_scene

    try:
        scene = read_scene(job.path, axes=job.settings.axes, up=job.settings.up)
        fit = fit_scene(scene, job.settings, advance)
    except DataError as error:
        return scene_name(job.path), str(error)
    facts = {
        "psnr_heldout": round(fit.psnr, 2),
        "n_images": len(scene.train),
        "n_heldout": len(scene.held_out),
        "seconds": round(fit.seconds, 1),
        "layout": scene.layout,
        "source_up": scene.up,
        "box_rule": fit.field.box.rule,
        "bbox_min": [round(float(value), 6) for value in fit.field.box.low],
        "bbox_max": [round(float(value), 6) for value in fit.field.box.high],
    }
    content = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez_compressed(content, grid=grid_of(fit.field), facts=text)
    job.result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.result, content.getvalue())
    return scene.name, None


def _check(writing: Writing, settings: FitSettings, scenes: Sequence[Scene], source: Path) -> None:
    names = [scene.name for scene in scenes]
    for wanted in writing.test:
        if wanted not in names:
            raise DataError(
                f"test={wanted}: {source} has no such scene; it has {', '.join(names)}{suggest(wanted, names)}"
            )
    if set(writing.test) == set(names):
        raise DataError(f"test={','.join(writing.test)}: no scene of {source} is left for the split train; name fewer")
    if writing.dtype not in DTYPES:
        raise DataError(f"dtype={writing.dtype!r} is not allowed; use {' or '.join(DTYPES)}")
    if writing.cuts < 0 or writing.shard_mb <= 0:
        raise DataError(f"cuts={writing.cuts}, shard_mb={writing.shard_mb}: neither may be negative, nor shards empty")
    if writing.cuts and not 1 <= writing.cut_size <= settings.resolution:
        raise DataError(
            f"cut_size={writing.cut_size} is not allowed; cuts are cubes of grids with resolution={settings.resolution}"
        )


def _options(scenes: Sequence[Scene], settings: FitSettings, writing: Writing) -> dict[str, Any]:
    """Everything that determines the bytes, for `dataset.json`."""
    contents = "".join(f"{scene.name} {scene.digest}\n" for scene in scenes)
    asked = {
        "kind": "radiance",
        "input": hashlib.sha256(contents.encode()).hexdigest(),
        **asdict(settings),
        "box": None if settings.box is None else list(settings.box),
        "test": sorted(writing.test) or None,
        "min_psnr": writing.min_psnr,
        "dtype": writing.dtype,
        "cuts": writing.cuts or None,
        "cut_size": writing.cut_size if writing.cuts else None,
        "shard_mb": writing.shard_mb,
    }
    return {option: value for option, value in asked.items() if value is not None}


def _result_of(scene: Scene, settings: FitSettings) -> Path:
    """Where the fit of a scene is kept: by everything that determines it."""
    determines = {"rules": _FIT_RULES, "scene": scene.digest, **asdict(settings)}
    digest = hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()
    return cache_root() / "radiance" / f"{digest[:32]}.npz"


def _kept(result: Path) -> _Fitted | None:
    """A fit that is there and whole."""
    with suppress(OSError, DataError, KeyError, ValueError):
        arrays = decode_arrays(result.read_bytes())
        return _Fitted(arrays["grid"], parse_json(arrays["facts"].tobytes()))
    return None


def _fit_all(
    scenes: Sequence[Scene],
    settings: FitSettings,
    workers: int,
    run_jobs: RunJobs,
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Fit the scenes that no earlier run has fitted; what is wrong with scenes, by name."""
    jobs = [FitJob(scene.path, settings, _result_of(scene, settings)) for scene in scenes]
    jobs = [job for job in jobs if _kept(job.result) is None]
    done, total = 0, settings.steps * len(jobs)

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(done, total)

    if jobs:
        advance(0)
    with closing(run_jobs(fit_to_cache, jobs, workers, advance)) as results:
        return {name: problem for name, problem in results if problem is not None}


def _judged(scene: Scene, fitted: _Fitted | None, problem: str | None, min_psnr: float) -> SceneReport:
    """Whether a scene is written."""
    if fitted is None:
        return SceneReport(
            scene.name, None, None, problem or f"{scene.path}: its fit is not in {cache_root()} any more"
        )
    psnr, views = fitted.facts["psnr_heldout"], fitted.facts["n_heldout"]
    if psnr < min_psnr:
        problem = (
            f"{scene.path}: {psnr:.1f} dB on {views} held-out views is less than {min_psnr:g} dB; look at the cameras "
            f"and at the box {_shown(fitted.facts)} (--axes, --bound, --box), or take more --resolution and --steps"
        )
    return SceneReport(scene.name, psnr, fitted.facts["seconds"], problem)


def _shown(facts: Mapping[str, Any]) -> str:
    low, high = (" ".join(f"{value:.3g}" for value in facts[corner]) for corner in ("bbox_min", "bbox_max"))
    return f"({low}) to ({high})"


def _items(
    scene: Scene, fitted: _Fitted, split: str, writing: Writing, settings: FitSettings, folder: Path
) -> Iterator[Item]:
    """The samples of a scene, as files below `folder`."""
    whole = {
        "scene": scene.name,
        "source": scene.path.name,
        "density_kind": "alpha",
        "alpha_step_vox": ALPHA_STEP_VOX,
        "up_axis": "z",
        **{name: value for name, value in fitted.facts.items() if name != "seconds"},  # which no two fits share
        "fit": asdict(settings),
    }
    grid = stored(fitted.grid, writing.dtype)
    if not writing.cuts:
        yield _item(scene.name, grid, {**whole, "resolution": grid.shape[1:]}, split, folder)
        return
    size = min(writing.cut_size, *grid.shape[1:])
    rng = np.random.default_rng([settings.seed, *scene.name.encode()])
    for number, cut in enumerate(draw_cuts(fitted.grid, writing.cuts, size, rng)):
        facts = {**whole, **_facts_of_cut(cut, fitted), "resolution": (size, size, size)}
        yield _item(f"{scene.name}_{number:04d}", cut_grid(grid, cut), facts, split, folder)


def _facts_of_cut(cut: Cut, fitted: _Fitted) -> dict[str, Any]:
    """Where a cut lies in its scene, before it was turned and mirrored."""
    low, high = np.array(fitted.facts["bbox_min"]), np.array(fitted.facts["bbox_max"])
    voxel = (high - low) / (np.array(fitted.grid.shape[1:]) - 1)
    first = np.array(cut.origin)
    return {
        "origin": cut.origin,
        "quarter_turns": cut.quarter_turns,
        "flip": [cut.flip_x, cut.flip_y, False],
        "bbox_min": (low + first * voxel).round(6).tolist(),
        "bbox_max": (low + (first + cut.size - 1) * voxel).round(6).tolist(),
    }


def _item(key: str, grid: npt.NDArray[Any], facts: Mapping[str, Any], split: str, folder: Path) -> Item:
    content = io.BytesIO()
    np.save(content, grid, allow_pickle=False)
    contents = {GRID_FIELD: content.getvalue(), "json": json.dumps(facts, sort_keys=True).encode()}
    for field, data in contents.items():
        (folder / f"{key}.{field}").write_bytes(data)
    pieces = (Piece(field, str(folder / f"{key}.{field}"), 0, len(data)) for field, data in contents.items())
    return Item(key, tuple(pieces), split=split, key=key)


def _write(
    folder: PackFolder,
    name: str,
    items: Sequence[Item],
    options: Mapping[str, Any],
    writing: Writing,
    num_rejected: int,
) -> Manifest:
    """Write the shards that are not finished yet, and describe all of them."""
    names = [split for split in ("train", "test") if any(item.split == split for item in items)]
    shard_bytes = round(writing.shard_mb * 1e6)
    plans = plan_shards(
        items, [(split, None) for split in names], seed=options["seed"], shard_bytes=shard_bytes, shard_samples=None
    )
    written: dict[str, list[ShardRecord]] = {split: [] for split in names}
    for plan in plans:
        conversion = Conversion("tars", "/")  # grids and descriptions as they are
        job = ShardJob(folder.path(plan.name), folder.record(plan.name), plan.first, plan.items, conversion)
        record = finished_shard(job) or write_shard(job, lambda samples: None)
        if record.rejected or record.entry is None:
            raise DataError(f"{plan.name}: {'; '.join(map(': '.join, record.rejected))}")
        written[plan.split].append(record)
    return Manifest(
        name=name,
        fields={GRID_FIELD: "volume", "json": "json"},
        splits={split: _described(records) for split, records in written.items()},
        options=options,
        rejected=num_rejected,
        created_by=CREATED_BY,
    )


def _described(records: Sequence[ShardRecord]) -> Split:
    shards = tuple(record.entry for record in records if record.entry is not None)
    digest = split_digest(shard.index_digest for shard in shards)
    return Split(sum(shard.samples for shard in shards), digest, shards)
