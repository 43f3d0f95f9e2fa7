"""`pretrain manifest`: what is written passes the schemas of those who read it, and holds no secret."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal as signals
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from cluster.manifests import kuberay, ray_up, slurm
from cluster.manifests.workload import Node, SecretKey, Workload
from pretrain.cli.main import main
from pretrain.config.load import load_plan, recipe_content, recipe_names, recipe_path
from pretrain.config.stages import plan_yaml
from pretrain.deployment import Machines, Sized, portable_yaml, secret_in, sized

SCHEMAS = Path(__file__).parents[3] / "shared" / "data" / "kuberay"
WRITERS = {"rayjob": kuberay.ray_job, "raycluster": kuberay.ray_cluster, "raycronjob": kuberay.ray_cron_job}
PVC = ["--image", "registry.example/pretrain:0.1.0", "--pvc", "runs"]
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


def strict(schema: dict[str, Any]) -> Any:
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def validators() -> Mapping[str, Any]:
    if not SCHEMAS.is_dir():
        pytest.skip("the schemas of KubeRay are not here")
    return {
        kind: strict(json.loads(gzip.decompress((SCHEMAS / f"{kind}.schema.json.gz").read_bytes()))) for kind in WRITERS
    }


@pytest.fixture(scope="module")
def ray_schema() -> Any:
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return jsonschema.Draft7Validator(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def placed() -> Mapping[str, Sized]:
    """Every shipped recipe on its nodes."""
    wanted = {"data.root": "/mnt/pretrain/data", "teacher_from": "models:/teacher/1"}
    found = {}
    for name in recipe_names():
        content = recipe_content(name)
        left = {"data.root": content["data"].get("root"), "teacher_from": content.get("teacher_from")}
        settings = [f"{key}={value}" for key, value in wanted.items() if left[key] == "???"]
        found[name] = sized(name, settings, Machines(), "/mnt/pretrain/runs")
    return MappingProxyType(found)


def workload(name: str, found: Sized) -> Workload:
    return Workload(
        name=name.replace("_", "-"),
        recipe=portable_yaml(found.plan),
        storage="/mnt/pretrain/runs",
        ray_version="2.60.0",
        nodes=found.nodes,
        node=found.node,
        environment={"MLFLOW_TRACKING_URI": "https://mlflow.example"},
        hours=24,
        image="registry.example/pretrain:0.1.0",
        namespace="ml",
        queue="team-a",
        claims={"/mnt/pretrain": "runs", "/data": "photos"},
        secret_keys={"MLFLOW_TRACKING_TOKEN": SecretKey("mlflow", "token")},
        secret_files={"MLFLOW_TRACKING_TOKEN": "/shared/me/token"},
        schedule="0 2 * * 0",
        time_zone="Europe/London",
        setup=["source /shared/venv/bin/activate"],
        hosts=["10.0.0.1", "10.0.0.2"],
        ssh_user="ml",
    )


def test_manifests__every_kind_of_every_recipe_passes_its_schema(
    placed: Mapping[str, Sized], validators: Mapping[str, Any], ray_schema: Any
) -> None:
    for name, found in placed.items():
        described = workload(name, found)
        for kind, write in WRITERS.items():
            problems = [error.message for error in validators[kind].iter_errors(write(described)[-1])]
            assert problems == [], (name, kind)
        assert [error.message for error in ray_schema.iter_errors(ray_up.cluster_file(described))] == [], name


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("rayjob", ("spec", "backofLimit"), 3),
        ("rayjob", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volume"), []),
        ("rayjob", ("spec", "backoffLimit"), "three"),
        ("raycluster", ("spec", "workerGroupSpecs"), {}),
        ("raycronjob", ("spec", "cron"), "0 2 * * 0"),
    ],
)
def test_schemas__a_planted_error_is_named(
    kind: str, path: tuple[str, ...], value: Any, placed: Mapping[str, Sized], validators: Mapping[str, Any]
) -> None:
    item = WRITERS[kind](workload("demo", placed["demo"]))[-1]
    place = item
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (error,) = validators[kind].iter_errors(item)
    assert path[-1] in error.message or path[-1] in error.absolute_path


def test_sized__workers_of_a_recipe_fill_nodes(placed: Mapping[str, Sized]) -> None:
    paper = placed["mae_vitb16_imagenet"]
    assert (paper.nodes, paper.node.gpus) == (8, 8) and paper.node.cpus >= 8 * 9
    assert paper.plan.recipe.cluster.gpus_per_worker == 1  # said, so that no worker trains on a CPU instead
    assert paper.plan.recipe.data.loader_workers == 8  # as the recipe says, not as this machine has cores
    small = placed["mae_cifar10"]
    assert (small.nodes, small.node.gpus, small.plan.recipe.data.loader_workers) == (1, 2, 8)
    on_cpus = sized("mae_cifar10", ["data.root=/x"], Machines(gpus=0, nodes=2, cpus=6), "/runs")
    assert (on_cpus.nodes, on_cpus.node) == (2, Node(6, 0, 12 * 1024)) and on_cpus.note is not None
    assert on_cpus.plan.recipe.cluster.gpus_per_worker == 0 and on_cpus.plan.recipe.data.loader_workers == 3


def test_portable_yaml__comes_back_as_the_plan_wherever_the_package_lies(
    placed: Mapping[str, Sized], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("demo", "dinov3_cifar10"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(portable_yaml(placed[name].plan))
        here = [f"storage={tmp_path}"]
        again = load_plan(file, here, check_files=False)
        moved = [replace(s, recipe=replace(s.recipe, storage=str(tmp_path))) for s in placed[name].plan.stages]
        assert list(again.stages) == moved
    written = (tmp_path / "demo.yaml").read_text()
    assert "train: package:demo_data/" in written and "site-packages" not in written
    assert len(plan_yaml(placed["demo"].plan)) > len(written)


def test_slurm__script_is_sound_and_carries_the_recipe(placed: Mapping[str, Sized], tmp_path: Path) -> None:
    described = workload("demo", placed["demo"])
    script = slurm.script(described, stopped=75)
    file = tmp_path / "demo.sh"
    file.write_text(script)
    subprocess.run(["bash", "-n", str(file)], check=True)
    recipe = script.split("<<'END_OF_RECIPE'\n")[1].split("\nEND_OF_RECIPE\n")[0]
    assert recipe + "\n" == described.recipe
    header = script[: script.index("set -euo")].splitlines()
    assert "#SBATCH --time=24:00:00" in header and "#SBATCH --signal=B:USR1@300" in header
    assert all(line.startswith("#") for line in header)
    odd = replace(described, recipe="a: 1\nEND_OF_RECIPE\nb: 2\n")
    assert "<<'END_OF_RECIPE_'\na: 1\nEND_OF_RECIPE\nb: 2\nEND_OF_RECIPE_\n" in slurm.script(odd, stopped=75)


def test_slurm__script_passes_shellcheck(placed: Mapping[str, Sized], tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    file = tmp_path / "demo.sh"
    file.write_text(slurm.script(workload("demo", placed["demo"]), stopped=75))
    found = subprocess.run([shellcheck, "--exclude=SC1091", str(file)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


FAKES = {
    "srun": "exec sleep 60",
    "scontrol": 'echo "$@" >> "$STATE/requeued"',
    "pretrain": """
