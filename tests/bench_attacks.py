"""One attacker after the other against a real service, and what others notice: `python -m tests.bench_attacks`.

Each attack runs for some seconds, from `ATTACKERS` threads of a process of its own, with a pause after each blow: what
is measured is what one blow costs others, not a flood (`tests.bench_overload` is one). Meanwhile others ask for
`/health` twenty times a second, and draw one image after the other. Before each attack the same is measured without it.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

from serve_app.api.pictures.images import encode_image
from serve_app.core import PixelImage
from tests.footprint import footprints
from tests.hostile_http import bomb, message, text_bomb
from tests.hub_server import HubServer
from tests.service import base_settings, connect, ray_cluster
from tests.unit.api.pictures.test_structure import with_comments, with_scans

BASE = "demo/sd15"
ATTACKERS = 4
PAUSE_S = 0.5
REST_S = 3.0
HUB_HEADER_BYTES = 16 * 1024**2 - 1024
HEALTH_BAR_MS, IMAGE_BAR, MEMORY_BAR = 100.0, 2.0, 1.1
Blow = Callable[[str, int], str]


def sent(raw: bytes, url: str) -> str:
    """Send a request as it is; return the status of its answer."""
    with connect(url) as caller:
        with suppress(BrokenPipeError, ConnectionResetError):
            caller.sendall(raw)
        with suppress(ConnectionResetError):
            return b"".join(caller.recv(4096).split()[1:2]).decode() or "closed"
    return "closed"


def posting(path: str, body: bytes, kind: str = "application/json") -> Blow:
    raw = message("POST", path, body, {"content-type": kind})
    return lambda url, turn: sent(raw, url)


def endless_header(url: str, turn: int) -> str:
    """Send a header line of 100 MB."""
    sent_mb = 0
    with connect(url) as caller, suppress(BrokenPipeError, ConnectionResetError):
        caller.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        for sent_mb in range(100):  # noqa: B007 - told below
            caller.sendall(b"a" * 1_000_000)
    return f"closed after {sent_mb} MB"


def many_headers(url: str, turn: int) -> str:
    return sent(message("GET", "/", headers={f"x-{index}": "a" for index in range(20_000)}), url)


def unknown_ids(url: str, turn: int) -> str:
    return ", ".join(sorted({sent(message("GET", f"/v1/loras/evil/id-{turn}-{index}"), url) for index in range(20)}))


def known_ids(url: str, turn: int) -> str:
    """Ask for as many ids that are known: what of the cost of unknown ones is that of any request."""
    return ", ".join(sorted({sent(message("GET", f"/v1/loras/{BASE}-night"), url) for _ in range(20)}))


def hub_headers(url: str, turn: int) -> str:
    return sent(message("GET", f"/v1/loras/evil/headers-{turn % 8}"), url)


def held(raw: bytes, drip: bytes, count: int) -> Blow:
    """Open connections, send the beginning of a request on each, and then next to nothing."""

    def blow(url: str, turn: int) -> str:
        with ExitStack() as stack:
            callers = [stack.enter_context(connect(url)) for _ in range(count)]
            for caller in callers:
                caller.sendall(raw)
            for _ in range(4):
                time.sleep(1)
                for caller in callers if drip else ():
                    with suppress(BrokenPipeError, ConnectionResetError):
                        caller.sendall(drip)
        return f"{count} held"

    return blow


def many_fields() -> bytes:
    """Some 30 MiB of names that no two are the same."""
    return b"".join(b',"%x":1' % index for index in range(2**28, 2**28 + 2_300_000))


def heavy_jpeg() -> bytes:
    """As much work as a JPEG within the limits can be: all the scans and pixels that are taken."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((256, 256), 90).resize((4096, 4096)).convert("L").save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole.rindex(b"\xff\xda")
    repeats = 31 - whole.count(b"\xff\xda")
    return whole[:last] + whole[last:-2] * repeats + whole[-2:]


