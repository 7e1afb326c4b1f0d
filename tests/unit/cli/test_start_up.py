"""How soon the command line answers: what it loads, not how long that takes, so that a busy machine changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "diffusers", "transformers", "huggingface_hub", "fastapi", "numpy"}
HEAVY_FOR_HELP = HEAVY | {"httpx", "PIL"}

PROGRAM = """
import sys
sys.argv = ["loraplex", *{arguments!r}]
from serve_app.cli.main import main
try:
    main()
except SystemExit as end:
    print("exit code", end.code)
print("loaded", *sys.modules)
"""


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    program = PROGRAM.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, _, modules = done.stdout.rpartition("\nloaded ")
    return said, set(modules.split())


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("generate", "--help"), ("inspect", "--help")])
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    said, modules = loaded_by(*arguments)
    assert said.endswith("exit code 0")
    assert modules & HEAVY_FOR_HELP == set()


@pytest.mark.parametrize("arguments", [("models",), ("generate", "a cat", "-o", "cat.png")])
def test_a_client_command_loads_neither_torch_nor_ray(arguments: tuple[str, ...], url: str, tmp_path: object) -> None:
    arguments = tuple(f"{tmp_path}/{text}" if text.endswith(".png") else text for text in arguments)
    said, modules = loaded_by(*arguments, "--url", url)
    assert said.endswith("exit code 0")
    assert modules & HEAVY == set()
