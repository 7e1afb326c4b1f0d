"""A workload as a CSV file, to replay a service's own log.

Owns the columns and what is said of a row that cannot be read. Only `at_s` and `adapters` are needed:

| column | meaning | where it is missing |
|---|---|---|
| `at_s` | seconds since the start, in any order | refused |
| `adapters` | `id` or `id:scale`, several joined by `;`; empty for the base alone | refused |
| `base` | the base's id | `sdxl` |
| `steps`, `images`, `width`, `height`, `guidance_scale` | as in a request | 30, 1, 1024, 1024, 7.5 |
| `size_bytes` | the size of each of its adapters | 93 MB; the largest said of an adapter counts |
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from serve_app.bench.traffic.workload import AdapterAsk, Arrival, Workload
from serve_app.errors import LoraplexError

COLUMNS = ("at_s", "base", "adapters", "steps", "images", "width", "height", "guidance_scale", "size_bytes")
NEEDED = ("at_s", "adapters")
DEFAULT_SIZE_BYTES = 93_000_000
SHOWN_FAULTS = 5


class WorkloadUnreadable(LoraplexError):
    """A CSV file holds no workload."""

    reason: str
    code = "workload_unreadable"
    template = "{reason}"


def read_workload(path: Path) -> Workload:
    """Read a CSV file.

    Raises:
        WorkloadUnreadable: columns are missing or unknown, or rows hold what is no value; names the lines.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _read(file, path.name)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadUnreadable(f"{path.name} cannot be read as CSV: {error}") from None


def write_workload(workload: Workload, file: TextIO) -> None:
    """Write every request of a workload as a row that `read_workload` reads."""
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for arrival in workload.arrivals:
        asked = ";".join(f"{ask.key}:{ask.scale:g}" for ask in arrival.adapters)
        size = max((workload.sizes[ask.key] for ask in arrival.adapters), default=0)
        row = (f"{arrival.at_s:.3f}", arrival.base_id, asked, arrival.steps, arrival.images)
        writer.writerow((*row, arrival.width, arrival.height, f"{arrival.guidance_scale:g}", size))


def _read(file: TextIO, name: str) -> Workload:
    reader = csv.DictReader(file)
    _check_columns(reader.fieldnames or (), name)
    arrivals: list[Arrival] = []
    sizes: dict[str, int] = {}
    faults: list[str] = []
    for row in reader:
        try:
            arrival, size_bytes = _arrival(row)
        except ValueError as error:
            faults.append(f"line {reader.line_num}: {error}")
            continue
        arrivals.append(arrival)
        for ask in arrival.adapters:
            sizes[ask.key] = max(sizes.get(ask.key, 0), size_bytes)
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise WorkloadUnreadable(f"{name}: {'; '.join(faults[:SHOWN_FAULTS])}{more}")
    if not arrivals:
        raise WorkloadUnreadable(f"{name} has no rows")
    return Workload(tuple(sorted(arrivals, key=lambda arrival: arrival.at_s)), sizes)


def _check_columns(found: Iterable[str], name: str) -> None:
    columns = list(found)
    missing = [column for column in NEEDED if column not in columns]
    unknown = [column for column in columns if column not in COLUMNS]
    if missing or unknown:
        said = [f"has no column {', '.join(missing)}"] if missing else []
        said += [f"has the unknown column {', '.join(unknown)}"] if unknown else []
        raise WorkloadUnreadable(f"{name} {' and '.join(said)}; columns are {', '.join(COLUMNS)}")


def _arrival(row: Mapping[str, str | None]) -> tuple[Arrival, int]:
    """Return a row's request and the size of its adapters; ValueError says what is wrong."""
    if None in row:
        raise ValueError("more values than columns")
    at_s = _number(row, "at_s", None, least=0.0)
    asks = tuple(_ask(text.strip()) for text in (row["adapters"] or "").split(";") if text.strip())
    if len({ask.key for ask in asks}) < len(asks):
        raise ValueError("an adapter is named twice")
    arrival = Arrival(
        at_s,
        (row.get("base") or "sdxl").strip(),
        asks,
        int(_number(row, "steps", 30, least=1)),
        int(_number(row, "images", 1, least=1)),
        int(_number(row, "width", 1024, least=8)),
        int(_number(row, "height", 1024, least=8)),
        _number(row, "guidance_scale", 7.5, least=0.0),
    )
    return arrival, int(_number(row, "size_bytes", DEFAULT_SIZE_BYTES, least=0))


def _number(row: Mapping[str, str | None], column: str, default: float | None, *, least: float) -> float:
    text = (row.get(column) or "").strip()
    if not text:
        if default is None:
            raise ValueError(f"{column} is missing")
        return default
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{column} is '{text[:40]}', not a number") from None
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{column} is {text[:40]}; the least is {least:g}")
    return value


def _ask(text: str) -> AdapterAsk:
    key, colon, scale = text.rpartition(":")
    if not colon:
        return AdapterAsk(text)
    try:
        return AdapterAsk(key, float(scale))
    except ValueError:
        raise ValueError(f"the scale of '{text[:80]}' is not a number") from None
