"""How many GPUs a traffic needs; the profiles it is asked of; what is printed, written and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from serve_app.bench.simulation.compare import figures_of, plan
from serve_app.bench.simulation.profile import TimingsInvalid, read_profile
from serve_app.bench.simulation.routers import POLICIES
from serve_app.bench.simulation.simulator import Fleet, simulate
from serve_app.bench.traffic.workload import Traffic, generate
from serve_app.cli.main import app

PROFILES = ("calibrated", "a10g", "a100", "h100")
BUSY = replace(Traffic(), requests=120, users=20, days=0.04, fold=False, hours=(1.0,) * 24)


def test_the_fewest_replicas_that_are_enough_are_found() -> None:
    workloads = [generate(BUSY, seed) for seed in range(2)]
    profile = read_profile("a10g")
    found = plan(workloads, profile, POLICIES[:1], 150.0)
    count = found.total("loraplex")
    assert count is not None
    assert count > 1

    def worst_p95(replicas: int) -> float:
        runs = [simulate(one, profile, POLICIES[0], Fleet(replicas), seed=s) for s, one in enumerate(workloads)]
        return max(figures_of([run]).p95_s for run in runs)

    assert worst_p95(count) <= 150.0 < worst_p95(count - 1)
    assert dict(found.needs[0].curve).keys() >= {count, count - 1}


def test_a_target_under_the_time_of_one_request_is_met_by_no_number() -> None:
    found = plan([generate(BUSY, 0)], read_profile("a10g"), POLICIES[:1], 1.0)
    assert found.total("loraplex") is None
    assert json.loads(found.to_json())["needs"][0]["replicas"] is None


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_says_where_its_numbers_are_from_and_what_nobody_measured(name: str) -> None:
    profile = read_profile(name)
    assert profile.sources
    assert set(profile.unproved) <= set(profile.sources) | {"pass_s"}
    assert profile.base("anything").pace.seconds(50.0) > 0


def test_faster_machines_need_fewer_gpus() -> None:
    workloads = [generate(BUSY, 0)]
    counts = [plan(workloads, read_profile(name), POLICIES[:1], 120.0).total("loraplex") for name in PROFILES[1:]]
    assert None not in counts
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("profiles: {x: {about: y}}", "profiles.x.bases"),
        ("profiles: {}", "own.yaml has no profile 'a10g'"),
        ("a: [", "own.yaml cannot be read"),
        ("profile: {}", "unknown key 'profile'; did you mean 'profiles'"),
    ],
)
def test_a_wrong_file_of_measurements_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(TimingsInvalid, match=said):
        read_profile("a10g", path)


def test_a_base_without_timings_is_named(tmp_path: Path) -> None:
    profile = replace(read_profile("a10g"), bases={})
    with pytest.raises(TimingsInvalid, match="profile 'a10g' has no timings for the base 'flux'"):
        profile.base("flux")


def bench(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


def test_drawn_traffic_is_replayed_through_the_command_line(tmp_path: Path) -> None:
    requests, report, picture = tmp_path / "requests.csv", tmp_path / "report.json", tmp_path / "policies.png"
    assert "distinct adapters" in bench("workload", "--requests", 200, "--adapters", 40, "-o", requests)
    # The first hours of the day: the autoscaler looks at every moment of it.
    requests.write_text("".join(requests.read_text().splitlines(keepends=True)[:41]))
    printed = bench(
        "simulate", "--csv", requests, "--profile", "a100", "--seeds", 1, "--policy", "loraplex",
        "--policy", "affinity", "--autoscale", 5, "--json", report, "--plot", picture,
    )  # fmt: skip
    assert "not measured: pass_s, swap" in printed
    results = json.loads(report.read_text())["results"]
    assert [(one["policy"], one["seeds"][0]["requests"]) for one in results] == [("loraplex", 40), ("affinity", 40)]
    with Image.open(picture) as image:
        assert image.width > 500


def test_the_number_of_gpus_is_printed_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "gpus.png"
    printed = bench(
        "simulate", "--traffic", "blog", "--requests", 300, "--profile", "h100", "--seeds", 1, "--p95", 30,
        "--plot", picture,
    )  # fmt: skip
    assert "sd15" in printed
    assert "sdxl" in printed
    with Image.open(picture) as image:
        assert image.width > 500


def test_wrong_arguments_fail_in_one_line() -> None:
    for arguments in (
        ("simulate", "--policy", "best"),
        ("simulate", "--profile", "t4"),
        ("workload", "--traffic", "x"),
    ):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")


def test_a_picture_without_matplotlib_names_the_extra(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['matplotlib'] = None; from serve_app.cli.main import main; main()"
    command = [sys.executable, "-c", hidden, "bench", "simulate", "--plot", str(tmp_path / "x.png")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 1
    assert "pip install 'loraplex[bench]'" in run.stderr
