"""Seconds and memory of cutting point clouds into groups, and of the Chamfer distance with its gradient.

Both look at blocks of distances at a time, so that memory does not grow with points times groups. One process, one
thread; the peak is that of the resident memory above what the process had before.

    python benchmarks/point_groups.py [--batch 128] [--points 8192] [--groups 512] [--group-size 32]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable


def measured(name: str, work: Callable[[], object]) -> None:
    """Prints one line; the peak of a process never falls, so the lightest work comes first."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    work()
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name:50s} {seconds:8.2f} CPU-s  {grown:8.0f} MiB more than before", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--points", type=int, default=8192)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=32)
    arguments = parser.parse_args()

    import torch

    from backbones.points.grouping import farthest_points, group
    from objectives.parts.chamfer import chamfer_distance

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    clouds = torch.rand(arguments.batch, arguments.points, 3, generator=generator)
    shape = f"{arguments.batch} x {arguments.points} points"
    patches = torch.rand(arguments.batch * 38, 2, arguments.group_size, 3, generator=generator).requires_grad_(True)
    measured(
        f"Chamfer distance, {len(patches)} x {arguments.group_size} points",
        lambda: chamfer_distance(patches[:, 0], patches[:, 1]).backward(),
    )
    measured(f"{shape}: farthest {arguments.groups}", lambda: farthest_points(clouds, arguments.groups))
    measured(
        f"{shape}: {arguments.groups} groups of {arguments.group_size}",
        lambda: group(clouds, arguments.groups, arguments.group_size),
    )
    pair = clouds[:1].clone().requires_grad_(True)
    measured(
        f"Chamfer distance, 1 x {arguments.points} points",
        lambda: chamfer_distance(pair, pair.detach() + 0.01).backward(),
    )


if __name__ == "__main__":
    main()
