"""Where the store's tests get their adapters from: files that come when the test lets them through."""

from __future__ import annotations

import asyncio
from pathlib import Path

from serve_app.core import AdapterSpec
from serve_app.refusals import MalformedFile


def spec(name: str) -> AdapterSpec:
    filename = "pytorch_lora_weights.safetensors"
    return AdapterSpec(f"demo/{name}", "demo/base", "0" * 40, filename, "folder", "elsewhere", size_bytes=10)


class Remote:
    """Files that come when they are let through; a canonical file is the original in capitals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.fetched: list[str] = []
        self.closed: dict[str, asyncio.Event] = {}
        self.asked: dict[str, asyncio.Event] = {}
        self.failures: dict[str, Exception] = {}
        self.sizes: dict[str, int] = {}

    def hold(self, wanted: AdapterSpec) -> None:
        self.closed[wanted.id] = asyncio.Event()
        self.asked[wanted.id] = asyncio.Event()

    def let_through(self, wanted: AdapterSpec) -> None:
        self.closed[wanted.id].set()

    async def fetch(self, wanted: AdapterSpec) -> Path:
        self.fetched.append(wanted.id)
        if wanted.id in self.closed:
            self.asked[wanted.id].set()
            await self.closed[wanted.id].wait()
        if wanted.id in self.failures:
            raise self.failures[wanted.id]
        path = self.folder / wanted.id.replace("/", "--")
        content = f"{wanted.id} ".ljust(self.sizes.get(wanted.id, 10), "x")
        await asyncio.to_thread(path.write_text, content)
        return path

    async def admit(self, wanted: AdapterSpec, source: Path, target: Path) -> None:
        if wanted.id.endswith("broken"):
            await asyncio.to_thread(target.write_text, "half")
            raise MalformedFile(wanted.id, "it is truncated")
        await asyncio.to_thread(lambda: target.write_text(source.read_text().upper()))


def load(wanted: AdapterSpec, path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(wanted.id.upper().encode()):
        raise ValueError("damaged")
    return content
