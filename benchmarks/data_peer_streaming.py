"""The mosaicml-streaming peer of `data_pipeline`, for the interpreter of an environment of its own.

    python benchmarks/data_peer_streaming.py FILES MDS

Writes the samples in FILES (`<sample>.<field>`, one file per field) to the folder MDS and says so in a line, then
answers each line of standard input, `{"workers": ..., "batch_size": ..., "settle": ..., "count": ...}`, with a line
`{"cpu_us": ..., "samples_per_s": ...}` of its shuffled reader.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from data_cost import Cost, Plan, cost_per_sample
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader


class ReadOnly(StreamingDataset):
    """Reads every sample and keeps its number of fields only."""

    def __getitem__(self, at: int) -> int:
        return len(super().__getitem__(at))


def write(files: Path, mds: Path) -> None:
    """All samples as one MDS set, the fields as bytes, without compression."""
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path in sorted(files.iterdir()):
        sample, _, field = path.name.partition(".")
        samples[sample][field] = path.read_bytes()
    columns = dict.fromkeys(next(iter(samples.values())), "bytes")
    with MDSWriter(out=str(mds), columns=columns) as writer:
        for fields in samples.values():
            writer.write(fields)


def measure(mds: Path, workers: int, plan: Plan) -> Cost:
    """Cost of reading in the order of `StreamingDataset(shuffle=True)`.

    Its threads that look ahead have reached the end of the epoch when counting begins, which is to its advantage: with
    the default look-ahead of 8 batches they run all the time, and a reader that does nothing else then mostly waits
    for the interpreter lock.
    """
    samples = (plan.settle + plan.count + 4 * workers) * plan.batch_size
    sizes = {"batch_size": plan.batch_size, "epoch_size": samples, "predownload": samples}
    dataset = ReadOnly(local=str(mds), shuffle=True, **sizes)
    loader = DataLoader(dataset, batch_size=plan.batch_size, num_workers=workers, collate_fn=sum)
    return cost_per_sample(lambda: iter(loader), plan)


def main() -> None:
    files, mds = map(Path, sys.argv[1:])
    write(files, mds)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        cost = measure(mds, request.pop("workers"), Plan(**request))
        print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