echo "$@" >> "$STATE/said"; cp "$2" "$STATE/recipe.yaml"
trap 'exit ${CODE:-75}' TERM
if [[ -n ${ENDS:-} ]]; then exit "$ENDS"; fi
touch "$STATE/running"; while true; do sleep 0.05; done
""",
}


@pytest.mark.parametrize(
    ("signal", "ends", "restarts", "code", "is_requeued"),
    [
        ("USR1", None, 0, 75, True),  # before the time limit
        ("USR1", None, 10, 75, False),  # often enough
        ("TERM", None, 0, 75, False),  # for good
        (None, "0", 0, 0, False),
        (None, "1", 0, 1, False),
    ],
)
def test_slurm__stops_goes_on_and_ends_as_the_run_does(
    signal: str | None, ends: str | None, restarts: int, code: int, is_requeued: bool, tmp_path: Path
) -> None:
    """The script with the programs that it calls replaced by small ones, since no Slurm is here."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    described = Workload(
        name="photos",
        recipe="name: photos\n",
        storage=str(tmp_path / "runs"),
        ray_version="2.60.0",
        nodes=1,
        node=Node(2, 0, 1024),
        environment={"GREETING": "it's"},
    )
    (tmp_path / "job.sh").write_text(slurm.script(described, stopped=75))
    with socket.create_server(("", 0)) as server:  # in the place of Ray's head
        port = server.getsockname()[1]
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STATE": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_JOB_ID": "7",
        }
        environment |= {"ENDS": ends} if ends is not None else {}
        script = tmp_path / "job.sh"
        script.write_text(script.read_text().replace("port=$((20000 + SLURM_JOB_ID % 10000))", f"port={port}"))
        process = subprocess.Popen(["bash", str(script)], env=environment, cwd=tmp_path, start_new_session=True)
        try:
            if signal is not None:
                deadline = time.monotonic() + 60
                while not (tmp_path / "running").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                process.send_signal(getattr(signals, f"SIG{signal}"))
            assert process.wait(60) == code
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signals.SIGKILL)
    assert (tmp_path / "recipe.yaml").read_text() == "name: photos\n"
    said = (tmp_path / "said").read_text()
    assert said.startswith("run ") and f"--run-id photos --address {socket.gethostname()}:{port}" in said
    assert (tmp_path / "requeued").exists() == is_requeued
    assert not list(tmp_path.glob("recipe-*"))


