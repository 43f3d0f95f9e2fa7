"""Each rule that KubeRay's operator has beyond its schema, broken once in a manifest that is right."""

from __future__ import annotations

import copy
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.manifests import kuberay
from cluster.manifests.kuberay_rules import broken_rules
from cluster.manifests.workload import Node, SecretKey, Workload

WORKLOAD = Workload(
    name="photos",
    recipe="name: photos\n",
    storage="/mnt/pretrain/runs",
    ray_version="2.60.0",
    nodes=2,
    node=Node(cpus=8, gpus=1, memory_mib=32768),
    image="registry.example/pretrain:0.1.0",
    claims={"/mnt/pretrain": "runs"},
    secret_keys={"MLFLOW_TRACKING_TOKEN": SecretKey("mlflow", "token")},
    schedule="0 2 * * 0",
)
WRITERS = {"RayJob": kuberay.ray_job, "RayCluster": kuberay.ray_cluster, "RayCronJob": kuberay.ray_cron_job}


def cluster_of(objects: list[Any]) -> Any:
    spec = objects[-1]["spec"]
    return spec["rayClusterSpec"] if objects[-1]["kind"] == "RayJob" else spec


def worker_pod(objects: list[Any]) -> Any:
    return cluster_of(objects)["workerGroupSpecs"][0]["template"]["spec"]


