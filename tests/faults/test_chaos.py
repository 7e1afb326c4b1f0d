"""Two minutes of chaos; `python -m tests.chaos` is the same for longer, and docs/reliability.md keeps what it says."""

from __future__ import annotations

import pytest

from tests.chaos.report import Report
from tests.chaos.run import chaos

MINUTES = 2.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    lines: list[str] = []
    report = chaos(MINUTES, 1, say=lines.append, cache=tmp_path_factory.mktemp("cache"))
    print("\n".join([*lines, *report.lines()]))  # noqa: T201
    return report


def test_accepted_means_answered_whatever_is_killed_and_however_the_hub_fares(report: Report) -> None:
    assert report.broken_promises == [], "\n".join(report.lines())


def test_the_chaos_was_chaos(report: Report) -> None:
    assert len(report.told) > 100
    assert len(report.blows) >= 5
    assert {blow.kind for blow in report.blows} == {"base replica", "ingress replica", "node"}
    assert sum(report.hub.values()) > 20
