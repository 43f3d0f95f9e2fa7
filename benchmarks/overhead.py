"""What the full stack costs per step: Ray + DeepSpeed ZeRO-0 with one worker over a bare PyTorch loop.

Both run the objective, the sample stream and the optimizer settings of the same recipe, in alternation, in processes of
their own with one thread. The figure is the ratio of the medians of all step times of one invocation.

    python benchmarks/overhead.py [RECIPE] [key=value ...] [--steps 120] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

WARM_UP = 60  # steps that do not count: meanwhile the driver imports MLflow and makes its database, once per run


def bare_steps(recipe_path: str, overrides: Sequence[str] = ()) -> list[float]:
    """Step times in seconds of a plain loop: forward, backward, clip, fused AdamW."""
    import torch

    from data_pipelines.streaming.stream import StreamState
    from objectives.base import Progress
    from pretrain.config.load import load_recipe
    from pretrain.training.inputs import build_stream
    from pretrain.training.model import build_objective
    from pretrain.training.schedules import learning_rate

    recipe = load_recipe(recipe_path, overrides)
    torch.set_num_threads(1)
    torch.manual_seed(recipe.train.seed)
    objective = build_objective(recipe)
    groups = objective.param_groups(recipe.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=tuple(recipe.optimizer.betas), fused=True)
    batches = iter(build_stream(recipe, objective, 0, StreamState(0, 0)))
    times, began = [], time.perf_counter()
    for step in range(recipe.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe).at(step)
        for _ in range(recipe.train.accumulation or 1):
            loss = objective(next(batches), Progress(step, recipe.train.steps)).loss / (recipe.train.accumulation or 1)
            loss.backward()
        if recipe.optimizer.clip_grad:
            torch.nn.utils.clip_grad_norm_(objective.parameters(), recipe.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)  # as the full stack does on a logged step
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return times


def full_steps(recipe_path: str) -> list[float]:
    """Step times in seconds that the event log of `pretrain run` reports."""
    import pretrain
    from pretrain.record.events import Metrics
    from pretrain.record.journal import read_events
    from pretrain.record.run_dir import RunDir

    result = pretrain.run(recipe_path)
    events = read_events(RunDir(result.run_dir).journal)[0]
    return [event.values["step_s"] for event in events if isinstance(event, Metrics)]


def measure(kind: str, recipe_path: Path) -> list[float]:
    """Run one of the two in a fresh process; returns its step times without the warm-up."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, str(recipe_path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("bare", "full"), help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.child:
        times = {"bare": bare_steps, "full": full_steps}[arguments.child](arguments.recipe)
        print(json.dumps(times))
        return

    from pretrain.config.load import load_recipe, to_yaml

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        steps = arguments.steps + WARM_UP
        train = replace(
            recipe.train,
            workers=1,
            zero_stage=0,
            steps=steps,
            global_batch_size=(recipe.train.micro_batch_size or 1) * (recipe.train.accumulation or 1),
            log_every=1,
            checkpoint_every=steps,
            pictures_every=0,
        )
        evaluation = replace(recipe.evaluation, enabled=False, baseline=False)
        optimizer = replace(recipe.optimizer, warmup_steps=min(recipe.optimizer.warmup_steps, 1))
        recipe = replace(recipe, train=train, evaluation=evaluation, optimizer=optimizer, storage=scratch)
        path = Path(scratch) / "overhead.yaml"
        path.write_text(to_yaml(recipe))
        times: dict[str, list[float]] = {"bare": [], "full": []}
        for number in range(arguments.rounds):
            for kind in ("bare", "full"):
                times[kind] += measure(kind, path)
                print(f"round {number + 1} {kind}: {statistics.median(times[kind]) * 1e3:.1f} ms/step", flush=True)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    print(
        f"{recipe.name}, batch {train.global_batch_size}, {len(times['full'])} steps each: "
        f"bare {medians['bare'] * 1e3:.1f} ms, full stack {medians['full'] * 1e3:.1f} ms, "
        f"ratio {medians['full'] / medians['bare']:.3f}"
    )


if __name__ == "__main__":
    main()
