"""`loraplex pull`: download adapters and bases into the caches of replicas before the first request.

Owns the arguments and the progress bar. Code that needs torch or Ray is imported inside the command.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.cli.terminal import AsJson, ConfigOption, bytes_text, err, print_json, print_line, reporting
from serve_app.core import AdapterRef

if TYPE_CHECKING:
    from serve_app.cli.sources import Sources
    from serve_app.core import AdapterSpec

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Pulled:
    """One model that is now on this machine; `base_id` None means that it is a base itself."""

    id: str
    base_id: str | None
    revision: str | None
    path: Path
    size_bytes: int


def pull(
    adapters: Annotated[list[str] | None, typer.Argument(metavar="ADAPTER", help="Adapters' ids.")] = None,
    bases: Annotated[bool, typer.Option("--bases", help="Fetch every base, too, with what is fused into it.")] = False,
    config: ConfigOption = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the adapters.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download adapters into the cache of this machine's replicas, so that the first request need not wait."""
    if not adapters and not bases:
        raise typer.BadParameter("name at least one adapter, or give --bases")
    with reporting(as_json=as_json):
        from serve_app.cli.sources import open_sources

        sources = open_sources(config)
        pulled = _pull_bases(sources, is_quiet=as_json) if bases else []
        refs = [AdapterRef(name, revision=revision) for name in adapters or ()]
        fused = [one for base in sources.config.bases for one in base.fused] if bases else []
        refs += [AdapterRef(one.id, revision=one.revision, filename=one.filename) for one in fused]
        pulled += asyncio.run(_pull_adapters(sources, refs, is_quiet=as_json))
    if as_json:
        print_json({"pulled": [asdict(model) for model in pulled]})


async def _pull_adapters(sources: Sources, refs: list[AdapterRef], *, is_quiet: bool) -> list[Pulled]:
    import time

    from serve_app.catalog.catalog import Catalog
    from serve_app.catalog.files import AdapterFiles
    from serve_app.catalog.reading.repository import REMOTE

    catalog = Catalog(sources.config, sources.adapter_sources, clock=time.monotonic)
    files = AdapterFiles(sources.adapter_sources)
    pulled: list[Pulled] = []
    for ref in refs:
        spec = await catalog.adapter(ref)
        fetching = asyncio.gather(*(files.path(spec, name) for name in spec.files))
        with _bar(spec, is_quiet=is_quiet) as advance:
            while not fetching.done():
                advance(files.downloaded_bytes(spec))
                await asyncio.wait({fetching}, timeout=POLL_S)
        paths = fetching.result()
        size_bytes = sum(path.stat().st_size for path in paths)
        pulled.append(Pulled(spec.id, spec.base_id, spec.revision, paths[0], size_bytes))
        if not is_quiet:
            _say(pulled[-1], "" if spec.origin in REMOTE else f", already here: {spec.origin}")
    return pulled


def _pull_bases(sources: Sources, *, is_quiet: bool) -> list[Pulled]:
    from serve_app.engine.base.fetching import HubAccess
    from serve_app.engine.base.loading import fetch

    pulled: list[Pulled] = []
    for base in sources.config.bases:
        with err.status(f"{base.id} ...") if err.is_terminal and not is_quiet else contextlib.nullcontext():
            places = fetch(base, HubAccess(token=sources.environment.token))
        for place in places:
            size_bytes = sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())
            pulled.append(Pulled(base.id, None, base.source.revision, place, size_bytes))
            if not is_quiet:
                _say(pulled[-1], "")
        if not places and not is_quiet:
            print_line(("here ", "green"), (base.id, "bold"), "  nothing to fetch")
    return pulled


def _say(model: Pulled, more: str) -> None:
    of_base = f" for {model.base_id}" if model.base_id else ""
    print_line(("here ", "green"), (model.id, "bold"), f"{of_base}  {bytes_text(model.size_bytes)}{more}")


@contextlib.contextmanager
def _bar(spec: AdapterSpec, *, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show the progress of a file on a terminal; yields a function that takes the bytes so far."""
    from serve_app.catalog.reading.repository import REMOTE

    if is_quiet or not err.is_terminal or spec.origin not in REMOTE:
        yield lambda fetched_bytes: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(spec.id, total=spec.size_bytes or None)
        yield lambda fetched_bytes: progress.update(task, completed=fetched_bytes)
