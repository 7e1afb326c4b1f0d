"""The families whose processors need torchvision, in a process that has it."""

from __future__ import annotations

import importlib.util

import pytest

from tests.apart import run_with
from tests.tiny_families.build import NEED_TORCHVISION
from tests.tiny_families.vision import FOLDER


@pytest.mark.slow
@pytest.mark.timeout(1200)  # all their tests in one
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="they are tested with the others")
def test_families_that_need_torchvision_pass_the_tests_of_every_family() -> None:
    if not FOLDER.is_dir():
        pytest.skip(f"torchvision is not in {FOLDER.name}: make .venv/.dev")
    chosen = " or ".join(f"[{name}]" for name in NEED_TORCHVISION)
    tests = "tests/unit/families/test_every_family.py"
    done = run_with(FOLDER, "pytest", "-q", "-p", "no:xdist", tests, "-k", chosen)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
