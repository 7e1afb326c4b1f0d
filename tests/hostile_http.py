"""Requests that nobody should send, as the bytes that go over the wire.

Owns the corpus: each entry is complete, so that no client library tidies it. `SECRETS` are the caller's own words that
must never turn up in a reply's error or in a log.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

HOST = "localhost"
TOKEN = "hf_" + "SecretSecretSecretSecret"
KEY = "sk-" + "live-secret-of-a-caller"
SECRETS = (TOKEN, KEY)
AUTHORISATION = {"authorization": f"Bearer {TOKEN}"}

# Nothing on the wire may make the service open one of these.
ADDRESSES = (
    "http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:9/adapter.safetensors", "https://localhost/a",
    "http://[::1]:9/x", "ftp://127.0.0.1/x", "gopher://127.0.0.1:9/_x", "file:///etc/passwd", "s3://bucket/key",
    "hf://../../etc/passwd", "//169.254.169.254/x", "data:application/octet-stream;base64,AAAA",
)  # fmt: skip
PATHS = (
    "/etc/passwd", "../../../../etc/passwd", "..\\..\\windows\\win.ini", "~/.ssh/id_rsa", "./demo/sdxl-sepia",
    "demo/../demo/sdxl-sepia", "demo/..", "demo/sdxl-sepia/../../../etc", "demo//sdxl-sepia", "demo/sdxl-sepia/",
    "/demo/sdxl-sepia", "demo/sdxl\u0000-sepia", "demo/sdxl-sepia\r\nx-evil: 1", "\\\\host\\share",
    "${HOME}/x", "$(id)", "`id`", "demo/%2e%2e/x", "%2fetc%2fpasswd", "demo/sdxl--sepia", ".", "..", "-", "--help",
    "demo/\u202esdxl", "{0.__class__}", "{adapter}", "%s%n",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostileRequest:
    """One request: what it is, its bytes, and whether it is one of HTTP at all, which the server itself refuses."""

    name: str
    raw: bytes
    path: str = "/"
    is_http: bool = True
    is_head: bool = False


def message(
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str | bytes] | None = None,
    *,
    length: str | None = None,
) -> bytes:
    """Return a request as it is sent; `length` is a content-length that may lie."""
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"host: " + HOST.encode(), b"connection: close"]
    for name, value in (headers or {}).items():
        lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode("latin-1")))
    if body or length is not None or method in ("POST", "PUT", "PATCH"):
        lines.append(f"content-length: {len(body) if length is None else length}".encode())
    return b"\r\n".join([*lines, b"", body])


def posted(name: str, path: str, body: Any, headers: Mapping[str, str | bytes] | None = None) -> HostileRequest:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HostileRequest(name, message("POST", path, content, headers), path)


def hf(name: str, headers: Mapping[str, str | bytes] | None = None, /, **parameters: Any) -> HostileRequest:
    return posted(name, "/", {"inputs": "elephant", "parameters": {"num_inference_steps": 1, **parameters}}, headers)


def ai(name: str, **fields: Any) -> HostileRequest:
    return posted(name, "/v1/images/generations", {"prompt": "elephant", "num_inference_steps": 1, **fields})


def bodies() -> Iterator[HostileRequest]:
    """Bodies that are no request."""
    broken: dict[str, bytes] = {
        "an empty body": b"",
        "blanks": b" \r\n\t",
        "no JSON": b"elephant",
        "a cut object": b'{"inputs": "elephant"',
        "two objects": b'{"inputs": "a"}{"inputs": "b"}',
        "a trailing comma": b'{"inputs": "a",}',
        "single quotes": b"{'inputs': 'a'}",
        "a comment": b'{"inputs": "a" /* b */}',
        "no UTF-8": b'{"inputs": "\xff\xfe"}',
        "UTF-16": '{"inputs": "a"}'.encode("utf-16"),
        "a lone surrogate": b'{"inputs": "\\ud800"}',
        "NaN": b'{"inputs": "a", "parameters": {"guidance_scale": NaN}}',
        "infinity": b'{"inputs": "a", "parameters": {"guidance_scale": -Infinity}}',
        "a huge exponent": b'{"inputs": "a", "parameters": {"guidance_scale": 1e999999}}',
        "a number of 100,000 digits": b'{"inputs": "a", "parameters": {"seed": ' + b"9" * 100_000 + b"}}",
        "100,000 open arrays": b"[" * 100_000,
        "100,000 open objects": b'{"a":' * 100_000,
        "deep options": b'{"inputs": "a", "options": {"a": ' + b"[" * 60 + b"]" * 60 + b"}}",
        "null": b"null",
        "an array": b"[]",
        "a gzip body": zlib.compress(b'{"inputs": "a"}'),
        "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
        "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    }
    broken["a name twice"] = b'{"inputs": "a", "inputs": "b", "prompt": "a", "prompt": "b"}'
    for name, body in broken.items():
        yield posted(name, "/", body)
        yield posted(f"{name} in the other shape", "/v1/images/generations", body)
    yield posted("a body of 50,000 unknown fields", "/", {f"field{index}": index for index in range(50_000)})
    yield posted("a key of a megabyte", "/", {"k" * 1_000_000: 1})
    yield posted("a gzip body that says so", "/", zlib.compress(b"{}" * 1000), {"content-encoding": "gzip"})


def fields() -> Iterator[HostileRequest]:
    """Fields of wrong types and sizes."""
    yield posted("a prompt of two megabytes", "/", {"inputs": "a" * 2_000_000})
    yield hf("a negative prompt of a megabyte", negative_prompt="a" * 1_000_000)
    yield hf("a picture of 2^40 pixels", width=2**20, height=2**20)
    yield hf("a width of 2^70", width=2**70)
    yield hf("a negative width", width=-64)
    yield hf("no width", width=0)
    yield hf("a million steps", num_inference_steps=1_000_000)
    yield hf("a negative seed", seed=-1)
    yield hf("a seed of words", seed="'; DROP TABLE seeds; --")
    yield hf("a scheduler of Python", scheduler="__import__('os').system('id')")
    yield hf("a scheduler of another class", scheduler="StableDiffusionPipeline")
    yield hf("an object for a number", guidance_scale={"$gt": 0})
    yield hf("sixty-five adapters", loras=["demo/sdxl-sepia"] * 65)
    yield hf("a hundred thousand adapters", loras=["a"] * 100_000)
    yield hf("more adapters than the base takes", loras=["demo/sdxl-sepia"] * 40)
    yield hf("a scale of 1e300", loras=[{"id": "demo/sdxl-sepia", "scale": 1e300}])
    yield hf("a pickled adapter", loras=[{"id": "demo/sdxl-sepia", "filename": "adapter.bin"}])
    yield ai("ten thousand images", n=10_000)
    yield ai("a minus image", n=-1)
    yield ai("a size of words", size="hugexhuge")
    yield ai("a size of many digits", size="9" * 400 + "x8")
    yield ai("a reply by address", response_format="file")
    yield ai("a stream of words", stream="yes")
    yield ai("a million previews", stream=True, partial_images=1_000_000)
    yield ai("an unknown field", webhook="http://169.254.169.254/")
    yield ai("adapters as broken JSON text", loras='[{"id": ')
    yield ai("adapters as deep JSON text", loras="[" * 5000)
    yield ai("a model with two colons", model=":::")
    yield ai("a model of a megabyte", model="a" * 1_000_000)


def names() -> Iterator[HostileRequest]:
    """Names of models and adapters that are paths or addresses."""
    for index, name in enumerate((*ADDRESSES, *PATHS)):
        yield hf(f"an adapter at {name!a}", loras=[{"path": name}])
        kind = index % 4
        if kind == 0:
            yield ai(f"a model called {name!a}", model=name)
        elif kind == 1:
            yield hf(f"a file called {name!a}", loras=[{"id": "demo/sdxl-sepia", "filename": name}])
        elif kind == 2:
            yield ai(f"an adapter of the base called {name!a}", model=f"demo/sdxl:{name}")
        else:
            yield hf(f"a single adapter called {name!a}", lora_adapter=name)
    for address in ADDRESSES[:3]:
        yield posted(f"a picture at {address}", "/", {"image": address, "inputs": "a"})
        yield posted(f"inputs at {address}", "/", {"inputs": address, "parameters": {"prompt": "a"}})
        yield hf(f"the header lora with {address}", {"lora": address})
    yield hf("a revision that climbs", loras=[{"id": "demo/sdxl-sepia", "revision": "../../main"}])
    yield hf("a token as an adapter", AUTHORISATION, loras=["../" + TOKEN])


def locations() -> Iterator[HostileRequest]:
    """Paths and methods that are not served."""
    for path in (
        "/../../../../etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "/static/../app.py",
        "/static/..%2fapp.py", "/static/%2e%2e%2f%2e%2e%2fconfig.py", "/static/", "/static/docs.html%00.js",
        "/.git/config", "/.env", "/etc/passwd", "/metrics", "/admin", "/v1", "/v1/", "/v1/chat/completions",
        "/v1/images", "/v1/models/%00", "/v1/models/..%2f..%2fetc", "/v1/models/%ff%fe", "/" + "a" * 8000,
        "/docs/../openapi.yaml", "/models", "/v1/models?limit=-1", "/v1/models?limit=1e9", "/v1/models?limit=%00",
        "/v1/models?after=" + "a" * 4000, "/v1/models?after=http://169.254.169.254/", "/<script>alert(1)</script>",
    ):  # fmt: skip
        yield HostileRequest(f"GET {path[:60]}", message("GET", path), path)
    for path in ("/models/", "/models/%00", "/models/..%2f..%2fetc%2fpasswd", "/models/http://169.254.169.254/",
                 "/models/" + "a" * 4000, "/models/%0d%0ax-evil:%201", "/models/%ff%fe"):  # fmt: skip
        yield HostileRequest(f"POST {path[:60]}", message("POST", path, b'{"inputs": "a"}'), path)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        yield HostileRequest(f"{method} /", message(method, "/"), "/")
        yield HostileRequest(f"{method} a generation", message(method, "/v1/images/generations"), "/v1/x")
    yield HostileRequest("HEAD a generation", message("HEAD", "/v1/images/generations"), "/v1/x", is_head=True)


def headers() -> Iterator[HostileRequest]:
    """Headers that lie, or are too many."""
    body = b'{"inputs": "a", "parameters": {"num_inference_steps": 1}}'
    odd: dict[str, dict[str, str | bytes]] = {
        "an adapter of 5,000 letters": {"lora": "a" * 5000},
        "an adapter of no letters": {"lora": b"\xff\xfe\xfd"},
        "a time of words": {"x-request-timeout-s": "soon"},
        "an endless time": {"x-request-timeout-s": "inf"},
        "no time": {"x-request-timeout-s": "-1"},
        "a time that is no number": {"x-request-timeout-s": "nan"},
        "no acceptable format": {"accept": "application/x-httpd-php"},
        "a format of 5,000 letters": {"accept": "image/" + "x" * 5000},
        "formats with broken q": {"accept": "image/png;q=nan, image/jpeg;q=-1"},
        "a token in the wrong place": {"accept": TOKEN, **AUTHORISATION},
        "a key in the name of an adapter": {"lora": KEY + "/../x", "authorization": f"Bearer {KEY}"},
    }
    for name, extra in odd.items():
        yield posted(name, "/", body, extra)
    yield posted("a header of a megabyte", "/", body, {"x-a": "a" * 1_000_000})
    yield posted("10,000 headers", "/", body, {f"x-{index}": "a" for index in range(10_000)})
    yield posted("a query of 40,000 letters", "/?" + "a" * 40_000, body)
    twice = message("POST", "/", body, {"lora": "demo/sdxl-sepia"}).replace(b"lora:", b"lora: a/b\r\nlora:", 1)
    yield HostileRequest("two adapters in two headers", twice)
    for id_header in ("x-request-id", "x-request-timeout-seconds", "serve_multiplexed_model_id", "cookie", "forwarded"):
        yield posted(f"{id_header} of no letters", "/", b"no JSON", {id_header: b"\xff\xfe" + TOKEN.encode()})


def forms() -> Iterator[HostileRequest]:
    """Multipart forms."""
    picture = png(16, 16)
    kind = "multipart/form-data; boundary=xyz"

    def part(head: str, content: bytes) -> bytes:
        return b"--xyz\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"

    def field(name: str, value: str) -> bytes:
        return part(f'content-disposition: form-data; name="{name}"', value.encode())

    def file(name: str, content: bytes, filename: str = "a.png") -> bytes:
        return part(f'content-disposition: form-data; name="{name}"; filename="{filename}"', content)

    end = b"--xyz--\r\n"
    prompt, image = field("prompt", "a"), file("image", picture)
    whole: dict[str, bytes] = {
        "no part": end,
        "no picture": prompt + end,
        "no end": prompt + image,
        "a picture as text": prompt + field("image", "http://169.254.169.254/x.png") + end,
        "a thousand files": prompt + image * 1000 + end,
        "a thousand fields": image + prompt * 1000 + end,
        "a field of two megabytes": image + field("prompt", "a" * 2_000_000) + end,
        "an unknown file": prompt + image + file("../../etc/passwd", picture) + end,
        "a file name that climbs, and no picture in it": prompt + file("image", b"#!/bin/sh", "../../x.sh") + end,
        "a part without a name": part("content-disposition: form-data", b"a") + end,
        "a part without a disposition": part("x: y", b"a") + end,
        "a part with a header of a megabyte": part("x: " + "y" * 1_000_000, b"a") + prompt + image + end,
        "a part with 10,000 headers": part("\r\n".join(["x: y"] * 10_000), b"a") + prompt + image + end,
        "a mask of another size": prompt + image + file("mask", png(8, 8, mode="RGBA")) + end,
        "a mask that keeps all": prompt + image + file("mask", picture) + end,
        "a number of words": prompt + image + field("n", "many") + end,
        "an infinite number": prompt + image + field("strength", "inf") + end,
        "a name of no letters": b'--xyz\r\ncontent-disposition: form-data; name="\xff\xfe"\r\n\r\na\r\n' + image + end,
        "a bomb as mask": prompt + image + file("mask", bomb()) + end,
        "nested forms": prompt + part('content-type: multipart/mixed; boundary=abc\r\ncontent-disposition: form-data; '
                                      'name="image"', b"--abc\r\n\r\na\r\n--abc--") + end,
    }  # fmt: skip
    for name, content in whole.items():
        yield posted(f"a form with {name}", "/v1/images/edits", content, {"content-type": kind})
    for name, other in {
        "JSON": "application/json",
        "no boundary": "multipart/form-data",
        "an empty boundary": "multipart/form-data; boundary=",
        "another boundary": "multipart/form-data; boundary=abc",
        "a boundary of 5,000 letters": "multipart/form-data; boundary=" + "a" * 5000,
        "an unknown charset": "multipart/form-data; boundary=xyz; charset=utf-99",
        "an encoding that decodes nothing": "multipart/form-data; boundary=xyz; charset=undefined",
    }.items():
        # With an unknown charset the form itself is sound, so it must be wrong in another way to be refused.
        content = prompt + end if "charset" in other else prompt + image + end
        yield posted(f"a form that says {name}", "/v1/images/edits", content, {"content-type": other})


def pictures() -> Iterator[HostileRequest]:
    """Pictures that are bombs, or none."""
    kinds: dict[str, bytes] = {
        "a PNG bomb": bomb(),
        "a PNG that says 2^31 pixels a side": png_header(2**31 - 1, 2**31 - 1),
        "a PNG without pixels": png_header(0, 0),
        "a PNG cut off": png(64, 64)[:60],
        "a PNG with a text bomb": text_bomb(),
        "a GIF that says 65535 a side": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x3b",
        "a JPEG that says 65535 a side": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03"
        b"\x01\x11\x00\x02\x11\x01\x03\x11\x01\xff\xd9",
        "a BMP of negative size": b"BM" + b"\0" * 12 + struct.pack("<IiiHHIIiiII", 40, -5, -5, 1, 24, 0, 0, 0, 0, 0, 0),
        "a WebP of nothing": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff",
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/"/></svg>',
        "a TIFF": b"II*\x00\x08\x00\x00\x00",
        "PostScript": b"%!PS-Adobe-3.0\n(/etc/passwd) (r) file",
    }
    for name, content in kinds.items():
        yield posted(f"{name} as the body", "/", content, {"content-type": "image/png"})
        encoded = base64.b64encode(content).decode()
        yield posted(f"{name} in base64", "/", {"image": encoded, "inputs": "a"})
    yield posted("base64 of no picture", "/", {"image": "data:image/png;base64,AAAA", "inputs": "a"})
    yield posted("no base64", "/", {"image": "data:image/png;base64,!!!!", "inputs": "a"})


def protocol() -> Iterator[HostileRequest]:
    """Bytes that are hardly HTTP, which the server refuses before any route."""
    body = b'{"inputs": "a"}'
    host = f"host: {HOST}\r\nconnection: close\r\n".encode()
    raw: dict[str, bytes] = {
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        "another protocol": b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
        "a version of HTTP that is none": b"GET / HTTP/9.9\r\n" + host + b"\r\n",
        "a length of words": b"POST / HTTP/1.1\r\n" + host + b"content-length: many\r\n\r\n",
        "a negative length": b"POST / HTTP/1.1\r\n" + host + b"content-length: -1\r\n\r\n",
        "two lengths": b"POST / HTTP/1.1\r\n" + host + b"content-length: 15\r\ncontent-length: 3\r\n\r\n" + body,
        "a length and chunks": b"POST / HTTP/1.1\r\n" + host
        + b"content-length: 15\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "a chunk of a wrong size": b"POST / HTTP/1.1\r\n" + host + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        "a header without a name": b"GET / HTTP/1.1\r\n" + host + b": x\r\n\r\n",
        "a header with a zero": b"GET / HTTP/1.1\r\n" + host + b"x-a: \0\r\n\r\n",
        "a request line of a megabyte": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n" + host + b"\r\n",
        "an unknown method": b"BREW / HTTP/1.1\r\n" + host + b"\r\n",
        "an address as the target": b"CONNECT 169.254.169.254:80 HTTP/1.1\r\n" + host + b"\r\n",
    }  # fmt: skip
    for name, content in raw.items():
        yield HostileRequest(name, content, is_http=False)


CORPUS = {kind.__name__: kind for kind in (bodies, fields, names, locations, headers, forms, pictures, protocol)}


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")


def bomb() -> bytes:
    """A sound PNG of 100 kilobytes and 400 million pixels."""
    side = 20_000
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = packer.compress(b"\0" * (1 + side // 8) * side) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose comment unpacks to 200 megabytes."""
    packer = zlib.compressobj(9)
    text = b"".join([packer.compress(b"a" * 1_000_000) for _ in range(200)]) + packer.flush()
    whole = png(16, 16)
    return whole[:33] + _chunk(b"zTXt", b"comment\0\0" + text) + whole[33:]
