"""How well the sample order mixes, and how local its reads stay, for several (block_size, window, num_streams).

    python benchmarks/shuffle_quality.py [--shards 100] [--samples 1000] [--batch 1024]

Columns, over five epochs: `corr` the correlation of position and sample id (root mean square; 1 without a shuffle);
`next` the share of neighbours in the order that are neighbours in a shard, in per mille; `shards` how many shards a
batch mixes; `open` how many shards the reads of 16 batches in a row touch, which is what a cache has to hold.
"""

from __future__ import annotations

import argparse

import numpy as np

from data_pipelines.order import EpochOrder, Ids

SETTINGS = [  # (block_size, window, num_streams); the first three are the extremes, the fifth is the default
    (1, 10**9, 1),
    (10**9, 1, 1),
    (256, 1, 1),
    (256, 16, 1),
    (256, 16, 8),
    (256, 16, 32),
    (64, 64, 8),
    (32, 16, 16),
]


EPOCHS = 5


def quality(ids: Ids, shard_size: int, batch: int) -> tuple[float, float, float, float]:
    """corr, next, shards and open (see above) of one epoch of equal shards."""
    correlation = float(np.corrcoef(np.arange(len(ids)), ids)[0, 1])
    adjacent = float((np.abs(np.diff(ids)) == 1).mean() * 1000)
    shards = ids // shard_size

    def touched(size: int) -> float:
        return float(np.mean([len(np.unique(shards[i : i + size])) for i in range(0, len(ids) - size + 1, size)]))

    return correlation, adjacent, touched(batch), touched(16 * batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--samples", type=int, default=1000, help="per shard")
    parser.add_argument("--batch", type=int, default=1024)
    args = parser.parse_args()
    counts = [args.samples] * args.shards
    if 16 * args.batch > sum(counts):
        parser.error(
            f"--batch {args.batch} is not allowed: an epoch of {sum(counts)} samples holds at least 16 batches"
        )
    print(f"{args.shards} shards of {args.samples} samples, batches of {args.batch}")
    print("block_size  window  num_streams |   corr  next/1000  shards  open")
    for block_size, window, num_streams in SETTINGS:
        block_size, window = min(block_size, args.samples), min(window, sum(counts))
        layout = {"seed": 0, "block_size": block_size, "window": window, "num_streams": num_streams}
        orders = [EpochOrder(counts, epoch=epoch, **layout) for epoch in range(EPOCHS)]
        epochs = np.array([quality(order(range(sum(counts))), args.samples, args.batch) for order in orders])
        corr, (_, adjacent, shards, touched) = np.sqrt((epochs[:, 0] ** 2).mean()), epochs.mean(axis=0)
        setting = f"{block_size:10d}  {window:6d}  {num_streams:11d}"
        print(f"{setting} | {corr:6.3f}  {adjacent:9.2f}  {shards:6.1f}  {touched:4.0f}")


if __name__ == "__main__":
    main()
