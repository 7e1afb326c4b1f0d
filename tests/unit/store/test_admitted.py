"""Admitted files on a real disk, shared by real processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from serve_app.store.admitted import AdmittedFiles

Open = Callable[..., AdmittedFiles]

PREAMBLE = """
import sys, time
from pathlib import Path
from serve_app.store.admitted import AdmittedFiles
folder, budget_bytes = Path(sys.argv[1]), int(sys.argv[2])
files = AdmittedFiles(folder, budget_bytes, depends_on=("base", "float32"), clock=time.time)
"""


@pytest.fixture
def open_files(tmp_path: Path) -> Iterator[Open]:
    opened: list[AdmittedFiles] = []
    ticks = count(1000)

    def open_one(budget_bytes: int = 1000, base: str = "base", dtype: str = "float32") -> AdmittedFiles:
        files = AdmittedFiles(
            tmp_path / "admitted",
            budget_bytes,
            depends_on=(base, dtype),
            clock=lambda: float(next(ticks)),
        )
        opened.append(files)
        return files

    yield open_one
    for files in opened:
        files.close()


@contextmanager
def process(script: str, folder: Path, budget_bytes: int = 1000) -> Iterator[subprocess.Popen[str]]:
    """Run a script beside us that says one line when it is where the test wants it."""
    child = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, str(folder), str(budget_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def put(files: AdmittedFiles, key: str, content: bytes) -> None:
    draft = files.new_draft()
    draft.write_bytes(content)
    with files.publish(key, draft):
        pass
    files.drop_draft(draft)


def get(files: AdmittedFiles, key: str) -> bytes | None:
    with files.reading(key) as path:
        return None if path is None else path.read_bytes()


def until_opened_twice(path: Path) -> None:
    """Wait until another thread of this process has the file open as well as we."""
    while sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd")) < 2:
        pass


def drafts(folder: Path) -> list[Path]:
    return sorted(folder.glob(".drafts-*"))


def test_a_published_file_is_found_by_every_replica_of_the_base(open_files: Open) -> None:
    put(open_files(), "adapter", b"weights")
    assert get(open_files(), "adapter") == b"weights"


@pytest.mark.parametrize("other", [{"base": "other"}, {"dtype": "bfloat16"}])
def test_a_file_belongs_to_one_base_and_dtype(open_files: Open, other: dict[str, str]) -> None:
    put(open_files(), "adapter", b"weights")
    assert get(open_files(**other), "adapter") is None


def test_a_draft_is_invisible_until_it_is_published(open_files: Open) -> None:
    files = open_files()
    draft = files.new_draft()
    draft.write_bytes(b"half")
    assert get(files, "adapter") is None
    with files.publish("adapter", draft) as path:
        assert path.read_bytes() == b"half"


def test_a_draft_that_was_never_written_publishes_nothing(open_files: Open) -> None:
    files = open_files()
    with pytest.raises(OSError, match="draft"), files.publish("adapter", files.new_draft()):
        pass
    assert get(files, "adapter") is None


def test_the_least_recently_read_file_makes_room(open_files: Open) -> None:
    files = open_files(budget_bytes=100)
    put(files, "a", b"a" * 40)
    put(files, "b", b"b" * 40)
    assert get(files, "a") is not None
    put(files, "c", b"c" * 40)
    assert [get(files, key) is not None for key in "abc"] == [True, False, True]


def test_all_bases_of_a_node_share_one_budget(open_files: Open) -> None:
    first, second = open_files(100, base="first"), open_files(100, base="second")
    put(first, "a", bytes(60))
    put(second, "b", bytes(60))
    assert get(first, "a") is None
    assert get(second, "b") is not None


def test_a_file_larger_than_the_budget_lives_as_long_as_it_is_held(open_files: Open) -> None:
    files = open_files(budget_bytes=10)
    draft = files.new_draft()
    draft.write_bytes(bytes(50))
    with files.publish("huge", draft) as path:
        assert len(path.read_bytes()) == 50
    assert get(files, "huge") is None


def test_a_file_larger_than_the_budget_goes_even_when_reading_it_fails(open_files: Open) -> None:
    files = open_files(budget_bytes=10)
    draft = files.new_draft()
    draft.write_bytes(bytes(50))
    with pytest.raises(RuntimeError), files.publish("huge", draft):
        raise RuntimeError
    assert get(files, "huge") is None


def test_a_new_file_replaces_a_damaged_one(open_files: Open) -> None:
    files = open_files()
    put(files, "adapter", b"weig")
    put(files, "adapter", b"weights")
    assert get(files, "adapter") == b"weights"


def test_a_reader_that_an_evictor_overtook_finds_nothing(open_files: Open) -> None:
    files = open_files()
    put(files, "adapter", b"weights")
    path = files.path("adapter")
    with ThreadPoolExecutor(1) as threads, path.open("rb") as evictor:
        fcntl.flock(evictor, fcntl.LOCK_EX)
        reading = threads.submit(get, files, "adapter")
        until_opened_twice(path)
        path.unlink()
        fcntl.flock(evictor, fcntl.LOCK_UN)
        assert reading.result(timeout=60) is None


def test_a_reader_that_a_publisher_overtook_finds_the_new_file(open_files: Open) -> None:
    files = open_files()
    put(files, "adapter", b"old")
    path = files.path("adapter")
    with ThreadPoolExecutor(1) as threads, path.open("rb") as evictor:
        fcntl.flock(evictor, fcntl.LOCK_EX)
        reading = threads.submit(get, files, "adapter")
        until_opened_twice(path)
        put(files, "adapter", b"new")
        fcntl.flock(evictor, fcntl.LOCK_UN)
        assert reading.result(timeout=60) == b"new"


def test_publication_waits_for_an_eviction_under_way(open_files: Open, tmp_path: Path) -> None:
    files = open_files()
    with ThreadPoolExecutor(1) as threads, (tmp_path / "admitted" / ".lock").open("rb") as evictor:
        fcntl.flock(evictor, fcntl.LOCK_EX)
        publication = threads.submit(put, files, "adapter", b"weights")
        assert get(files, "adapter") is None
        with pytest.raises(TimeoutError):
            publication.result(timeout=0.3)
        fcntl.flock(evictor, fcntl.LOCK_UN)
        publication.result(timeout=60)
    assert get(files, "adapter") == b"weights"


def test_only_our_own_files_are_evicted(open_files: Open, tmp_path: Path) -> None:
    files = open_files(budget_bytes=10)
    stranger = tmp_path / "admitted" / "notes" / "important.txt"
    stranger.parent.mkdir()
    stranger.write_bytes(bytes(500))
    put(files, "a", bytes(8))
    put(files, "b", bytes(8))
    assert stranger.exists()
    assert get(files, "b") is not None


def test_a_file_that_another_process_reads_is_not_evicted(open_files: Open, tmp_path: Path) -> None:
    files = open_files(budget_bytes=100)
    put(files, "read", bytes(60))
    script = """
