"""The options of a benchmark, and why they may be refused.

Owns the choices. Must not import torch: the command line shows them before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from serve_app.errors import LoraplexError


class Model(StrEnum):
    """Which denoiser is built."""

    TINY = "tiny"
    SD15 = "sd15"
    SDXL = "sdxl"
    FLUX = "flux"


class Device(StrEnum):
    """Where it is built."""

    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """The dtype of its weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Targets(StrEnum):
    """Which layers the adapters change: q, k, v and out; or the blocks' linear layers; or convolutions and all."""

    ATTENTION = "attention"
    LINEAR = "linear"
    ALL = "all"


class Baseline(StrEnum):
    """The baseline measured beside ours."""

    DIFFUSERS = "diffusers"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SwapOptions:
    """One run of the swap benchmark.

    `steps` are denoiser steps for each image of the stream, and `latent` the height and width of its latents;
    None means few and small on a CPU, 25 and the model's own size on a GPU. `threads` are torch's on the CPU.
    `is_preparing` measures swaps that are prepared during the image before, which takes a second set of fused buffers.
    """

    model: Model = Model.TINY
    device: Device = Device.CPU
    dtype: DType = DType.BFLOAT16
    rank: int = 32
    targets: Targets = Targets.ATTENTION
    baseline: Baseline = Baseline.DIFFUSERS
    is_narrow: bool = False
    is_preparing: bool = True
    repeats: int = 3
    seed: int = 0
    threads: int = 1
    steps: int | None = None
    latent: int | None = None

    @property
    def buffer_sets_held(self) -> int:
        """How many fused copies of the touched weights there are."""
        return 2 if self.is_preparing else 1

    def command(self) -> str:
        """Return the command line that asks for this run."""
        words = ["loraplex bench swap", f"--model {self.model}", f"--device {self.device}", f"--dtype {self.dtype}"]
        words += [f"--rank {self.rank}", f"--targets {self.targets}", f"--baseline {self.baseline}"]
        words += ["--narrow"] if self.is_narrow else []
        words += [] if self.is_preparing else ["--no-prepare"]
        words += [f"--repeat {self.repeats}", f"--seed {self.seed}", f"--threads {self.threads}"]
        words += [f"--steps {self.steps}"] if self.steps is not None else []
        words += [f"--latent {self.latent}"] if self.latent is not None else []
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class StartOptions:
    """One run of the start benchmark, on a CPU; `threads` are torch's."""

    model: Model = Model.TINY
    dtype: DType = DType.BFLOAT16
    repeats: int = 3
    seed: int = 0
    threads: int = 1

    def command(self) -> str:
        """Return the command line that asks for this run."""
        words = ["loraplex bench start", f"--model {self.model}", f"--dtype {self.dtype}"]
        words += [f"--repeat {self.repeats}", f"--seed {self.seed}", f"--threads {self.threads}"]
        return " ".join(words)

    def as_swap(self) -> SwapOptions:
        """Return the options by which the denoiser is built."""
        return SwapOptions(self.model, dtype=self.dtype, seed=self.seed)


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """One run of the admission benchmark, on a CPU.

    Adapters are for `model`; the generation that goes on beside them is always the tiny one's, with `steps` denoiser
    steps each time, alone and beside.
    """

    model: Model = Model.TINY
    dtype: DType = DType.BFLOAT16
    rank: int = 32
    repeats: int = 15
    steps: int = 20
    latent: int = 32
    seed: int = 0

    def command(self) -> str:
        """Return the command line that asks for this run."""
        words = ["loraplex bench admission", f"--model {self.model}", f"--dtype {self.dtype}", f"--rank {self.rank}"]
        words += [f"--repeat {self.repeats}", f"--steps {self.steps}", f"--latent {self.latent}", f"--seed {self.seed}"]
        return " ".join(words)

    def as_swap(self) -> SwapOptions:
        """Return the options by which the adapters' denoiser is outlined and their files are written."""
        return SwapOptions(self.model, dtype=self.dtype, rank=self.rank, seed=self.seed)

    def running(self) -> SwapOptions:
        """Return the options of the generation beside."""
        return SwapOptions(dtype=DType.FLOAT32, steps=1, latent=self.latent, seed=self.seed)


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """One run of the pipeline benchmark.

    `size` is the side in pixels of the images of the demo bases, `steps` their denoiser steps; the narrow SDXL runs at
    latents of an eighth, its VAE at `vae_sides`. `dtype` is that of all parts; where it is not float32, the VAE is
    measured in float32 too.
    """

    device: Device = Device.CPU
    dtype: DType = DType.FLOAT32
    size: int = 128
    steps: int = 4
    repeats: int = 5
    seed: int = 0
    threads: int = 1
    vae_sides: tuple[int, ...] = (256, 512)

    def command(self) -> str:
        """Return the command line that asks for this run."""
        words = ["loraplex bench pipeline", f"--device {self.device}", f"--dtype {self.dtype}", f"--size {self.size}"]
        words += [f"--steps {self.steps}", f"--repeat {self.repeats}", f"--seed {self.seed}"]
        return " ".join([*words, f"--threads {self.threads}"])

    def narrow(self) -> SwapOptions:
        """Return the options by which the narrow SDXL is built and run."""
        return SwapOptions(
            Model.SDXL,
            self.device,
            self.dtype,
            is_narrow=True,
            seed=self.seed,
            threads=self.threads,
            steps=self.steps,
            latent=max(self.size // 8, 8),
        )


class BenchmarkRefused(LoraplexError):
    """The benchmark cannot run here as asked."""

    reason: str
    code = "benchmark_refused"
    template = "{reason}"
