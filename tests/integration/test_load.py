"""The load client against the real service."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from serve_app.cli.main import app
from tests.service import Service


def test_traffic_is_sent_answered_and_reported(service: Service, tmp_path: Path) -> None:
    report_file, picture = tmp_path / "load.json", tmp_path / "load.png"
    arguments = (
        "bench", "load", service.url, "--rate", "8", "--duration", "5", "--max-requests", "8", "--steps", "1",
        "--adapter", "demo/sdxl-sepia", "--adapter", "demo/sd15-night", "--adapter", "no-such/adapter",
        "--json", report_file, "--plot", picture,
    )  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text())
    assert report["requests"] == 8
    asked_for_none = sum(sample["adapters"] == ["no-such/adapter"] for sample in report["samples"])
    assert report["errors"] == ({"adapter_not_found": asked_for_none} if asked_for_none else {})
    assert report["answered"] == 8 - asked_for_none
    assert report["answered"] > 0
    assert 0 < report["p50_s"] <= report["p95_s"] <= report["worst_s"]
    assert set(report["mean_ms"]) >= {"queue", "fetch", "swap", "denoise"}
    assert picture.read_bytes().startswith(b"\x89PNG")
