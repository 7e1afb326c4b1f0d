"""What a part of the service loads, as a process of its own sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

HEAVY = ("torch", "ray", "diffusers", "transformers")
LIGHT_MODULES = [
    "serve_app.api.app",
    "serve_app.catalog.catalog",
    "serve_app.store.store",
    "serve_app.config",
    "serve_app.core",
    "serve_app.errors",
    "serve_app.redaction",
    "serve_app.demo.embedded",
    "serve_app.engine.worker.scheduling",
    "serve_app.deployments.ingress.resolve_defaults",
    "serve_app.deployments.ingress.dispatch",
]
COMMANDS = ["serve_app.cli.main", "serve_app.cli.inspect", "serve_app.cli.pull", "serve_app.cli.sources"]
PROGRAM = """
import importlib, json, sys
modules, unwanted = json.loads(sys.argv[1])
loaded = []
for module in modules:
    importlib.import_module(module)
    loaded += [f"{module} loads {name}" for name in unwanted if name in sys.modules and not loaded]
print(json.dumps(loaded))
"""


def first_to_load(unwanted: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Import modules one after another in one process; return which of them loads what it should not, if any does."""
    command = [sys.executable, "-c", PROGRAM, json.dumps([modules, unwanted])]
    found: list[str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def test_the_http_side_loads_neither_torch_nor_ray() -> None:
    assert first_to_load(HEAVY, LIGHT_MODULES) == []


def test_commands_that_start_no_service_load_no_ray() -> None:
    assert first_to_load(["ray"], COMMANDS) == []


def test_the_ingress_loads_no_torch() -> None:
    assert first_to_load(HEAVY, ["serve_app.app"]) == ["serve_app.app loads ray"]
