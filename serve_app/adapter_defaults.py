"""The settings that an adapter recommends, for requests that set none. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class AdapterDefaults:
    """Values for requests with an adapter that set none themselves; None where the adapter sets none.

    The trigger words are for people: they are shown, and no prompt is changed. `timesteps` and `sigmas` stand for the
    number of steps.
    """

    scale: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    scheduler_options: tuple[tuple[str, bool | float | str], ...] = ()
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    negative_prompt: str | None = None
    trigger_words: str | None = None

    def over(self, others: AdapterDefaults) -> AdapterDefaults:
        """Return these, and of `others` what these leave open: no options of another scheduler, no steps twice."""
        kept = others
        if self.scheduler is not None:
            kept = replace(kept, scheduler_options=())
        if self.sampling_steps is not None:
            kept = replace(kept, steps=None, sigmas=None, timesteps=None)
        own = {name: value for name in self.__slots__ if (value := getattr(self, name)) not in (None, ())}
        return replace(kept, **own)

    @property
    def sampling_steps(self) -> object:
        """The field that sets the number of steps, or None."""
        return next((one for one in (self.steps, self.sigmas, self.timesteps) if one is not None), None)


NO_DEFAULTS = AdapterDefaults()
