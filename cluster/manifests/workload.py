"""What is to run, and on what: all that the writers of manifests are told.

Secrets are references throughout: the name of a Kubernetes Secret and of a key in it, or the path of a file on the
nodes. There is no field that a secret itself fits in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Node", "SecretKey", "Workload"]


@dataclass(frozen=True)
class Node:
    """What one node gives to the workers of a run.

    Attributes:
        cpus, gpus: Whole ones.
        memory_mib: In MiB (2**20 bytes).
    """

    cpus: int
    gpus: int
    memory_mib: int


@dataclass(frozen=True)
class SecretKey:
    """A key of a Kubernetes Secret."""

    secret: str
    key: str


@dataclass(frozen=True)
class Workload:
    """A run, or a cluster for runs of its size.

    Attributes:
        name: A DNS label; it names the objects and the run, so that a retry goes on with it.
        recipe: The resolved recipe as YAML.
        storage: Directory of the runs, as all nodes see it.
        ray_version: Of the image or environment.
        nodes: How many with workers; of Kubernetes the head is one more.
        node: Each of them.
        environment: Variables of the processes by name; no secrets.
        retries: How often a run that was stopped or lost is begun again, to go on from its last checkpoint.
        grace_s: Seconds that a run has for its last checkpoint when its nodes are taken away.
        hours: Longest time; None: no bound.
        image: Container image; None: the processes run on the nodes themselves.
        namespace: Of Kubernetes; None: where the objects are applied.
        queue: Local queue of Kueue, or partition of Slurm.
        claims: Mount path -> PersistentVolumeClaim.
        secret_keys: Variable -> where Kubernetes finds its value.
        secret_files: Variable -> file on the nodes that holds its value.
        schedule, time_zone: Cron expression of five fields, and the zone it is meant in.
        setup: Shell commands that come first.
        hosts: Addresses of machines for `ray up`, the head first.
        ssh_user: Who `ray up` logs in as.
    """

    name: str
    recipe: str
    storage: str
    ray_version: str
    nodes: int
    node: Node
    environment: Mapping[str, str] = field(default_factory=dict)
    retries: int = 10
    grace_s: int = 300
    hours: float | None = None
    image: str | None = None
    namespace: str | None = None
    queue: str | None = None
    claims: Mapping[str, str] = field(default_factory=dict)
    secret_keys: Mapping[str, SecretKey] = field(default_factory=dict)
    secret_files: Mapping[str, str] = field(default_factory=dict)
    schedule: str | None = None
    time_zone: str | None = None
    setup: Sequence[str] = ()
    hosts: Sequence[str] = ()
    ssh_user: str | None = None
