"""The error tree: every error that a caller can get, with its HTTP status and a stable code.

Messages are one sentence for the caller: they name the thing, the limit and what to do, and never a path, a host or
a token. Errors travel between processes, so each rebuilds itself from its fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, dataclass_transform

from serve_app.redaction import redact_secrets


def _rebuild(cls: type[LoraplexError], fields: dict[str, Any]) -> LoraplexError:
    error = cls.__new__(cls)
    error.__dict__.update(fields)
    return error


@dataclass_transform(eq_default=False)
@dataclass(eq=False)
class LoraplexError(Exception):
    """The root: `status` is the HTTP status, `code` the stable name, `str(error)` the message for the caller."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    template: ClassVar[str] = "something went wrong"
    retry_after: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Make every class of the tree a dataclass of its fields."""
        dataclass(eq=False)(cls)

    def __str__(self) -> str:
        """Return the message for the caller."""
        return redact_secrets(self.template.format(**self.__dict__))

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from fields, so that keyword construction survives pickling."""
        return _rebuild, (type(self), dict(self.__dict__))


def strip_traceback(error: LoraplexError) -> LoraplexError:
    """Return an error without its traceback and causes, whose frames would keep objects alive."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


class BadRequest(LoraplexError):
    """The request is invalid."""

    status = 400
    code = "bad_request"


class MalformedRequest(BadRequest):
    """The body or a header cannot be read."""

    reason: str
    code = "malformed_request"
    template = "{reason}"


class UnknownParameter(BadRequest):
    """A parameter that does not exist; `hint` names the nearest that does."""

    name: str
    hint: str
    code = "unknown_parameter"
    template = "unknown parameter '{name}'{hint}"


class OutOfBounds(BadRequest):
    """A value outside the limits of the base."""

    name: str
    value: object
    limit: str
    code = "out_of_bounds"
    template = "'{name}' is {value}, but must be {limit}"


class UnknownScheduler(BadRequest):
    """A noise scheduler that the base does not offer."""

    name: str
    base: str
    choices: str
    code = "unknown_scheduler"
    template = "scheduler '{name}' is not offered by {base}; choose one of: {choices}"


class PipelineRefused(BadRequest):
    """The base's own pipeline refuses the request with the sentence `reason`; a check before the device is missing."""

    base: str
    reason: str
    code = "pipeline_refused"
    template = "{base} cannot draw this request: {reason}"


class BaseMismatch(BadRequest):
    """An adapter made for another base than the request names."""

    adapter: str
    adapter_base: str
    base: str
    code = "base_mismatch"
    template = (
        "adapter {adapter} was made for {adapter_base}, but the request names {base}; "
        "name {adapter_base}, or name no base"
    )


class Unauthorized(LoraplexError):
    """No valid key."""

    reason: str
    status = 401
    code = "unauthorised"
    template = "{reason}"


class AccessDenied(LoraplexError):
    """A gated or private repository that cannot be read."""

    model: str
    whose: str = "the service's Hub token"
    status = 403
    code = "access_denied"
    template = "access to {model} is restricted; {whose} must be granted access to it"


class StoreAccessDenied(AccessDenied):
    """An object of a configured store that the service's credentials do not open; no token of a caller would."""

    whose: str = "the service's credentials for its object store"
    code = "store_access_denied"


class AdminRequired(LoraplexError):
    """A valid key that may not do what admins may."""

    key: str
    status = 403
    code = "admin_required"
    template = "the key '{key}' may not change the registry or read the usage of all keys; use an admin key"


class ModelNotFound(LoraplexError):
    """Neither a served base nor an adapter that was found; `detail` says where it was searched for."""

    model: str
    detail: str = "it is neither a served base nor an adapter on the configured sources"
    status = 404
    code = "model_not_found"
    template = "model {model} was not found: {detail}"


class BaseRemoved(ModelNotFound):
    """A base that was served and is no longer listed; `served` are those that are."""

    served: str = "none"
    code = "base_removed"
    template = "base {model} is not served any more; served are {served}"


class NoPicture(LoraplexError):
    """An adapter of which no picture can be shown."""

    adapter: str
    reason: str = "none comes with it, and none was drawn yet"
    status = 404
    code = "no_picture"
    template = "adapter {adapter} has no picture: {reason}"


class NotAcceptable(LoraplexError):
    """No image format of the Accept header can be served."""

    accept: str
    choices: str
    status = 406
    code = "not_acceptable"
    template = "none of '{accept}' can be served; the formats are {choices}"


class BodyTimeout(LoraplexError):
    """The caller took too long to send the head or the body."""

    limit_s: float
    status = 408
    code = "body_timeout"
    template = "the request did not arrive within {limit_s:g} s; send it faster, or a smaller one"


class NameTaken(LoraplexError):
    """A name that is already in use."""

    name: str
    reason: str
    status = 409
    code = "name_taken"
    template = "the name '{name}' is taken: {reason}; choose another, or remove that first"