def attacks() -> Iterator[tuple[str, Callable[[], Blow]]]:
    """Each attack's name, and what makes its blow: bodies of many megabytes are built for one attack alone."""
    picture = "image/png"
    stream = json.dumps({"prompt": "a", "stream": True, "num_inference_steps": 1}).encode()
    form = "multipart/form-data; boundary=xyz"
    yield "header line of 100 MB", lambda: endless_header
    yield "20,000 headers", lambda: many_headers
    yield "30 MiB of JSON, fields", lambda: posting("/", b'{"inputs":"x"' + many_fields() + b"}")
    yield "30 MiB of JSON, lists", lambda: posting("/", b'{"inputs":[' + b"[]," * (10 * 2**20) + b"0]}")
    yield "1 MiB of JSON, depth", lambda: posting("/", b'{"inputs":' + b"[" * 10**6)
    yield "1 MiB of JSON, values", lambda: posting("/", b'{"inputs":[' + b"1," * 500_000 + b"0]}")
    yield (
        "24 MiB of base64, no picture",
        lambda: posting(
            "/", json.dumps({"image": base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(18 * 2**20)).decode()}).encode()
        ),
    )
    yield "JPEG of 250 scans", lambda: posting("/", with_scans(250), picture)
    yield "JPEG of the most scans and pixels", lambda: posting("/", heavy_jpeg(), picture)
    yield "JPEG of 100,000 comments", lambda: posting("/", with_comments(100_000), picture)
    yield (
        "GIF of 12,000,000 pieces",
        lambda: posting("/", b"GIF89a\x08\x00\x08\x00\x00\x00\x00\x21\xfe" + b"\x01a" * 12_000_000, picture),
    )
    yield "PNG of 400 million pixels", lambda: posting("/", bomb(), picture)
    yield "PNG of 200 MB of text", lambda: posting("/", text_bomb(), picture)
    yield (
        "form of 100,000 parts",
        lambda: posting(
            "/v1/images/edits", b'--xyz\r\ncontent-disposition: form-data; name="a"\r\n\r\na\r\n' * 100_000, form
        ),
    )
    yield "form with a header of 30 MB", lambda: posting("/v1/images/edits", b"--xyz\r\nx: " + b"y" * 30_000_000, form)
    yield "headers of Hub files, 3 x 16 MiB", lambda: hub_headers
    yield "ids that nobody knows", lambda: unknown_ids
    yield "for comparison: ids that are known", lambda: known_ids
    yield "slow heads", lambda: held(b"GET / HTTP/1.1\r\nhost: localhost\r\nx-a: ", b"a", 50)
    yield "slow bodies", lambda: held(message("POST", "/", length="1000"), b" ", 50)
    yield "readers who do not read", lambda: held(message("POST", "/v1/images/generations", stream), b"", 2)


def strike(name: str, url: str, seconds: float) -> None:
    """Run one attack and print what came of it."""
    blow = dict(attacks())[name]()
    outcomes: Counter[str] = Counter()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    ends_at = time.monotonic() + seconds

    def attacker(number: int) -> None:
        turn = number
        while time.monotonic() < ends_at:
            try:
                outcomes[blow(url, turn)] += 1
            except TimeoutError:
                outcomes["no answer"] += 1
            turn += ATTACKERS
            time.sleep(PAUSE_S)

    with ThreadPoolExecutor(ATTACKERS) as pool:
        list(pool.map(attacker, range(ATTACKERS)))
    sys.stdout.write(json.dumps(outcomes))


def others(url: str, is_over: Callable[[], bool]) -> tuple[float, float]:
    """Return the medians, in milliseconds, of others' health checks and images until `is_over`."""
    health_ms: list[float] = []
    image_ms: list[float] = []

    def timed(times_ms: list[float], call: Callable[[httpx.Client], httpx.Response], pause_s: float) -> None:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            while not is_over() or not times_ms:
                began = time.perf_counter()
                try:
                    call(http).raise_for_status()
                    times_ms.append((time.perf_counter() - began) * 1e3)
                except httpx.HTTPError:
                    times_ms.append(math.inf)  # what fails is never done
                time.sleep(pause_s)

    prober = threading.Thread(target=timed, args=(health_ms, lambda http: http.get("/health"), 0.05))
    prober.start()
    timed(image_ms, lambda http: http.post("/", json={"inputs": "a red circle"}), 0.0)
    prober.join()
    return statistics.median(health_ms), statistics.median(image_ms)


