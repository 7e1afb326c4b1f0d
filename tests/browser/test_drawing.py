from __future__ import annotations

import asyncio
import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.async_api import BrowserContext, expect

from tests.browser.playground import Playground
from tests.service import Service, pixels_of

pytestmark = pytest.mark.asyncio(loop_scope="session")
STAR = "a large yellow star on a blue background"
# Images that share a pass round differently, by one level of 255.
ROUNDING = 1


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and int(abs(one.astype(int) - other).max()) <= ROUNDING


async def test_an_adapter_changes_the_picture_into_the_one_that_every_client_gets(
    playground: Playground, service: Service
) -> None:
    await playground.write(STAR, seed=7)
    await playground.generate()
    base = await playground.pixels()
    await playground.choose("demo/sdxl-sepia")
    await playground.element("#adapters input[type=number]").fill("0.8")
    await playground.generate()
    panel = playground.page.get_by_role("region", name="demo/sdxl")
    await expect(panel.locator(".chip.applied", has_text="sdxl-sepia")).to_have_count(1)
    sepia = await playground.pixels()
    assert not is_same(base, sepia)
    assert is_same(base, service.draw(STAR, model="demo/sdxl", seed=7))
    loras = [{"id": "demo/sdxl-sepia", "scale": 0.8}]
    assert is_same(sepia, service.draw(STAR, model="demo/sdxl", seed=7, loras=loras))


async def test_a_result_tells_its_seeds_its_adapters_and_where_its_time_went(playground: Playground) -> None:
    await playground.page.get_by_role("button", name="Two at once").click()
    await playground.page.fill("#seed", "9007199254740993")
    await playground.page.fill("#count", "2")
    await playground.generate()
    assert await playground.card.locator(".seed b").all_inner_texts() == ["9007199254740993", "9007199254740994"]
    tags = await playground.card.locator(".tag").all_inner_texts()
    assert tags == ["demo/sdxl", "demo/sdxl-sketch× 0.8", "demo/sdxl-sepia× 0.5"]
    stages = await playground.card.locator(".timing dt").all_inner_texts()
    assert stages == ["queue", "fetch", "swap", "denoise", "decode", "encode", "total"]
    assert all(text.endswith("s") for text in await playground.card.locator(".timing dd").all_inner_texts())


async def test_progress_moves_and_previews_come_before_the_image(playground: Playground) -> None:
    await playground.page.evaluate("""() => {
        window.seen = [];
        const note = () => {
            const [bar, image] = [document.querySelector("progress"), document.querySelector(".card img")];
            window.seen.push([bar?.hasAttribute("value") ? bar.value / bar.max : 0, image?.className ?? ""]);
        };
        const options = {subtree: true, childList: true, attributes: true};
        new MutationObserver(note).observe(document.getElementById("gallery"), options);
    }""")
    await playground.write(STAR, steps=30)
    await playground.generate()
    seen = await playground.page.evaluate("window.seen")
    moving = [done for done, _ in seen if done]
    assert moving == sorted(moving)
    assert len(set(moving)) >= 5
    states = [state for _, state in seen]
    assert states.index("preview") < states.index("done")


