"""The machine of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from serve_app.bench.measuring.report import Machine

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("loraplex", "torch", "diffusers", "peft", "transformers", "safetensors")


def describe_machine(device: torch.device, threads: int) -> Machine:
    """Name the processor, the accelerator if one is used, and the versions of what does the work."""
    accelerator = None
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        accelerator = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        load_average=round(os.getloadavg()[0], 2),
        accelerator=accelerator,
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions={package: _version(package) for package in PACKAGES},
    )


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None where there is none."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "a checkout"  # of this project, or of what is carried along


def _processor() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