@pytest.mark.parametrize("kind", [*WRITERS, "slurm", "ray-up"])
def test_manifest__command_writes_each_kind_and_no_secret(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", TOKEN)
    file = tmp_path / "manifest"
    given = {
        "slurm": ["--storage", "/shared/runs", "--secret", "MLFLOW_TRACKING_TOKEN=/shared/token"],
        "ray-up": [
            "--storage",
            "/shared/runs",
            "--host",
            "10.0.0.1",
            "--secret",
            "MLFLOW_TRACKING_TOKEN=/shared/token",
        ],
        "raycronjob": [*PVC, "--schedule", "0 2 * * 0", "--secret", "MLFLOW_TRACKING_TOKEN=mlflow/token"],
    }.get(kind, [*PVC, "--secret", "MLFLOW_TRACKING_TOKEN=mlflow/token"])
    command = ["manifest", "demo", "--kind", kind, "--name", "mine", *given]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert main([*command, "--output", str(file)]) == 0
    assert file.read_text() == printed and TOKEN not in printed
    assert "MLFLOW_TRACKING_TOKEN" in printed and "mine" in printed
    if kind == "slurm":
        return
    documents = list(yaml.safe_load_all(printed))
    kinds = [document.get("kind") for document in documents]
    expected = {"rayjob": "RayJob", "raycluster": "RayCluster", "raycronjob": "RayCronJob"}.get(kind)
    assert kinds == (["ConfigMap", expected] if kind in ("rayjob", "raycronjob") else [expected])
    if "ConfigMap" in kinds:
        content = yaml.safe_load(documents[0]["data"]["recipe.yaml"])
        assert content["storage"] == "/mnt/pretrain/runs" and content["cluster"]["gpus_per_worker"] == 1


JOB = ["--kind", "rayjob", *PVC]
CRON = ["--kind", "raycronjob", *PVC, "--schedule"]
SLURM = ["--kind", "slurm", "--storage", "/shared/runs"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kind", "rayjobs"], "Invalid value for '--kind'"),
        (["--kind", "rayjob", "--pvc", "x"], "--image: needed by rayjob"),
        (["--kind", "rayjob", "--image", "a/b:1"], "--pvc: needed"),
        (["--kind", "rayjob", "--image", "a/b", "--pvc", "x"], "--image 'a/b': expected REGISTRY/NAME:TAG"),
        (["--kind", "rayjob", "--image", "me:hunter2@a/b:1", "--pvc", "x"], "--image: expected REGISTRY/NAME:TAG"),
        ([*JOB, "--name", "x" * 48], "RayJob xxx"),
        ([*JOB, "--name", "My_Run"], "--name 'My_Run': expected lower-case"),
        ([*JOB, "--schedule", "0 2 * * 0"], "--schedule: not of rayjob, only of raycronjob"),
        (["--kind", "raycronjob", *PVC], "--schedule: needed by raycronjob"),
        (["--kind", "raycronjob", *PVC, "--schedule", "tomorrow"], "--schedule 'tomorrow': 1 field; expected five"),
        ([*CRON, "99 2 * * *"], "--schedule '99 2 * * *': field 1 (minute) is '99'; expected * or 0-59"),
        ([*CRON, "0 2 31 2 *"], "--schedule '0 2 31 2 *': fields 3 to 5 (31 2 *) name no day that exists"),
        ([*CRON, "0 2 L * *"], "--schedule '0 2 L * *': Kubernetes has no L"),
        ([*CRON, "0 2 * * 7"], "--schedule '0 2 * * 7': Kubernetes has no L and no # for days, and its Sunday is 0"),
        ([*CRON, "0 2 * * 0", "--time-zone", "Mars/X"], "--time-zone Mars/X: no such time zone; expected a name"),
        ([*CRON, "0 2 * * 0", "--time-zone", "berlin"], "--time-zone berlin: no such time zone; expected a name such"),
        ([*SLURM, "--pvc", "x"], "--pvc: not of slurm, only of rayjob"),
        (["--kind", "slurm"], "--storage: needed"),
        (["--kind", "ray-up", "--storage", "/x"], "--host: needed by ray-up"),
        ([*JOB, "--memory", "lots"], "--memory 'lots': expected a number with Gi"),
        ([*JOB, "--memory", "1Mi"], "--memory '1Mi': of a node is from 1Gi to 65536Gi"),
        ([*JOB, "--memory", "99999999999G"], "--memory '99999999999G': of a node is from 1Gi to 65536Gi"),
        ([*JOB, "--storage", f"s3://me:{TOKEN}@b/runs"], "storage=s3://b/runs: a remote store; the nodes share a dir"),
        ([*JOB, "--storage", "/elsewhere/runs"], "--storage /elsewhere/runs: pods see nothing there"),
        (
            [*JOB, "data.train=/home/me/photos"],
            "data.train=/home/me/photos: pods see nothing there, only /mnt/pretrain",
        ),
        ([*JOB, "train.workers=16", "--nodes", "1"], "--nodes 1: room for 1 x 8 = 8 workers, train.workers=16; give 2"),
        ([*JOB, "train.device=cuda", "--gpus-per-node", "0"], "--gpus-per-node 0: train.device=cuda needs GPUs"),
        ([*JOB, "cluster.gpus_per_worker=2", "--gpus-per-node", "1"], "--gpus-per-node 1: cluster.gpus_per_worker=2"),
        ([*JOB, "cluster.cpus_per_worker=8", "--cpus", "4"], "--cpus 4: 2 workers of a node reserve 8 each"),
        ([*JOB, "train.stepz=1"], "command line: train.stepz=1: unknown setting"),
        ([*JOB, "--output", "no/such/file"], "--output no/such/file: no such directory"),
        ([*JOB, "--secret", f"HF_TOKEN={TOKEN}"], "--secret HF_TOKEN=...: expected NAME=SECRET/KEY"),
        ([*JOB, "--secret", f"HF_TOKEN=hf/{TOKEN}"], "--secret HF_TOKEN=...: expected NAME=SECRET/KEY"),
        ([*JOB, "--secret", "A=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"], "--secret A=...: expected NAME=SECRET/KEY"),
        ([*SLURM, "--secret", f"HF_TOKEN={TOKEN}"], "--secret HF_TOKEN=...: expected NAME=/FILE"),
        ([*JOB, "--secret", "A=s/k", "--secret", "A=s/l"], "--secret A=...: given twice"),
        ([*JOB, "--env", f"HF_TOKEN={TOKEN}"], "--env HF_TOKEN=...: looks like a secret"),
        ([*JOB, "--env", f"GREETING={TOKEN}"], "--env GREETING=...: looks like a secret"),
        ([*JOB, "--env", f"MLFLOW_TRACKING_URI=https://me:{TOKEN}@host"], "--env MLFLOW_TRACKING_URI=...: looks like"),
        ([*JOB, "--env", TOKEN], "--env ...: expected NAME=VALUE"),
        ([*SLURM, "--setup", f"export HF_TOKEN={TOKEN}"], "--setup ...: looks like a secret"),
        ([*SLURM, "--setup", "export MY_PASSWORD=wJalr"], "--setup ...: looks like a secret"),
        ([*SLURM, "--setup", f"curl https://me:{TOKEN}@host/x"], "--setup ...: looks like a secret"),
        ([*JOB, f"data.train=https://me:{TOKEN}@host/a.tar"], "data.train=https://***@host/a.tar: its user, password"),
        ([*JOB, f"backbone.options.x={TOKEN}"], "looks like a secret"),
        ([*JOB, f"description={TOKEN}"], "description: looks like a secret"),
    ],
)
def test_manifest__bad_request_is_one_line_that_repeats_no_secret(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["manifest", "demo", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line and captured.out == ""
    assert TOKEN not in line and "wJalr" not in line and list(tmp_path.iterdir()) == []


def test_manifest__the_place_of_a_pipe_or_a_device_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who may write to /dev would have a file in the place of /dev/null."""
    os.mkfifo(pipe := tmp_path / "pipe")
    assert main(["manifest", "demo", *JOB, "--output", str(pipe)]) == 2
    assert f"--output {pipe}: is no regular file" in capsys.readouterr().err and pipe.is_fifo()


def test_manifest__a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "job.yaml")
    assert main(["manifest", "demo", *JOB, "--output", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and "RayJob" in (tmp_path / "job.yaml").read_text()


def test_manifest__a_recipe_of_a_remote_store_needs_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else its runs would go to the first claim without a word."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipe_path("demo").read_text() + "\nstorage: s3://b/runs\n")
    assert main(["manifest", str(recipe), *JOB]) == 2
    assert capsys.readouterr().err.startswith("error: storage=s3://b/runs: a remote store; ")
    assert main(["manifest", str(recipe), *JOB, "--storage", "/mnt/pretrain/runs"]) == 0


@pytest.mark.parametrize(
    ("text", "is_secret"),
    [
        ("AKIAIOSFODNN7EXAMPLE", True),
        ("wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY1", True),
        ("-----BEGIN RSA PRIVATE KEY-----", True),
        ("postgresql://user:pw@host/db", True),
        ("https://mlflow.example:5000", False),
        ("s3://bucket/prefix", False),
        ("/var/run/secrets/mlflow/token", False),
        ("glibc.malloc.hugetlb=1", False),
        ("expandable_segments:True", False),
    ],
)
def test_secret_in__texts_of_which_one_can_tell(text: str, is_secret: bool) -> None:
    assert secret_in("NAME", text) == is_secret
