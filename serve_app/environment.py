"""The process environment: the values the service reads, and those it passes to the processes that it starts.

Only this module reads the environment. Must not import Ray: commands that start no service use it too.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import SecretStr

from serve_app.config import Environment, SharedSettings
from serve_app.settings import RegistrySettings

# As Serve's proxy imports it; the module itself is above this one.
PROXY_GUARDS = "serve_app.deployments.proxy:guards"


def read_environment(config: SharedSettings, registry: RegistrySettings | None = None) -> Environment:
    """Return the values of the process environment; values of the configuration come first.

    Where the aliases are is for their keeper alone, whose process has a `registry`.
    """
    token = os.environ.get("HF_TOKEN")
    redis = None if registry is None or registry.path else os.environ.get("LORAPLEX_REGISTRY_REDIS")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Environment(
        hub_token=SecretStr(token) if token else None,
        hub_endpoint=config.adapters.hub.endpoint or os.environ.get("HF_ENDPOINT") or None,
        cache_dir=config.cache_dir or cache_home / "loraplex",
        registry_redis=SecretStr(redis) if redis else None,
    )


def launch_environment() -> dict[str, str]:
    """Return the environment for `serve run`: this one, without usage reports and with our layers before Serve's proxy.

    Few malloc arenas keep memory from growing with the number of threads.
    """
    return {
        "MALLOC_ARENA_MAX": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": PROXY_GUARDS,
        **os.environ,
    }


# Variables that the loader, Python, temporary files and torch's threads need; none that could be a secret.
_FOR_CHILDREN = (
    "PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONHASHSEED",
    "PYTHONMALLOC", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip


def child_environment() -> dict[str, str]:
    """Return the environment of a process that parses untrusted files: no tokens or keys, no Hub, no GPU."""
    passed = {name: os.environ[name] for name in _FOR_CHILDREN if name in os.environ}
    return {**passed, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "CUDA_VISIBLE_DEVICES": ""}
