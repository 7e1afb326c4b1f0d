"""What a node pays for an adapter's file: from the Hub, or from a peer through Ray's object store.

    python -m tests.bench_sharing [megabytes]

Both are measured in one run on one machine: the Hub is a server on loopback and its network costs nothing, so that the
numbers compare what the two ways cost in processor and disk. A real Hub adds its network; a real peer a faster one.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ray
from huggingface_hub import hf_hub_download
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.local_cluster import ISOLATION
from serve_app.catalog.sources.download_cache import DownloadCache
from serve_app.deployments.shared.file_index import SharedFile
from serve_app.deployments.shared.sharing import ObjectStore, get_file, put_file
from tests.hub_server import HubServer

REPEATS = 3


@ray.remote(num_cpus=1)
class Node:
    """A replica's part in sharing, on one node."""

    def fetch(self, endpoint: str, repository: str, folder: str) -> tuple[str, float]:
        started = time.perf_counter()
        path = hf_hub_download(repository, "adapter.safetensors", endpoint=endpoint, cache_dir=folder, token=False)
        return path, time.perf_counter() - started

    def put(self, path: str) -> tuple[SharedFile, float]:
        started = time.perf_counter()
        return put_file(ObjectStore(), Path(path), "first"), time.perf_counter() - started

    def get(self, file: SharedFile, folder: str) -> tuple[str, float]:
        copies = DownloadCache(Path(folder), 1 << 40, clock=time.time)
        started = time.perf_counter()
        with copies.draft(file.sha256) as draft:
            get_file(ObjectStore(), file, draft)
            path = str(copies.commit(file.sha256, draft).path)
        return path, time.perf_counter() - started


def measure(megabytes: int, root: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ids = [cluster.add_node(num_cpus=1, object_store_memory=2 * 1024**3).node_id for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    here, there = (
        Node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(i, soft=False)).remote() for i in ids
    )
    rows: dict[str, list[float]] = {"from the Hub": [], "put by the first": [], "from a peer": []}
    with HubServer() as hub:
        for number in range(REPEATS):
            content = os.urandom(1024**2) * megabytes
            hub.push(f"acme/{number}", {"adapter.safetensors": content})
            path, fetch_s = ray.get(here.fetch.remote(hub.endpoint, f"acme/{number}", str(root / "hub")))
            file, put_s = ray.get(here.put.remote(path))
            copy, get_s = ray.get(there.get.remote(file, str(root / "peers")))
            assert hashlib.sha256(Path(copy).read_bytes()).hexdigest() == file.sha256
            for row, seconds in zip(rows.values(), (fetch_s, put_s, get_s), strict=True):
                row.append(seconds)
    for name, seconds in rows.items():
        middle = statistics.median(seconds)
        sys.stdout.write(
            f"{name:18} {megabytes} MiB: {middle:6.2f} s ({megabytes / middle:6.0f} MiB/s), median of {REPEATS}\n"
        )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="loraplex-", ignore_cleanup_errors=True) as home:
        os.environ.update(ISOLATION, HOME=home)
        measure(int(sys.argv[1]) if len(sys.argv) > 1 else 186, Path(home))
