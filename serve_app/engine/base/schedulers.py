"""The noise schedulers that one base offers.

Owns which of the listed schedulers fit the base, and gives every call a scheduler of its own. Must not know requests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import diffusers
import numpy
import torch

from serve_app.config import BaseModelConfig
from serve_app.engine.base.noise import send_noise_without_waiting
from serve_app.engine.base.timesteps import read_timesteps_on_host
from serve_app.errors import BaseUnusable, MalformedRequest, OutOfBounds, UnknownScheduler
from serve_app.families.family import Family
from serve_app.families.schedulers import SCHEDULERS, PredictionKind, SchedulerChoice, kind_of, listed_name, with_shift

_TRIED_STEPS = range(1, 11)
_USUAL_STEPS = (12, 30)
_MAX_TRIED = 256
_SHIFTED_BY_SIZE = {"mu": 1.0}
_LARGEST_NOISE = 10.0  # in standard deviations
_NO_LEVELS: Mapping[str, Any] = {}
_FAILURES = (AttributeError, ImportError, ValueError, TypeError, RuntimeError)
SchedulerOptions = tuple[tuple[str, Any], ...]


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
    """The schedulers of one base, by name.

    The templates are never stepped: every call gets a copy, so that nothing of one request (steps, history, the
    choice itself) reaches the next. A copy costs 0.1 ms; making a template costs ten times that, and for some classes
    a loop over all training steps. So those that are not configured are made, and tried, when first asked for.
    """

    def __init__(self, config: BaseModelConfig, own: Any, family: Family) -> None:
        """Try the default and the names that the configuration lists itself, with the configuration of `own`.

        `own` is the scheduler that the base came with. Names of the default list that do not fit are left out.

        Raises:
            BaseUnusable: `config.scheduler`, a name that the configuration itself lists, or its options cannot serve
            this base.
        """
        self._base_id = config.id
        self._family = family
        self._kind: PredictionKind = kind_of(type(own).__name__, own.config)
        self._own_name = type(own).__name__
        self._own = _rebuilt(own, config)
        self._default = self._listed(config.scheduler or self._own_name)
        listed = tuple(map(self._listed, config.schedulers or ()))
        self._known = frozenset((self._own_name, self._default, *(listed or SCHEDULERS[self._kind])))
        self._tried: dict[tuple[str, SchedulerOptions], _Offer | _Unfit] = {}
        self._is_finite_once = lru_cache(_MAX_TRIED)(self._is_finite)
        for name in sorted({self._default, *listed}):
            tried = self._try(name)
            if isinstance(tried, _Unfit):
                raise BaseUnusable(config.id, f"scheduler '{name}' {tried.reason}")

    def supported_names(self) -> tuple[str, ...]:
        """Build every scheduler that is on the list; return the names of those that this base can use, sorted."""
        return tuple(name for name in sorted(self._known) if isinstance(self._try(name), _Offer))

    def check(
        self,
        name: str | None,
        steps: int,
        options: SchedulerOptions = (),
        levels: Mapping[str, Any] = _NO_LEVELS,
        *,
        redraws: bool = False,
    ) -> None:
        """Refuse what this base cannot run; None means its default.

        `redraws` says that the image begins as a noisy picture, `levels` are the "sigmas" or "timesteps" that the
        caller chooses, if any. They are tried on one pixel.

        Raises:
            UnknownScheduler: says which schedulers it does offer.
            MalformedRequest: the scheduler has no such option, or takes no steps of the caller's, or not these.
            OutOfBounds: the scheduler cannot run that few steps, or makes no finite image with exactly so many.
        """
        name = self._listed(name or self._default)
        tried = self._try(name) if name in self._known else None
        if not isinstance(tried, _Offer):
            raise UnknownScheduler(name, self._base_id, ", ".join(self.supported_names()))
        if redraws and not self._can_redraw(tried.template):
            raise MalformedRequest(f"scheduler '{name}' cannot begin with a picture; {self._own_name} can")
        for level in sorted(set(levels) - _step_parameters(tried.template)):
            raise MalformedRequest(f"scheduler '{name}' takes no '{level}' of the caller's")
        for option, _ in options:
            if not set(with_shift({option: 1.0})) & _config_names(tried.template):
                raise MalformedRequest(f"scheduler '{name}' has no option '{option}'")
        if options and isinstance(changed := self._try(name, options), _Unfit):
            raise MalformedRequest(f"scheduler '{name}' {changed.reason} and these options")
        if steps < tried.min_steps:
            raise OutOfBounds("num_inference_steps", steps, f"at least {tried.min_steps} with {name}")
        if levels and not _runs_with(self.fresh(name, options), levels):
            raise MalformedRequest(f"scheduler '{name}' cannot run with these '{min(levels)}'")
        if not levels and not self._is_finite_once(name, steps, options):
            where = f"{name} stays finite on {self._base_id}"
            raise OutOfBounds("num_inference_steps", steps, f"another number, with which {where}")

    def _is_finite(self, name: str, steps: int, options: SchedulerOptions) -> bool:
        """Say whether rounding leaves a scheduler's arithmetic finite: ancestral ones fail at some numbers of steps."""
        try:
            return _stays_finite(self.fresh(name, options), steps)
        except (*_FAILURES, IndexError, AssertionError):
            return True  # its pipeline sets its steps in another way

    def _can_redraw(self, template: Any) -> bool:
        """Say whether a scheduler can add noise to a picture as the pipelines of its kind ask for it."""
        return self._kind != "flow" or hasattr(template, "scale_noise")

    def fresh(self, name: str | None, options: SchedulerOptions = ()) -> Any:
        """Return an unused scheduler of a name that `check` passes."""
        tried = self._try(self._listed(name or self._default), options)
        assert isinstance(tried, _Offer)
        send_noise_without_waiting(tried.template)
        scheduler = copy.deepcopy(tried.template)
        read_timesteps_on_host(scheduler)
        return scheduler

    def _listed(self, name: str) -> str:
        return name if name == self._own_name else listed_name(name, self._kind)

    def _try(self, name: str, options: SchedulerOptions = ()) -> _Offer | _Unfit:
        """Return what came of trying a name; two threads may try one at a time, with the same outcome."""
        tried = self._tried.get((name, options))
        if tried is None:
            tried = self._offer(name, dict(options))
            if not options or len(self._tried) < _MAX_TRIED:  # callers may think of any number of options
                self._tried[name, options] = tried
        return tried

    def _offer(self, name: str, options: Mapping[str, Any]) -> _Offer | _Unfit:
        """Make a scheduler from the configuration of the base's own, and find out how few steps it can run."""
        if name == self._own_name and not options:
            return _Offer(self._own, _fewest_steps(self._own) or 1)
        own = SchedulerChoice(name, name) if name == self._own_name else None
        choice = own or SCHEDULERS[self._kind].get(name)
        if choice is None:
            is_other = isinstance(getattr(diffusers, name, None), type)
            what = (
                f"does not fit this base, whose own is {self._own_name}"
                if is_other
                else "is not a scheduler of diffusers"
            )
            return _Unfit(what)
        return self._made(getattr(diffusers, choice.class_name), {**choice.options, **with_shift(options)})

    def _made(self, scheduler_class: Any, options: Mapping[str, Any]) -> _Offer | _Unfit:
        config = {**self._own.config, **_shift_of(self._own), **options}
        try:
            template = _template(scheduler_class, config)
        except (ImportError, ValueError, TypeError, RuntimeError) as error:
            return _Unfit(f"cannot be made from this base's configuration ({type(error).__name__})")
        is_unfit = type(template).__name__ in self._family.unfit_schedulers
        if is_unfit or not set(self._family.sends_levels) <= _step_parameters(template):
            return _Unfit("cannot take the noise levels that this base's pipeline sets")
        if self._family.only_redraws and not self._can_redraw(template):
            return _Unfit("cannot begin with a picture, as all that this base draws does")
        if self._kind == "noise" and not _runs_through(template):
            return _Unfit("cannot run with the noise levels of this base's training")
        fewest = _fewest_steps(template)
        return _Offer(template, fewest) if fewest else _Unfit("cannot run with this base's configuration")


