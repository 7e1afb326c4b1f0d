"""The process environment: what the service takes from it, and what it gives to the processes that it starts.

Owns every reading of the environment. Must not import Ray: commands that start no service read it too.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import SecretStr

from serve_app.config import AppConfig, Environment

# As Serve's proxy imports it; the module itself is above this one.
PROXY_GUARDS = "serve_app.deployments.proxy:guards"


def read_environment(config: AppConfig) -> Environment:
    """Return what the process environment says, the configuration's own words first."""
    token = os.environ.get("HF_TOKEN")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Environment(
        hub_token=SecretStr(token) if token else None,
        hub_endpoint=config.adapters.hub.endpoint or os.environ.get("HF_ENDPOINT") or None,
        cache_dir=config.cache_dir or cache_home / "loraplex",
    )


def launch_environment() -> dict[str, str]:
    """Return the environment that `loraplex serve` starts `serve run` with: this one, usage reports off, callers kept
    from steering Serve's proxy, and memory that does not spread over an arena of the C library for each thread."""
    return {
        "MALLOC_ARENA_MAX": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": PROXY_GUARDS,
        **os.environ,
    }


# What the loader, Python's own start, temporary files and torch's threads need, and nothing that could be a secret.
_FOR_CHILDREN = (
    "PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONHASHSEED",
    "PYTHONMALLOC", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip


def child_environment() -> dict[str, str]:
    """Return the environment of a process that reads files nobody vouches for: no token, no key, no way to the Hub, and
    no GPU."""
    passed = {name: os.environ[name] for name in _FOR_CHILDREN if name in os.environ}
    return {**passed, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "CUDA_VISIBLE_DEVICES": ""}
