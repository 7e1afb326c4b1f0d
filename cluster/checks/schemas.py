"""YAML files against closed JSON schemas, each fault on a line of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parents[1] / "schemas"


def documents(path: Path) -> list[Any]:
    """Return every YAML document of a file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def faults_of(name: str, data: Any, where: str) -> Iterator[str]:
    """Yield what a schema of `cluster/schemas` refuses in some data."""
    for error in sorted(_validator(name).iter_errors(data), key=lambda error: error.json_path):
        # The deepest of the reasons why no alternative fitted is the one to mend.
        reason = max([error, *(error.context or [])], key=lambda reason: len(reason.absolute_path))
        place = ".".join(str(part) for part in reason.absolute_path)
        yield f"{where}: {place or 'top'}: {reason.message[:300]}"


@cache
def _validator(name: str) -> Draft202012Validator:
    schema = yaml.safe_load((SCHEMAS / f"{name}.yaml").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(json.loads(json.dumps(schema)))
