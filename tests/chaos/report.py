"""What the chaos run came to: counts and times, as text and as JSON, and whether the promise was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tests.chaos.blows import Blow

ANSWERED, RETRYABLE, FAILED, HUNG, WRONG = "answered", "retryable", "failed", "hung", "wrong"
MAX_RETRYABLE = 0.005
# A short run has too few requests for a share: one node's loss may be half of a percent of them. It counts what is not
# promised to be lost alone: a stream that had shown a preview ends in one of these, and is to be asked for again.
FEW = 4
PROMISED = frozenset(("event ingress_lost", "event replica_lost"))


@dataclass(frozen=True, slots=True)
class Told:
    """What became of one request: `what` where it was not answered, `began_s` and `ended_s` on the run's clock."""

    outcome: str
    shape: str
    what: str
    began_s: float
    ended_s: float
    images: int
    is_exact: bool
    asked_again: int = 0

    @property
    def took_s(self) -> float:
        """Seconds until the answer."""
        return self.ended_s - self.began_s


@dataclass(frozen=True, slots=True)
class Report:
    """One run."""

    seconds: float
    seed: int
    told: tuple[Told, ...]
    blows: tuple[Blow, ...]
    is_whole: bool
    turned_away: int
    sent_again: int
    hub: dict[str, int]
    hub_requests: int
    new_adapters: int
    machine: str

    def of(self, outcome: str) -> list[Told]:
        """Return the requests with an outcome."""
        return [told for told in self.told if told.outcome == outcome]

    @property
    def retryable_share(self) -> float:
        """The part of all requests that ended in an error that may be retried."""
        return len(self.of(RETRYABLE)) / max(1, len(self.told))

    @property
    def broken_promises(self) -> list[str]:
        """What did not hold, in words; nothing where all did."""
        lost = self.of(RETRYABLE)
        may_be_lost = MAX_RETRYABLE * len(self.told)
        counted = lost if may_be_lost > FEW else [told for told in lost if told.what not in PROMISED]
        never = [told for told in lost if told.asked_again < 0]
        found = [f"{len(self.of(outcome))} requests {outcome}" for outcome in (FAILED, HUNG, WRONG) if self.of(outcome)]
        if len(counted) > max(FEW, may_be_lost):
            found.append(f"{len(counted)} of {len(self.told)} requests lost, over {max(FEW, may_be_lost):.0f}")
        if never:
            found.append(f"{len(never)} requests were not answered when asked again either")
        if not self.is_whole:
            found.append("the service did not become whole again")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all of it, requests that were answered in sum only."""
        return {
            **{
                name: getattr(self, name) for name in ("seconds", "seed", "turned_away", "sent_again", "hub", "machine")
            },
            "hub_requests": self.hub_requests,
            "new_adapters": self.new_adapters,
            "requests": len(self.told),
            "outcomes": Counter(told.outcome for told in self.told),
            "blows": [asdict(blow) for blow in self.blows],
            "not_answered": [asdict(told) for told in self.told if told.outcome != ANSWERED],
            "broken_promises": self.broken_promises,
        }

    def lines(self) -> Iterable[str]:
        """Yield the report as text."""
        answered = self.of(ANSWERED)
        times = sorted(told.took_s for told in answered) or [0.0]
        yield f"{self.seconds:.0f} s, seed {self.seed}, {self.machine}"
        yield f"requests {len(self.told)}, answered {len(answered)}, " + ", ".join(
            f"{outcome} {len(self.of(outcome))}" for outcome in (RETRYABLE, FAILED, HUNG, WRONG)
        )
        yield (
            f"lost with a retryable error {self.retryable_share:.2%} (at most {MAX_RETRYABLE:.1%}), all "
            f"answered when asked again but {sum(told.asked_again < 0 for told in self.of(RETRYABLE))}"
        )
        exact = sum(told.images for told in answered if told.is_exact)
        yield f"images compared {sum(told.images for told in answered)}, bit for bit {exact}, the rest within one level"
        yield (
            f"seconds to an answer: median {median(times):.2f}, "
            f"p99 {times[int(0.99 * (len(times) - 1))]:.2f}, slowest {times[-1]:.2f}"
        )
        yield f"connections refused and made elsewhere {self.turned_away}"
        yield f"connections lost before an answer began, and sent again {self.sent_again}"
        yield f"Hub: {self.hub_requests} requests, {self.new_adapters} adapters new to it, troubles {_listed(self.hub)}"
        yield ""
        yield from self._blow_lines()
        for what, count in Counter((told.shape, told.what) for told in self.told if told.what).most_common():
            yield f"  {count} x {' '.join(what)}"
        yield "kept" if not self.broken_promises else "BROKEN: " + "; ".join(self.broken_promises)

    def _blow_lines(self) -> Iterable[str]:
        late = [blow.waited_s for blow in self.blows if blow.waited_s > 1]
        yield (
            f"blows {len(self.blows)}; {len(late)} of them waited over a second because what was left "
            f"could not be spared, {sum(late):.0f} s in all"
        )
        yield f"{'killed':16} {'times':>5} {'in flight':>9} {'answered':>8} {'lost':>5}  replaced (s): median, most"
        for kind in dict.fromkeys(blow.kind for blow in self.blows):
            of_kind = [blow for blow in self.blows if blow.kind == kind]
            struck = [told for told in self.told if self._last_blow(told) in of_kind]
            replaced_s = sorted(blow.made_good_s for blow in of_kind if blow.made_good_s is not None) or [0.0]
            well = sum(told.outcome == ANSWERED for told in struck)
            yield (
                f"{kind:16} {len(of_kind):5} {len(struck):9} {well:8} {len(struck) - well:5}"
                f"  {median(replaced_s):.1f}, {replaced_s[-1]:.1f}"
            )
        calm = [told for told in self.told if told.outcome != ANSWERED and self._last_blow(told) is None]
        yield f"not answered and in flight at no blow: {len(calm)}"

    def _last_blow(self, told: Told) -> Blow | None:
        """Return the last blow that fell while a request was under way."""
        during = [blow for blow in self.blows if told.began_s <= blow.at <= told.ended_s]
        return during[-1] if during else None


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
