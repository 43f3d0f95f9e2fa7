"""What a sample costs on its way from disk to the training step, beside webdataset, torchvision and mosaicml-streaming.

Every row is one loader, measured in one invocation in rounds that go through all rows: CPU time per sample of the main
process and the loader workers together, each with one thread, and samples per second of wall time; medians over the
rounds. A group has a peer, and groups with views a limit: decoding the same images and nothing else.

    read cifar10, camvid    bytes of all fields of a sample, of samples below 1 KB and of about 50 KB
    mae 32, mae 224         one random resized crop of CIFAR-10 images and of CamVid frames (480 x 360)
    dino                    2 x 224 + 8 x 96 crops of CamVid frames with colour jitter, grey, blur and solarization

mosaicml-streaming does not fit into this environment (it needs an older numpy and transformers 4): it is measured in
an environment of its own, made from `requirements/bench-streaming.txt`, whose interpreter is given.

    python benchmarks/data_pipeline.py [GROUP ...] [--data DIR] [--streaming-python PATH] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_cost import Cost, Plan
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from data_cases import Case, SampleSet

GROUPS = ("read", "mae", "dino")
WORKERS = (1, 2)
PLANS = {
    "read cifar10": Plan(batch_size=1000, settle=4, count=40),
    "read camvid": Plan(batch_size=250, settle=8, count=40),
    "mae 32": Plan(batch_size=256, settle=6, count=20),
    "mae 224": Plan(batch_size=64, settle=6, count=20),
    "dino": Plan(batch_size=16, settle=6, count=12),
    "decode": Plan(batch_size=64, settle=6, count=20),
}
QUICK_PLANS = {name: Plan(plan.batch_size // 8, settle=4, count=4) for name, plan in PLANS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", default=GROUPS, help=" | ".join(GROUPS))
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="has cifar10/ and camvid/ with shards"
    )
    parser.add_argument("--streaming-python", type=Path, help="an interpreter that can import mosaicml-streaming")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    for name in ("cifar10", "camvid"):
        if not list((arguments.data / name).glob("*.tar")):
            parser.error(f"{arguments.data / name}: no shards (*.tar); name the folder of the data sets with --data")
    if arguments.streaming_python and not arguments.streaming_python.is_file():
        parser.error(f"{arguments.streaming_python}: no such interpreter")
    rounds, plans = (1, QUICK_PLANS) if arguments.quick else (arguments.rounds, PLANS)

    # Before torch is imported: whatever computes has one thread, so that CPU time is that of one thread.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["PRETRAIN_CACHE"] = str(scratch / "cache")
        cases = all_cases(arguments, plans, scratch, stack)
        costs = measure(cases, rounds)
    rows = summary(cases, costs)
    print_table(rows, f"median of {rounds} round{'s' if rounds > 1 else ''}")
    if "read" in arguments.groups and not arguments.streaming_python:
        print("mosaicml-streaming: not measured: give --streaming-python")
    if arguments.json:
        report = {"machine": machine(), "rounds": rounds, "plans": {name: asdict(plan) for name, plan in plans.items()}}
        arguments.json.write_text(json.dumps({**report, "rows": rows}, indent=1))


def all_cases(arguments: argparse.Namespace, plans: dict[str, Plan], scratch: Path, stack: ExitStack) -> list[Case]:
    """The rows of the chosen groups; peers in other processes end with `stack`."""
    import torch
    from data_cases import Case, crop_rows, dino_rows, open_set, read_cases, view_cases

    torch.set_num_threads(1)
    cifar, camvid = (open_set(arguments.data / name, scratch) for name in ("cifar10", "camvid"))
    cases: list[Case] = []
    if "read" in arguments.groups:
        for samples in (cifar, camvid):
            plan = plans[f"read {samples.name}"]
            cases += read_cases(samples, plan)
            if arguments.streaming_python:
                its_plan = replace(plan, settle=plan.count)  # its threads settle later
                peer = stack.enter_context(streaming_peer(arguments.streaming_python, samples, scratch, its_plan))
                cases.append(Case(cases[-1].group, "mosaicml-streaming", peer))
    views = {"mae 32": (cifar, crop_rows(cifar, 32)), "mae 224": (camvid, crop_rows(camvid, 224))}
    for group, (samples, rows) in {**views, "dino": (camvid, dino_rows(camvid))}.items():
        if group.split()[0] in arguments.groups:
            cases += view_cases(f"{group}, {samples.name}", samples, rows, plans[group], plans["decode"])
    return cases


@contextmanager
def streaming_peer(python: Path, samples: SampleSet, scratch: Path, plan: Plan) -> Iterator[Any]:
    """A process of another interpreter that reads the same samples with mosaicml-streaming.

    Yields:
        what measures it with so many loader workers.
    """
    script = Path(__file__).with_name("data_peer_streaming.py")
    command = [str(python), str(script), str(samples.files / "all"), str(scratch / f"{samples.name}.mds")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def answer() -> Any:
            line = answers.readline()
            if not line:
                raise SystemExit(f"{python}: the mosaicml-streaming peer ended with exit code {process.wait()}")
            return json.loads(line)

        def measure_peer(workers: int) -> Cost:
            print(json.dumps({"workers": workers, **asdict(plan)}), file=requests)
            return Cost(**answer())

        answer()  # it has imported its library and written its data

        yield measure_peer


def measure(cases: list[Case], rounds: int) -> dict[tuple[int, int], list[Cost]]:
    """Costs of (number of the case, workers), one per round."""
    costs: dict[tuple[int, int], list[Cost]] = {}
    for round_number in range(1, rounds + 1):
        for number, case in enumerate(cases):
            for workers in WORKERS:
                cost = case.measure(workers)
                costs.setdefault((number, workers), []).append(cost)
                line = f"round {round_number} {case.group}: {case.name}, {workers} workers: {cost.cpu_us:.1f} us"
                print(line, file=sys.stderr, flush=True)
    return costs


def summary(cases: list[Case], costs: dict[tuple[int, int], list[Cost]]) -> list[dict[str, Any]]:
    """Medians, and their ratios to the peer and to the limit of the group; plain JSON."""
    medians = {place: statistics.median(cost.cpu_us for cost in rounds) for place, rounds in costs.items()}
    marked = {(case.group, case.role): number for number, case in enumerate(cases) if case.role}
    rows = []
    for (number, workers), rounds in costs.items():
        case, cpu_us = cases[number], medians[number, workers]
        peer, limit = (marked.get((case.group, role)) for role in ("peer", "limit"))
        rows.append(
            {
                "group": case.group,
                "name": case.name,
                "workers": workers,
                "cpu_us": cpu_us,
                "samples_per_s": statistics.median(cost.samples_per_s for cost in rounds),
                "times_cheaper_than_peer": None if peer is None else medians[peer, workers] / cpu_us,
                "times_decode_only": None if limit is None else cpu_us / medians[limit, workers],
                "rounds": [asdict(cost) for cost in rounds],
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], caption: str) -> None:
    table = Table(title=f"CPU time of one thread per sample, {caption}", title_justify="left")
    table.add_column("")
    for workers in WORKERS:
        for column in (f"CPU us, {workers} w", "x cheaper", "x decode", "samples/s"):
            table.add_column(column, justify="right")
    ratios = (("times_cheaper_than_peer", "{:.2f}"), ("times_decode_only", "{:.2f}"))
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        values = [form.format(row[name]) if row[name] else "" for name, form in ratios]
        line = [f"{row['cpu_us']:,.1f}", *values, f"{row['samples_per_s']:,.0f}"]
        cells.setdefault((row["group"], row["name"]), []).extend(line)
    group = None
    for (its_group, name), values in cells.items():
        if its_group != group:
            table.add_section()
            table.add_row(f"[bold]{its_group}")
            group = its_group
        table.add_row(f"  {name}", *values)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def machine() -> dict[str, Any]:
    """Hardware and versions, as the numbers mean nothing without."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "torchvision", "webdataset", "pillow", "numpy")
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
