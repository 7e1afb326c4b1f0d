import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from serve_app.cli.main import app

QUICK = ["bench", "swap", "--rank", "2", "--repeat", "1", "--steps", "1"]


def test_a_run_prints_a_table_and_writes_its_report(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, [*QUICK, "--json", str(tmp_path / "report.json")])
    assert outcome.exit_code == 0, outcome.output
    assert "diffusers  the four calls" in outcome.output
    assert "loraplex   A -> B, from host memory" in outcome.output
    assert "bit-equal to load and fuse" in outcome.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exactness"]["fused_equal"] is True
    assert report["command"] in " ".join(outcome.output.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["start"], "ready / reading the bytes"),
        (["admission", "--rank", "2", "--steps", "1", "--latent", "8"], "beside / alone"),
    ],
    ids=lambda words: words[0],
)
def test_the_other_benchmarks_print_a_table_and_write_their_reports(
    words: list[str], shown: str, tmp_path: Path
) -> None:
    outcome = CliRunner().invoke(app, ["bench", *words, "--repeat", "1", "--json", str(tmp_path / "report.json")])
    assert outcome.exit_code == 0, outcome.output
    assert shown in outcome.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["command"] in " ".join(outcome.output.split())


def test_an_unknown_model_is_refused_with_those_that_exist() -> None:
    outcome = CliRunner().invoke(app, ["bench", "swap", "--model", "sd9"])
    assert outcome.exit_code == 2
    assert all(name in outcome.output for name in ("sd9", "tiny", "sd15", "sdxl", "flux"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_one_clear_line() -> None:
    outcome = CliRunner().invoke(app, [*QUICK, "--device", "cuda"])
    assert outcome.exit_code == 1
    assert "torch finds no CUDA device here; use --device cpu" in outcome.output
    assert "Traceback" not in outcome.output
