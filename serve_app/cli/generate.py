"""`loraplex generate`: a prompt in, an image file out.

Owns the arguments and what is said about the result; `serve_app.cli.service` asks, `serve_app.cli.contact_sheet` draws
the sheet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.cli.models import complete_model
from serve_app.cli.service import Drawing, Pictures, ServiceClient, Step
from serve_app.cli.terminal import (
    DEFAULT_URL,
    AsJson,
    CommandFailed,
    Key,
    Url,
    err,
    plain,
    print_error,
    print_fields,
    print_json,
    print_line,
    reporting,
)
from serve_app.core import AdapterRef, AppliedAdapter, PromptSyntax, Scales, UnresolvedRequest, scale_of

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_LORA = re.compile(r"(?P<id>[^:@]+)(?:@(?P<revision>[^\s:@]+))?(?::(?P<scale>[-+0-9.]+)(?:/(?P<text>[-+0-9.]+))?)?")


def _checked_output(value: Path) -> Path:
    if value.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"'{value}' must end in one of {', '.join(FORMATS)}")
    if not value.parent.is_dir():
        raise typer.BadParameter(f"there is no folder '{value.parent}'")
    return value


def _checked_size(value: str | None) -> str | None:
    if value is not None and not _SIZE.fullmatch(value):
        raise typer.BadParameter(f"'{value}' is no size; one looks like 512x768")
    return value


def _checked_loras(values: list[str] | None) -> list[str]:
    for value in values or []:
        _adapter(value)
    return values or []


Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="The file to write: .png, .jpg or .webp.", callback=_checked_output),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", "-l", metavar="ID[@REVISION][:SCALE[/SCALE]]", callback=_checked_loras, autocompletion=complete_model,
        help="An adapter, repeatable; a second scale is the text encoders'.",
    ),
]  # fmt: skip
Model = Annotated[
    str | None, typer.Option("--model", "-m", autocompletion=complete_model, help="A base or an adapter.")
]
Size = Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", callback=_checked_size, help="The image's size.")]
Image = Annotated[
    Path | None, typer.Option("--image", "-i", exists=True, dir_okay=False, help="Start from this picture.")
]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Output,
    model: Model = None,
    lora: Loras = None,
    negative: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same image.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    size: Size = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A noise scheduler that the base offers.")] = None,
    prompt_syntax: Annotated[
        PromptSyntax | None, typer.Option(help="How the prompts are written; without it the service's default.")
    ] = None,
    image: Image = None,
    strength: Annotated[float | None, typer.Option(help="With --image: over 0 (keep it) to 1 (ignore it).")] = None,
    mask: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="With --image: transparent where to draw again.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many images, numbered files.")] = 1,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="The same prompt and seed through each --lora, or all, on one sheet.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for an answer.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Generate an image with a running service and save it."""
    for name, value in (("--guidance", guidance), ("--strength", strength)):
        if value is not None and not math.isfinite(value):
            raise typer.BadParameter(f"{name} must be a finite number")
    if image is None and (strength is not None or mask is not None):
        raise typer.BadParameter("--strength and --mask go with --image")
    if sheet and count != 1:
        raise typer.BadParameter("--sheet draws one image of each; leave --count out")
    width, height = _pixels(size)
    draft = UnresolvedRequest(
        prompt=prompt, model=model, adapters=tuple(_adapter(text) for text in lora or []), negative_prompt=negative,
        width=width, height=height, steps=steps, guidance_scale=guidance, scheduler=scheduler, seed=seed,
        num_images=count, strength=strength, prompt_syntax=prompt_syntax,
    )  # fmt: skip
    with reporting(as_json=as_json), ServiceClient(url, key, timeout_s=timeout_s) as service:
        pictures = Pictures(_read(image), _read(mask) if mask else None) if image is not None else None
        if sheet:
            _draw_sheet(service, draft, pictures, output, as_json=as_json)
        else:
            _draw_images(service, draft, pictures, output, as_json=as_json)


def _draw_images(
    service: ServiceClient, draft: UnresolvedRequest, pictures: Pictures | None, output: Path, *, as_json: bool
) -> None:
    form = FORMATS[output.suffix.lower()]
    with _busy("drawing", is_quiet=as_json) as say:
        on_step = None if say is None else lambda step: say(_how_far(step))
        drawing = service.draw(draft, form=form, pictures=pictures, on_step=on_step)
    paths = numbered(output, len(drawing.images))
    for path, content in zip(paths, drawing.images, strict=True):
        _write(path, content)
    if as_json:
        print_json({"files": paths, **report(drawing)})
        return
    for path in paths:
        print_line(("saved ", "green"), (str(path), "bold"))
    _describe(drawing)


