"""Usage and start times outlive the process that counts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.catalog.replica_report import DayUsage
from serve_app.deployments.registry.ledger import Ledger
from serve_app.deployments.registry.usage import Drawn
from serve_app.errors import NotReady
from tests.clock import Clock
from tests.unit.deployments.registry.registry_fakes import StoreKeeper

A, B = "demo/a", "demo/b"


def test_what_was_drawn_adds_up_by_day_key_and_base_and_is_there_for_the_next_keeper(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "folder" / "usage.sqlite3", clock=Clock())
    ledger.add(())
    ledger.add((DayUsage("2026-11-29", "alice", A, 2, 1.5), DayUsage("2026-11-30", None, A, 1, 0.5)))
    ledger.add((DayUsage("2026-11-29", "alice", A, 3, 1.0), DayUsage("2026-11-29", "alice", B, 1, 9.0)))
    ledger.note_start(A, 40.0)
    ledger.note_start(A, 20.0)
    ledger.close()
    again = Ledger(tmp_path / "folder" / "usage.sqlite3", clock=Clock())
    assert set(again.usage("2026-11-29")) == {
        DayUsage("2026-11-29", "alice", A, 5, 2.5),
        DayUsage("2026-11-29", "alice", B, 1, 9.0),
        DayUsage("2026-11-30", None, A, 1, 0.5),
    }
    assert again.usage("2026-11-30") == (DayUsage("2026-11-30", None, A, 1, 0.5),)
    assert again.start_times_s() == {A: 20.0}
    again.close()


def test_days_long_past_are_forgotten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "usage.sqlite3", clock=Clock())
    for day in ("2025-10-25", "2025-10-26", "2026-11-30"):
        ledger.add((DayUsage(day, "alice", A, 1, 1.0),))
    assert [row.day for row in ledger.usage("")] == ["2025-10-26", "2026-11-30"]
    ledger.close()


def test_a_base_that_has_not_started_for_long_is_forgotten(tmp_path: Path) -> None:
    clock = Clock(1_796_083_200.0)
    ledger = Ledger(tmp_path / "usage.sqlite3", clock=clock)
    ledger.note_start(A, 40.0)
    clock.now += 60 * 86400
    ledger.note_start(B, 20.0)
    assert ledger.start_times_s() == {A: 40.0, B: 20.0}
    clock.now += 31 * 86400
    assert ledger.start_times_s() == {B: 20.0}
    ledger.close()


def test_what_is_drawn_counts_for_the_day_on_which_it_is_drawn() -> None:
    clock = Clock(1_796_083_199.0)  # 2026-11-30 23:59:59 UTC
    drawn = Drawn(clock)
    drawn.note("alice", A, images=1, device_s=0.5)
    clock.now += 1
    drawn.note("alice", A, images=2, device_s=0.5)
    drawn.note("alice", A, images=2, device_s=1.0)
    rows = drawn.take()
    assert rows == (DayUsage("2026-11-30", "alice", A, 1, 0.5), DayUsage("2026-12-01", "alice", A, 4, 1.5))
    assert drawn.take() == ()


async def test_what_was_drawn_while_the_keeper_is_away_is_counted_once_it_is_back() -> None:
    keeper = StoreKeeper()
    client = keeper.client()
    client.note_drawn("alice", A, images=2, device_s=1.0)
    keeper.is_away = True
    with pytest.raises(NotReady):
        await client.usage("2026-01-01")
    keeper.is_away = False
    keeper.start_times_s = {A: 20.0}
    (row,) = await client.usage("2026-01-01")
    assert (row.key, row.base_id, row.images, row.device_s) == ("alice", A, 2, 1.0)
    assert client.start_times_s() == {A: 20.0}
