"""How long a bucket of many adapters takes to list: `python -m tests.bench_listing --adapters 1000`.

moto's S3 server runs in a process of its own, so that only the product's part of the work competes with itself.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from serve_app.catalog.sources.object_stores import ObjectStoreSource
from serve_app.source_settings import AdapterSources
from tests.s3_server import S3Server
from tests.unit.catalog.builders import adapter_files


def serve(connection: Connection, adapters: int) -> None:
    """Serve a bucket of adapters with cards until the other end says so."""
    with pytest.MonkeyPatch.context() as patch, S3Server() as server:
        server.set_up(patch)
        files = adapter_files("demo/sd")
        bucket = server.bucket({f"me/{at}/{name}": body for at in range(adapters) for name, body in files.items()})
        connection.send((server.endpoint, bucket))
        connection.recv()


def listed(bucket: str, adapters: int) -> tuple[float, float]:
    """List a bucket from nothing; return seconds on the clock and of this process's CPU."""
    with tempfile.TemporaryDirectory() as cache:
        sources = AdapterSources.model_validate({"stores": [{"url": f"s3://{bucket}"}]})
        source = ObjectStoreSource(sources, cache_dir=Path(cache))
        began, cpu = time.monotonic(), time.process_time()
        found = asyncio.run(source.marks())
        took = time.monotonic() - began, time.process_time() - cpu
    assert len(found) == adapters, f"{len(found)} of {adapters} adapters are listed"
    return took


def main() -> None:
    """List a bucket several times and print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, options.adapters))
    server.start()
    try:
        endpoint, bucket = here.recv()
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": endpoint,
        }  # fmt: skip
        runs = [listed(bucket, options.adapters) for _ in range(options.times)]
        walls, cpus = zip(*runs, strict=True)
        sys.stdout.write(
            f"{options.adapters} adapters with cards, {options.times} lists: first {walls[0]:.2f} s, median "
            f"{statistics.median(walls):.2f} s, of which this process's CPU {statistics.median(cpus):.2f} s; "
            f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n"
        )
        here.send("end")
        server.join(30)
    finally:
        server.kill()


if __name__ == "__main__":
    main()
