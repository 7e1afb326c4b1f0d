"""`loraplex inspect`: show what an adapter is, and whether it can be served.

Owns the arguments and how an inspection is shown. Code that needs torch or Ray is imported inside the command.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.cli.terminal import (
    FAILED,
    AsJson,
    CommandFailed,
    ConfigOption,
    bytes_text,
    plural,
    print_fields,
    print_json,
    print_line,
    reporting,
)
from serve_app.core import AdapterRef

if TYPE_CHECKING:
    from serve_app.catalog.reading.header import HeaderFacts
    from serve_app.cli.inspection import Inspection, Verdict

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
UNMATCHED_SHOWN = 3


def inspect(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER|FILE", help="An adapter's id, or a local weight file.")],
    base: Annotated[str | None, typer.Option(help="Ask this base alone; default: those it may be for.")] = None,
    config: ConfigOption = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
    file: Annotated[str | None, typer.Option(help="Which file, where a repository holds several.")] = None,
    header_only: Annotated[bool, typer.Option("--header-only", help="Read no weights, and fetch none.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is, how many layers of a base it matches, or why it is refused (exit code 1).

    No service has to run: the same code looks at the file as in a replica.
    """
    with reporting(as_json=as_json):
        seen = _look(AdapterRef(adapter, revision=revision, filename=file), base, config, header_only=header_only)
    if as_json:
        print_json({**dataclasses.asdict(seen), "is_served": seen.is_served})
    else:
        show(seen)
    if not seen.is_served:
        raise typer.Exit(FAILED)


def _look(ref: AdapterRef, base_id: str | None, config: Path | None, *, header_only: bool) -> Inspection:
    path = Path(ref.id)
    is_file = path.is_file()
    if not is_file and ref.id.endswith(WEIGHT_SUFFIXES):
        raise CommandFailed(f"there is no file '{ref.id}'", "not_found")
    from serve_app.cli.inspection import inspect_file, inspect_id
    from serve_app.cli.sources import open_sources

    sources = open_sources(config)
    base = sources.base(base_id) if base_id is not None else None
    if is_file:
        return asyncio.run(inspect_file(sources, path, base, header_only=header_only))
    return asyncio.run(inspect_id(sources, ref, base, header_only=header_only))


def show(seen: Inspection) -> None:
    """Print an inspection as text."""
    print_line((seen.id, "bold"))
    size = bytes_text(seen.size_bytes) if seen.size_bytes is not None else ""
    print_fields(
        [
            ("found in", "" if seen.origin == "file" else seen.origin),
            ("revision", seen.revision or ""),
            ("file", ", ".join(filter(None, (seen.file, size)))),
            ("sha256", seen.sha256 or ""),
            ("card", f"made for {', '.join(seen.card.claims)}" if seen.card.claims else "names no base"),
            ("trigger", seen.defaults.trigger_words or ""),
            ("defaults", _defaults_line(seen.defaults)),
            ("weights", _facts_line(seen.header) if seen.header else ""),
        ]
    )
    for verdict in seen.verdicts:
        _show_verdict(verdict)
    if seen.refusal is not None:
        print_line(("  ✗ ", "bold red"), seen.refusal)
    elif not seen.verdicts and seen.bases:
        print_line(("  ? ", "bold yellow"), f"for {', '.join(seen.bases)}; its layers were not compared")


def _defaults_line(defaults: AdapterDefaults) -> str:
    levels = {"timesteps": defaults.timesteps, "sigmas": defaults.sigmas}
    parts = [
        f"scale {defaults.scale:g}" if defaults.scale is not None else "",
        f"steps {defaults.steps}" if defaults.steps is not None else "",
        *(f"{name} {'/'.join(f'{one:g}' for one in values)}" for name, values in levels.items() if values),
        f"guidance {defaults.guidance_scale:g}" if defaults.guidance_scale is not None else "",
        f"scheduler {defaults.scheduler}" if defaults.scheduler else "",
        *(f"{name} {value}" for name, value in defaults.scheduler_options),
        f"negative prompt '{defaults.negative_prompt}'" if defaults.negative_prompt else "",
    ]
    return ", ".join(filter(None, parts))


def _facts_line(facts: HeaderFacts) -> str:
    parts = [
        "/".join(sorted(facts.methods)) or "no adapter",
        f"rank {facts.max_rank}" if facts.max_rank else "",
        plural(facts.layers, "layer"),
        "in " + " and ".join(sorted(facts.components)) if facts.components else "",
        f"text width {facts.text_width}" if facts.text_width else "",
        f"family {facts.family}" if facts.family else "",
    ]
    return ", ".join(filter(None, parts))


def _show_verdict(verdict: Verdict) -> None:
    if verdict.refusal is not None:
        print_line(("  ✗ ", "bold red"), (verdict.base_id, "bold"), f"  {verdict.refusal}")
        return
    low, high = verdict.ranks
    ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
    layers = f"{verdict.layers_matched} of {plural(verdict.layers_in_file, 'layer')} matched"
    print_line(("  ✓ ", "bold green"), (verdict.base_id, "bold"), f"  {layers}, {ranks}")
    if verdict.unmatched:
        more = len(verdict.unmatched) - UNMATCHED_SHOWN
        names = ", ".join(verdict.unmatched[:UNMATCHED_SHOWN]) + (f" and {more} more" if more > 0 else "")
        print_line((f"      not in this base: {names}", "yellow"))
