"""Node's clients against the real service; skipped, with the reason, where Node or its packages are not to be had."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service import Service

SCRIPT = Path(__file__).with_name("node_clients.mjs")
PACKAGES = ("openai@6", "@huggingface/inference@4", "ai@6", "@ai-sdk/openai@3")


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node here: its clients were not tried")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    if installed.returncode:
        pytest.skip("the packages of Node's clients could not be installed: they were not tried")
    shutil.copy(SCRIPT, folder)
    return folder


def test_the_clients_of_node_draw_and_edit_with_an_adapter(service: Service, node_modules: Path) -> None:
    command = ["node", SCRIPT.name, service.url, "demo/sdxl-sepia"]
    told = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stderr
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(lines) == 5
    assert [line["client"] for line in lines if not line["isPng"]] == []