def memory_mb() -> Counter[str]:
    """Return what each kind of process takes."""
    taken: Counter[str] = Counter()
    for process, footprint in footprints().items():
        taken[process.partition("/")[0]] += round(footprint.memory_bytes / 1e6)
    return taken


def measured(name: str, url: str, seconds: float) -> dict[str, Any]:
    """Measure without the attack, then with it, then the memory after a rest."""
    ends_at = time.monotonic() + seconds
    before_health, before_image = others(url, lambda: time.monotonic() > ends_at)
    before_mb = memory_mb()
    command = [sys.executable, "-m", "tests.bench_attacks", "--strike", name, "--url", url, "--seconds", str(seconds)]
    attacker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert attacker.stdout is not None
    assert attacker.stdout.readline() == "ready\n"
    health, image = others(url, lambda: attacker.poll() is not None)
    outcomes = json.loads(attacker.stdout.read())
    time.sleep(REST_S)
    return {
        "outcomes": outcomes,
        "health_ms": (before_health, health),
        "image_ms": (before_image, image),
        "memory_mb": (before_mb, memory_mb()),
    }


def row(name: str, found: dict[str, Any]) -> str:
    (health_before, health), (image_before, image) = found["health_ms"], found["image_ms"]
    before, after = found["memory_mb"]
    memory_before, memory_after = before.total(), after.total()
    ((kind, grown_mb),) = (after - before or Counter({"none": 0})).most_common(1)
    is_met = health < HEALTH_BAR_MS and image < IMAGE_BAR * image_before and memory_after < MEMORY_BAR * memory_before
    answers = "; ".join(f"{count} x {outcome}" for outcome, count in found["outcomes"].items())
    return (
        f"| {name} | {answers} | {health_before:.0f} | {health:.0f} | {image_before:.0f} | {image / image_before:.2f} "
        f"| {memory_after / memory_before - 1:+.1%}, most by {kind}: {grown_mb} MB | {'' if is_met else 'MISSED'} |\n"
    )


def hub_with_heavy_headers() -> HubServer:
    """A Hub whose repositories have files of headers as large as are read."""
    hub = HubServer()
    entry = '"lora_unet_{:x}.lora_down.weight":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    names = ",".join(entry.format(index) for index in range(HUB_HEADER_BYTES // 90))
    header = f"{{{names}}}".encode()[:HUB_HEADER_BYTES]
    file = len(header).to_bytes(8, "little") + header + b"\0"
    for index in range(8):
        hub.push(f"evil/headers-{index}", {f"a{number}.safetensors": file for number in range(3)})
    return hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each attack, and of the time before it")
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    parser.add_argument("--strike", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.strike:
        strike(options.strike, options.url, options.seconds)
        return

    from cluster.local_service import run_service

    os.environ.update({"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"})
    out = sys.stdout.write
    with tempfile.TemporaryDirectory() as folder, hub_with_heavy_headers() as hub, ray_cluster(Path(folder)) as port:
        settings = {
            "bases": [base_settings(BASE)],
            "adapters": {"embedded": True, "hub": {"endpoint": hub.endpoint}},
            "ingress": {"replicas": 2, "num_cpus": 0.1},
            "cache_dir": f"{folder}/cache",
            "log_level": "WARNING",
        }
        run_service(settings)
        url = f"http://127.0.0.1:{port}"
        # What a service holds that has drawn, and edited a picture as large as is taken: buffers, decoders.
        ends_at = time.monotonic() + options.seconds
        others(url, lambda: time.monotonic() > ends_at)
        large = base64.b64encode(encode_image(PixelImage(2400, 2400, os.urandom(2400 * 2400 * 3)), "png")).decode()
        for _ in range(4):
            httpx.post(url, json={"image": large, "inputs": "a"}, timeout=120, trust_env=False).raise_for_status()
        out(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n\n")
        out("| attack | answers | health, ms | meanwhile | image, ms | times | memory after | |\n|" + "---|" * 8 + "\n")
        for name, _ in attacks():
            if options.only in name:
                out(row(name, measured(name, url, options.seconds)))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
