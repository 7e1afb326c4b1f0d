"""Our own way of changing an adapter: file, canonical file, host memory, device, fused buffers.

Owns the order in which the engine's parts are called, so that it can be said what was timed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from serve_app.bench.machine.stream import ImageSteps
from serve_app.bench.measuring.options import SwapOptions
from serve_app.bench.measuring.timing import Step, Stopwatch
from serve_app.bench.models.adapter_files import AdapterFiles
from serve_app.bench.models.denoisers import Denoiser, outline_of
from serve_app.engine.adapters.canonical import read_canonical, write_canonical
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import manifest_of
from serve_app.engine.weights.device_cache import moved_to
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.side_stream import SideStream
from serve_app.settings import AdapterLimits

NAME = "benchmark"
Fused = dict[str, Tensor]


class LoraplexSwap:
    """Two adapters, A and B, on a denoiser whose own weights are never written.

    Invariant: outside its methods the base is bound.
    """

    def __init__(
        self, denoiser: Denoiser, files: AdapterFiles, options: SwapOptions, stopwatch: Stopwatch[Step]
    ) -> None:
        self._files, self._options, self._stopwatch = files, options, stopwatch
        self._device = torch.device(options.device)
        self._manifest = manifest_of(denoiser.pipeline)
        self._parameters = dict(denoiser.module.named_parameters())
        component = denoiser.architecture.component
        self._second = self._admit_second()
        # Both adapters of a round fit, none of the round before.
        cache_bytes = 2 * self._second.size_bytes
        self._weights = FusedWeights({component: denoiser.module}, device_cache_bytes=cache_bytes)
        # The same layers on torch's meta device, which takes the way of a GPU and computes nothing.
        self._hollow = FusedWeights({component: outline_of(options).module})

    @property
    def adapter_bytes(self) -> int:
        """The bytes of one adapter in host memory."""
        return self._second.size_bytes

    def admit(self) -> ParsedAdapter:
        """Take A's file through every stage to host memory; read it in kohya's spelling too."""
        canonical = self._files.first.with_suffix(".canonical")
        with self._stopwatch.timed(Step.READ):
            adapter = self._read(self._files.first)
        with self._stopwatch.timed(Step.WRITE_CANONICAL):
            write_canonical(adapter, canonical)
        del adapter
        with self._stopwatch.timed(Step.READ_CANONICAL):
            first = self._read_canonical(canonical)
        if self._files.kohya is not None:
            with self._stopwatch.timed(Step.READ_KOHYA):
                self._read(self._files.kohya)
        return first

    def first(self, adapter: ParsedAdapter) -> None:
        """Base -> A -> B and back, for the first time in this process."""
        with self._stopwatch.timed(Step.FIRST_SWAP):
            self._weights.apply([(adapter, 1.0)])
        self.change(adapter, 0)

    def change(self, first: ParsedAdapter, round_number: int) -> list[Fused]:
        """Base -> A -> B -> B prepared again -> base.

        Return B's fused weights, by name, once for each way in which they came about; they stay until the next round.
        """
        # As adapters of new digests they are not on the device yet.
        first, second = _renamed(first, round_number), _renamed(self._second, round_number)
        with self._stopwatch.timed(Step.APPLY):
            self._weights.apply([(first, 1.0)])
        with self._stopwatch.timed(Step.SWAP):
            self._weights.apply([(second, 1.0)])
        self._from_device(first, second)
        self._hollow.apply([(first, 1.0)])
        with self._stopwatch.timed(Step.CALLS, counts_device=False):
            self._hollow.apply([(second, 1.0)])
        fused = [self._bound()]
        if self._options.is_preparing:
            fused.append(self._prepared(_renamed(second, round_number)))
        with self._stopwatch.timed(Step.RESTORE):
            self._weights.apply([])
        return [{name: data for name, data in bound.items() if self._is_fused_buffer(name, data)} for bound in fused]

    def stream(self, images: ImageSteps, first: ParsedAdapter) -> None:
        """Run images in turn: with the last one's adapter, with the other one, and with one prepared beforehand."""
        threads = self._options.threads
        self._weights.apply([(first, 1.0)])
        images.run()
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as beside:
            for _ in range(self._options.repeats):
                with self._stopwatch.timed(Step.STEADY_IMAGE):
                    self._weights.apply([(first, 1.0)])
                    images.run()
                with self._stopwatch.timed(Step.CHANGING_IMAGE):
                    self._weights.apply([(self._second, 1.0)])
                    images.run()
                if self._options.is_preparing:
                    self._prepared_image(images, first, beside)
                self._weights.apply([(first, 1.0)])
        self._weights.apply([])

    def _prepared_image(self, images: ImageSteps, adapter: ParsedAdapter, beside: ThreadPoolExecutor) -> None:
        """Run an image whose adapter is prepared already, while another thread prepares the next one's."""
        prepared = self._weights.prepare([(adapter, 1.0)])
        with self._stopwatch.timed(Step.PREPARED_IMAGE):
            self._weights.bind(prepared)
            preparing = beside.submit(self._weights.prepare, [(self._second, 1.0)])
            images.run()
            preparing.result()

    def _from_device(self, first: ParsedAdapter, second: ParsedAdapter) -> None:
        """The way to the device alone; and the same swap with both adapters in the device's memory already.

        A CPU has no such way: there a copy in host memory is timed, with the calls that a GPU takes.
        """
        copies = SideStream(self._device)
        with self._stopwatch.timed(Step.TO_DEVICE):
            moved_to(second, self._device, copies)
            copies.wait_stream()
        if self._device.type != "cuda":
            return
        self._weights.apply([(first, 1.0)])
        with self._stopwatch.timed(Step.SWAP_RESIDENT):
            self._weights.apply([(second, 1.0)])

    def _prepared(self, adapter: ParsedAdapter) -> Fused:
        """The same swap in two halves: the work possible while an image runs, and the rest."""
        with self._stopwatch.timed(Step.PREPARE, counts_device=False):
            prepared = self._weights.prepare([(adapter, 1.0)])
        with self._stopwatch.timed(Step.BIND):
            self._weights.bind(prepared)
        return self._bound()

    def _admit_second(self) -> ParsedAdapter:
        canonical = self._files.second.with_suffix(".canonical")
        write_canonical(self._read(self._files.second), canonical)
        return self._read_canonical(canonical)

    def _read(self, path: Path) -> ParsedAdapter:
        return parse_adapter(path, NAME, self._manifest, AdapterLimits())

    def _read_canonical(self, path: Path) -> ParsedAdapter:
        return read_canonical(path, pinned=self._device.type == "cuda")

    def _bound(self) -> Fused:
        return {name: parameter.data for name, parameter in self._parameters.items()}

    def _is_fused_buffer(self, name: str, data: Tensor) -> bool:
        return data.data_ptr() != self._parameters[name].data_ptr()


def _renamed(adapter: ParsedAdapter, round_number: int) -> ParsedAdapter:
    return replace(adapter, digest=f"{adapter.digest}-{round_number}")
