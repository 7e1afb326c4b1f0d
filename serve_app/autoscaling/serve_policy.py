"""The policy as Serve's controller makes it, for the bases of all applications.

It is apart from `policy` and `controller`, since Serve carries a copy of this module to its controller.
"""

from __future__ import annotations

from serve_app.autoscaling.controller import ask_at_zero, this_cluster
from serve_app.autoscaling.policy import PredictedWorkPolicy, is_ours


class ServePolicy(PredictedWorkPolicy):
    """`PredictedWorkPolicy` of a base that shares the cluster's GPUs with those of all applications."""

    def __init__(self, target_wait_s: float, gpus: float, weight: float, cluster_gpus: float | None) -> None:
        ask_at_zero(is_ours)
        super().__init__(target_wait_s, gpus, weight, cluster_gpus, this_cluster())
