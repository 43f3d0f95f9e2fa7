"""What the machines of a cluster have, and which of them are about to be taken away.

Ray says in public which machines are alive and what they have. That one is being drained (`ray drain-node`, which
autoscalers and handlers of spot notices call) is known to `ray._private.state.state.get_draining_nodes` alone, which
`tests/cluster/test_nodes.py` touches; where a version of Ray has it not, nobody is warned, and a machine that goes is
noticed when it is gone.

Not here: what follows from it (`cluster.workers`).
"""

from __future__ import annotations

from collections.abc import Mapping

import ray

__all__ = ["draining", "free", "room"]


def draining() -> frozenset[str]:
    """Ids of the nodes that will be taken away soon."""
    try:
        from ray._private.state import state

        return frozenset(state.get_draining_nodes())
    except (ImportError, AttributeError):
        return frozenset()


def room(bundle: Mapping[str, float]) -> int:
    """How many workers of that size all machines that stay have room for, whoever uses them now."""
    leaving = draining()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return sum(fitting(bundle, node["Resources"]) for node in nodes)


def free(bundle: Mapping[str, float]) -> int:
    """How many workers of that size there is room for now; more than there is when what is left lies in pieces."""
    return fitting(bundle, ray.available_resources())


def fitting(bundle: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How often `bundle`, which is not empty, goes into `resources`."""
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())
