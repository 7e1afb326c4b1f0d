"""Files are read in a process of their own, which can hang, crash or be orphaned without harm."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.engine.adapters.canonical import read_canonical
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.adapters.safetensors_file import FilePart
from serve_app.engine.admission.child import NICENESS
from serve_app.engine.admission.lane import BOOT, Child, ChildWorker
from serve_app.engine.admission.process import AdmissionProcess
from serve_app.engine.base.manifest import BaseManifest, manifest_of
from serve_app.refusals import AdmissionTimedOut, MalformedFile, NonFinite, ShapeMismatch
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import lora, write
from tests.tiny_forms import Form, put
from tests.tiny_words import embeddings

# Starts the child as a lane does, and imports nothing of ours itself.
PARENT = """
import json, os, subprocess, sys, time
boot, setup = json.loads(sys.stdin.readline())
command = [sys.executable, "-c", boot, json.dumps(sys.path)]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdin.write(json.dumps({**setup, "parent": os.getpid()}) + "\\n")
child.stdin.flush()
assert json.loads(child.stdout.readline()) == {}
print(child.pid, flush=True)
time.sleep(600)
"""


# Who waits for whom does not depend on what is read: this child reads files whole, with all else as in the real one's
# protocol, and starts in a moment where that one imports torch.
LIGHT = """
import json, os, sys
setup = json.loads(sys.stdin.readline())
assert setup["parent"] == os.getppid()
print(json.dumps({}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answer = {}
    with open(asked["sources"][0][0], "rb") as file:
        if not file.read():
            answer = {"error": "MalformedFile", "reason": "its file is empty"}
    if not answer:
        open(asked["target"], "w").close()
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def manifest() -> BaseManifest:
    return manifest_of(tiny_pipeline("sd15"))


@pytest.fixture(scope="module")
def admission(manifest: BaseManifest) -> Iterator[AdmissionProcess]:
    process = AdmissionProcess(manifest, AdapterLimits())
    yield process
    process.close()


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engine.admission.lane.BOOT", LIGHT)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put(tmp_path, "adapter", Form(lora(tiny_pipeline("sd15"))))


def wait_until_reading(admission: AdmissionProcess, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while admission.reading is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_gone(pid: int, timeout_s: float = 120.0) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout_s)


async def test_what_is_admitted_equals_what_is_read_here(
    admission: AdmissionProcess, manifest: BaseManifest, source: Path, tmp_path: Path
) -> None:
    await admission.admit(source, "owner/adapter", tmp_path / "canonical")
    here, there = parse_adapter(source, "x", manifest, AdapterLimits()), read_canonical(tmp_path / "canonical")
    assert (here.digest, here.coverage) == (there.digest, there.coverage)


async def test_refusals_come_through_with_their_kind_and_reason(admission: AdmissionProcess, tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    bad = {key: torch.full_like(tensor, float("nan")) for key, tensor in tensors.items()}
    with pytest.raises(NonFinite, match="adapter owner/nan is refused: layer unet.* has NaN or infinite values"):
        await admission.admit(put(tmp_path, "nan", Form(bad)), "owner/nan", tmp_path / "canonical")
    wide = {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in tensors.items()}
    with pytest.raises(ShapeMismatch, match="owner/wide"):
        await admission.admit(put(tmp_path, "wide", Form(wide)), "owner/wide", tmp_path / "canonical")
    assert not (tmp_path / "canonical").exists()


async def test_a_file_that_vanished_is_refused_without_its_path(admission: AdmissionProcess, tmp_path: Path) -> None:
    with pytest.raises(MalformedFile) as refusal:
        await admission.admit(tmp_path / "gone.safetensors", "owner/gone", tmp_path / "canonical")
    assert str(tmp_path) not in str(refusal.value)


async def test_many_ask_at_once_and_one_child_answers(
    admission: AdmissionProcess, source: Path, tmp_path: Path
) -> None:
    await asyncio.gather(*(admission.admit(source, "a/b", tmp_path / f"canonical-{n}") for n in range(8)))
    assert all((tmp_path / f"canonical-{number}").exists() for number in range(8))
    assert len([child for child in psutil.Process().children() if child.pid == admission.pid]) == 1


async def test_an_asker_that_leaves_does_not_upset_the_next(
    admission: AdmissionProcess, source: Path, tmp_path: Path
) -> None:
    asking = asyncio.ensure_future(admission.admit(source, "a/b", tmp_path / "first"))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await admission.admit(source, "a/b", tmp_path / "second")
    assert (tmp_path / "second").exists()


async def test_the_child_has_one_thread_of_torch_and_a_low_priority(
    admission: AdmissionProcess, source: Path, tmp_path: Path
) -> None:
    await admission.admit(source, "a/b", tmp_path / "canonical")
    assert admission.pid is not None
    assert psutil.Process(admission.pid).nice() == min(19, psutil.Process().nice() + NICENESS)


async def test_a_file_that_takes_too_long_costs_its_child_and_the_next_gets_another(
    light: None, manifest: BaseManifest, source: Path, tmp_path: Path
) -> None:
    """A pipe that nobody writes to is a file that is never read to its end."""
    endless = tmp_path / "endless.safetensors"
    os.mkfifo(endless)
    admission = AdmissionProcess(manifest, AdapterLimits(admission_timeout_s=300.0))
    try:
        await admission.admit(source, "a/b", tmp_path / "canonical")
        first = admission.pid
        # For this file alone: an ordinary one may take as long on a busy machine.
        admission._limit_s = 3.0
        with pytest.raises(AdmissionTimedOut, match="longer than 3 s"):
            await admission.admit(endless, "owner/endless", tmp_path / "never")
        admission._limit_s = 300.0
        await admission.admit(source, "a/b", tmp_path / "again")
        assert admission.pid != first
        assert first is not None
        assert not psutil.pid_exists(first)
    finally:
        admission.close()


# Nothing but the end of the test ever answers for an endless file.
@pytest.mark.timeout(1200)
async def test_a_file_that_hangs_does_not_hold_up_the_others(
    light: None, manifest: BaseManifest, source: Path, tmp_path: Path
) -> None:
    """The second child is still reading it when the first has answered for everybody else."""
    endless = [tmp_path / f"endless-{number}.safetensors" for number in range(2)]
    for path in endless:
        os.mkfifo(path)
    admission = AdmissionProcess(manifest, AdapterLimits(admission_timeout_s=3000.0), patience_s=0.2)
    try:
        await admission.admit(source, "a/b", tmp_path / "canonical")
        first = admission.pid
        hostile = [asyncio.ensure_future(admission.admit(path, "a/endless", tmp_path / "never")) for path in endless]
        await asyncio.to_thread(wait_until_reading, admission)
        asking = [asyncio.ensure_future(admission.admit(source, "a/b", tmp_path / f"canonical-{n}")) for n in range(3)]
        while admission._second._asked < len(hostile):  # noqa: ASYNC110 - the lane tells nobody
            await asyncio.sleep(0.01)
        # Ordinary files may take as long on a busy machine.
        admission._first._patience_s = 3000.0
        await asyncio.gather(*asking)
        assert not any(asking.done() for asking in hostile)
        assert first is not None
        assert not psutil.pid_exists(first)
        # The second child waits for the first of them; once that has an end, it is answered for.
        await asyncio.to_thread(lambda: endless[0].open("wb").close())
        with pytest.raises(MalformedFile, match="its file is empty"):
            await hostile[0]
        assert not hostile[1].done()
    finally:
        admission.close()
    with pytest.raises((RuntimeError, MalformedFile, asyncio.CancelledError)):
        await hostile[1]


async def test_a_slow_file_that_nobody_waits_behind_keeps_its_child(
    light: None, manifest: BaseManifest, source: Path, tmp_path: Path
) -> None:
    endless = tmp_path / "endless.safetensors"
    os.mkfifo(endless)
    admission = AdmissionProcess(manifest, AdapterLimits(admission_timeout_s=300.0), patience_s=0.1)
    try:
        await admission.admit(source, "a/b", tmp_path / "canonical")
        children = psutil.Process().children()
        admission._limit_s = 2.0
        with pytest.raises(AdmissionTimedOut, match="longer than 2 s"):
            await admission.admit(endless, "owner/endless", tmp_path / "never")
        assert not set(psutil.Process().children()) - set(children)
    finally:
        admission.close()


async def test_files_that_are_one_adapter_are_admitted_together(
    admission: AdmissionProcess, source: Path, tmp_path: Path
) -> None:
    tensors = load_file(source)
    parts = [FilePart(tmp_path / f"{n}.safetensors") for n in range(2)]
    for n, part in enumerate(parts):
        save_file(dict(list(tensors.items())[n::2]), part.path)
    await admission.admit(parts, "a/b", tmp_path / "together")
    await admission.admit(source, "a/b", tmp_path / "one")
    together, one = (read_canonical(tmp_path / name) for name in ("together", "one"))
    assert together.coverage == one.coverage
    assert all(torch.equal(first, other) for first, other in zip(together.tensors(), one.tensors(), strict=True))
    with pytest.raises(MalformedFile, match="lacks one of its two factors"):
        await admission.admit(parts[:1], "a/b", tmp_path / "half")


async def test_the_words_beside_an_adapter_are_admitted_with_it(
    admission: AdmissionProcess, source: Path, tmp_path: Path
) -> None:
    beside = write(tmp_path / "adapter_emb.safetensors", embeddings("sd15"))
    await admission.admit(source, "owner/adapter", tmp_path / "canonical", beside)
    assert read_canonical(tmp_path / "canonical").ti_tokens["text_encoder"].shape == (2, 32)
    wide = write(tmp_path / "wide_emb.safetensors", {"clip_l": torch.ones(2, 33)})
    with pytest.raises(ShapeMismatch, match="adapter owner/wide is refused: its embeddings clip_l"):
        await admission.admit(source, "owner/wide", tmp_path / "other", wide)


async def test_a_child_that_dies_over_a_file_is_replaced(
    light: None, manifest: BaseManifest, source: Path, tmp_path: Path
) -> None:
    admission = AdmissionProcess(manifest, AdapterLimits())
    try:
        await admission.admit(source, "a/b", tmp_path / "canonical")
        assert admission.pid is not None
        os.kill(admission.pid, signal.SIGSTOP)
        asking = asyncio.ensure_future(admission.admit(source, "owner/crash", tmp_path / "never"))
        await asyncio.to_thread(wait_until_reading, admission)
        os.kill(admission.pid, signal.SIGKILL)
        with pytest.raises(MalformedFile, match="the process that read it died"):
            await asking
        await admission.admit(source, "a/b", tmp_path / "again")
    finally:
        admission.close()


def test_the_child_dies_with_a_parent_that_is_killed(manifest: BaseManifest) -> None:
    setup = {"manifest": manifest.to_json(), "limits": AdapterLimits().model_dump(mode="json")}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps([BOOT, setup]) + "\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    wait_until_gone(child)
    assert not psutil.pid_exists(child)


async def test_closing_ends_the_child_and_refuses_more(
    light: None, manifest: BaseManifest, source: Path, tmp_path: Path
) -> None:
    admission = AdmissionProcess(manifest, AdapterLimits())
    await admission.admit(source, "a/b", tmp_path / "canonical")
    child = admission.pid
    admission.close()
    assert child is not None
    assert not psutil.pid_exists(child)
    with pytest.raises(RuntimeError):
        await admission.admit(source, "a/b", tmp_path / "never")


async def test_the_process_that_reads_files_is_given_no_token_nor_anything_else_of_ours(
    light: None, manifest: BaseManifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "LORAPLEX_API_KEY"):
        monkeypatch.setenv(name, "a-secret-of-ours")
    process = AdmissionProcess(manifest, AdapterLimits())
    try:
        await process.admit(source, "a/b", tmp_path / "canonical")
        assert process.pid is not None
        given = psutil.Process(process.pid).environ()
        arguments = " ".join(psutil.Process(process.pid).cmdline())
    finally:
        process.close()
    assert "a-secret-of-ours" not in f"{given} {arguments}"
    assert not [name for name in given if name.startswith(("AWS_", "RAY_", "LORAPLEX_")) or "KEY" in name]


def test_a_lane_that_is_closed_while_its_child_starts_reads_nothing_more(
    light: None, manifest: BaseManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "endless.safetensors"
    os.mkfifo(endless)
    is_starting, may_start = threading.Event(), threading.Event()
    started: list[Child] = []

    class Late(Child):
        def __init__(self) -> None:
            is_starting.set()
            may_start.wait()
            super().__init__()
            started.append(self)

    monkeypatch.setattr("serve_app.engine.admission.lane.Child", Late)
    limits = AdapterLimits().model_dump(mode="json")
    setup = {"manifest": manifest.to_json(), "limits": limits, "parent": os.getpid()}
    lane = ChildWorker(setup, patience_s=1e9, is_lasting=True)
    asking = lane.ask({"source": str(endless), "name": "a/b", "target": str(tmp_path / "never")}, 1e9)
    is_starting.wait()
    closing = threading.Thread(target=lane.close)
    closing.start()
    while not lane._thread._shutdown:
        time.sleep(0.01)
    may_start.set()
    closing.join(120)
    is_closed = not closing.is_alive()
    started[0].kill()
    assert is_closed
    with pytest.raises(RuntimeError, match="closed"):
        asking.result(0)
