"""What processes have written so far, read while they go on: files and folders may vanish meanwhile."""

from __future__ import annotations

import fnmatch
import os
from contextlib import suppress
from pathlib import Path


def contents(folder: Path, pattern: str = "*") -> dict[Path, bytes]:
    """Return what the files below a folder hold, but for those that vanish."""
    found: dict[Path, bytes] = {}
    # Unlike `rglob` it puts up with folders that vanish.
    for inside, _, names in os.walk(folder):
        for path in (Path(inside, name) for name in fnmatch.filter(names, pattern)):
            with suppress(FileNotFoundError):
                if path.is_file():
                    found[path] = path.read_bytes()
    return found


def logs(pattern: str = "*") -> dict[Path, bytes]:
    """Return what Ray's processes of this cluster have logged."""
    from ray._private.worker import global_worker

    return contents(Path(global_worker.node.get_session_dir_path()) / "logs", pattern)  # type: ignore[union-attr]
