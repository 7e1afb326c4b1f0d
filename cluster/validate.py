"""Everything under `cluster/`, checked by the tools of those who will read it: `python -m cluster.validate`.

Owns the list of checks. A tool that is not installed is said to be missing; with `--strict`, as in CI, that is a fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from cluster.checks import kubernetes, machines, monitoring
from cluster.checks.tools import ToolMissing

CLUSTER = Path(__file__).parent
CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "Serve files": machines.check_serve_files,
    "ray up": machines.check_ray_up,
    "image": machines.check_image,
    "compose": machines.check_compose,
    "KubeRay": kubernetes.check,
    "Prometheus and Grafana": monitoring.check,
}


def validate(cluster: Path, *, is_strict: bool) -> list[str]:
    """Return every fault of a folder like this one; say what could not be checked."""
    found: list[str] = []
    for name, check in CHECKS.items():
        try:
            found += [f"{name}: {fault}" for fault in check(cluster)]
        except ToolMissing as missing:
            sys.stderr.write(f"cluster: {name} not wholly checked: {missing}\n")
            if is_strict:
                found.append(f"{name}: {missing}")
    return found


def main() -> int:
    """Print the faults; the exit code says whether there are any."""
    faults = validate(CLUSTER, is_strict="--strict" in sys.argv[1:])
    for fault in faults:
        sys.stderr.write(f"cluster: {fault}\n")
    if not faults:
        sys.stdout.write(f"cluster: {len(CHECKS)} kinds of file are valid\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
