"""The host memory of a loaded base: the pages of its files, once for all replicas of a node."""

from __future__ import annotations

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from serve_app.config import BaseModelConfig
from serve_app.engine.base.fetching import HubAccess, ResolvedSource
from serve_app.engine.base.loading import PAGES_THREAD, _bringing_in_pages, load_base
from serve_app.engine.base.manifest import adaptable_components
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.integrity import IntegrityChecker
from serve_app.settings import ModelSource
from tests.footprint import kilobytes_of
from tests.tiny import sd15_unet, tiny_pipeline

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system has no /proc")

FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose denoiser is some 70 MB."""
    pipeline: Any = tiny_pipeline("sd15")
    pipeline.register_modules(unet=sd15_unet(block_out_channels=(128, 320)))
    folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    config = BaseModelConfig(id="base", source=ModelSource(folder=folder))
    return load_base(config, ResolvedSource(folder=folder), {}, device=torch.device("cpu"), hub=HubAccess()).pipeline


def ready(pipeline: Any) -> tuple[FusedWeights, IntegrityChecker]:
    """Do what a replica does with loaded weights, which reads all of them."""
    weights = FusedWeights(adaptable_components(pipeline))
    return weights, IntegrityChecker(weights.checksummed_tensors)


def test_a_second_replica_takes_no_second_copy_of_the_file(folder: Path) -> None:
    """The kernel counts the mappings of a page, whether one process has both or each of two has one."""
    first, _check = ready(load(folder))
    before = kilobytes_of()["Anonymous"]
    second, _other_check = ready(load(folder))
    grown, file = kilobytes_of()["Anonymous"] - before, kilobytes_of(folder / FILE)
    size_kb = (folder / FILE).stat().st_size // 1024
    assert second.checksum() == first.checksum()
    assert file["Rss"] >= 2 * size_kb
    assert file["Pss"] <= file["Rss"] / 2 + 64
    assert file["Private_Dirty"] == 0
    assert file["Anonymous"] == 0
    assert grown < size_kb / 2


def test_the_pages_of_a_file_are_there_before_anyone_looks_at_its_weights(folder: Path) -> None:
    with (folder / FILE).open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        try:
            mapped.madvise(22)
        except OSError:
            pytest.skip("the kernel is older than 5.14")
    before = kilobytes_of(folder / FILE).get("Rss", 0)
    pipeline = load(folder)
    for thread in threading.enumerate():
        if thread.name == PAGES_THREAD:
            thread.join()
    there = kilobytes_of(folder / FILE)["Rss"] - before
    assert there * 1024 >= sum(weight.nbytes for weight in pipeline.unet.parameters())


def test_loads_at_once_leave_the_reader_of_files_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", before)  # put back, should this fail
    inside, most = 0, 0

    def enter(_: int) -> None:
        nonlocal inside, most
        with _bringing_in_pages():
            inside += 1
            most = max(most, inside)
            os.sched_yield()
            inside -= 1

    with ThreadPoolExecutor(4) as loads:
        list(loads.map(enter, range(400)))
    assert (most, safetensors.torch.load_file) == (1, before)
