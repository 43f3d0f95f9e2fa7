"""`pretrain manifest`: what a scheduler takes: objects of KubeRay, a script of Slurm, a file of `ray up`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from data_pipelines.files import write_atomically
from pretrain.cli.filled import Filled
from pretrain.screen import say

__all__ = ["manifest"]

KINDS = ("rayjob", "raycluster", "raycronjob", "slurm", "ray-up")


@click.command(cls=Filled)
@click.argument("recipe")
@click.argument("settings", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What to write.")
@click.option("--name", metavar="NAME", help="Of the objects and of the run; default: the recipe's.")
@click.option("--namespace", metavar="NAME", help="Of Kubernetes; default: where it is applied.")
@click.option("--image", metavar="IMAGE:TAG", help="With this package, as deploy/Dockerfile makes it.")
@click.option("--nodes", type=click.IntRange(1, 10_000), help="With workers; default: as many as those need.")
@click.option("--gpus-per-node", "gpus", type=click.IntRange(0, 64), help="Default: up to 8; 0: train on CPUs.")
@click.option("--cpus", type=click.IntRange(1, 4096), help="Of each node; default: workers, loaders and 2 more.")
@click.option("--memory", metavar="256Gi", help="Of each node; default: 32Gi for each GPU and 8Gi more.")
@click.option("--queue", metavar="NAME", help="Local queue of Kueue, or partition of Slurm.")
@click.option(
    "--pvc", "claims", metavar="CLAIM[:PATH]", multiple=True, help="ReadWriteMany claim; PATH: /mnt/pretrain."
)
@click.option(
    "--storage", metavar="DIR", help="Of the runs, as all nodes see it; default: PATH/runs of the first --pvc."
)
@click.option(
    "--secret", "secrets", metavar="NAME=SECRET/KEY", multiple=True, help="Variable of a Secret's key; else =FILE."
)
@click.option("--env", "environment", metavar="NAME=VALUE", multiple=True, help="Variable that is no secret.")
@click.option("--schedule", metavar="CRON", help="Of raycronjob, five fields: '0 2 * * 0'.")
@click.option("--time-zone", metavar="ZONE", help="Of the schedule, such as Europe/London.")
@click.option("--retries", type=click.IntRange(0, 1000), help="Times that a run is begun again to go on; default: 10.")
@click.option(
    "--grace", type=click.IntRange(30, 3600), default=300, show_default=True, help="Seconds for a checkpoint."
)
@click.option("--hours", type=click.FloatRange(0.01, 10_000), help="Longest time; default: no bound.")
@click.option(
    "--setup", metavar="COMMAND", multiple=True, help="Of slurm and ray-up, first: 'source ENV/bin/activate'."
)
@click.option("--host", "hosts", metavar="ADDRESS", multiple=True, help="Of ray-up, the head first.")
@click.option("--ssh-user", metavar="USER", help="Of ray-up.")
@click.option("--output", metavar="FILE", help="Default: standard output.")
def manifest(recipe: str, settings: tuple[str, ...], kind: str, output: str | None, **options: Any) -> None:
    """Write what a scheduler needs to run RECIPE: it carries the resolved recipe, goes on after a lost node, and names
    secrets without holding any.

    \b
    pretrain manifest mae_photos data.root=/mnt/pretrain/photos --kind rayjob --image REGISTRY/pretrain:0.1.0 --pvc runs
    pretrain manifest mae_photos data.root=/shared/photos --kind slurm --storage /shared/runs --hours 24
    """
    from pretrain.cli.manifest_request import Options, requested, written

    workload, notes = requested(recipe, settings, kind, output, Options(**options))
    text = written(workload, kind)
    for note in notes:
        say(f"note: {note}", err=True)
    if output is None:
        for line in text.splitlines():
            say(line)
    else:
        write_atomically(Path(output).resolve(), text.encode())
        say(f"{kind} {workload.name} is in {output}", err=True)
