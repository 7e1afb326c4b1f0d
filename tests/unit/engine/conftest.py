"""One thread for the engine's tests: torch's threads spin, and the bits of a sum depend on how many share it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