def _draw_sheet(
    service: ServiceClient, draft: UnresolvedRequest, pictures: Pictures | None, output: Path, *, as_json: bool
) -> None:
    from serve_app.cli.contact_sheet import compose, draw_tiles

    with _busy("drawing a sheet", is_quiet=as_json) as say:
        tiles = draw_tiles(service, draft, pictures, say=say or (lambda text: None))
    drawn = [tile for tile in tiles if tile.drawing is not None]
    refused = [tile for tile in tiles if tile.refusal]
    if not drawn:
        raise CommandFailed(refused[0].refusal if refused else "the service knows no adapter to draw with", "no_tiles")
    try:
        compose(tiles, draft.prompt).save(output)
    except OSError as error:
        raise CommandFailed(f"'{output}' cannot be written: {error.strerror or error}", "not_written") from None
    if as_json:
        told = [
            {"label": tile.label, **(report(tile.drawing) if tile.drawing else {"refusal": tile.refusal})}
            for tile in tiles
        ]
        print_json({"files": [output], "tiles": told})
    else:
        print_line(("saved ", "green"), (str(output), "bold"))
        seed = drawn[0].drawing.seed if drawn[0].drawing else ""
        print_fields([("images", str(len(drawn))), ("seed", str(seed))])
        for tile in refused:
            print_error(tile.refusal)
    if refused:
        raise typer.Exit(1)


def _how_far(step: Step) -> str:
    if step.is_starting:
        return "the base starts" + ("" if step.expected_s is None else f", ready in about {step.expected_s:.0f} s")
    if step.step:
        aside = ", set aside for shorter requests" if step.queue_position else ""
        return f"drawing: step {step.step} of {step.steps}{aside}"
    return f"waiting: {step.queue_position} before it" if step.queue_position else "drawing ..."


def numbered(output: Path, count: int) -> list[Path]:
    """Return the file names of `count` images: the given one, or `name-1.png` and so on."""
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1)]


def report(drawing: Drawing) -> dict[str, Any]:
    """Return the `--json` output of a generation: everything except the pixels."""
    fields = {part.name: getattr(drawing, part.name) for part in dataclasses.fields(drawing) if part.name != "images"}
    return fields | {"adapters": [dataclasses.asdict(adapter) for adapter in drawing.adapters]}


def _describe(drawing: Drawing) -> None:
    stages = [f"{name} {duration_ms:.0f}" for name, duration_ms in drawing.timing_ms.items() if duration_ms >= 0.5]
    adapters = [("adapter", _adapter_line(adapter)) for adapter in drawing.adapters]
    time_text = f"{drawing.wall_ms:.0f} ms" + (f"  ({', '.join(stages)})" if stages else "")
    print_fields([("base", drawing.base_id), *adapters, ("seed", str(drawing.seed)), ("time", time_text)])
    for warning in drawing.warnings:
        err.print(f"[yellow]warning:[/] {plain(warning).replace('[', chr(92) + '[')}", soft_wrap=True)


def _adapter_line(adapter: AppliedAdapter) -> str:
    layers = f"{adapter.layers_matched} of {adapter.layers_in_file} layers"
    return f"{adapter.id}  x {adapter.scale:g}  {layers}  @{adapter.revision[:12]}"


def _adapter(text: str) -> AdapterRef:
    match = _LORA.fullmatch(text)
    try:
        if match is not None:
            scale = float(match["scale"]) if match["scale"] else None
            scales = scale if scale is None or not match["text"] else Scales(scale, float(match["text"]))
            if scales is None or all(math.isfinite(scale_of(scales, part)) for part in ("denoiser", "text_encoder")):
                return AdapterRef(match["id"], scales, match["revision"])
    except ValueError:
        pass
    raise typer.BadParameter(f"'{text}' is no adapter; one looks like owner/name, owner/name:0.8 or owner/name@v1:0.8")


def _pixels(size: str | None) -> tuple[int, int] | tuple[None, None]:
    match = _SIZE.fullmatch(size or "")
    return (int(match[1]), int(match[2])) if match else (None, None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandFailed(f"'{path}' cannot be read: {error.strerror}", "not_read") from None


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CommandFailed(f"'{path}' cannot be written: {error.strerror}", "not_written") from None


@contextlib.contextmanager
def _busy(what: str, *, is_quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """Show progress on a terminal; yields a function that updates it, or None without a terminal."""
    if is_quiet or not err.is_terminal:
        yield None
        return
    with err.status(f"{what} ...") as status:
        yield lambda text: status.update(plain(text))
