"""The branch of the error tree for adapters that exist but cannot be applied."""

from __future__ import annotations

from serve_app.errors import LoraplexError


class RefusedAdapter(LoraplexError):
    """The adapter exists but cannot be applied; `reason` says why."""

    adapter: str
    reason: str
    status = 422
    code = "refused_adapter"
    template = "adapter {adapter} is refused: {reason}"


class UnsafeFile(RefusedAdapter):
    """Anything but safetensors: pickled weights can run code."""

    code = "unsafe_file"


class MalformedFile(RefusedAdapter):
    """Truncated, lying or unreadable."""

    code = "malformed_file"


class AmbiguousFile(RefusedAdapter):
    """Several files could be meant; the reason lists them."""

    code = "ambiguous_file"


class NotAnAdapter(RefusedAdapter):
    """A repository or file without adapter weights."""

    code = "not_an_adapter"


class BaseNotServed(RefusedAdapter):
    """An adapter for a base that is not configured, or whose base cannot be told."""

    code = "base_not_served"


class NoLayerMatches(RefusedAdapter):
    """No layer of the file exists in the base."""

    code = "no_layer_matches"


class ShapeMismatch(RefusedAdapter):
    """A layer exists in the base with other widths."""

    code = "shape_mismatch"


class NonFinite(RefusedAdapter):
    """NaN or infinite values."""

    code = "non_finite"


class RankTooHigh(RefusedAdapter):
    """A rank over the base's limit."""

    code = "rank_too_high"


class UnsupportedMethod(RefusedAdapter):
    """A way of adapting that is not served."""

    code = "unsupported_method"


class AdmissionTimedOut(RefusedAdapter):
    """Checking the file took longer than allowed."""

    code = "admission_timed_out"


class Quarantined(RefusedAdapter):
    """Its images failed on the device again and again; it is tried again later."""

    retry_after_s: int = 60
    code = "quarantined"
    retry_after = True
    template = "adapter {adapter} is refused for now: {reason}; it may be tried again in {retry_after_s} s"