with files.reading("read") as path:
    print("reading", flush=True)
    sys.stdin.readline()
    print(len(path.read_bytes()), flush=True)
print("done", flush=True)
"""
    with process(script, tmp_path / "admitted", 100) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        put(files, "new", bytes(60))
        reader.communicate("\n")
    assert get(files, "read") is not None
    put(files, "newer", bytes(60))
    assert get(files, "newer") is not None
    assert (get(files, "read"), get(files, "new")) == (None, None)


def test_a_reader_that_was_killed_holds_nothing(open_files: Open, tmp_path: Path) -> None:
    files = open_files(budget_bytes=100)
    put(files, "read", bytes(60))
    script = """
with files.reading("read"):
    print("reading", flush=True)
    sys.stdin.readline()
"""
    with process(script, tmp_path / "admitted", 100) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
    put(files, "new", bytes(60))
    assert get(files, "read") is None


def test_what_a_killed_writer_left_is_cleared_and_a_living_one_is_let_be(open_files: Open, tmp_path: Path) -> None:
    folder = tmp_path / "admitted"
    files = open_files()
    living = files.new_draft()
    living.write_bytes(b"half")
    script = """
files.new_draft().write_bytes(b"half")
print("drafted", flush=True)
sys.stdin.readline()
"""
    with process(script, folder) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        put(files, "a", b"a")
        assert len(drafts(folder)) == 2
    put(files, "b", b"b")
    assert drafts(folder) == [living.parents[1]]
    assert living.read_bytes() == b"half"


def test_a_start_clears_what_a_killed_writer_left(open_files: Open, tmp_path: Path) -> None:
    folder = tmp_path / "admitted"
    script = """
files.new_draft().write_bytes(b"half")
print("drafted", flush=True)
sys.stdin.readline()
"""
    with process(script, folder) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
    assert len(drafts(folder)) == 1
    open_files().close()
    assert drafts(folder) == []


def test_replicas_that_come_and_go_disturb_nobody(open_files: Open, tmp_path: Path) -> None:
    script = """
print("ready", flush=True)
while True:
    AdmittedFiles(folder, budget_bytes, depends_on=("base", "float32"), clock=time.time).close()
"""
    files = open_files()
    with process(script, tmp_path / "admitted") as other:
        assert other.stdout is not None
        other.stdout.readline()
        for number in range(500):
            put(files, str(number), bytes(300))
        assert other.poll() is None
    assert [get(files, str(number)) for number in (497, 498, 499)] == [bytes(300)] * 3


def test_replicas_that_publish_evict_and_read_together_see_only_whole_files(tmp_path: Path) -> None:
    script = """
import random
chance = random.Random(time.time_ns())
print("ready", flush=True)
sys.stdin.readline()
seen = 0
for _ in range(150):
    number = chance.randrange(8)
    whole = bytes([number]) * (3000 + number)
    with files.reading(str(number)) as path:
        content = None if path is None else path.read_bytes()
    if content is None:
        draft = files.new_draft()
        draft.write_bytes(whole)
        with files.publish(str(number), draft) as path:
            content = path.read_bytes()
        files.drop_draft(draft)
    assert content == whole, (number, len(content))
    seen += 1
files.close()
print(seen, flush=True)
"""
    folder = tmp_path / "admitted"
    with process(script, folder, 10_000) as one, process(script, folder, 10_000) as two:
        for child in (one, two):
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in (one, two):
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        assert [child.communicate()[0] for child in (one, two)] == ["150\n", "150\n"]
    assert sum(path.stat().st_size for path in folder.glob("*/*.canonical")) <= 10_000
    assert drafts(folder) == []
