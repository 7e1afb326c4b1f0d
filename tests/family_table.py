"""The table of docs/families.md: written from what the tests proved, and compared to it.

`python -m tests.family_table` proves every family and renews the file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from serve_app.families.family import TASKS

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
COLUMNS = (
    "family", "`_class_name`", *TASKS, "several pictures", "adapter equals diffusers", "previews", "schedulers",
    "tokens", "sides", "denoiser runs twice", "shares passes",
)  # fmt: skip
# Set while the file is renewed.
RENEWS = "LORAPLEX_RENEW_FAMILIES"
PROOFS = ("tests/unit/families/test_every_family.py", "tests/unit/families/test_vision_families.py")


def line_of(proved: Mapping[str, str]) -> str:
    """Return the line of one family; every column must have been proved."""
    return "| " + " | ".join(proved[column] for column in COLUMNS) + " |\n"


def documented() -> dict[str, str]:
    """Return the lines of the file, by `_class_name`."""
    lines = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].splitlines(keepends=True)[2:]
    return {line.split(" | ")[1]: line for line in lines}


def check_or_renew(proved: Mapping[str, str]) -> None:
    """Fail where the file says something else of a family, or write what it should say."""
    line, lines = line_of(proved), documented()
    if os.environ.get(RENEWS) is None:
        assert lines.get(proved["`_class_name`"]) == line, "renew it: python -m tests.family_table"
        return
    _write({**lines, proved["`_class_name`"]: line})


def _write(lines: Mapping[str, str]) -> None:
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|" + "---|" * len(COLUMNS) + "\n"
    before, rest = DOCUMENT.read_text().split(BEGIN)
    table = head + "".join(lines[name] for name in sorted(lines))
    DOCUMENT.write_text(before + BEGIN + table + END + rest.split(END)[1])


if __name__ == "__main__":
    _write({})
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", "-q", *PROOFS], env={**os.environ, RENEWS: "1"}))
