"""The bars for a GPU: one for each promise, and where its figure comes from.

The bars of `make gpu`. Those of time and rate hold on a GPU alone; a CPU's run shows that the kit works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure of a part, and what it must be at most, at least or exactly."""

    part: str
    figure: str
    comparison: Literal["at most", "at least", "is"]
    limit: float
    needs_gpu: bool = True

    def holds(self, value: float) -> bool:
        """Whether a figure meets the bar."""
        if self.comparison == "at most":
            return value <= self.limit
        return value >= self.limit if self.comparison == "at least" else value == self.limit


def _swap_bars(model: str, swap_ms: float) -> tuple[Bar, ...]:
    part = f"swap {model}"
    return (
        Bar(part, "fused weights with other bits than diffusers'", "is", 0, needs_gpu=False),
        Bar(part, "base restored", "is", 1, needs_gpu=False),
        Bar(part, "swap from host memory, ms", "at most", swap_ms),
        Bar(part, "a swap's calls alone, ms", "at most", 5),
        Bar(part, "prepared swap on the critical path, ms", "at most", 2),
        Bar(part, "diffusers' four calls over a swap", "at least", 50),
        Bar(part, "stream with prepared changes, of one without", "at least", 0.97),
    )


BARS = (
    Bar("tests", "exit status", "is", 0, needs_gpu=False),
    *_swap_bars("sd15", 5),
    *_swap_bars("sdxl", 15),
    *_swap_bars("flux", 60),
    Bar("start", "load and touch over reading the file", "at most", 1.3),
    Bar("admission", "a new file ready in host memory, ms", "at most", 300),
    Bar("pipeline", "most waits of the host in a step", "at most", 0),
)
