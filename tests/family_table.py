"""Writes the table of docs/families.md from the rows; `python -m tests.family_table` renews the file."""

from __future__ import annotations

import math
from pathlib import Path

from serve_app.families.family import TASKS, Family
from serve_app.families.table import FAMILIES

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
HEAD = (
    "| family | `_class_name` | text | image | inpaint | edit | sides | tokens | denoiser runs twice | previews "
    "| shares passes |\n"
)


def rendered() -> str:
    """Return the table, a line a row."""
    rule = "|" + "---|" * (HEAD.count("|") - 1) + "\n"
    return "".join([HEAD, rule, *(_line(pipeline, row) for pipeline, row in FAMILIES.items())])


def _line(pipeline: str, row: Family) -> str:
    tasks = " | ".join("yes" if row.serves(task) else "" for task in TASKS)
    tokens = str(row.tokens) if row.tokens else "tokenizer's"
    return (
        f"| {row.name} | `{pipeline}` | {tasks} | {row.side_multiple} | {tokens} | {_guidance(row)} "
        f"| {'yes' if row.previews else 'no'} | {'yes' if row.shares_passes else 'no'} |\n"
    )


def _guidance(row: Family) -> str:
    if row.has_own_true_cfg:
        return "with a negative prompt and `true_cfg_scale` over 1"
    if math.isinf(row.guided_above):
        return "never" if row.guided_above > 0 else "always"
    times = "" if row.guided_runs == 2 else f", {row.guided_runs} times"
    return f"over {row.guided_above:g}{times}"


def with_table(text: str) -> str:
    """Return the document with the table as the rows have it."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + rendered() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