class TooLarge(LoraplexError):
    """A body or an image over its limit."""

    what: str
    limit: str
    status = 413
    code = "too_large"
    template = "{what} is too large; the limit is {limit}"


class HeadersTooLarge(LoraplexError):
    """Headers and URL over their common limit."""

    size_bytes: int
    limit_bytes: int
    status = 431
    code = "headers_too_large"
    template = "the headers and the address take {size_bytes} bytes; at most {limit_bytes} are read"


class QueueFull(LoraplexError):
    """The base has as many requests as it accepts."""

    base: str
    limit: int
    retry_after_s: int = 1
    status = 429
    code = "queue_full"
    retry_after = True
    template = "{base} already has {limit} requests waiting; try again in {retry_after_s} s"


class Overloaded(LoraplexError):
    """More requests arrive than the ingress can handle."""

    retry_after_s: int = 1
    status = 429
    code = "overloaded"
    retry_after = True
    template = "more is asked of the service than it can do; try again in {retry_after_s} s"


class KeyLimitReached(LoraplexError):
    """An API key over its limit."""

    key: str
    limit: str
    retry_after_s: int = 1
    status = 429
    code = "key_limit_reached"
    retry_after = True
    template = "the key '{key}' is limited to {limit}; try again in {retry_after_s} s"


class UnknownIdLimitReached(LoraplexError):
    """A caller that asks for one unknown id after the other."""

    limit: int
    retry_after_s: int = 1
    status = 429
    code = "unknown_id_limit_reached"
    retry_after = True
    template = (
        "too many ids that are not known here were asked for; at most {limit} a minute are looked up for a key or an "
        "address; try again in {retry_after_s} s, or name a known one"
    )


class InternalError(LoraplexError):
    """A fault of the service; the log has the details under the request id."""

    request_id: str
    status = 500
    code = "internal"
    template = "the service failed on this request; its id is {request_id}"


class Unavailable(LoraplexError):
    """A temporary failure; a later retry may succeed."""

    status = 503
    code = "unavailable"
    retry_after = True


class NotReady(Unavailable):
    """The base has no running replica yet; `what` it does instead."""

    base: str
    retry_after_s: int = 5
    what: str = "is starting"
    code = "not_ready"
    template = "{base} {what}; try again in {retry_after_s} s"


class BaseUnusable(Unavailable):
    """The base cannot be loaded as it is configured; raised when a replica starts."""

    base: str
    reason: str
    code = "base_unusable"
    retry_after = False
    template = "{base} cannot be served: {reason}"


class HubUnavailable(Unavailable):
    """The Hub did not answer in time, or answered with an error."""

    model: str
    reason: str
    retry_after_s: int = 10
    code = "hub_unavailable"
    template = "{model} could not be fetched: {reason}; try again in {retry_after_s} s"


class StoreUnavailable(HubUnavailable):
    """A configured object store did not answer in time, or answered with an error."""

    code = "store_unavailable"


class HostMemoryFull(Unavailable):
    """The adapters of other requests filled the host memory of a replica for longer than a request waits."""

    retry_after_s: int = 10
    code = "host_memory_full"
    template = (
        "the adapters of other requests fill the host memory of the replica (replica.host_cache); "
        "try again in {retry_after_s} s"
    )


class DiskFull(Unavailable):
    """The disk of a replica's node has no space for an adapter, even after evicting cached files."""

    model: str
    retry_after_s: int = 30
    code = "disk_full"
    template = (
        "{model} could not be prepared: the disk of the node that serves it is full and must be given room; "
        "try again in {retry_after_s} s"
    )


class OutOfMemory(Unavailable):
    """The device has too little memory for a request, even alone; `advice` says what would need less."""

    base: str
    what: str
    advice: str
    retry_after_s: int = 10
    code = "out_of_memory"
    template = "{base} has no memory left for {what}; {advice}, or try again in {retry_after_s} s"


class ReplicaLost(Unavailable):
    """The replica that had the request died, and so did those tried after it; `reason` is only for metrics."""

    base: str
    attempts: int
    retry_after_s: int = 2
    reason: str = "closing"
    code = "replica_lost"
    template = "{base} lost this request's replica ({attempts} attempts); try again in {retry_after_s} s"


class IngressLost(Unavailable):
    """The ingress replica that had the request died, and so did those tried after it."""

    attempts: int
    retry_after_s: int = 2
    code = "ingress_lost"
    template = "the request was lost on its way to a replica ({attempts} attempts); try again in {retry_after_s} s"


class DeadlineExceeded(LoraplexError):
    """The request's deadline has passed."""

    limit_s: float
    status = 504
    code = "deadline_exceeded"
    template = "the request took longer than {limit_s:g} s and was stopped"


class DeadlineOutOfReach(DeadlineExceeded):
    """The deadline cannot be met with the requests that wait before it; the request was not started."""

    code = "deadline_out_of_reach"
    template = "the request cannot be done within {limit_s:g} s with what waits before it; ask again later"
