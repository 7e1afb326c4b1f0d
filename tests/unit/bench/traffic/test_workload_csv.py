"""A service's own log can be replayed, and a bad row is named by its line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.bench.traffic.workload import AdapterAsk, Arrival, Traffic, generate
from serve_app.bench.traffic.workload_csv import WorkloadUnreadable, read_workload, write_workload


def written(folder: Path, text: str) -> Path:
    path = folder / "log.csv"
    path.write_text(text)
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    drawn = generate(replace(Traffic(), requests=200, users=20), 5)
    path = tmp_path / "drawn.csv"
    with path.open("w", newline="") as file:
        write_workload(drawn, file)
    read = read_workload(path)
    for was, now in zip(drawn.arrivals, read.arrivals, strict=True):
        assert now == replace(was, at_s=now.at_s, user=0, session=0)
        assert now.at_s == pytest.approx(was.at_s, abs=0.001)
    assert all(read.sizes[key] == drawn.sizes[key] for key in read.sizes)


def test_two_columns_are_enough_and_rows_may_come_in_any_order(tmp_path: Path) -> None:
    workload = read_workload(written(tmp_path, "at_s,adapters\n5,me/a:0.5;me/b\n1,\n"))
    assert workload.arrivals == (
        Arrival(1.0, "sdxl", ()),
        Arrival(5.0, "sdxl", (AdapterAsk("me/a", 0.5), AdapterAsk("me/b"))),
    )
    assert workload.sizes["me/a"] == 93_000_000


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x,a,1", "line 3: at_s is 'x', not a number"),
        ("nan,a,1", "line 3: at_s is nan"),
        (",a,1", "line 3: at_s is missing"),
        ("-1,a,1", "line 3: at_s is -1; the least is 0"),
        ("1,a:b,1", "line 3: the scale of 'a:b' is not a number"),
        ("1,a;a,1", "line 3: an adapter is named twice"),
        ("1,a,0", "line 3: images is 0; the least is 1"),
        ("1,a,1,9", "line 3: more values than columns"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(WorkloadUnreadable, match=said):
        read_workload(written(tmp_path, f"at_s,adapters,images\n0,a,1\n{row}\n"))


def test_many_bad_rows_are_counted_not_listed(tmp_path: Path) -> None:
    rows = "\n".join(["x,a"] * 8)
    with pytest.raises(WorkloadUnreadable, match=r"line 6: .*; and 3 more$"):
        read_workload(written(tmp_path, f"at_s,adapters\n{rows}\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapters\na\n", "has no column at_s"),
        ("at_s,adapters,colour\n1,a,red\n", "has the unknown column colour; columns are at_s, base"),
        ("at_s,adapters\n", "has no rows"),
        ("", "has no column at_s, adapters"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(WorkloadUnreadable, match=said):
        read_workload(written(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(WorkloadUnreadable, match="cannot be read as CSV"):
        read_workload(path)
