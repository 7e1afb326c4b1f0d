from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from serve_app.core import AdapterRef, Scales
from serve_app.errors import BaseMismatch, LoraplexError
from serve_app.refusals import RankTooHigh
from tests.unit.api.fakes import FakeGateway
from tests.unit.cli.conftest import Run


def test_every_option_reaches_the_service(run: Run, url: str, gateway: FakeGateway, tmp_path: Path) -> None:
    result = run(
        "generate", "a red circle", "-o", tmp_path / "out.png", "--url", url, "-m", "demo/sdxl",
        "--lora", "demo/sdxl-sepia:0.5", "-l", "acme/x@v1:-0.25", "-l", "acme/y@v2", "-l", "acme/z:0.75/0.5",
        "--negative", "blue", "--seed", 11, "--steps", 9, "--size", "96x64", "--guidance", 2.5,
        "--scheduler", "DDIMScheduler", "--prompt-syntax", "comfyui",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    draft = gateway.draft
    assert (draft.prompt, draft.model, draft.negative_prompt) == ("a red circle", "demo/sdxl", "blue")
    assert (draft.width, draft.height, draft.steps, draft.seed) == (96, 64, 9, 11)
    assert (draft.guidance_scale, draft.scheduler, draft.num_images) == (2.5, "DDIMScheduler", 1)
    assert draft.prompt_syntax == "comfyui"
    assert draft.adapters == (
        AdapterRef("demo/sdxl-sepia", 0.5),
        AdapterRef("acme/x", -0.25, "v1"),
        AdapterRef("acme/y", None, "v2"),
        AdapterRef("acme/z", Scales(0.75, 0.5)),
    )


def test_what_is_not_said_is_left_to_the_service(run: Run, url: str, gateway: FakeGateway, tmp_path: Path) -> None:
    run("generate", "a cat", "-o", tmp_path / "out.png", "--url", url)
    draft = gateway.draft
    assert (draft.model, draft.adapters, draft.seed, draft.width, draft.steps) == (None, (), None, None, None)


@pytest.mark.parametrize(
    ("name", "form"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_the_file_is_what_its_name_says(run: Run, url: str, tmp_path: Path, name: str, form: str) -> None:
    run("generate", "a cat", "-o", tmp_path / name, "--url", url)
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (form, (64, 64))


def test_seed_adapters_and_time_are_printed(run: Run, url: str, tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    said = run("generate", "a cat", "-o", path, "-l", "demo/sdxl-sepia:0.5", "--url", url).stdout
    for part in (f"saved {path}", "demo/sdxl-sepia  x 0.5  48 of 50 layers", "seed     7", "denoise 400"):
        assert part in said


def test_several_images_get_numbered_files(run: Run, url: str, tmp_path: Path) -> None:
    told = json.loads(run("generate", "a cat", "-o", tmp_path / "a.png", "-n", 2, "--url", url, "--json").stdout)
    assert told["files"] == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    first, second = (Image.open(path).tobytes() for path in told["files"])
    assert first != second


def test_json_says_how_the_image_came_about(run: Run, url: str, tmp_path: Path) -> None:
    arguments = ("generate", "a cat", "-o", tmp_path / "a.png", "-l", "demo/sdxl-sepia:0.5", "--url", url, "--json")
    told = json.loads(run(*arguments).stdout)
    assert (told["seed"], told["base_id"], told["timing_ms"]["swap"]) == (7, "demo/sdxl", 3.25)
    assert told["adapters"] == [
        {"id": "demo/sdxl-sepia", "revision": "0123abcd", "scale": 0.5, "layers_matched": 48, "layers_in_file": 50}
    ]


def test_a_picture_is_sent_to_start_from(run: Run, url: str, gateway: FakeGateway, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "in.png")
    result = run(
        "generate", "a cat", "-o", tmp_path / "out.png", "--image", tmp_path / "in.png", "--strength", 0.4,
        "-l", "demo/sdxl-sepia", "--seed", 3, "--url", url,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert gateway.draft.image is not None
    assert (gateway.draft.image.width, gateway.draft.image.height) == (48, 32)
    assert (gateway.draft.strength, gateway.draft.seed, gateway.draft.num_images) == (0.4, 3, 1)
    assert gateway.draft.adapters == (AdapterRef("demo/sdxl-sepia"),)


def test_what_the_service_warns_of_is_shown_and_steers_no_terminal(
    run: Run, url: str, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.warnings = ("the prompt's [bold]end[/] was cut \x1b[31m",)
    result = run("generate", "a cat", "-o", tmp_path / "out.png", "--url", url)
    assert "warning: the prompt's [bold]end[/] was cut" in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize(
    "failure",
    [BaseMismatch("demo/sd15-night", "demo/sd15", "demo/sdxl"), RankTooHigh("acme/x", "its rank is 1024")],
)
def test_a_refusal_writes_no_file(
    run: Run, url: str, gateway: FakeGateway, tmp_path: Path, failure: LoraplexError
) -> None:
    gateway.failure = failure
    said = run("generate", "a cat", "-o", tmp_path / "out.png", "--url", url)
    told = run("generate", "a cat", "-o", tmp_path / "out.png", "--url", url, "--json")
    assert (said.exit_code, said.stderr) == (1, f"error: {failure}\n")
    assert json.loads(told.stdout)["error"] == {"code": failure.code, "message": str(failure)}
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told(run: Run, url: str, tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    result = run("generate", "a cat", "-o", tmp_path / "out.png", "--url", url)
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
