"""The command line against the real service: few and quick; the arguments are tested in `tests/unit/cli`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from serve_app.cli.main import app
from tests.service import Service


def run(service: Service, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"LORAPLEX_URL": service.url})


def test_a_listed_adapter_draws_what_the_service_draws_for_others(service: Service, tmp_path: Path) -> None:
    listed = json.loads(run(service, "models", "--json").stdout)["models"]
    assert {"id": "demo/sdxl-sepia", "base_id": "demo/sdxl"} in listed
    path = tmp_path / "sepia.png"
    result = run(service, "generate", "a red circle", "-o", path, "-l", "demo/sdxl-sepia", "--seed", 7, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["base_id"], told["seed"]) == ("demo/sdxl", 7)
    assert told["adapters"][0]["layers_matched"] == told["adapters"][0]["layers_in_file"]
    drawn = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(drawn, service.draw("a red circle", lora="demo/sdxl-sepia", seed=7))


def test_a_sheet_holds_adapters_of_both_bases(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    adapters = ("-l", "demo/sdxl-sepia", "-l", "demo/sd15-night")
    result = run(service, "generate", "a red circle", "--sheet", "-o", path, *adapters, "--steps", 2, "--json")
    assert result.exit_code == 0, result.output
    tiles = json.loads(result.stdout)["tiles"]
    assert [tile["label"] for tile in tiles] == [
        "demo/sdxl alone",
        "demo/sdxl-sepia",
        "demo/sd15 alone",
        "demo/sd15-night",
    ]
    assert len({tile["seed"] for tile in tiles}) == 1


def test_a_refusal_is_the_service_s_own_sentence(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    result = run(service, "generate", "a red circle", "-o", path, "-m", "demo/sd15", "-l", "demo/sdxl-sepia")
    assert (result.exit_code, path.exists()) == (1, False)
    assert "adapter demo/sdxl-sepia was made for demo/sdxl, but the request names demo/sd15" in result.stderr
