"""The closing table of a run on the terminal, with the lines to try next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.config.schema import Recipe

__all__ = ["print_summary"]


def print_summary(
    console: Console,
    recipe: Recipe,
    run_dir: Path,
    records: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    report: Path,
) -> None:
    """Print what a run achieved.

    Args:
        console: Where to.
        recipe: Its recipe.
        run_dir: Its directory.
        records: Its journal.
        evaluations: Records with `metrics` of `evaluations.jsonl`.
        report: The HTML page.
    """
    metrics = [record for record in records if record["kind"] == "metrics"]
    table = Table(title=run_dir.name, title_justify="left")
    for column in ("", "random", "first", "last"):
        table.add_column(column, justify="left" if not column else "right")
    if metrics:
        first, last = metrics[0], metrics[-1]
        table.add_row(
            "loss",
            "",
            f"{first['values']['loss']:.4f} (step {first['step']})",
            f"{last['values']['loss']:.4f} (step {last['step']})",
        )
    for task in recipe.evaluation.tasks:
        table.add_row(*_score_row(task.protocol, task.data, evaluations))
    if metrics:
        rates = [record["values"]["images_per_s"] for record in metrics]
        table.add_row("images/s", "", "", f"{median(rates):.0f}")
    console.print(table)
    name = recipe.tracking.model_name or recipe.name
    storage = Path(recipe.storage)
    console.print(f"run         {run_dir}", markup=False)
    console.print(f"report      {report}", markup=False)
    console.print(f"MLflow      {_uri(storage)}", markup=False)
    place = "" if storage == Path("runs").absolute() else f" --storage {storage}"
    console.print(f"try next    pretrain pull {name}@best ./{name}-backbone{place}", markup=False)
    console.print(f"            mlflow ui --backend-store-uri {_uri(storage)}", markup=False)


def _score_row(protocol: str, data: str, evaluations: Sequence[dict[str, Any]]) -> tuple[str, str, str, str]:
    """Headline metric of the random backbone, the first and the last graded checkpoint."""
    found = sorted(
        (r for r in evaluations if (r["protocol"], r["data"]) == (protocol, data)), key=lambda record: record["step"]
    )
    trained = [record for record in found if record["step"] > 0]
    if not found:
        return f"{protocol}/{data}", "failed", "", ""
    headline = next(iter(found[0]["metrics"]))

    def cell(record: dict[str, Any], *, with_step: bool) -> str:
        score = f"{record['metrics'][headline]:.1%}"
        return f"{score} (step {record['step']})" if with_step else score

    random = cell(found[0], with_step=False) if found[0]["step"] == 0 else ""
    ends = (cell(trained[0], with_step=True), cell(trained[-1], with_step=True)) if trained else ("", "")
    return f"{protocol}/{data} {headline}", random, *ends


def _uri(storage: Path) -> str:
    from pretrain.tracking.client import default_uri, redact

    return redact(default_uri(storage))
