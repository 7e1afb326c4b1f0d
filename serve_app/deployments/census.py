"""How many replicas there are, as Serve says: the one reader of its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve

# Serve types its states as an enumeration, and sends them as text.
RUNNING: Any = "RUNNING"
STARTING: Any = "STARTING"


@dataclass(frozen=True, slots=True)
class Count:
    """How many replicas of one deployment run, and how many start."""

    running: int = 0
    starting: int = 0


def replica_counts(app_name: str) -> Mapping[str, Count]:
    """Return the counts of an application by deployment; none where Serve does not know it. Blocks."""
    application = serve.status().applications.get(app_name)
    if application is None:
        return {}
    states = {name: overview.replica_states for name, overview in application.deployments.items()}
    return {name: Count(found.get(RUNNING, 0), found.get(STARTING, 0)) for name, found in states.items()}
