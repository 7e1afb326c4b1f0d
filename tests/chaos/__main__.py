"""Chaos by hand: `python -m tests.chaos --minutes 10 --seed 1 --json report.json`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import chaos


def main() -> int:
    """Run it, print the report, and say by the exit status whether the promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the report")
    options = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as cache:
        report = chaos(options.minutes, options.seed, say=say, cache=Path(cache))
    for line in report.lines():
        say(line)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    return 1 if report.broken_promises else 0


if __name__ == "__main__":
    sys.exit(main())
