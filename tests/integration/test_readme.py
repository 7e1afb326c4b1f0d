"""The README: every command in it, run as a new user would run it in a fresh terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from serve_app.cli.serve_file import check_serve_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
READY = "ready at http://127.0.0.1:8000"
# A clone without a virtual environment installs first.
READY_TIMEOUT_S = 900
COMMAND_TIMEOUT_S = 600
# Ray's workers yield to all other processes by default: beside the rest of the suite they would starve.
RAY_OF_TESTS = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}

# A service of its own, started as a newcomer starts it.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class Terminal:
    """`make run`, as the README says it, and what it prints."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            blocks("bash")[0].split(),
            cwd=ROOT,
            env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), **RAY_OF_TESTS},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.is_ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(READY):
                self.is_ready.set()
        self.is_ready.set()

    def interrupt(self) -> set[int]:
        """Press Ctrl-C; return the ids of the processes that outlive the end."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(300)
        _, left = psutil.wait_procs(tree, timeout=60)
        return {process.pid for process in left}


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    running = Terminal(tmp_path_factory.mktemp("home"))
    try:
        assert running.is_ready.wait(READY_TIMEOUT_S), "".join(running.lines)
        assert any(line.startswith(READY) for line in running.lines), "".join(running.lines)
        yield running
    finally:
        if running.process.poll() is None:
            running.interrupt()


def run(command: str, folder: Path) -> str:
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True,
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
    )  # fmt: skip
    return done.stdout


def test_every_command_of_the_readme_does_what_it_says(terminal: Terminal, tmp_path: Path) -> None:
    _, star, first, second, refused = blocks("bash")
    run(star, tmp_path)
    run(first, tmp_path)
    printed = run(second, tmp_path)
    base, sepia, night = (np.asarray(Image.open(tmp_path / f"{name}.jpg")) for name in ("base", "adapter1", "adapter2"))
    # A blue background, then brown where red leads and blue trails, then darkness.
    assert base[:4, :4, 2].mean() > base[:4, :4, 0].mean()
    assert sepia[:4, :4, 0].mean() > sepia[:4, :4, 2].mean()
    assert night.mean() < base.mean()
    for name in ("star.jpg", "sketch.jpg", "both.png", "inverted.jpg"):
        assert Image.open(tmp_path / name).size == (64, 64)
    for header in ("x-base-model: demo/sdxl", "x-adapters: demo/sdxl-sepia@", "x-seed:", "server-timing:"):
        assert header in printed
    said = run(refused, tmp_path)
    assert "demo/sdxl" in said
    assert "demo/sd15" in said


def test_the_python_of_the_readme_draws(terminal: Terminal, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, timeout=COMMAND_TIMEOUT_S, check=True)
    assert Image.open(tmp_path / "pixel-art.png").size == (64, 64)


def test_the_gpu_configuration_of_the_readme_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "gpu.yaml"
    path.write_text(blocks("yaml")[0])
    assert len(check_serve_file(path).applications[0].bases) == 2


def test_what_make_run_says_to_try_works(terminal: Terminal, tmp_path: Path) -> None:
    said = "".join(terminal.lines)
    commands = [line.strip() for line in said[said.index("ready at") :].splitlines() if line.startswith("  curl")]
    assert len(commands) == 2
    for command in commands:
        run(command, tmp_path)
    assert Image.open(tmp_path / "base.jpg").size == Image.open(tmp_path / "adapter.jpg").size == (64, 64)


def test_ctrl_c_leaves_no_process_behind(terminal: Terminal) -> None:
    started = time.time()
    assert terminal.interrupt() == set()
    assert terminal.process.returncode in (0, -signal.SIGINT, 2, 130)
    fresh = [p for p in psutil.process_iter(["cmdline"]) if _is_of_this_service(p)]
    assert fresh == [], f"{fresh} still there {time.time() - started:.0f} s after Ctrl-C"


def _is_of_this_service(process: psutil.Process) -> bool:
    words = " ".join(process.info["cmdline"] or ())
    return "ray.serve.scripts run" in words and "serve_config.yaml" in words
