"""A cluster file for `ray up` on machines of one's own, which it reaches by SSH (provider `local`).

It starts a cluster for runs of a recipe's size; runs are given to it afterwards (`pretrain run ... --address`). Clouds
take node types that no recipe knows: there KubeRay is the better way, or a file of one's own.
"""

from __future__ import annotations

import shlex
from typing import Any

from cluster.manifests.workload import Workload

__all__ = ["cluster_file"]

PORT = 6379
OBJECT_STORE_BYTES = 10**9
TOKEN = "~/.ray/auth_token"  # made by `ray get-auth-token --generate`; carried to every machine, never written here
_SHARED_MEMORY = 4  # a part of a machine's memory that a container may share


def cluster_file(workload: Workload) -> dict[str, Any]:
    """The file as a dictionary."""
    head, *workers = workload.hosts
    node = workload.node
    options = f"--num-gpus={node.gpus} --object-store-memory={OBJECT_STORE_BYTES}"
    start = [*_environment(workload), "ray stop"]
    file: dict[str, Any] = {
        "cluster_name": workload.name,
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
        "auth": {} if workload.ssh_user is None else {"ssh_user": workload.ssh_user},
        "file_mounts": {TOKEN: TOKEN},
        "setup_commands": [f"chmod 600 {TOKEN}", *workload.setup],
        "head_start_ray_commands": [
            _in_one_shell(
                start,
                # The head's own driver and workers go to one machine: no more is declared than a node of workers has.
                f"ray start --head --port={PORT} --num-cpus={node.cpus} {options} "
                "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
            )
        ],
        "worker_start_ray_commands": [
            _in_one_shell(start, f"ray start --address=$RAY_HEAD_IP:{PORT} --num-cpus={node.cpus} {options}")
        ],
    }
    if workload.image is not None:
        shared = node.memory_mib // _SHARED_MEMORY
        volumes = [f"--volume={shlex.quote(workload.storage)}:{shlex.quote(workload.storage)}"]
        file["docker"] = {
            "image": workload.image,
            "container_name": "pretrain",
            "run_options": [f"--shm-size={shared}m", *volumes],
        }
    return file


def _environment(workload: Workload) -> list[str]:
    found = ["export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"]
    found += [f"export {name}={shlex.quote(value)}" for name, value in workload.environment.items()]
    for name, path in workload.secret_files.items():
        found.append(f'{name}="$(cat {shlex.quote(path)})" && export {name}')
    return found


def _in_one_shell(before: list[str], command: str) -> str:
    """Each command of the file gets a shell of its own, so what it exports is lost to the next."""
    return " && ".join([*before, command])
