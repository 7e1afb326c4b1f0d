"""What policies need of Serve's controller: the cluster that they share, its GPUs, and to be asked at zero too.

Owns all that this room uses of Ray. Must not decide anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from serve_app.autoscaling.cluster import Cluster

# What Serve calls to answer in place of a policy, in `ray.serve.autoscaling_policy`.
AT_ZERO = "_get_cold_start_scale_up_replicas"


def ray_gpus() -> float:
    """Return how many GPUs the nodes of the Ray cluster have now."""
    import ray

    resources: dict[str, float] = cast("Any", ray).cluster_resources()
    return resources.get("GPU", 0.0)


def ask_at_zero(is_ours: Callable[[Any], bool]) -> None:
    """Have Serve ask our policies too where requests wait and no replica runs; `is_ours` is given Ray's context.

    Serve answers there itself and starts a replica at once, so that those that have just given way would take the next
    GPU before those that have waited longer: among replicas that find no room, Ray keeps to no order.
    """
    from ray.serve import autoscaling_policy as serve

    answer = getattr(serve, AT_ZERO, None)
    if answer is None or hasattr(answer, "leaves_out_ours"):
        return

    def answer_others(ctx: Any) -> int | None:
        return None if is_ours(ctx) else answer(ctx)

    answer_others.leaves_out_ours = True  # pyright: ignore[reportFunctionMemberAccess]
    setattr(serve, AT_ZERO, answer_others)


_CLUSTER = Cluster(ray_gpus)


def this_cluster() -> Cluster:
    """Return what the policies of all applications share: each is asked in Serve's one controller process.

    A function, since Serve carries a copy of the policy's module there, with copies of the objects that it names.
    """
    return _CLUSTER
