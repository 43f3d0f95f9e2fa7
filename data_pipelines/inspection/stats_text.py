"""The numbers of `stats` as lines for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.inspection.stats import FieldStats, Stats

__all__ = ["readable_bytes", "stats_lines"]

_LISTED_CLASSES = 40
_WIDTH = 110


def readable_bytes(count: float) -> str:
    """`26214400` -> `25.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def stats_lines(stats: Stats) -> list[str]:
    """All of them, widest facts first."""
    part = "all" if stats.read == stats.samples else f"the first {stats.read}"
    lines = [
        f"{stats.samples} samples in {stats.shards} shards, {readable_bytes(stats.bytes)}; below: {part} of them",
        "",
        *_table(stats.fields),
        "",
    ]
    for name, found in stats.fields.items():
        facts = list(_facts(found, stats.class_names))
        lines += [f"{name}: {fact}" for fact in facts[:1]] + [f"  {fact}" for fact in facts[1:]]
    if stats.compared is not None:
        lines.append(f"duplicates: {stats.duplicates} samples have the {stats.compared} of an earlier one")
    if stats.damaged:
        lines.append(f"damaged: {stats.damaged} samples; `pretrain data verify` names them")
    if stats.recipe:
        settings = [f"{key}=[{','.join(f'{value:.4f}' for value in values)}]" for key, values in stats.recipe.items()]
        lines.append(f"for the recipe: {' '.join(settings)}")
    return lines


def _table(fields: Mapping[str, FieldStats]) -> list[str]:
    quantiles = ("min", "median", "p95", "max")
    rows: list[tuple[str, ...]] = [("field", "kind", "samples", "total", *quantiles)]
    for name, found in fields.items():
        sizes = (readable_bytes(found.bytes[quantile]) for quantile in quantiles)
        rows.append((name, found.kind or "unknown", str(found.count), readable_bytes(found.total_bytes), *sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_aligned(cells, widths)).rstrip() for cells in rows]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if number < 2 else cell.rjust(width)


def _facts(found: FieldStats, class_names: Sequence[str]) -> Iterator[str]:
    values = found.values
    if found.kind == "image" and values:
        yield f"width {_range(values['width'])}, height {_range(values['height'])}"
        yield f"mean {_numbers(values['mean'])}, std {_numbers(values['std'])} in [0, 1] over {values['pixels']} pixels"
    elif found.kind == "label" and values:
        even = values["balance"]
        entropy = f"entropy {even['entropy_bits']:.2f} of {even['entropy_bits_max']:.2f} bits"
        yield f"{len(values['classes'])} classes, {even['min']} to {even['max']} samples each, {entropy}"
        yield from _classes(values["classes"], class_names, str)
    elif found.kind == "mask" and values:
        pixels = sum(values["classes"].values())
        yield f"shape {_shape(values['shape'])}, {len(values['classes'])} values, share of pixels:"
        yield from _classes(values["classes"], class_names, lambda count: f"{count / pixels:.2%}")
    else:
        for name, array in values.get("arrays", {}).items():
            yield f"{f'{name}: ' if name else ''}{_array(array)}"


def _array(array: Mapping[str, Any]) -> str:
    text = f"{' '.join(array['dtypes'])} {_shape(array['shape'])}"
    if "mean" in array:
        text += f", {array['min']:.6g} to {array['max']:.6g}"
        text += f", mean {_numbers(array['mean'])}, std {_numbers(array['std'])}"
    return text + (f", {array['not_finite']} values are not finite" if array["not_finite"] else "")


def _classes(counts: Mapping[int, int], names: Sequence[str], say: Any) -> Iterator[str]:
    """One entry per class; of many classes the largest and the smallest."""
    entries = [f"{names[n] if 0 <= n < len(names) else n} {say(count)}" for n, count in counts.items()]
    if len(entries) > _LISTED_CLASSES:
        order = sorted(range(len(entries)), key=lambda at: -list(counts.values())[at])
        entries = [*(entries[at] for at in order[:10]), "...", *(entries[at] for at in order[-10:])]
    yield from textwrap.wrap(", ".join(entries), _WIDTH)


def _shape(axes: Sequence[Mapping[str, int]]) -> str:
    return " x ".join(_range(axis) for axis in axes) or "of differing ranks"


def _range(found: Mapping[str, int]) -> str:
    if found["min"] == found["max"]:
        return str(found["min"])
    return f"{found['min']}..{found['max']} (median {found['median']})"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" if abs(value) < 1e4 else f"{value:.6g}" for value in values)
