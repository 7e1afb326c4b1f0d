"""Which noise schedulers a base may be drawn with: a list for each kind of prediction, and the names people type.

Owns the names, the class and options that each means, and which options a request may set. Whether one really fits a
base is found out by `serve_app.engine.base.schedulers`, which makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PredictionKind = Literal["noise", "flow", "own"]
"""A denoiser's prediction: noise (epsilon, v, the sample), the direction of a flow, or what only one class reads."""


@dataclass(frozen=True, slots=True)
class SchedulerChoice:
    """One name of the list: a class of diffusers, with the options that the name stands for."""

    name: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


_KARRAS = {"use_karras_sigmas": True}
_EXPONENTIAL = {"use_exponential_sigmas": True}
_BETA = {"use_beta_sigmas": True}
_TRAILING = {"timestep_spacing": "trailing"}
_DPM, _EULER, _UNIPC = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_FLOW_EULER = "FlowMatchEulerDiscreteScheduler"

# Classes whose name alone is a choice, and the shorter names that people know them by.
_NOISE_CLASSES: Mapping[str, str] = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "DEISMultistepScheduler": "DEIS",
    _DPM: "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    _EULER: "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "PNDMScheduler": "PLMS",
    "TCDScheduler": "TCD",
    _UNIPC: "UniPC",
}
_NOISE_VARIANTS = (
    SchedulerChoice("DPM++ 2M Karras", _DPM, _KARRAS),
    SchedulerChoice("DPM++ 2M Exponential", _DPM, _EXPONENTIAL),
    SchedulerChoice("DPM++ 2M Beta", _DPM, _BETA),
    SchedulerChoice("DPM++ 2M SDE", _DPM, _SDE),
    SchedulerChoice("DPM++ 2M SDE Karras", _DPM, {**_SDE, **_KARRAS}),
    SchedulerChoice("Euler Karras", _EULER, _KARRAS),
    SchedulerChoice("Euler Exponential", _EULER, _EXPONENTIAL),
    SchedulerChoice("Euler Beta", _EULER, _BETA),
    SchedulerChoice("Euler Trailing", _EULER, _TRAILING),
    SchedulerChoice("DDIM Trailing", "DDIMScheduler", _TRAILING),
    SchedulerChoice("DPM2 Karras", "KDPM2DiscreteScheduler", _KARRAS),
    SchedulerChoice("UniPC Karras", _UNIPC, _KARRAS),
)
_FLOW_CLASSES: Mapping[str, str] = {
    _FLOW_EULER: "Euler",
    "FlowMatchHeunDiscreteScheduler": "Heun",
    "FlowMatchLCMScheduler": "LCM",
    _UNIPC: "UniPC",
    _DPM: "DPM++ 2M",
    "DEISMultistepScheduler": "DEIS",
}
_FLOW_VARIANTS = (
    SchedulerChoice("Euler Karras", _FLOW_EULER, _KARRAS),
    SchedulerChoice("Euler Exponential", _FLOW_EULER, _EXPONENTIAL),
    SchedulerChoice("Euler Beta", _FLOW_EULER, _BETA),
)


def _choices(
    classes: Mapping[str, str], variants: tuple[SchedulerChoice, ...], options: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, SchedulerChoice]:
    by_class = {name: SchedulerChoice(name, name, options.get(name, {})) for name in classes}
    return by_class | {choice.name: choice for choice in variants}


SCHEDULERS: Mapping[PredictionKind, Mapping[str, SchedulerChoice]] = {
    "noise": _choices(_NOISE_CLASSES, _NOISE_VARIANTS, {}),
    "flow": _choices(
        _FLOW_CLASSES,
        _FLOW_VARIANTS,
        dict.fromkeys((_UNIPC, _DPM, "DEISMultistepScheduler"), _FLOW_SIGMAS),
    ),
    "own": {},
}
_TYPED: Mapping[PredictionKind, Mapping[str, str]] = {"noise": _NOISE_CLASSES, "flow": _FLOW_CLASSES, "own": {}}

# Schedulers of distilled bases that no other can stand for.
_ONLY_THEMSELVES = ("SCMScheduler",)

# Options that a request may set: they choose at which noise levels the steps are, and change nothing else.
REQUEST_OPTIONS: Mapping[str, type] = {
    "shift": float,
    "timestep_spacing": str,
    "use_karras_sigmas": bool,
    "use_exponential_sigmas": bool,
    "use_beta_sigmas": bool,
}
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def _key(name: str) -> str:
    """Return what of a typed name counts: neither letter case nor spaces, dashes and underscores."""
    return "".join(letter for letter in name.casefold() if letter not in " -_")


def listed_name(name: str, kind: PredictionKind) -> str:
    """Return the name of the list that a typed one means; a name that the list has not comes back as it is."""
    known = {_key(choice): choice for choice in SCHEDULERS[kind]}
    known |= {_key(short): class_name for class_name, short in _TYPED[kind].items()}
    return known.get(_key(name), name)


def known_names() -> tuple[str, ...]:
    """Return the names of all lists, sorted."""
    return tuple(sorted({name for choices in SCHEDULERS.values() for name in choices}))


def is_known_name(name: str) -> bool:
    """Say whether a name means a scheduler of any kind; which base offers it is for the base to say."""
    return any(listed_name(name, kind) in choices for kind, choices in SCHEDULERS.items())


def kind_of(class_name: str, config: Mapping[str, Any]) -> PredictionKind:
    """Return what the denoiser behind a base's own scheduler predicts."""
    if class_name in _ONLY_THEMSELVES:
        return "own"
    is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return "flow" if is_flow or class_name.startswith("FlowMatch") else "noise"


def with_shift(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as schedulers know them: a fixed shift goes by two names, and replaces one by the size."""
    shift = options.get("shift")
    if shift is None:
        return dict(options)
    return {**options, "flow_shift": shift, "use_dynamic_shifting": False}
