"""moto's S3 on loopback, whose answers a test can spoil."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import boto3
import fsspec.config
import httpx
import pytest
from aiobotocore.session import get_session
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

# moto keeps one set of buckets for all servers of a process.
_NUMBERS = count()


@dataclass(frozen=True)
class Request:
    """One request that the server got."""

    method: str
    path: str
    range: str | None
    is_listing: bool


@dataclass
class Fault:
    """How the server answers requests that `hits`: once `until` is set, with a status, half of the body or other bytes,
    or after `before` has changed something. It does so `times` times."""

    hits: Callable[[Request], bool]
    until: threading.Event | None = None
    status: str | None = None
    cuts_body: bool = False
    alters_body: bool = False
    before: Callable[[], object] = lambda: None
    times: int | None = None


class S3Server:
    """A server with buckets; a context manager."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fault: Fault | None = None
        self._session = get_session()
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)

    def __enter__(self) -> S3Server:
        self._moto.start()
        server: Any = self._moto._server
        self._answer, server.app = server.app, self._spoiled
        self.endpoint = f"http://127.0.0.1:{self._moto.get_host_and_port()[1]}"
        return self

    def set_up(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
        """Have S3's clients call this server with the keys of a service, or in another environment.

        Without another one they share what each would otherwise read for itself: a third of a second of descriptions.
        """
        usual = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.endpoint,
        }
        for name, value in (usual | environment).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", {} if environment else {"session": self._session})

    def __exit__(self, *_: object) -> None:
        self._moto.stop()

    @cache  # noqa: B019 - as many servers as test modules
    def client(self, service: str) -> Any:
        """Return boto3's client for somebody who may do everything."""
        return boto3.client(service, endpoint_url=self.endpoint)

    def bucket(self, files: Mapping[str, bytes]) -> str:
        """Make a bucket with some objects; return its name."""
        name = f"adapters-{next(_NUMBERS)}"
        self._backend.create_bucket(name, "us-east-1")
        self.put(name, files)
        return name

    def put(self, bucket: str, files: Mapping[str, bytes], **about: Any) -> None:
        """Write objects, behind the API: a thousand take a moment."""
        for key, content in files.items():
            self._backend.put_object(bucket, key, content, **about)

    def remove(self, bucket: str, key: str) -> None:
        """Remove an object."""
        self._backend.delete_object(bucket, key)

    @contextmanager
    def only_letting(self, *statements: Mapping[str, object]) -> Iterator[Mapping[str, str]]:
        """Refuse all that a new user's policy does not allow; yield the environment with that user's keys."""
        iam, user = self.client("iam"), f"service-{next(_NUMBERS)}"
        iam.create_user(UserName=user)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        policy = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **one} for one in statements]})
        iam.put_user_policy(UserName=user, PolicyName="reads", PolicyDocument=policy)
        httpx.post(f"{self.endpoint}/moto-api/reset-auth", content=b"0")
        try:
            yield {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        finally:
            httpx.post(f"{self.endpoint}/moto-api/reset-auth", content=b"Infinity")

    @property
    def _backend(self) -> Any:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def count(self, method: str, part: str = "") -> int:
        """Return how many requests with some text in their path there were."""
        return sum(request.method == method and part in request.path for request in self.requests)

    @property
    def listings(self) -> int:
        """How many pages of a bucket's list were asked for."""
        return sum(request.is_listing for request in self.requests)

    def _spoiled(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE"),
            "list-type" in environ.get("QUERY_STRING", ""),
        )  # fmt: skip
        self.requests.append(request)
        fault = self.fault
        if fault is None or fault.times == 0 or not fault.hits(request):
            return self._answer(environ, start_response)
        if fault.times is not None:
            fault.times -= 1
        if fault.until is not None:
            fault.until.wait(60)
        fault.before()
        if fault.status is not None:
            start_response(fault.status, [("content-length", "0")])
            return []
        body = b"".join(self._answer(environ, start_response))
        if fault.alters_body:
            body = bytes(byte ^ 1 for byte in body)
        return [body[: len(body) // 2] if fault.cuts_body else body]
