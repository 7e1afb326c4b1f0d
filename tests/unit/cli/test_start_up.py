"""How soon the command line answers: what it loads, not how long that takes, so that a busy machine changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = {"torch", "ray", "diffusers", "transformers", "huggingface_hub", "fastapi", "numpy"}
HEAVY_FOR_HELP = HEAVY | {"httpx", "PIL"}

PROGRAM = """
import sys
from serve_app.cli.main import main
for arguments in {commands!r}:
    sys.argv = ["loraplex", *arguments]
    try:
        main()
    except SystemExit as end:
        print("exit code", end.code)
print("loaded", *sys.modules)
"""


def loaded_by(*commands: tuple[str, ...]) -> set[str]:
    """Return the modules that a process has after some commands, all of which must succeed."""
    program = PROGRAM.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, _, modules = done.stdout.rpartition("\nloaded ")
    assert said.count("exit code 0") == len(commands), said
    return set(modules.split())


def test_help_loads_nothing_heavy() -> None:
    modules = loaded_by(("--help",), ("--version",), ("generate", "--help"), ("inspect", "--help"))
    assert modules & HEAVY_FOR_HELP == set()


def test_a_client_command_loads_neither_torch_nor_ray(url: str, tmp_path: Path) -> None:
    draw = ("generate", "a cat", "-o", str(tmp_path / "cat.png"))
    assert loaded_by(("models", "--url", url), (*draw, "--url", url)) & HEAVY == set()
