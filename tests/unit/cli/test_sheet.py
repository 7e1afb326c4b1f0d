from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from serve_app.cli.contact_sheet import COLUMNS, Tile, compose
from serve_app.cli.service import Drawing
from serve_app.core import GenerationResult, UnresolvedRequest
from serve_app.refusals import RankTooHigh
from tests.unit.api.fakes import FakeGateway
from tests.unit.cli.conftest import Run


def drawing(colour: str, size: tuple[int, int] = (64, 64)) -> Drawing:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return Drawing((content.getvalue(),), 7, "demo/sdxl", (), {}, (), 1.0)


def test_each_adapter_is_drawn_with_one_seed_after_its_base_alone(
    run: Run, url: str, gateway: FakeGateway, tmp_path: Path
) -> None:
    result = run("generate", "a cat", "--sheet", "-o", tmp_path / "s.png", "-l", "a/x", "-l", "a/y:0.5", "--url", url)
    assert result.exit_code == 0, result.output
    assert [[ref.id for ref in draft.adapters] for draft in gateway.drafts] == [["a/x"], ["a/y"], []]
    assert [draft.seed for draft in gateway.drafts] == [None, 7, 7]
    assert gateway.drafts[-1].model == "demo/sdxl"
    # Three places of 128 px and four gaps of 10.
    assert Image.open(tmp_path / "s.png").width == 3 * 128 + 4 * 10


def test_a_seed_that_is_given_holds_for_every_image(run: Run, url: str, gateway: FakeGateway, tmp_path: Path) -> None:
    run("generate", "a cat", "--sheet", "-o", tmp_path / "s.png", "-l", "a/x", "--seed", 5, "--url", url)
    assert {draft.seed for draft in gateway.drafts} == {5}


@pytest.mark.parametrize(("model", "expected"), [((), 3), (("-m", "demo/sd15"), 1)])
def test_without_adapters_all_of_the_service_are_drawn(
    run: Run, url: str, gateway: FakeGateway, tmp_path: Path, model: tuple[str, ...], expected: int
) -> None:
    run("generate", "a cat", "--sheet", "-o", tmp_path / "s.png", *model, "--url", url)
    assert len([draft for draft in gateway.drafts if draft.adapters]) == expected


def test_an_adapter_that_is_refused_leaves_its_place_empty_and_exit_code_1(
    run: Run, url: str, tmp_path: Path, gateway: FakeGateway
) -> None:
    class Choosy(FakeGateway):
        async def generate(self, draft: UnresolvedRequest, *, request_id: str) -> GenerationResult:
            if any(ref.id == "a/bad" for ref in draft.adapters):
                raise RankTooHigh("a/bad", "its rank is 1024")
            return await super().generate(draft, request_id=request_id)

    from serve_app.api.app import create_app
    from serve_app.config import IngressSettings
    from tests.unit.api.fakes import served

    with served(create_app(Choosy(), IngressSettings())) as choosy_url:
        arguments = ("generate", "a cat", "--sheet", "-o", tmp_path / "s.png", "-l", "a/bad", "-l", "a/x")
        said = run(*arguments, "--url", choosy_url)
        told = run(*arguments, "--url", choosy_url, "--json")
    assert said.exit_code == told.exit_code == 1
    assert "its rank is 1024" in said.stderr
    labels = {tile["label"]: tile.get("refusal") for tile in json.loads(told.stdout)["tiles"]}
    assert labels.keys() == {"a/bad", "a/x", "demo/sdxl alone"}
    assert [bool(refusal) for refusal in labels.values()].count(True) == 1
    assert (tmp_path / "s.png").exists()


def test_a_service_without_adapters_has_nothing_for_a_sheet(
    run: Run, url: str, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.known = ()
    result = run("generate", "a cat", "--sheet", "-o", tmp_path / "s.png", "--url", url)
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert "knows no adapter" in result.stderr


def test_pictures_keep_their_colours_and_their_order() -> None:
    tiles = [Tile("one", "b", drawing("red")), Tile("two", "b", drawing("lime"))]
    sheet = compose(tiles, "a cat")
    assert sheet.getpixel((10 + 64, 40 + 64)) == (255, 0, 0)
    assert sheet.getpixel((10 + 128 + 10 + 64, 40 + 64)) == (0, 255, 0)


def test_each_base_begins_a_row_and_a_full_row_goes_on_below() -> None:
    one = Tile("x", "first", drawing("red"))
    other = dataclasses.replace(one, base_id="second")
    row = 128 + 22 + 10
    assert compose([one, other], "a cat").height == 40 + 2 * row
    assert compose([one] * (COLUMNS + 1), "a cat").height == 40 + 2 * row


def test_a_picture_that_is_not_square_keeps_its_shape() -> None:
    sheet = compose([Tile("wide", "b", drawing("red", (128, 64)))], "a cat")
    assert sheet.getpixel((10 + 64, 40 + 64)) == (255, 0, 0)
    assert sheet.getpixel((10 + 64, 40 + 8)) == (255, 255, 255)
