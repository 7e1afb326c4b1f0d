"""A minute of chaos; `python -m tests.chaos` is the same for longer, and docs/reliability.md keeps what it says."""

from __future__ import annotations

import pytest

from tests.chaos.blows import BASE, INGRESS, NODE
from tests.chaos.report import Report
from tests.chaos.run import Least, chaos

MINUTES = 1.0
# A machine that does other things too needs longer for the same.
CHAOS = Least(requests=100, blows=5, kinds=frozenset((BASE, INGRESS, NODE)), troubles=20, within_minutes=15.0)

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    lines: list[str] = []
    report = chaos(MINUTES, 1, say=lines.append, cache=tmp_path_factory.mktemp("cache"), at_least=CHAOS)
    print("\n".join([*lines, *report.lines()]))  # noqa: T201
    return report


def test_accepted_means_answered_whatever_is_killed_and_however_the_hub_fares(report: Report) -> None:
    assert report.broken_promises == [], "\n".join(report.lines())


def test_the_chaos_was_chaos(report: Report) -> None:
    assert CHAOS.is_met(len(report.told), report.blows, sum(report.hub.values()))