async def test_cancelling_stops_the_work_and_leaves_the_form_ready(playground: Playground, service: Service) -> None:
    # Pressed in the page, before it takes the next event: from here the images might be done by then.
    await playground.page.evaluate("""() => {
        const status = document.getElementById("status");
        new MutationObserver((_, observer) => {
            if (!/^Step [1-9]/.test(status.textContent)) return;
            observer.disconnect();
            window.pressedAt = status.textContent;
            document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
        }).observe(status, {childList: true});
    }""")
    await playground.write(STAR, steps=50, count=4, width=128, height=128)
    await playground.page.click("#generate")
    await expect(playground.element("#status")).to_contain_text("Cancelled: step")
    pressed_at = await playground.page.evaluate("window.pressedAt")
    await expect(playground.element("#status")).to_have_text(f"Cancelled: {pressed_at.lower()}")
    await expect(playground.element("article.card")).to_have_count(0)
    async with asyncio.timeout(120):
        while any(row["running"] for row in service.http.get("/v1/replicas").json()["data"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await playground.write(STAR, steps=4, count=1, width=64, height=64)
    await playground.generate()


def run(command: list[str], folder: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    subprocess.run(command, cwd=folder, timeout=120, check=True, env=plain)


@pytest.mark.slow
async def test_what_is_copied_draws_the_same_picture_in_a_terminal(playground: Playground, tmp_path: Path) -> None:
    await playground.write("a 'large' \"yellow\" star on a blue background", seed=11, negative="$HOME `ls`")
    await playground.choose("demo/sdxl-night")
    await playground.generate()
    shown = await playground.pixels()
    for label, program in (("Copy as curl", ["bash", "-c"]), ("Copy as Python", [sys.executable, "-c"])):
        copied = await playground.copy(label)
        (tmp_path / "image-0.png").unlink(missing_ok=True)
        await asyncio.to_thread(run, [*program, copied], tmp_path)
        assert is_same(np.asarray(Image.open(tmp_path / "image-0.png").convert("RGB")), shown)


def png(colour: str, size: tuple[int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


async def drop(playground: Playground, content: bytes) -> None:
    await playground.page.evaluate(
        """async text => {
            const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "red.png", {type: "image/png"}));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}));
        }""",
        base64.b64encode(content).decode(),
    )
    await playground.element("#chosen").wait_for()


async def test_a_dropped_picture_that_says_how_it_was_drawn_fills_the_form(
    playground: Playground, service: Service
) -> None:
    reply = service.ask(
        "a (large:1.2) star – <lora:demo/sd15-sepia:0.7>", model="demo/sd15", negative_prompt="a (circle)",
        seed=9007199254740993, width=64, height=96, num_inference_steps=5, guidance_scale=3.5,
        scheduler="Euler Karras", prompt_syntax="a1111",
    )  # fmt: skip
    assert reply.status_code == 200, reply.text
    await drop(playground, reply.content)
    await playground.page.get_by_role("button", name="Use its settings").click()
    await expect(playground.element("#prompt")).to_have_value("a (large:1.2) star – ")
    await expect(playground.element("#prompt")).to_be_focused()
    await expect(playground.element("#chosen")).to_be_hidden()
    shown = {"base": "demo/sd15", "negative": "a (circle)", "seed": "9007199254740993", "syntax": "a1111", "steps": "5"}
    shown |= {"width": "64", "height": "96", "guidance": "3.5", "scheduler": "Euler Karras"}
    for name, value in shown.items():
        await expect(playground.element(f"#{name}")).to_have_value(value)
    assert await playground.element("#adapters .model").all_inner_texts() == ["demo/sd15-sepia"]
    await playground.generate()
    assert is_same(await playground.pixels(), pixels_of(reply))


async def test_a_dropped_picture_is_where_the_drawing_starts(playground: Playground) -> None:
    await drop(playground, png("red", (96, 48)))
    await expect(playground.element("#chosen-settings")).to_be_hidden()
    assert (await playground.page.input_value("#width"), await playground.page.input_value("#height")) == ("96", "48")
    await playground.write("a red background", strength=0.1, steps=10)
    await playground.generate()
    assert any(url.endswith("/v1/images/edits") for url in playground.requests)
    drawn = await playground.pixels()
    assert drawn.shape == (48, 96, 3)
    assert drawn[..., 0].mean() > 150 > 100 > drawn[..., 2].mean()


async def test_only_the_painted_part_of_a_picture_is_redrawn_and_every_client_can_repeat_it(
    playground: Playground, tmp_path: Path
) -> None:
    start = np.zeros((64, 128, 3), np.uint8)
    start[:, :64], start[:, 64:] = (255, 0, 0), (0, 0, 255)
    content = io.BytesIO()
    Image.fromarray(start).save(content, "PNG")
    await drop(playground, content.getvalue())
    await playground.page.get_by_role("button", name="Paint what to redraw").click()
    await playground.page.fill("#brush", "40")
    canvas = playground.element("#mask-canvas")
    box = await canvas.bounding_box()
    assert box is not None
    # A stroke over the right half, from top to bottom.
    await playground.page.mouse.move(box["x"] + 0.85 * box["width"], box["y"] + 2)
    await playground.page.mouse.down()
    await playground.page.mouse.move(box["x"] + 0.85 * box["width"], box["y"] + box["height"] - 2, steps=4)
    await playground.page.mouse.up()
    await expect(playground.element("#mask-note")).to_have_text("Only the painted part is redrawn.")
    async with playground.page.expect_download() as saved:
        await playground.page.click("#mask-save")
    await (await saved.value).save_as(tmp_path / "mask.png")
    alpha = np.asarray(Image.open(tmp_path / "mask.png").convert("RGBA"))[..., 3]
    assert alpha.shape == (64, 128)
    assert (alpha[:, 100:].max(), alpha[:, :70].min()) == (0, 255)
    await playground.write(
        "a 'large' \"yellow\" circle on a green background", strength=1, seed=3, negative="$HOME `ls`"
    )
    await playground.generate()
    drawn = await playground.pixels()
    assert (drawn[:, :70] == start[:, :70]).all()
    assert abs(drawn[:, 100:].astype(int) - start[:, 100:]).mean() > 60
    await expect(playground.card.locator(".facts")).to_contain_text("a part redrawn")
    (tmp_path / "red.png").write_bytes(content.getvalue())
    for label, program in (("Copy as curl", ["bash", "-c"]), ("Copy as Python", [sys.executable, "-c"])):
        copied = await playground.copy(label)
        (tmp_path / "image-0.png").unlink(missing_ok=True)
        await asyncio.to_thread(run, [*program, copied], tmp_path)
        assert is_same(np.asarray(Image.open(tmp_path / "image-0.png").convert("RGB")), drawn)
    await playground.page.click("#mask-clear")
    await playground.card.get_by_role("button", name="Use again").click()
    await expect(playground.element("#mask-clear")).to_be_enabled()
    await playground.page.click("#chosen-remove")
    await expect(playground.element("#mask-field")).to_be_hidden()


@pytest.mark.slow
async def test_cards_of_adapters_without_a_picture_show_one_that_the_service_drew(
    context: BrowserContext, service: Service
) -> None:
    shown = await Playground.open(context, service.url, draws_pictures=True)
    await shown.page.fill("#adapter", "sdxl-sepia")
    image = shown.element("[data-id='demo/sdxl-sepia'] img")
    await image.wait_for()
    drawn = service.draw("a red circle on a blue background, sepia style", model="demo/sdxl-sepia", seed=0)
    assert abs((await shown.pixels(image)).astype(int) - drawn).mean() < 6
    assert service.http.get("/v1/pictures/demo/sdxl-sepia").status_code == 200
    shown.check_manners()


async def test_an_image_can_be_the_start_of_the_next_and_its_settings_come_back(playground: Playground) -> None:
    await playground.write(STAR, seed=3)
    await playground.choose("demo/sdxl-sketch")
    await playground.generate()
    await playground.card.get_by_role("button", name="Start from the image").click()
    await expect(playground.element("#chosen-name")).to_have_text("3.png")
    await playground.page.get_by_role("button", name="Remove demo/sdxl-sketch").click()
    await playground.write("something else", seed=4)
    await playground.card.get_by_role("button", name="Use again").click()
    await expect(playground.element("#prompt")).to_have_value(STAR)
    await expect(playground.element("#seed")).to_have_value("3")
    await expect(playground.element("#chosen")).to_be_hidden()
    assert await playground.element("#adapters .model").all_inner_texts() == ["demo/sdxl-sketch"]
