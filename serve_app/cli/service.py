"""The client of a running service, local or remote.

Owns the HTTP side of `loraplex models` and `loraplex generate`: addresses, keys, and every way in which a service can
be away or answer something else.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from serve_app.cli.terminal import CommandFailed
from serve_app.core import AdapterRef, AppliedAdapter, Scale, Scales, UnresolvedRequest

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of the service: a base, or an adapter with its base."""

    id: str
    base_id: str | None


@dataclass(frozen=True, slots=True)
class ServedBase:
    """What a base of the service does; `expected_s` until it can draw, None if unknown, `reason` why it cannot.

    A canary draws the `share` of the requests for the base that it is `canary_of`.
    """

    id: str
    state: str
    expected_s: float | None
    reason: str | None
    canary_of: str | None = None
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """The input files as bytes: an image, and optionally a mask of the part to repaint."""

    image: bytes
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The progress of a request; `queue_position` counts those before it, None before it is queued.

    `is_starting` says that its base has no replica yet; one is expected in `expected_s`, None where that is unknown.
    """

    queue_position: int | None
    step: int
    steps: int
    is_starting: bool = False
    expected_s: float | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """The result of one request: the files' bytes and the service's report, with its timings in `timing_ms`."""

    images: tuple[bytes, ...] = field(repr=False)
    seed: int
    base_id: str
    adapters: tuple[AppliedAdapter, ...]
    timing_ms: dict[str, float]
    warnings: tuple[str, ...]
    wall_ms: float


class ServiceClient:
    """One service at one address; close it, or use it in a `with` statement."""

    def __init__(self, url: str, key: str | None, *, timeout_s: float) -> None:
        import httpx

        self._url = url
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            # A proxy of the environment is for the world outside, never for this machine.
            trust_env=urlsplit(url).hostname not in LOOPBACK,
        )

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *failure: object) -> None:
        self._http.close()

    def models(self) -> tuple[ServedModel, ...]:
        """Return the served bases and the adapters known so far.

        Raises:
            CommandFailed: the service is away, or refuses.
        """
        found: list[ServedModel] = []
        query: dict[str, str] = {}
        while True:
            page = self._ask("GET", "/v1/models", params=query)
            try:
                found += [ServedModel(entry["id"], entry["parent"]) for entry in page["data"]]
                if not page["has_more"]:
                    return tuple(found)
                query = {"after": page["last_id"]}
            except (KeyError, TypeError):
                raise self._stranger() from None

    def bases(self) -> tuple[ServedBase, ...]:
        """Return what each base does.

        Raises:
            CommandFailed: the service is away, or refuses.
        """
        rows = self._ask("GET", "/v1/bases")
        try:
            names = [field.name for field in dataclasses.fields(ServedBase)]
            return tuple(ServedBase(**{name: row[name] for name in names}) for row in rows)
        except (KeyError, TypeError):
            raise self._stranger() from None

    def draw(
        self,
        draft: UnresolvedRequest,
        *,
        form: str,
        pictures: Pictures | None = None,
        on_step: Callable[[Step], object] | None = None,
    ) -> Drawing:
        """Return the images of a draft in the format `form`, from a prompt alone or from `pictures`.

        `on_step` hears how far it is.

        Raises:
            CommandFailed: the service is away, or refuses.
        """
        started = time.perf_counter()
        request = _request(draft, form, pictures, is_stream=on_step is not None)
        path = "/v1/images/generations" if pictures is None else "/v1/images/edits"
        try:
            reply = self._ask("POST", path, **request) if on_step is None else self._follow(path, request, on_step)
            return _drawing(reply, wall_ms=(time.perf_counter() - started) * 1000)
        except (KeyError, TypeError, ValueError):
            raise self._stranger() from None

    def _ask(self, method: str, path: str, **request: Any) -> Any:
        with self._connected():
            reply = self._http.request(method, self._url + path, **request)
        if not reply.is_success:
            raise self._refusal(reply)
        try:
            return reply.json()
        except ValueError:
            raise self._stranger() from None

    def _follow(self, path: str, request: Mapping[str, Any], on_step: Callable[[Step], object]) -> dict[str, Any]:
        """Return the result of a stream of events, in the form of a reply without a stream."""
        images: list[dict[str, Any]] = []
        with self._connected(), self._http.stream("POST", self._url + path, **request) as reply:
            if not reply.is_success:
                reply.read()
                raise self._refusal(reply)
            for line in reply.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if "error" in event:
                    raise CommandFailed(str(event["error"]["message"]), str(event["error"]["code"]))
                if event.get("type", "").endswith(".progress"):
                    on_step(Step(event["queue_position"], event["step"], event["steps"]))
                elif event.get("type", "").endswith(".starting"):
                    expected_s = event["expected_s"] if event["state"] == "starting" else None
                    on_step(Step(None, 0, 0, is_starting=True, expected_s=expected_s))
                elif event.get("type", "").endswith(".completed"):
                    images.append(event)
        if not images:
            raise CommandFailed(f"{self._url} broke off before the image was done", "broken_connection")
        return {"data": images, "loraplex": images[-1]["loraplex"]}

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn every connection error into one sentence."""
        import httpx

        try:
            yield
        except httpx.ConnectError:
            hint = "start one with: loraplex serve FILE"
            raise CommandFailed(f"no service at {self._url}; {hint}", "no_service") from None
        except httpx.TimeoutException:
            limit = f"did not answer within {self._timeout_s:g} s; --timeout allows more"
            raise CommandFailed(f"{self._url} {limit}", "timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CommandFailed(f"{self._url} broke off: {type(error).__name__}", "broken_connection") from None

    def _refusal(self, reply: httpx.Response) -> CommandFailed:
        try:
            error = reply.json()["error"]
            return CommandFailed(str(error["message"]), str(error["code"]))
        except (ValueError, KeyError, TypeError):
            return CommandFailed(f"{self._url} answered HTTP {reply.status_code}, not as Loraplex does", "no_service")

    def _stranger(self) -> CommandFailed:
        return CommandFailed(f"what answers at {self._url} is no Loraplex service", "no_service")


def _request(draft: UnresolvedRequest, form: str, pictures: Pictures | None, *, is_stream: bool) -> dict[str, Any]:
    """Return the body as httpx arguments: JSON, or a form if there are pictures."""
    asked = _asked(draft, form) | ({"stream": True} if is_stream else {})
    if pictures is None:
        return {"json": asked}
    named = {"image": pictures.image, "mask": pictures.mask}
    return {
        "data": {name: value if isinstance(value, str) else json.dumps(value) for name, value in asked.items()},
        "files": {name: (name, content) for name, content in named.items() if content is not None},
    }


def _asked(draft: UnresolvedRequest, form: str) -> dict[str, Any]:
    """Return the body of the OpenAI shape, without the values that the draft does not set."""
    size = f"{draft.width}x{draft.height}" if draft.width and draft.height else None
    fields: dict[str, Any] = {
        "prompt": draft.prompt,
        "model": draft.model,
        "n": draft.num_images,
        "size": size,
        "output_format": form,
        "negative_prompt": draft.negative_prompt,
        "num_inference_steps": draft.steps,
        "guidance_scale": draft.guidance_scale,
        "scheduler": draft.scheduler,
        "prompt_syntax": draft.prompt_syntax,
        "seed": draft.seed,
        "strength": draft.strength,
        "loras": [_entry(ref) for ref in draft.adapters] or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _entry(ref: AdapterRef) -> dict[str, object]:
    scale = dataclasses.asdict(ref.scale) if isinstance(ref.scale, Scales) else ref.scale
    entry = {"id": ref.id, "scale": scale, "revision": ref.revision}
    return {name: value for name, value in entry.items() if value is not None}


def _drawing(reply: Mapping[str, Any], *, wall_ms: float) -> Drawing:
    report = reply["loraplex"]
    return Drawing(
        images=tuple(base64.b64decode(entry["b64_json"]) for entry in reply["data"]),
        seed=report["seed"],
        base_id=report["base_model"],
        adapters=tuple(_applied(entry) for entry in report["adapters"]),
        timing_ms={name: float(value) for name, value in report["timing_ms"].items()},
        warnings=tuple(report["warnings"]),
        wall_ms=wall_ms,
    )


def _applied(entry: Mapping[str, Any]) -> AppliedAdapter:
    scale: Scale = Scales(**entry["scale"]) if isinstance(entry["scale"], dict) else entry["scale"]
    return AppliedAdapter(entry["id"], entry["revision"], scale, entry["layers_matched"], entry["layers_in_file"])
