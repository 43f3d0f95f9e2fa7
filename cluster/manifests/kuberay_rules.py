"""What KubeRay's operator refuses although its schema accepts it, and what we ask of every object that is handed out.

The rules of the operator are those of KubeRay 1.7. A manifest that breaks one is stored by Kubernetes without a word
and never becomes a pod, so they are checked before anything is applied; also on files that were edited by hand. Not
here: the schema (types, names of fields), which the Kubernetes server checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.secret_names import holds_secret

__all__ = ["broken_rules"]

LONGEST_NAME = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
CONFIG_MAP_BYTES = 1 << 20
TOKEN_SINCE = (2, 52)  # Ray version
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_RESOURCES = {"num-cpus": "cpu", "num-gpus": "nvidia.com/gpu", "memory": "memory"}

Object = Mapping[str, Any]


def broken_rules(objects: Sequence[Object]) -> list[str]:
    """One line per rule that an object breaks: `KIND NAME: FIELD: what is wrong`."""
    found: list[str] = []
    for item in objects:
        kind, metadata = str(item.get("kind")), item.get("metadata") or {}
        found += (f"{kind} {metadata.get('name')}: {problem}" for problem in _of_object(kind, metadata, item))
    return found


def _of_object(kind: str, metadata: Object, item: Object) -> Iterator[str]:
    if kind == "ConfigMap":
        size = sum(len(str(text).encode()) for text in (item.get("data") or {}).values())
        if size > CONFIG_MAP_BYTES:
            yield f"data: {size} bytes; a ConfigMap holds {CONFIG_MAP_BYTES}"
        return
    name, longest = str(metadata.get("name") or ""), LONGEST_NAME.get(kind, 63)
    if not _LABEL.fullmatch(name):
        yield "metadata.name: expected lower-case letters, digits and '-', beginning with a letter"
    if len(name) > longest:
        yield f"metadata.name: {len(name)} characters; the operator takes {longest}"
    spec = item.get("spec") or {}
    if kind == "RayCluster":
        yield from _of_cluster(spec, "spec", is_job=False)
    elif kind == "RayJob":
        yield from _of_job(spec, "spec")
    elif kind == "RayCronJob":
        if len(str(spec.get("schedule") or "").split()) != 5 or "TZ" in str(spec.get("schedule")):
            yield "spec.schedule: expected five fields, such as '0 2 * * 0'; the zone belongs into spec.timeZone"
        yield from _of_job(spec.get("jobTemplate") or {}, "spec.jobTemplate")
    else:
        yield "kind: expected RayJob, RayCluster, RayCronJob or ConfigMap"


def _of_job(spec: Object, at: str) -> Iterator[str]:
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    for field in ("suspend", "ttlSecondsAfterFinished"):
        if spec.get(field) and not ends:
            yield f"{at}.{field}: needs shutdownAfterJobFinishes: true"
    if ends and (spec.get("deletionStrategy") or {}).get("deletionRules"):
        yield f"{at}.deletionStrategy.deletionRules: excluded by shutdownAfterJobFinishes: true"
    for field in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        if isinstance(value := spec.get(field), int) and value < (1 if field == "activeDeadlineSeconds" else 0):
            yield f"{at}.{field}: {value} is too small"
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("clusterSelector"):
        if spec.get("suspend"):
            yield f"{at}.suspend: excluded by clusterSelector"
        if spec.get("backoffLimit"):
            yield f"{at}.backoffLimit: excluded by clusterSelector"
        if mode == "SidecarMode":
            yield f"{at}.submissionMode: SidecarMode is excluded by clusterSelector"
    elif not spec.get("rayClusterSpec"):
        yield f"{at}.rayClusterSpec: missing, and no clusterSelector names a cluster"
    if mode == "SidecarMode":
        head = _pod_spec((spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {})
        if spec.get("submitterPodTemplate"):
            yield f"{at}.submitterPodTemplate: excluded by SidecarMode"
        if head.get("restartPolicy") != "Never":
            yield f"{at}.rayClusterSpec.headGroupSpec: SidecarMode needs restartPolicy: Never"
    if mode != "InteractiveMode" and not str(spec.get("entrypoint") or "").strip():
        yield f"{at}.entrypoint: empty"
    if spec.get("submitterPodTemplate"):
        yield from _of_pod(_pod_spec({"template": spec["submitterPodTemplate"]}), f"{at}.submitterPodTemplate")
    if cluster := spec.get("rayClusterSpec"):
        yield from _of_cluster(cluster, f"{at}.rayClusterSpec", is_job=True)


def _of_cluster(spec: Object, at: str, *, is_job: bool) -> Iterator[str]:
    auth = spec.get("authOptions") or {}
    if auth.get("mode") != "token":
        yield f"{at}.authOptions.mode: expected token; without it everybody in the network may run code here"
    elif _version(spec.get("rayVersion")) < TOKEN_SINCE:
        yield f"{at}.rayVersion: token authentication needs {'.'.join(map(str, TOKEN_SINCE))} or newer, and it said"
    if is_job and auth.get("enableK8sTokenAuth"):
        yield f"{at}.authOptions.enableK8sTokenAuth: not for a RayJob"
    autoscales = bool(spec.get("enableInTreeAutoscaling"))
    is_v2 = autoscales and (spec.get("autoscalerOptions") or {}).get("version") == "v2"
    groups = [("headGroupSpec", spec.get("headGroupSpec") or {})]
    groups += [(f"workerGroupSpecs[{n}]", group) for n, group in enumerate(spec.get("workerGroupSpecs") or [])]
    names = [group.get("groupName") for _, group in groups[1:]]
    if len(set(names)) < len(names):
        yield f"{at}.workerGroupSpecs: two groups have the same groupName"
    for field, group in groups:
        here = f"{at}.{field}"
        if field != "headGroupSpec" and not autoscales and not {"minReplicas", "maxReplicas"} <= group.keys():
            yield f"{here}: without autoscaling both minReplicas and maxReplicas must be set"
        bounds = [group.get(name) for name in ("minReplicas", "replicas", "maxReplicas")]
        numbers = [bound for bound in bounds if isinstance(bound, int)]
        if numbers != sorted(numbers):
            yield f"{here}: expected minReplicas <= replicas <= maxReplicas"
        twice = {_RESOURCES[name] for name in (group.get("rayStartParams") or {}) if name in _RESOURCES}
        if group.get("resources") and (
            both := sorted(twice | ({"resources"} & (group.get("rayStartParams") or {}).keys()))
        ):
            yield f"{here}: {', '.join(both)} in rayStartParams as well as in resources"
        pod = _pod_spec(group)
        if is_v2 and pod.get("restartPolicy") != "Never":
            yield f"{here}: version v2 of the autoscaler needs restartPolicy: Never"
        yield from _of_pod(pod, here)
        yield from _of_ray_pod(pod, here)
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules") or []
    if autoscales and any(rule.get("policy") == "DeleteWorkers" for rule in rules):
        yield f"{at}.deletionStrategy: DeleteWorkers is excluded by autoscaling"


def _of_pod(pod: Object, at: str) -> Iterator[str]:
    """Ours: nothing runs as root, and no secret is written down."""
    if not (pod.get("securityContext") or {}).get("runAsNonRoot"):
        yield f"{at}: securityContext.runAsNonRoot: expected true"
    for container in pod.get("containers") or []:
        for variable in container.get("env") or []:
            name = str(variable.get("name"))
            if "value" in variable and holds_secret(name, str(variable["value"])):
                yield f"{at}: env {name}: expected valueFrom.secretKeyRef, not a value"


def _of_ray_pod(pod: Object, at: str) -> Iterator[str]:
    """Ours: loader processes share memory, and a pod that is taken away has time for what its preStop does."""
    shared = {volume.get("name") for volume in pod.get("volumes") or [] if _is_memory(volume)}
    for container in (pod.get("containers") or [])[:1]:
        mounts = container.get("volumeMounts") or []
        if not any(mount.get("mountPath") == "/dev/shm" and mount.get("name") in shared for mount in mounts):
            yield f"{at}: /dev/shm: expected a mount of an emptyDir with medium: Memory; else it has 64 MiB"
    if not isinstance(pod.get("terminationGracePeriodSeconds"), int):
        yield f"{at}: terminationGracePeriodSeconds: missing; Kubernetes gives 30 s, too few for a checkpoint"


def _is_memory(volume: Object) -> bool:
    return (volume.get("emptyDir") or {}).get("medium") == "Memory"


def _pod_spec(group: Object) -> Object:
    return (group.get("template") or {}).get("spec") or {}


def _version(text: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(text or ""))[:2])
