"""The noise schedulers that one base offers.

Owns which scheduler classes fit the base, and gives every call a scheduler of its own. Must not know
requests.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import diffusers

from serve_app.config import BaseModelConfig
from serve_app.errors import BaseUnusable, OutOfBounds, UnknownScheduler

_TRIED_STEPS = range(1, 11)


@dataclass(frozen=True, slots=True)
class _Offer:
    """A scheduler that was never stepped, and the fewest steps it can run."""

    template: Any
    min_steps: int


@dataclass(frozen=True, slots=True)
class _Unfit:
    """Why a scheduler cannot serve the base."""

    reason: str


class NoiseSchedulers:
    """The schedulers of one base, by class name.

    The templates are never stepped: every call gets a copy, so that nothing of one request (steps, history, the
    choice itself) reaches the next. A copy costs 0.1 ms; making a template costs ten times that, and for some classes
    a loop over all training steps. So those that nobody configured are made, and tried, when first asked for.
    """

    def __init__(self, config: BaseModelConfig, own: Any) -> None:
        """Try the default and the names that the configuration lists itself, with the configuration of `own`.

        `own` is the scheduler that the base came with. Names of the default list that do not fit are left out.

        Raises:
            BaseUnusable: `config.scheduler`, or a name that the configuration itself lists, cannot serve this
            base.
        """
        self._base_id = config.id
        self._own = own
        self._default = config.scheduler or type(own).__name__
        wanted = {self._default, *(config.schedulers if "schedulers" in config.model_fields_set else ())}
        self._known = frozenset((type(own).__name__, *wanted, *config.schedulers))
        self._tried: dict[str, _Offer | _Unfit] = {}
        for name in sorted(wanted):
            tried = self._try(name)
            if isinstance(tried, _Unfit):
                raise BaseUnusable(config.id, f"scheduler '{name}' {tried.reason}")

    def supported_names(self) -> tuple[str, ...]:
        """Build every scheduler that is on the list; return the names of those that this base can use, sorted."""
        return tuple(name for name in sorted(self._known) if isinstance(self._try(name), _Offer))

    def check(self, name: str | None, steps: int) -> None:
        """Refuse what this base cannot run; None means its default.

        Raises:
            UnknownScheduler: says which schedulers it does offer.
            OutOfBounds: the scheduler cannot run that few steps.
        """
        name = name or self._default
        tried = self._try(name) if name in self._known else None
        if not isinstance(tried, _Offer):
            raise UnknownScheduler(name, self._base_id, ", ".join(self.supported_names()))
        if steps < tried.min_steps:
            raise OutOfBounds("num_inference_steps", steps, f"at least {tried.min_steps} with {name}")

    def fresh(self, name: str | None) -> Any:
        """Return an unused scheduler of a name that `check` passes."""
        tried = self._try(name or self._default)
        assert isinstance(tried, _Offer)
        return copy.deepcopy(tried.template)

    def _try(self, name: str) -> _Offer | _Unfit:
        """Return what came of trying a name; two threads may try one at a time, with the same outcome."""
        if name not in self._tried:
            self._tried[name] = _offer(name, self._own)
        return self._tried[name]


def _offer(name: str, own: Any) -> _Offer | _Unfit:
    """Make a scheduler of class `name` from the configuration of `own`, and find out how few steps it can run."""
    if name == type(own).__name__:
        return _Offer(own, _fewest_steps(own) or 1)  # flow matching needs more than a number of steps
    scheduler_class = getattr(diffusers, name, None)
    if not isinstance(scheduler_class, type):
        return _Unfit("is not a scheduler of diffusers")
    if scheduler_class not in own.compatibles:
        return _Unfit(f"does not fit this base, whose own is {type(own).__name__}")
    try:
        template: Any = scheduler_class.from_config(own.config)  # pyright: ignore[reportAttributeAccessIssue]
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        return _Unfit(f"cannot be made from this base's configuration ({type(error).__name__})")
    fewest = _fewest_steps(template)
    return _Offer(template, fewest) if fewest else _Unfit("cannot run with this base's configuration")


def _fewest_steps(template: Any) -> int | None:
    """Return the fewest steps that `template` accepts: multistep methods may need a run-up."""
    for steps in _TRIED_STEPS:
        try:
            copy.deepcopy(template).set_timesteps(steps)
        except (ImportError, ValueError, TypeError, RuntimeError, IndexError):
            continue
        return steps
    return None