def _rebuilt(own: Any, config: BaseModelConfig) -> Any:
    """Return the base's own scheduler with the options of the configuration, itself where there are none.

    Raises:
        BaseUnusable: it has no such option, or not with such a value.
    """
    unknown = set(config.scheduler_options) - _config_names(own)
    if unknown:
        raise BaseUnusable(config.id, f"{type(own).__name__} has no option '{min(unknown)}'")
    if not config.scheduler_options:
        return own
    try:
        return type(own).from_config({**own.config, **with_shift(config.scheduler_options)})
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise BaseUnusable(config.id, f"its scheduler cannot be made with scheduler_options: {error}") from error


def _template(scheduler_class: Any, config: Mapping[str, Any]) -> Any:
    """Make a scheduler; one whose class sets all steps of the training at once, in half a second, sets but a few.

    Every call sets its own steps, which replaces them.
    """

    class Brief(scheduler_class):
        def set_timesteps(self, num_inference_steps: int, *more: Any) -> None:
            super().set_timesteps(min(num_inference_steps, _USUAL_STEPS[0]), *more)

    Brief.__name__ = scheduler_class.__name__  # which diffusers looks at, and keeps
    template = Brief.from_config(config)
    template.__class__ = scheduler_class
    return template


def _shift_of(own: Any) -> dict[str, Any]:
    """Return the shift of a flow by the name that schedulers of diffusion have for it."""
    shift = own.config.get("shift")
    return {} if shift is None else {"flow_shift": shift}


