"""A batch script for Slurm: one Ray node on each node of the allocation, and the driver in the batch step of the first.

The driver is a child of the batch shell and no part of the steps that hold Ray, so a signal to the shell alone
(`--signal=B:`) lets the run publish a checkpoint while Ray stays up: USR1 before the time limit, after which the job is
queued again and goes on with its run, or TERM, after which it is not. Ray's ports follow from the job's id and are
guarded by a token that is drawn for the job; the nodes are asked for whole (`--exclusive`), since Ray knows of no other
users.
"""

from __future__ import annotations

import shlex

from cluster.manifests.workload import Workload

__all__ = ["script"]

NODES_JOIN_S = 300
OBJECT_STORE_BYTES = 10**9
_END = "END_OF_RECIPE"

_HEADER = """\
#!/bin/bash
# Begins the run {name}, or goes on with it:  sbatch FILE
# Stop it for good, with a checkpoint:  scancel --signal=TERM --batch JOBID
"""

_BODY = """\
set -euo pipefail
{setup}
run_id={name}
storage={storage}
mkdir -p "$storage"
recipe=$(mktemp "${{TMPDIR:-/tmp}}/recipe-XXXXXXXX.yaml")
cat > "$recipe" <<'{end}'
{recipe}
{end}
{environment}
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

head=$(hostname)
port=$((20000 + SLURM_JOB_ID % 10000))
{start}
started=$SECONDS
until (: > "/dev/tcp/$head/$port") 2>/dev/null; do
    kill -0 "$ray" 2>/dev/null || {{ echo "Ray did not start on $head" >&2; exit 1; }}
    ((SECONDS - started < {wait})) || {{ echo "Ray on $head does not answer after {wait} s" >&2; exit 1; }}
    sleep 2
done

pretrain run "$recipe" --run-id "$run_id" --address "$head:$port" &
driver=$!
asked=
trap 'asked=time; kill -TERM "$driver" 2>/dev/null || true' USR1
trap 'asked=stop; kill -TERM "$driver" 2>/dev/null || true' TERM INT
code=0
while true; do
    wait "$driver" && code=0 || code=$?
    kill -0 "$driver" 2>/dev/null || break  # a signal ends the wait, not the driver
done
kill "$ray" 2>/dev/null || true
rm -f "$recipe"
if [[ $code -eq {stopped} && $asked == time && ${{SLURM_RESTART_COUNT:-0}} -lt {retries} ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

_RAY = """\
# shellcheck disable=SC2016  # what the shells of the nodes are to expand
srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --overlap --kill-on-bad-exit=1 \\
    bash -c 'if [[ $SLURM_PROCID -eq 0 ]]; then
        exec ray start --head --block --port="$1" {options}
    fi
    until (: > "/dev/tcp/$0/$1") 2>/dev/null; do sleep 2; done
    exec ray start --block --address="$0:$1" {options}' "$head" "$port" &
ray=$!"""


def script(workload: Workload, *, stopped: int) -> str:
    """The script.

    Args:
        workload: What is to run.
        stopped: Exit code of a run that has stopped after a checkpoint and can go on.
    """
    node, name = workload.node, shlex.quote(workload.name)
    # No GPUs to see is said as well, or Ray would count those of the machine.
    options = f"--num-cpus={node.cpus} --num-gpus={node.gpus} --object-store-memory={OBJECT_STORE_BYTES}"
    end = _END
    while end in workload.recipe.splitlines():
        end += "_"
    environment = [f"export {name}={shlex.quote(value)}" for name, value in workload.environment.items()]
    for variable, file in workload.secret_files.items():
        environment += [f"{variable}=$(< {shlex.quote(file)})", f"export {variable}"]
    body = _BODY.format(
        setup="\n".join(workload.setup),
        name=name,
        storage=shlex.quote(workload.storage),
        recipe=workload.recipe.rstrip("\n"),
        end=end,
        environment="\n".join(environment),
        start=_RAY.format(nodes=workload.nodes, options=options),
        wait=NODES_JOIN_S,
        stopped=stopped,
        retries=workload.retries,
    )
    return "".join(
        (_HEADER.format(name=workload.name), *(f"#SBATCH --{line}\n" for line in _directives(workload)), body)
    )


def _directives(workload: Workload) -> list[str]:
    node = workload.node
    found = [
        f"job-name={workload.name}",
        f"nodes={workload.nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={node.cpus}",
        f"mem={node.memory_mib}M",
        "exclusive",
        "requeue",
        "open-mode=append",
        "output=%x-%j.log",
        f"signal=B:USR1@{workload.grace_s}",
    ]
    if node.gpus:
        found.append(f"gpus-per-node={node.gpus}")
    if workload.queue is not None:
        found.append(f"partition={workload.queue}")
    if workload.hours is not None:
        minutes = max(1, round(workload.hours * 60))
        found.append(f"time={minutes // 60}:{minutes % 60:02d}:00")
    return found
