"""How much memory is left within a container's limit, by the files of its cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve_app.bench.measuring.memory import free_bytes, free_within

GIB = 1024**3


def cgroup(folder: Path, *, limit: str, used: int, inactive_file: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon {GIB}\nfile {used - GIB}\ninactive_anon {GIB}\ninactive_file {inactive_file}\nactive_file 4096\n"
    )
    return folder


def test_cached_files_that_can_be_dropped_count_as_free(tmp_path: Path) -> None:
    full = cgroup(tmp_path, limit=str(8 * GIB), used=8 * GIB, inactive_file=6 * GIB)
    assert free_within(full) == 6 * GIB


def test_what_is_neither_used_nor_cached_is_free(tmp_path: Path) -> None:
    assert free_within(cgroup(tmp_path, limit=str(8 * GIB), used=3 * GIB, inactive_file=0)) == 5 * GIB


def test_no_more_than_the_limit_is_free_where_the_cache_grew_between_two_looks(tmp_path: Path) -> None:
    assert free_within(cgroup(tmp_path, limit=str(8 * GIB), used=GIB, inactive_file=2 * GIB)) == 8 * GIB


def test_a_container_without_a_limit_bounds_nothing(tmp_path: Path) -> None:
    assert free_within(cgroup(tmp_path, limit="max", used=3 * GIB, inactive_file=0)) is None


def test_a_machine_without_a_cgroup_bounds_nothing(tmp_path: Path) -> None:
    assert free_within(tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say what it has")
def test_the_host_has_memory_that_a_run_may_take() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