def _config_names(scheduler: Any) -> frozenset[str]:
    return frozenset(signature(type(scheduler).__init__).parameters)


def _step_parameters(scheduler: Any) -> frozenset[str]:
    return frozenset(signature(type(scheduler).set_timesteps).parameters)


def _runs_through(template: Any) -> bool:
    """Step through usual numbers of steps.

    Sigmas that fall on one timestep lead some classes past their end, sigmas as large as a training to pure noise has
    leave others without finite numbers.
    """
    for steps in _USUAL_STEPS:
        try:
            if not _stays_finite(copy.deepcopy(template), steps):
                return False
        except (IndexError, AssertionError):
            return False
        except _FAILURES:
            continue
    return True


def _stays_finite(scheduler: Any, steps: int) -> bool:
    """Say whether an unused scheduler ends in finite numbers; raises what its class does where it cannot run."""
    with numpy.errstate(all="ignore"):
        end = _stepped(scheduler, torch.zeros_like, num_inference_steps=steps, **_shifted_by_size(scheduler))
    return bool(torch.isfinite(end).all())


def _runs_with(scheduler: Any, levels: Mapping[str, Any]) -> bool:
    """Say whether an unused scheduler comes to an end with the steps of a caller."""
    try:
        with numpy.errstate(divide="raise", over="raise", invalid="raise"):
            end = _stepped(scheduler, _as_it_is, **levels, **_shifted_by_size(scheduler))
    except (*_FAILURES, IndexError, AssertionError, FloatingPointError):
        return False
    return len(scheduler.timesteps) > 0 and bool(torch.isfinite(end).all())


def _stepped(scheduler: Any, denoise: Callable[[torch.Tensor], torch.Tensor], **steps: Any) -> torch.Tensor:
    """Return what a scheduler makes of one pixel with what a denoiser returns for what it reads."""
    scheduler.set_timesteps(**steps)
    sample = torch.full((1, 4, 1, 1), _LARGEST_NOISE) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(denoise(scaled), timestep, sample, return_dict=False)[0]
    return sample


def _as_it_is(sample: torch.Tensor) -> torch.Tensor:
    return sample


def _shifted_by_size(scheduler: Any) -> Mapping[str, float]:
    return _SHIFTED_BY_SIZE if scheduler.config.get("use_dynamic_shifting") else {}


def _fewest_steps(template: Any) -> int | None:
    """Return the fewest steps that `template` accepts: multistep methods may need a run-up."""
    for steps in _TRIED_STEPS:
        try:
            tried = copy.deepcopy(template)
            with numpy.errstate(all="ignore"):  # one step alone may be stretched to an end that it has not
                tried.set_timesteps(steps, **_shifted_by_size(template))
        except (ImportError, ValueError, TypeError, RuntimeError, IndexError, AssertionError):
            continue
        if torch.isfinite(torch.as_tensor(tried.timesteps)).all():
            return steps
    return None
