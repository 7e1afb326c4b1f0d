from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from serve_app.catalog.sources.download_cache import DownloadCache, LockedFile


@pytest.fixture
def originals(tmp_path: Path) -> DownloadCache:
    ticks = itertools.count(1000)
    return DownloadCache(tmp_path / "hub", 100, clock=lambda: float(next(ticks)))


def put(originals: DownloadCache, key: str, content: bytes = b"x" * 40) -> LockedFile:
    with originals.draft(key) as draft:
        draft.add(content)
        return originals.commit(key, draft)


def is_there(originals: DownloadCache, key: str) -> bool:
    found = originals.find(key)
    if found is not None:
        found.release()
    return found is not None


def test_the_files_used_longest_ago_make_room_and_the_bytes_stay_within_their_budget(
    originals: DownloadCache, tmp_path: Path
) -> None:
    for key in "ab":
        put(originals, key).release()
    assert is_there(originals, "a")
    put(originals, "c", b"y" * 40).release()
    assert [is_there(originals, key) for key in "abc"] == [True, False, True]
    assert sum(path.stat().st_size for path in (tmp_path / "hub").glob("*.safetensors")) <= 100


def test_a_file_in_use_is_never_removed_and_goes_once_it_is_let_go(originals: DownloadCache) -> None:
    held = [put(originals, key, key.encode() * 60) for key in "abc"]
    assert originals.free_space(10**6) == 0
    assert all(original.path.exists() for original in held)
    for original in held:
        original.release()
    assert originals.free_space(10**6) == 180


def test_a_file_that_two_brought_at_once_is_there_for_as_long_as_either_uses_it(originals: DownloadCache) -> None:
    with originals.draft("a") as one, originals.draft("a") as other:
        one.add(b"x" * 40)
        other.add(b"x" * 40)
        first, second = originals.commit("a", one), originals.commit("a", other)
    assert first.path == second.path
    second.release()
    assert originals.free_space(10**6) == 0
    assert first.path.read_bytes() == b"x" * 40
    first.release()
    assert originals.free_space(10**6) == 40


def test_a_file_that_was_altered_while_another_was_on_its_way_is_replaced(originals: DownloadCache) -> None:
    with originals.draft("a") as draft:
        draft.add(b"x" * 40)
        put(originals, "a").path.write_bytes(b"y" * 40)
        kept = originals.commit("a", draft)
    assert kept.path.read_bytes() == b"x" * 40


def test_a_file_whose_bytes_changed_is_not_given_out_and_is_gone(originals: DownloadCache) -> None:
    kept = put(originals, "a")
    kept.release()
    kept.path.write_bytes(b"x" * 39 + b"y")
    assert originals.find("a") is None
    assert not kept.path.exists()


def test_what_another_put_in_the_place_of_an_altered_file_is_let_be(
    originals: DownloadCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = put(originals, "a")
    kept.release()
    kept.path.write_bytes(b"x" * 39 + b"y")
    other = DownloadCache(tmp_path / "hub", 100, clock=lambda: 2000.0)
    changing = originals._changing
    by_another: list[LockedFile] = []

    def late() -> AbstractContextManager[None]:
        by_another.append(put(other, "a"))
        return changing()

    monkeypatch.setattr(originals, "_changing", late)
    assert originals.find("a") is None
    assert by_another[0].path.read_bytes() == b"x" * 40


def test_what_is_not_kept_leaves_nothing_behind(originals: DownloadCache, tmp_path: Path) -> None:
    with originals.draft("a") as draft:
        draft.add(b"half")
        assert originals.downloaded_bytes("a") == 4
    assert [path.name for path in (tmp_path / "hub").iterdir()] == [".lock"]
    assert originals.find("a") is None


def test_what_a_killed_process_left_is_cleared_by_the_next_and_one_at_work_is_let_be(
    originals: DownloadCache, tmp_path: Path
) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from serve_app.catalog.sources.download_cache import DownloadCache\n"
        "with DownloadCache(Path(sys.argv[1]), 100, clock=time.time).draft('a') as draft:\n"
        "    draft.add(b'half'); print('here', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "hub")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[4],
    )  # fmt: skip
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        put(originals, "b").release()
        assert originals.downloaded_bytes("a") == 4
        os.kill(child.pid, signal.SIGKILL)
    put(originals, "c").release()
    assert originals.downloaded_bytes("a") == 0
