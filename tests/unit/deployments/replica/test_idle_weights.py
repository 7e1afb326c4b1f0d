"""The files of bases without a replica stay in memory, within a budget, for as long as their application is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.deployments.replica.idle_weights import HeldBases, hold_file
from tests.footprint import kilobytes_of

SIZE_BYTES = 64 * 1024


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        path.write_bytes(bytes(SIZE_BYTES))
    return paths


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system has no /proc")
def test_a_file_s_own_pages_are_locked_and_none_is_copied(files: list[Path]) -> None:
    held = hold_file(files[0])
    kilobytes = kilobytes_of(files[0])
    assert kilobytes["Anonymous"] == 0
    assert kilobytes["Locked"] == (SIZE_BYTES // 1024 if held.is_locked else 0)
    if held.is_locked:
        assert kilobytes["Rss"] == SIZE_BYTES // 1024
    del held
    assert kilobytes_of(files[0]) == {}


def test_the_base_that_was_loaded_longest_ago_gives_way(files: list[Path]) -> None:
    held = HeldBases()
    for number, path in enumerate(files):
        held.hold(f"base-{number}", f"app-{number}", [path], 2 * SIZE_BYTES)
    assert held.bases == ("base-1", "base-2")
    held.hold("base-1", "app-1", [files[1]], 2 * SIZE_BYTES)
    assert held.bases == ("base-2", "base-1"), "one that is loaded again is held once, and is the newest"
    assert held.size_bytes == 2 * SIZE_BYTES


def test_a_base_over_the_budget_is_not_held_and_takes_nobody_s_place(
    files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    held = HeldBases()
    held.hold("small", "app", files[:1], 2 * SIZE_BYTES)
    held.hold("large", "app", files, 2 * SIZE_BYTES)
    assert held.bases == ("small",)
    assert "large is not kept in memory" in caplog.text


def test_a_base_is_held_while_its_application_is_there(files: list[Path]) -> None:
    held = HeldBases()
    held.hold("one", "app-1", files[:1], 3 * SIZE_BYTES)
    held.hold("two", "app-2", files[1:2], 3 * SIZE_BYTES)
    assert held.keep_only({"app-2", "of-others"})
    assert held.bases == ("two",)
    assert not held.keep_only(set())