def deep_set(*path: Any, to: Any) -> Callable[[list[Any]], None]:
    """Set one value in the last object; `None` removes it."""

    def change(objects: list[Any]) -> None:
        place = objects[-1]
        for key in path[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
        if to is None:
            del place[path[-1]]
        else:
            place[path[-1]] = to

    return change


def both(*changes: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
    def change_all(objects: list[Any]) -> None:
        for change in changes:
            change(objects)

    return change_all


ENV = [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]
RULES = {"deletionRules": [{"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED"}}]}
CLUSTER, GROUP = ("spec", "rayClusterSpec"), ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
POD = (*GROUP, "template", "spec")
BROKEN = [
    (
        "RayJob",
        deep_set("metadata", "name", to="x" * 48),
        "RayJob .*: metadata.name: 48 characters; the operator takes 47",
    ),
    ("RayCluster", deep_set("metadata", "name", to="x" * 54), "54 characters; the operator takes 53"),
    ("RayCronJob", deep_set("metadata", "name", to="x" * 37), "37 characters; the operator takes 36"),
    ("RayJob", deep_set("metadata", "name", to="Photos"), "metadata.name: expected lower-case letters"),
    ("RayJob", deep_set("spec", "shutdownAfterJobFinishes", to=False), "ttlSecondsAfterFinished: needs shutdownAfter"),
    (
        "RayJob",
        both(deep_set("spec", "shutdownAfterJobFinishes", to=False), deep_set("spec", "suspend", to=True)),
        "spec.suspend: needs shutdownAfterJobFinishes",
    ),
    ("RayJob", deep_set("spec", "deletionStrategy", to=RULES), "deletionRules: excluded by shutdownAfterJobFinishes"),
    ("RayJob", deep_set("spec", "backoffLimit", to=-1), "spec.backoffLimit: -1 is too small"),
    ("RayJob", deep_set("spec", "activeDeadlineSeconds", to=0), "spec.activeDeadlineSeconds: 0 is too small"),
    ("RayJob", deep_set("spec", "clusterSelector", to={"a": "b"}), "spec.backoffLimit: excluded by clusterSelector"),
    (
        "RayJob",
        both(deep_set("spec", "clusterSelector", to={"a": "b"}), deep_set("spec", "suspend", to=True)),
        "spec.suspend: excluded by clusterSelector",
    ),
    (
        "RayJob",
        both(deep_set("spec", "clusterSelector", to={"a": "b"}), deep_set("spec", "submissionMode", to="SidecarMode")),
        "submissionMode: SidecarMode is excluded by clusterSelector",
    ),
    ("RayJob", deep_set("spec", "submissionMode", to="SidecarMode"), "submitterPodTemplate: excluded by SidecarMode"),
    ("RayJob", deep_set("spec", "submissionMode", to="SidecarMode"), "headGroupSpec: SidecarMode needs restartPolicy"),
    ("RayJob", deep_set("spec", "entrypoint", to=" "), "spec.entrypoint: empty"),
    ("RayJob", deep_set("spec", "rayClusterSpec", to=None), "spec.rayClusterSpec: missing"),
    ("RayCronJob", deep_set("spec", "schedule", to="0 2 * *"), "spec.schedule: expected five fields"),
    ("RayCronJob", deep_set("spec", "schedule", to="TZ=UTC 0 2 * *"), "spec.schedule: .* spec.timeZone"),
    ("RayCronJob", deep_set("spec", "jobTemplate", "entrypoint", to=""), "spec.jobTemplate.entrypoint: empty"),
    ("RayJob", deep_set(*CLUSTER, "authOptions", to=None), "authOptions.mode: expected token"),
    ("RayJob", deep_set(*CLUSTER, "rayVersion", to="2.49.0"), "rayVersion: token authentication needs 2.52"),
    ("RayJob", deep_set(*CLUSTER, "rayVersion", to=None), "rayVersion: token authentication needs 2.52"),
    (
        "RayJob",
        deep_set(*CLUSTER, "authOptions", "enableK8sTokenAuth", to=True),
        "enableK8sTokenAuth: not for a RayJob",
    ),
    ("RayJob", deep_set(*GROUP, "maxReplicas", to=None), "without autoscaling both minReplicas and maxReplicas"),
    ("RayJob", deep_set(*GROUP, "minReplicas", to=3), "expected minReplicas <= replicas <= maxReplicas"),
    (
        "RayJob",
        both(deep_set(*GROUP, "rayStartParams", "num-cpus", to="4"), deep_set(*GROUP, "resources", to={"CPU": "4"})),
        "cpu in rayStartParams as well as in resources",
    ),
    (
        "RayJob",
        both(
            deep_set(*CLUSTER, "enableInTreeAutoscaling", to=True),
            deep_set(*CLUSTER, "autoscalerOptions", to={"version": "v2"}),
        ),
        "version v2 of the autoscaler needs restartPolicy: Never",
    ),
    ("RayJob", deep_set(*POD, "securityContext", to=None), "workerGroupSpecs.0.: securityContext.runAsNonRoot"),
    (
        "RayJob",
        deep_set("spec", "submitterPodTemplate", "spec", "securityContext", to=None),
        "submitterPodTemplate: securityContext.runAsNonRoot",
    ),
    ("RayJob", deep_set(*POD, "containers", 0, "env", to=ENV), "env AWS_SECRET_ACCESS_KEY: expected valueFrom"),
    ("RayJob", deep_set(*POD, "volumes", 0, "emptyDir", to={}), "/dev/shm: expected a mount of an emptyDir"),
    ("RayJob", deep_set(*POD, "terminationGracePeriodSeconds", to=None), "terminationGracePeriodSeconds: missing"),
    ("RayJob", lambda objects: objects[0]["data"].update(x="é" * 2**19), r"ConfigMap photos-recipe: data: \d+ bytes"),
    ("RayJob", deep_set("kind", to="RayJobs"), "kind: expected RayJob, RayCluster"),
]


@pytest.mark.parametrize("kind", WRITERS)
def test_broken_rules__none_in_what_is_written(kind: str) -> None:
    assert broken_rules(WRITERS[kind](WORKLOAD)) == []


@pytest.mark.parametrize(("kind", "change", "said"), BROKEN, ids=[said[:40] for _, _, said in BROKEN])
def test_broken_rules__each_is_named(kind: str, change: Callable[[list[Any]], None], said: str) -> None:
    objects = copy.deepcopy(WRITERS[kind](WORKLOAD))
    change(objects)
    problems = broken_rules(objects)
    assert any(re.search(said, problem) for problem in problems), problems


def test_broken_rules__workers_may_not_be_deleted_where_they_come_and_go() -> None:
    objects = copy.deepcopy(kuberay.ray_cluster(WORKLOAD))
    cluster = cluster_of(objects)
    cluster |= {"enableInTreeAutoscaling": True, "deletionStrategy": RULES}
    assert any("DeleteWorkers is excluded by autoscaling" in problem for problem in broken_rules(objects))
    cluster["workerGroupSpecs"].append(copy.deepcopy(cluster["workerGroupSpecs"][0]))
    assert any("two groups have the same groupName" in problem for problem in broken_rules(objects))


@pytest.mark.parametrize(("kind", "run"), [("RayJob", "photos"), ("RayCronJob", "photos.rayjob-7")])
def test_pre_stop__asks_a_run_that_trains_for_a_checkpoint_and_waits(kind: str, run: str, tmp_path: Path) -> None:
    """The shell of a pod does what stands in the manifest."""
    objects = WRITERS[kind](replace(WORKLOAD, storage=str(tmp_path)))
    job = objects[-1]["spec"] if kind == "RayJob" else objects[-1]["spec"]["jobTemplate"]
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    commands = [
        group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] for group in groups
    ]
    assert commands[0] == commands[1]
    subprocess.run(commands[0], check=True, timeout=30)  # nothing has begun, or all is done
    other = tmp_path / "photos-large"  # of another manifest
    for folder in (tmp_path / run, other):
        folder.mkdir()
        (folder / "training").touch()
    waiting = subprocess.Popen(commands[0])
    try:
        while not (tmp_path / run / "stop").exists():
            assert waiting.poll() is None
            time.sleep(0.02)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
        (tmp_path / run / "training").unlink()
        assert waiting.wait(30) == 0
    finally:
        waiting.kill()
    assert not (other / "stop").exists()
