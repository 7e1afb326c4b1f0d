"""What is sent to a service is planned beforehand, and what is reported follows from single answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.bench.traffic.load import LoadOptions, plan_requests
from serve_app.bench.traffic.load_report import Sample, report_of
from serve_app.cli.main import app

URL = "http://127.0.0.1:1"
KNOWN = ("me/first", "me/second", "me/third")


def sample(at_s: float, took_s: float, adapter: str, code: str | None = None, **timing_ms: float) -> Sample:
    return Sample(at_s, at_s + 0.01, took_s, (adapter,), 200 if code is None else 429, code, timing_ms)


SAMPLES = [
    sample(0, 1.0, "a", swap=20.0, fetch=900.0, queue=0.0),
    sample(1, 2.0, "a", swap=0.2, fetch=0.1, queue=100.0),
    sample(2, 3.0, "b", swap=20.0, fetch=0.0, queue=200.0),
    sample(3, 0.1, "b", "overloaded"),
    sample(4, 6.0, "a", swap=20.0, fetch=0.0, queue=100.0),
]


def test_figures_follow_from_the_answers_as_by_hand() -> None:
    report = report_of(SAMPLES, 8.02, command="c", url=URL)
    assert (report.requests, report.answered, report.errors) == (5, 4, {"overloaded": 1})
    assert report.offered_per_s == pytest.approx(4 / 4.01)
    assert report.answered_per_s == pytest.approx(4 / 8.02)
    assert (report.p50_s, report.p95_s, report.worst_s) == (2.0, 6.0, 6.0)
    assert (report.swaps, report.fetches) == (0.75, 0.25)
    assert report.mean_ms["queue"] == 100.0
    assert report.late_s == pytest.approx(0.01)


def test_each_adapter_has_its_own_figures_and_fairness_compares_their_means() -> None:
    report = report_of(SAMPLES, 8.0, command="", url=URL)
    assert [(one.name, one.requests, one.answered, one.mean_s) for one in report.adapters] == [
        ("a", 3, 3, 3.0),
        ("b", 2, 1, 3.0),
    ]
    assert report.fairness == pytest.approx(1.0)
    uneven = report_of([sample(0, 1.0, "a"), sample(1, 9.0, "b")], 10.0, command="", url=URL)
    assert uneven.fairness == pytest.approx(100 / (2 * 82))


def test_a_run_without_an_answer_is_json_all_the_same() -> None:
    report = report_of([sample(0, 0.1, "a", "overloaded")], 1.0, command="", url=URL)
    assert json.loads(report.to_json())["p95_s"] is None


def test_a_plan_keeps_its_rate_and_stops_at_either_bound() -> None:
    many = plan_requests(LoadOptions(URL, rate_per_s=10.0, duration_s=100.0, max_requests=5000), KNOWN)
    assert len(many) == pytest.approx(1000, rel=0.15)
    assert max(one.at_s for one in many) < 100.0
    assert len(plan_requests(LoadOptions(URL, rate_per_s=10.0, duration_s=100.0, max_requests=7), KNOWN)) == 7


def test_a_plan_asks_for_the_first_adapter_most_and_in_sessions() -> None:
    planned = plan_requests(LoadOptions(URL, rate_per_s=50.0, duration_s=100.0, max_requests=4000, steps=4), KNOWN)
    counts = Counter(one.adapters[0].key for one in planned)
    assert [key for key, _ in counts.most_common()] == list(KNOWN)
    assert planned[0].parameters == {"num_inference_steps": 4}


def test_same_seed_plans_the_same() -> None:
    options = LoadOptions(URL, rate_per_s=5.0, duration_s=10.0, seed=3)
    assert plan_requests(options, KNOWN) == plan_requests(options, KNOWN)


def test_a_service_without_adapters_is_asked_for_its_base() -> None:
    assert {one.adapters for one in plan_requests(LoadOptions(URL, duration_s=5.0), ())} == {()}


def test_a_log_is_replayed_faster_and_cut_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("at_s,adapters,steps\n100,me/a:0.5,9\n110,me/b,30\n150,me/c,30\n")
    planned = plan_requests(LoadOptions(URL, csv_file=path, speed=10.0, duration_s=4.0), ())
    assert [(one.at_s, one.adapters[0].key, one.adapters[0].scale) for one in planned] == [
        (0.0, "me/a", 0.5),
        (1.0, "me/b", 1.0),
    ]
    assert planned[0].parameters["num_inference_steps"] == 9


def test_a_service_that_is_not_there_is_told_in_one_line() -> None:
    result = CliRunner().invoke(app, ["bench", "load", URL])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"error: no service at {URL}: ConnectError"


def test_a_key_is_in_no_report(tmp_path: Path) -> None:
    assert "sesame" not in repr(LoadOptions(URL, key="sesame"))
