"""Sweeps: every combination of some settings, each an ordinary run, at most so many at a time.

    STORAGE/sweeps/SWEEP_ID/  queue.jsonl   which point of the grid began as which run, and how it ended (`queue`)
                              table.csv     the comparison (`table`)
                              logs/         output of the runs, by point

The id is that of the request, so that the same command finds what it has done and goes on with the rest.
"""
