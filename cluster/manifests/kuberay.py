"""Objects of Kubernetes for KubeRay 1.7 (`ray.io/v1`): RayJob, RayCluster and RayCronJob, as plain dictionaries.

The head runs nothing but the driver; the workers have nodes of their own. A RayJob that fails, or stops after a
checkpoint (exit code 75), is begun again on a new cluster by `backoffLimit`, and its command goes on with the run. All
pods see the runs through claims that many pods may write to (ReadWriteMany).

When pods are taken away (drain, preemption, a deleted job), each waits in `preStop` while the run publishes a
checkpoint: the file `stop` in the directory of a run asks for that, and the file `training` is there until it is done.

What the operator demands beyond its schema is in `kuberay_rules`.
"""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from cluster.manifests.workload import Workload

__all__ = ["RECIPE_PATH", "ray_cluster", "ray_cron_job", "ray_job"]

Object = dict[str, Any]

RECIPE_FOLDER, RECIPE_FILE = "/etc/pretrain", "recipe.yaml"
RECIPE_PATH = f"{RECIPE_FOLDER}/{RECIPE_FILE}"
HEAD = {"cpu": "4", "memory": "16Gi"}  # the driver looks at the model before it asks for workers
SUBMITTER = {"cpu": "1", "memory": "1Gi"}
USER = 1000  # of the image, as in Ray's own images
OBJECT_STORE_BYTES = 10**9  # data does not travel through Ray; /dev/shm is for the loader processes
KEEP_S = 600  # that a finished job, and its logs, can still be looked at
_JOB_NAME = "batch.kubernetes.io/job-name"  # label that Kubernetes gives the pods of a Job, here the RayJob's name
_RUN = "PRETRAIN_RUN"


def ray_job(workload: Workload) -> list[Object]:
    """The recipe, and the job that runs it."""
    return [_recipe(workload), _object(workload, "RayJob", _job_spec(workload, run_id=workload.name))]


def ray_cron_job(workload: Workload) -> list[Object]:
    """The recipe, and a run of it at each of the times; a run that goes on when the next is due delays that.

    Every run has the name of the RayJob that the operator makes for it, which retries keep. The shell of the submitter
    pod puts it into the command.
    """
    spec: Object = {
        "schedule": workload.schedule,
        "jobTemplate": _job_spec(workload, run_id=f"{workload.name}.${_RUN}"),
    }
    if workload.time_zone is not None:
        spec["timeZone"] = workload.time_zone
    return [_recipe(workload), _object(workload, "RayCronJob", spec)]


def ray_cluster(workload: Workload) -> list[Object]:
    """A cluster that stays, for runs of this size."""
    return [_object(workload, "RayCluster", _cluster_spec(workload, run_id=None))]


def _job_spec(workload: Workload, *, run_id: str) -> Object:
    command = f"exec pretrain run {RECIPE_PATH} --run-id {run_id} --address auto"
    spec: Object = {
        "entrypoint": command,
        "submissionMode": "K8sJobMode",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(workload.grace_s)}}),
        "backoffLimit": workload.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_S,
        "submitterPodTemplate": {"spec": _submitter(workload, is_named="$" in run_id)},
        "rayClusterSpec": _cluster_spec(workload, run_id=run_id),
    }
    if workload.hours is not None:
        spec["activeDeadlineSeconds"] = round(workload.hours * 3600)
    return spec


def _cluster_spec(workload: Workload, *, run_id: str | None) -> Object:
    node = workload.node
    limits: Object = {"cpu": str(node.cpus), "memory": f"{node.memory_mib}Mi"}
    if node.gpus:
        limits["nvidia.com/gpu"] = str(node.gpus)
    store = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    return {
        "rayVersion": workload.ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", **store},
            "template": {"spec": _pod(workload, "ray-head", HEAD, run_id=run_id, has_recipe=run_id is not None)},
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": workload.nodes,
                "minReplicas": workload.nodes,
                "maxReplicas": workload.nodes,
                "rayStartParams": store,
                "template": {"spec": _pod(workload, "ray-worker", limits, run_id=run_id, has_recipe=False)},
            }
        ],
    }


def _pod(workload: Workload, name: str, limits: Object, *, run_id: str | None, has_recipe: bool) -> Object:
    volumes: list[Object] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[Object] = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, (path, claim) in enumerate(workload.claims.items()):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{number}", "mountPath": path})
    if has_recipe:
        volumes.append({"name": "recipe", "configMap": {"name": _recipe_name(workload)}})
        mounts.append({"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True})
    container: Object = {
        "name": name,
        "image": workload.image,
        "env": _environment(workload),
        "resources": {"limits": limits, "requests": dict(limits)},
        "securityContext": _unprivileged(),
        "volumeMounts": mounts,
    }
    if run_id is not None:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", _drain(workload.storage, run_id)]}}}
    return {
        "containers": [container],
        "volumes": volumes,
        "securityContext": _as_user(),
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": workload.grace_s,
    }


def _submitter(workload: Workload, *, is_named: bool) -> Object:
    """The pod that hands the command to the head and waits for its end; `is_named`: it fills in the name of the run."""
    name_of_job = {"fieldRef": {"fieldPath": f"metadata.labels['{_JOB_NAME}']"}}
    return {
        "restartPolicy": "Never",
        "securityContext": _as_user(),
        "automountServiceAccountToken": False,
        "containers": [
            {
                "name": "ray-job-submitter",
                "image": workload.image,
                "env": [{"name": _RUN, "valueFrom": name_of_job}] if is_named else [],
                "resources": {"limits": dict(SUBMITTER), "requests": dict(SUBMITTER)},
                "securityContext": _unprivileged(),
            }
        ],
    }


def _drain(storage: str, run_id: str) -> str:
    """Ask the run for a checkpoint if it trains, and wait until it has one; Kubernetes bounds the wait."""
    name, dot, _ = run_id.partition("$")  # of a cron job the rest is known to the submitter alone
    runs = f"{shlex.quote(f'{storage}/{name}')}{'*' if dot else ''}"
    return (
        f'for run in {runs}; do if [ -e "$run/training" ]; then touch "$run/stop"; fi; done; '
        f'for run in {runs}; do while [ -e "$run/training" ]; do sleep 1; done; done'
    )


def _environment(workload: Workload) -> list[Object]:
    given = {"RAY_USAGE_STATS_ENABLED": "0", **workload.environment}
    plain = [{"name": name, "value": value} for name, value in given.items()]
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": where.secret, "key": where.key}}}
        for name, where in workload.secret_keys.items()
    ]
    return [*plain, *secret]


def _as_user() -> Object:
    """What the strictest of Kubernetes' pod security standards asks of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",  # or every start would touch every file of a claim
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _unprivileged() -> Object:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _recipe(workload: Workload) -> Object:
    """The recipe as a file for the head."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(workload, _recipe_name(workload)),
        "data": {RECIPE_FILE: workload.recipe},
    }


def _recipe_name(workload: Workload) -> str:
    return f"{workload.name}-recipe"


def _object(workload: Workload, kind: str, spec: Object) -> Object:
    metadata = _metadata(workload, workload.name)
    if workload.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = workload.queue
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _metadata(workload: Workload, name: str) -> Object:
    labels = {"app.kubernetes.io/name": "pretrain", "app.kubernetes.io/instance": workload.name}
    metadata: Object = {"name": name, "labels": labels}
    if workload.namespace is not None:
        metadata["namespace"] = workload.namespace
    return metadata
