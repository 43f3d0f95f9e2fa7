"""What `pretrain manifest` is asked for: options that are checked, a recipe that is placed, the text that they give.

Apart from the command itself, so that `pretrain --help` imports nothing that reads recipes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import kuberay, kuberay_rules, ray_up, slurm
from cluster.manifests.workload import SecretKey, Workload
from cluster.secret_names import holds_secret
from data_pipelines.storage.locations import redact
from pretrain.config.recipe_files import recipe_content
from pretrain.deployment import Machines, Sized, paths_outside, portable_yaml, secret_in, sized
from pretrain.errors import EXIT_STOPPED, RequestError, nearest_file
from pretrain.remote.places import is_uri
from pretrain.schedules.cron import checked_cron, checked_zone

__all__ = ["Options", "requested", "written"]

KUBERNETES = ("rayjob", "raycluster", "raycronjob")
MOUNT = "/mnt/pretrain"
# Options that not every kind has a place for.
_ONLY_OF = {
    "namespace": KUBERNETES,
    "image": (*KUBERNETES, "ray-up"),
    "claims": KUBERNETES,
    "queue": ("rayjob", "raycluster", "slurm"),
    "schedule": ("raycronjob",),
    "time_zone": ("raycronjob",),
    "hours": ("rayjob", "raycronjob", "slurm"),
    "retries": ("rayjob", "raycronjob", "slurm"),
    "setup": ("slurm", "ray-up"),
    "hosts": ("ray-up",),
    "ssh_user": ("ray-up",),
}
_SPELLED = {"claims": "pvc", "hosts": "host"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OBJECT_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_KEY = re.compile(r"[-._A-Za-z0-9]{1,253}")
_IMAGE = re.compile(r"[a-z0-9][\w.:/-]*(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]*")
_LEAST_MIB, _MOST_MIB = 1024, 65536 * 1024  # of the memory of a node
_MEMORY = re.compile(r"([1-9]\d*)(Gi|Mi|G|M)")
_PATH = re.compile(r"(/[\w.@%+=-]+)+")
_MIB = {"Gi": 1024.0, "Mi": 1.0, "G": 1e9 / 2**20, "M": 1e6 / 2**20}


@dataclass(frozen=True)
class Options:
    """As typed; what was left out is None or empty."""

    name: str | None
    namespace: str | None
    image: str | None
    nodes: int | None
    gpus: int | None
    cpus: int | None
    memory: str | None
    queue: str | None
    claims: tuple[str, ...]
    storage: str | None
    secrets: tuple[str, ...]
    environment: tuple[str, ...]
    schedule: str | None
    time_zone: str | None
    retries: int | None
    grace: int
    hours: float | None
    setup: tuple[str, ...]
    hosts: tuple[str, ...]
    ssh_user: str | None


def requested(
    recipe: str, settings: Sequence[str], kind: str, output: str | None, options: Options
) -> tuple[Workload, list[str]]:
    """The workload, and what a person should know of it.

    Args:
        recipe, settings: Name or file, and `key=value` texts.
        kind: What will be written.
        output: The file that it will be in.
        options: All others.

    Raises:
        RequestError: One line per mistake; no value of a secret is quoted.
    """
    checks = _Checks(kind)
    checks.only_where_they_count(options)
    name = options.name or re.sub(r"[^a-z0-9]+", "-", Path(recipe).stem.lower()).strip("-")
    mounts = checks.claims(options.claims)
    place = checks.storage(options.storage, recipe, settings, mounts)
    checks.name("--name", name, _LABEL, "lower-case letters, digits and '-', at most 63")
    checks.name("--namespace", options.namespace, _LABEL, "lower-case letters, digits and '-', at most 63")
    checks.name("--queue", options.queue, _KEY, "the name of a queue")
    checks.name("--ssh-user", options.ssh_user, _KEY, "a user's name")
    checks.image(options.image)
    checks.schedule(options.schedule, options.time_zone)
    for host in options.hosts:
        checks.name("--host", host, _HOST, "an address")
    if kind == "ray-up" and len(options.hosts) < 1:
        checks.add("--host", "needed by ray-up, once for each machine, the head first")
    memory_mib = checks.memory(options.memory)
    keys, files = checks.secrets(options.secrets)
    variables = checks.environment(options.environment)
    checks.no_secrets(setup=options.setup)
    checks.output(output)
    if checks.mistakes:
        raise RequestError(*checks.mistakes)
    assert place is not None
    settings = tuple(text for text in settings if not text.startswith("storage="))
    found = sized(recipe, settings, Machines(options.nodes, options.gpus, options.cpus, memory_mib), place)
    _require_visible(found, kind, mounts)
    notes = [] if found.note is None else [found.note]
    if kind == "ray-up" and len(options.hosts) != found.nodes:
        size = f"{found.node.cpus} CPUs and {found.node.gpus} GPUs"
        notes.append(f"{len(options.hosts)} machines; the workers of the recipe fill {found.nodes} with {size}")
    workload = Workload(
        name=name,
        recipe=portable_yaml(found.plan),
        storage=place,
        ray_version=version("ray"),
        nodes=found.nodes,
        node=found.node,
        environment=variables,
        grace_s=options.grace,
        hours=options.hours,
        image=options.image,
        namespace=options.namespace,
        queue=options.queue,
        claims=mounts,
        secret_keys=keys,
        secret_files=files,
        schedule=options.schedule,
        time_zone=options.time_zone,
        setup=options.setup,
        hosts=options.hosts,
        ssh_user=options.ssh_user,
        **({} if options.retries is None else {"retries": options.retries}),
    )
    return workload, notes


def written(workload: Workload, kind: str) -> str:
    """The text of a file.

    Raises:
        RequestError: The operator of KubeRay would refuse it.
    """
    if kind == "slurm":
        return slurm.script(workload, stopped=EXIT_STOPPED)
    if kind == "ray-up":
        return _yaml([ray_up.cluster_file(workload)])
    writers = {"rayjob": kuberay.ray_job, "raycluster": kuberay.ray_cluster, "raycronjob": kuberay.ray_cron_job}
    objects = writers[kind](workload)
    if problems := kuberay_rules.broken_rules(objects):
        too_long = any("metadata.name" in problem for problem in problems)
        raise RequestError(*(f"{problem}{'; give a shorter --name' if too_long else ''}" for problem in problems))
    return _yaml(objects)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are read, so that the recipe in a ConfigMap can be reviewed."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=math.inf)


def _require_visible(found: Sized, kind: str, mounts: Mapping[str, str]) -> None:
    """Refuse paths that pods do not see; what machines of Slurm and `ray up` share is named nowhere.

    Raises:
        RequestError: There are some; names each.
    """
    if kind in KUBERNETES and (outside := paths_outside(found.plan, list(mounts))):
        where = ", ".join(mounts)
        raise RequestError(
            *(f"{text}: pods see nothing there, only {where}; mount it with --pvc CLAIM:PATH" for text in outside)
        )


def _storage_in(recipe: str) -> str:
    """What a recipe says of it; of one that cannot be read nothing, which is told later."""
    with suppress(RequestError):
        return str(recipe_content(recipe).get("storage") or "")
    return ""


class _Checks:
    """The options of a request, checked one by one; all mistakes are told at once. No value of a secret is quoted."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.mistakes: list[str] = []

    def add(self, option: str, problem: str) -> None:
        self.mistakes.append(f"{option}: {problem}")

    def only_where_they_count(self, options: Options) -> None:
        for key, kinds in _ONLY_OF.items():
            if getattr(options, key) not in (None, ()) and self.kind not in kinds:
                self.add(
                    f"--{_SPELLED.get(key, key.replace('_', '-'))}", f"not of {self.kind}, only of {', '.join(kinds)}"
                )
        if self.kind in KUBERNETES and options.image is None:
            self.add("--image", f"needed by {self.kind}; build one with deploy/Dockerfile")
        if self.kind == "raycronjob" and options.schedule is None:
            self.add("--schedule", "needed by raycronjob, such as --schedule '0 2 * * 0'")

    def name(self, option: str, value: str | None, pattern: re.Pattern[str], expected: str) -> None:
        if value is not None and not pattern.fullmatch(value):
            self.add(f"{option} {value!r}", f"expected {expected}")

    def image(self, image: str | None) -> None:
        if image is not None and not _IMAGE.fullmatch(image):
            expected = "expected REGISTRY/NAME:TAG or NAME@sha256:DIGEST in lower-case letters, without a password"
            self.add("--image" if "@" in image else f"--image {image!r}", f"{expected}; a retry must find the same")

    def schedule(self, schedule: str | None, time_zone: str | None) -> None:
        """KubeRay would find mistakes when the object is there. Its cron has neither `L` nor `#`, and Sunday is 0."""
        if schedule is not None:
            try:
                days = checked_cron(schedule, "--schedule").split()
            except RequestError as error:
                self.mistakes += error.mistakes
            else:
                if "L" in days[2].upper() or re.search(r"[#7]|L\b", days[4].upper()):
                    self.add(f"--schedule {schedule!r}", "Kubernetes has no L and no # for days, and its Sunday is 0")
        if time_zone is not None:
            try:
                checked_zone(time_zone, "--time-zone")
            except RequestError as error:
                self.mistakes += error.mistakes

    def memory(self, memory: str | None) -> int | None:
        if memory is None:
            return None
        match = _MEMORY.fullmatch(memory)
        if match is None:
            self.add(f"--memory {memory!r}", "expected a number with Gi, Mi, G or M, such as 256Gi")
            return None
        mib = int(int(match[1]) * _MIB[match[2]])
        if not _LEAST_MIB <= mib <= _MOST_MIB:
            self.add(f"--memory {memory!r}", "of a node is from 1Gi to 65536Gi")
        return mib

    def claims(self, claims: Sequence[str]) -> dict[str, str]:
        """Mount path -> claim."""
        found: dict[str, str] = {}
        for text in claims:
            claim, _, path = text.partition(":")
            path = (path or MOUNT).rstrip("/")
            if not _OBJECT_NAME.fullmatch(claim) or not _PATH.fullmatch(path):
                self.add(f"--pvc {text!r}", "expected CLAIM or CLAIM:/PATH")
            elif path in found:
                self.add(f"--pvc {text!r}", f"{path} is the place of {found[path]} already; give CLAIM:/OTHER/PATH")
            found[path] = claim
        if self.kind in KUBERNETES and not claims:
            self.add("--pvc", "needed: the pods write runs to a ReadWriteMany claim that they share")
        return found

    def storage(
        self, storage: str | None, recipe: str, settings: Sequence[str], mounts: Mapping[str, str]
    ) -> str | None:
        """The directory of the runs; one in the settings counts as well, but none in the recipe, which is of here."""
        typed = [text.partition("=")[2] for text in settings if text.startswith("storage=")]
        place = storage or (typed[-1] if typed else None)
        if is_uri(uri := place or _storage_in(recipe)):
            remedy = "the nodes share a directory; give that, and the checkpoints alone a store: checkpoints.storage="
            self.add(f"storage={redact(uri)}", f"a remote store; {remedy}{redact(uri)}")
            return None
        if place is None and mounts:
            place = f"{next(iter(mounts))}/runs"
        if place is None:
            if self.kind not in KUBERNETES:
                self.add("--storage", "needed: a directory that all nodes share, such as /shared/runs")
            return None
        place = place.rstrip("/")
        if not _PATH.fullmatch(place):
            self.add(f"--storage {place!r}", "expected an absolute path without blanks")
        elif self.kind in KUBERNETES and mounts and not any(place == p or place.startswith(f"{p}/") for p in mounts):
            self.add(f"--storage {place}", f"pods see nothing there, only {', '.join(mounts)}")
        return place

    def secrets(self, secrets: Sequence[str]) -> tuple[dict[str, SecretKey], dict[str, str]]:
        """Variable -> key of a Secret, and variable -> file, as the kind has it. A value by mistake is not repeated."""
        keys: dict[str, SecretKey] = {}
        files: dict[str, str] = {}
        for text in secrets:
            name, _, reference = text.partition("=")
            said = f"--secret {name}=..." if _NAME.fullmatch(name) else "--secret ..."
            secret, slash, key = reference.partition("/")
            if self.kind in KUBERNETES:
                is_reference = bool(slash and _OBJECT_NAME.fullmatch(secret) and _KEY.fullmatch(key))
                expected = "NAME=SECRET/KEY: the name of a Secret and of a key in it, not a value"
            else:
                is_reference = bool(_PATH.fullmatch(reference))
                expected = "NAME=/FILE: a file on the nodes that holds the value and only you can read, not a value"
            if not _NAME.fullmatch(name) or not is_reference or any(secret_in("", part) for part in (secret, key)):
                self.add(said, f"expected {expected}")
            elif name in keys or name in files:
                self.add(said, "given twice")
            elif self.kind in KUBERNETES:
                keys[name] = SecretKey(secret, key)
            else:
                files[name] = reference
        return keys, files

    def environment(self, pairs: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for text in pairs:
            name, equals, value = text.partition("=")
            if not equals or not _NAME.fullmatch(name):
                self.add("--env ...", "expected NAME=VALUE")
            elif holds_secret(name, value) or secret_in(name, value):
                reference = "SECRET/KEY" if self.kind in KUBERNETES else "/FILE"
                remedy = f"use --secret {name}={reference}"
                self.add(f"--env {name}=...", f"looks like a secret, which everybody could read here; {remedy}")
            elif not value.isprintable():
                self.add(f"--env {name}=...", "expected one printable line")
            else:
                found[name] = value
        return found

    def no_secrets(self, **texts: str | Sequence[str] | None) -> None:
        for option, given in texts.items():
            for text in [given] if isinstance(given, str) else given or ():
                words = re.split(r"[\s'\"]+", text)
                named = any(holds_secret(*word.split("=", 1)) for word in words if "=" in word)
                if named or any(secret_in(*word.rpartition("=")[::2]) for word in words):
                    self.add(
                        f"--{option.replace('_', '-')} ...", "looks like a secret, which everybody could read here"
                    )
                elif not text.isprintable():
                    self.add(f"--{option.replace('_', '-')} ...", "expected one printable line")

    def output(self, output: str | None) -> None:
        if output is None:
            return
        path = Path(output)
        if path.is_dir():
            self.add(f"--output {output}", "is a directory; name a file in it")
        elif path.exists() and not path.is_file():  # the new file would take the place of the device
            self.add(f"--output {output}", "is no regular file; standard output is where it goes without --output")
        elif not path.absolute().parent.is_dir():
            self.add(f"--output {output}", f"no such directory{nearest_file(path.absolute().parent)}")
