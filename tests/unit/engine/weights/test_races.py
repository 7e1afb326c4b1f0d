"""No access of the side stream races one of the device's own, whatever is prepared, bound, dropped or fails when."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serve_app.core import Scale
from serve_app.engine.adapters.canonical import read_canonical, write_canonical
from serve_app.engine.adapters.deltas import Coverage, Delta, Dora, LowRank, ParsedAdapter
from serve_app.engine.adapters.stacks import stack_layers
from serve_app.engine.weights.beside import BesideFuser
from serve_app.engine.weights.device_cache import DeviceCache
from serve_app.engine.weights.fused import FusedWeights, PreparedSwap, StalePreparation
from tests.streams import RaceChecker

HISTORIES, ACTIONS, ADAPTERS = 60, 40, 20
LINEAR = [f"m.l{place}" for place in range(4)]
CONV = [f"c.c{place}" for place in range(2)]


class Failed(Exception):
    """What an injected failure raises."""


@cache
def adapters() -> list[ParsedAdapter]:
    """Return adapters of all kinds, each in one buffer, as they are read in a replica."""
    chance, read = random.Random(0), list[ParsedAdapter]()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for place in range(ADAPTERS):
            path = Path(folder, f"d{place}")
            write_canonical(ParsedAdapter(path.name, {"unet": changes(chance)}, Coverage(1, 1)), path)
            read.append(read_canonical(path))
    return read


def changes(chance: random.Random) -> dict[str, Delta]:
    layers: dict[str, Delta] = {}
    for name in LINEAR:
        if chance.random() < 0.6:
            rank = chance.choice([2, 3])
            bias = torch.randn(8) if chance.random() < 0.3 else None
            change = LowRank(torch.randn(rank, 8), torch.randn(8, rank), chance.choice([rank, 1.5]), rank, bias)
            layers[name] = Dora(change, torch.rand(8) + 0.5) if chance.random() < 0.25 else change
    for name in CONV:
        if chance.random() < 0.6:
            layers[name] = LowRank(torch.randn(2, 4, 3, 3), torch.randn(4, 2, 1, 1), 2.0, 2.0)
    return layers or {LINEAR[0]: LowRank(torch.randn(2, 8), torch.randn(8, 2), 2.0, 2.0)}


class History:
    """A small base whose device thread acts at random, with preparations in the middle of passes."""

    def __init__(self, seed: int, checker: RaceChecker, break_it: Callable[[Any], None]) -> None:
        self.chance, self.checker = random.Random(seed), checker
        torch.manual_seed(seed)
        linear = nn.ModuleDict({f"l{place}": nn.Linear(8, 8) for place in range(4)})
        conv = nn.ModuleDict({f"c{place}": nn.Conv2d(4, 4, 3) for place in range(2)})
        self.net = nn.ModuleDict({"m": linear, "c": conv}).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.adapters = self.chance.sample(adapters(), 5)
        self.weights = FusedWeights({"unet": self.net})
        assert isinstance(self.weights._fuser, BesideFuser)
        self.fuser: Any = self.weights._fuser
        self.fuser._side._stream = checker.side
        cache = DeviceCache(self.chance.choice([0, 1, 2, 9]) * 400, torch.device("cpu"))
        copies: Any = cache._copies
        copies._stream = checker.copies
        self.weights._cache, self.fuser._hold = cache, cache.holding
        if self.chance.random() < 0.5:
            self.weights.reserve(ahead=True)
        break_it({"side": self.fuser._side, "copies": copies})

    def composition(self) -> list[tuple[ParsedAdapter, Scale]]:
        count = self.chance.choice([0, 1, 1, 2, 3])
        return [(self.chance.choice(self.adapters), self.chance.choice([1.0, 0.5])) for _ in range(count)]

    def play(self) -> None:
        prepared: PreparedSwap | None = None
        with torch.no_grad(), self.checker:
            for _ in range(ACTIONS):
                self.act(prepared)
                prepared = self.run_pass(is_preparing=self.chance.random() < 0.6)

    def act(self, prepared: PreparedSwap | None) -> None:
        drawn = self.chance.random()
        if drawn < 0.35 and prepared is not None:
            with suppress(StalePreparation):
                self.weights.bind(prepared)
        elif drawn < 0.75:
            self.weights.apply(self.composition())
        elif drawn < 0.80:
            self.weights.drop_spare_buffers()
        elif drawn < 0.85:
            self.checker.wait_for(self.checker.main, self.checker.side)
            self.weights.drop_spares()
        elif drawn < 0.88:
            self.weights.restore()
        elif drawn < 0.92:
            self.weights.forget(self.chance.choice(self.adapters).digest)
        elif drawn < 0.96:
            self.fail()

    def fail(self) -> None:
        """Apply something that fails at one of its stacks."""
        fuse, left = self.fuser._stacks.fuse, [self.chance.randrange(3)]

        def fail_late(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Failed
            fuse(*arguments)

        self.fuser._stacks.fuse = fail_late
        with suppress(Failed):
            self.weights.apply(self.composition())
        self.fuser._stacks.fuse = fuse

    def run_pass(self, *, is_preparing: bool) -> PreparedSwap | None:
        parameters = list(self.net.parameters())
        middle = len(parameters) // 2
        torch.ops.aten._foreach_abs.default(parameters[:middle])  # reads them in one operation
        prepared = self.weights.prepare(self.composition()) if is_preparing else None
        torch.ops.aten._foreach_abs.default(parameters[middle:])
        if self.chance.random() < 0.7:
            self.checker.wait_for(self.checker.main)
        return prepared


def races(monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Any], None]) -> Iterator[str]:
    for seed in range(HISTORIES):
        checker = RaceChecker()
        monkeypatch.setattr(torch.cuda, "stream", checker.on)
        monkeypatch.setattr(torch.cuda, "current_stream", checker.current_stream)
        History(seed, checker, break_it).play()
        yield from checker.races


def test_nothing_races(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(races(monkeypatch, lambda streams: None)) == []


@pytest.mark.parametrize(
    ("stream", "missing"),
    [(stream, missing) for stream in ("side", "copies") for missing in ("record_read_done", "wait_stream")]
    + [("copies", "wait_for")],
)
def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch, stream: str, missing: str) -> None:
    """The checker's own control."""
    assert next(races(monkeypatch, lambda streams: setattr(streams[stream], missing, lambda *given: None)), None)


class Products(RaceChecker):
    """Notes at each product how many pieces of adapters the stream that computes it has waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[int] = []

    def _ran(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        if name in ("mm", "bmm"):
            self.waited.append(self.side.clock.get("copies", 0))
        super()._ran(name, read, written)


def test_products_begin_before_the_last_piece_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Products()
    monkeypatch.setattr(torch.cuda, "stream", checker.on)
    monkeypatch.setattr(torch.cuda, "current_stream", checker.current_stream)
    history = History(0, checker, lambda streams: None)
    wide = max(adapters(), key=lambda one: len(stack_layers(one.components).stacks))
    with torch.no_grad(), checker:
        history.weights.apply([(wide, 1.0), (adapters()[0], 1.0)])
    pieces = checker.copies.clock["copies"]
    assert checker.waited == sorted(checker.waited)
    assert checker.waited[0] == 1 < checker.waited[-1] <= pieces
    assert checker.side.clock["copies"] == pieces
    assert checker.races == []
