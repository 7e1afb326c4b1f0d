"""The Hub of the chaos run: it has the embedded adapters under other ids, ever new ones among them, and is never well.

Every fault lasts for a moment and befalls one repository; the service is to bridge it.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.hub_server import CDN, ErrorDetail, HubServer
from tests.service import BASES, EMBEDDED, STYLES

HANG = "hangs"
# Name, what happens, and for how long at most.
TROUBLES: tuple[tuple[str, ErrorDetail | None, float], ...] = (
    ("503", ErrorDetail(status=503), 0.5),
    ("500", ErrorDetail(status=500), 0.5),
    ("429", ErrorDetail(status=429, headers={"retry-after": "1"}), 0.5),
    ("slow answers", ErrorDetail(delay_s=0.5), 3.0),
    ("slow bodies", ErrorDetail(bytes_per_s=200_000), 3.0),
    ("breaks off", ErrorDetail(cut_after_bytes=100_000, kinds=(CDN,)), 1.0),
    ("other bytes", ErrorDetail(alters_bytes=True, kinds=(CDN,)), 0.5),
    (HANG, None, 1.5),
)
# Seconds between one trouble and the next.
PAUSE_S = (0.2, 1.2)


def known_id(adapter: str) -> str:
    """Return the id on the Hub of an embedded adapter that all of the run asks for."""
    return adapter.replace("demo/", "acme/")


@dataclass
class HubTrouble:
    """A Hub in trouble from `run` to the end of it."""

    hub: HubServer
    rng: random.Random
    troubles: Counter[str] = field(default_factory=Counter)
    new: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        for base in BASES:
            for style in STYLES:
                self._push(f"{base}-{style}", known_id(f"{base}-{style}"))

    def new_id(self, adapter: str) -> str:
        """Return the id of an adapter that nobody has asked for."""
        repo_id = adapter.replace("demo/", f"new-{len(self.new)}/")
        self._push(adapter, repo_id)
        self.new.append(repo_id)
        return repo_id

    def run(self) -> None:
        """Trouble one repository after another until it is over."""
        known = [known_id(f"{base}-{style}") for base in BASES for style in STYLES]
        while not self.is_over.wait(self.rng.uniform(*PAUSE_S)):
            name, fault, longest_s = self.rng.choice(TROUBLES)
            # The newest ones are most likely being fetched now.
            repo_id = self.rng.choice(self.new[-3:] or known) if self.rng.random() < 0.5 else self.rng.choice(known)
            begin, end = self._ways(repo_id, fault)
            begin()
            self.troubles[name] += 1
            self.is_over.wait(self.rng.uniform(0.1, longest_s))
            end()

    def _ways(self, repo_id: str, fault: ErrorDetail | None) -> tuple[Callable[[], None], Callable[[], None]]:
        if fault is None:
            return lambda: self.hub.hold(repo_id), lambda: self.hub.release(repo_id)
        return lambda: self.hub.fail(repo_id, fault), lambda: self.hub.fail(repo_id, None)

    def _push(self, adapter: str, repo_id: str) -> None:
        self.hub.push_folder(repo_id, EMBEDDED / adapter)
