"""A recipe on the machines of a platform, for its scheduler: how many nodes, which paths, no secrets.

The recipe travels resolved, so that what is asked for here is what runs there; but for what this machine would decide:
data paths are those of the nodes, the package's own files are found where the package is, and loader processes are
counted by the cores of a node. Not here: options of the command (`pretrain.cli.manifest`), what a manifest looks like
(`cluster.manifests`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from omegaconf import OmegaConf

from cluster.manifests.workload import Node
from cluster.secret_names import holds_issued_key, reads_like_secret
from data_pipelines.storage.locations import redact
from pretrain.config.load import load_plan, recipe_content
from pretrain.config.paths import absolute
from pretrain.config.stages import Plan, plan_yaml
from pretrain.config.values import texts_in
from pretrain.errors import RequestError

__all__ = ["Machines", "Sized", "paths_outside", "portable_yaml", "secret_in", "sized"]

GPUS_PER_NODE = 8  # of most machines that have several
LOADERS_PER_GPU, LOADERS_PER_CPU_WORKER, MOST_LOADERS = 8, 1, 8
SPARE_CPUS = 2  # of a node, for Ray and an evaluation
GIB_PER_GPU, GIB_PER_CPU_WORKER, GIB_OF_A_NODE = 32, 4, 8
_PACKAGE = absolute("package:")
_NO_PLACES = ("data.cache_dir", "description")  # the one may lie anywhere on a node, the other is for people


@dataclass(frozen=True)
class Machines:
    """What is asked for; None: as the recipe suggests.

    Attributes:
        nodes: With workers.
        gpus, cpus, memory_mib: Of each.
    """

    nodes: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    memory_mib: int | None = None


@dataclass(frozen=True)
class Sized:
    """A recipe on its nodes.

    Attributes:
        plan: With what depends on the nodes filled in.
        nodes, node: How many, and each of them.
        note: What a person should know; None: nothing.
    """

    plan: Plan
    nodes: int
    node: Node
    note: str | None


def sized(recipe: str, settings: Sequence[str], machines: Machines, storage: str) -> Sized:
    """Place the workers of a recipe.

    Args:
        recipe: A name or file.
        settings: `key=value` texts.
        machines: What there is.
        storage: Directory of the runs, as the nodes see it.

    Raises:
        RequestError: The recipe is wrong, or its workers do not fit.
    """
    here = f"storage={tempfile.gettempdir()}"  # that of the nodes need not be on this machine
    plan = load_plan(recipe, (*settings, here), check_files=False)
    train, cluster = plan.recipe.train, plan.recipe.cluster
    gpus_each = cluster.gpus_per_worker
    if gpus_each is None:
        gpus_each = 0 if train.device == "cpu" or machines.gpus == 0 else 1
    if train.device == "cuda" and not gpus_each:
        raise RequestError("--gpus-per-node 0: train.device=cuda needs GPUs; give some, or train.device=auto")
    if gpus_each:
        gpus = machines.gpus if machines.gpus is not None else min(GPUS_PER_NODE, train.workers * gpus_each)
        per_node = gpus // gpus_each
        if not per_node:
            raise RequestError(f"--gpus-per-node {gpus}: cluster.gpus_per_worker={gpus_each} needs that many on a node")
    else:
        gpus = machines.gpus or 0
        per_node = math.ceil(train.workers / (machines.nodes or 1))
    needed = math.ceil(train.workers / per_node)
    nodes = machines.nodes or needed
    if nodes < needed:
        room = f"{nodes} x {per_node} = {nodes * per_node}"
        raise RequestError(f"--nodes {nodes}: room for {room} workers, train.workers={train.workers}; give {needed}")
    per_node = min(per_node, train.workers)

    loaders = _loaders(recipe, settings, plan)
    if loaders is None:
        usual = LOADERS_PER_GPU if gpus_each else LOADERS_PER_CPU_WORKER
        loaders = usual if machines.cpus is None else (machines.cpus - SPARE_CPUS) // per_node - 1
        loaders = max(1, min(loaders, MOST_LOADERS))
    cpus_each = max(cluster.cpus_per_worker, 1)
    cpus = machines.cpus or per_node * max(cpus_each, 1 + loaders) + SPARE_CPUS
    if cpus < per_node * cpus_each:
        problem = f"{per_node} workers of a node reserve {cpus_each} each (cluster.cpus_per_worker)"
        raise RequestError(f"--cpus {cpus}: {problem}; give {per_node * cpus_each} or more")
    gib = GIB_OF_A_NODE + (GIB_PER_GPU * gpus if gpus_each else GIB_PER_CPU_WORKER * per_node)
    node = Node(cpus, gpus, machines.memory_mib or gib * 1024)
    placed = (f"cluster.gpus_per_worker={gpus_each}", f"data.loader_workers={loaders}")
    plan = load_plan(recipe, (*settings, *placed, here), check_files=False)
    plan = Plan(tuple(replace(stage, recipe=replace(stage.recipe, storage=storage)) for stage in plan.stages))
    note = None
    if nodes > needed:
        note = f"{nodes} nodes, of which train.workers={train.workers} use {needed}"
    elif not gpus_each and train.device != "cpu":
        note = "no GPUs are asked for: the run trains on CPUs"
    return Sized(plan, nodes, node, note)


def _loaders(recipe: str, settings: Sequence[str], plan: Plan) -> int | None:
    """Loader processes of each worker, if the recipe or the request says how many."""
    content = recipe_content(recipe)
    sections = [layer.get("data") for layer in (content, *(content.get("stages") or []))]
    is_said = any(isinstance(section, Mapping) and section.get("loader_workers") is not None for section in sections)
    is_typed = any(text.partition("=")[0].strip().endswith("data.loader_workers") for text in settings)
    return plan.recipe.data.loader_workers if is_said or is_typed else None


def portable_yaml(plan: Plan) -> str:
    """The plan as YAML for another machine, where the installed package lies elsewhere.

    Raises:
        RequestError: It holds credentials.
    """
    for key, text in _texts(plan):
        if key != "description" and (redact(text) != text or "***" in text):  # one may name a page with a query
            stored = redact(text, marked=True)
            remedy = "its user, password or query does not travel; mount the data, or use a store with credentials"
            raise RequestError(f"{key}={stored}: {remedy} of its own (--secret)")
        if holds_issued_key(text):
            raise RequestError(
                f"{key}: looks like a secret, and a recipe is stored with the run; name a variable instead"
            )
    return plan_yaml(plan).replace(f"{_PACKAGE}/", "package:")


def paths_outside(plan: Plan, places: Sequence[str]) -> list[str]:
    """`key=path` of the paths in a plan that lie in none of the places which the nodes see."""
    return list(
        dict.fromkeys(
            f"{key}={text}"
            for key, text in _texts(plan)
            if (path := _path_in(text)) is not None
            and key not in _NO_PLACES
            and not any(path == place or path.startswith(f"{place}/") for place in (*places, _PACKAGE))
        )
    )


def secret_in(name: str, text: str) -> bool:
    """Whether a text that is to be written down looks like a secret, or a URI with one; `name` says what it is for."""
    return redact(text) != text or reads_like_secret(name, text)


def _path_in(text: str) -> str | None:
    """The absolute path that a setting is, or names behind the `@` of `timm:NAME@FILE`."""
    if text.startswith("timm:"):
        text = text.partition("@")[2]
    return text if text.startswith("/") else None


def _texts(plan: Plan) -> Iterator[tuple[str, str]]:
    """Keys and values of all texts in the recipes of a plan."""
    for stage in plan.stages:
        yield from texts_in(OmegaConf.to_container(OmegaConf.structured(stage.recipe)))
