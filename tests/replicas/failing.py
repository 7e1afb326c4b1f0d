"""A replica whose device fails when a prompt says so: everything of production, but for the fault.

A fault that ends a replica strikes once for each folder that is handed in: the next replica finds its mark and draws.
The mark, a file that is named like the prompt, also tells a test that the fault has struck.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray import serve

from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.core import GenerationRequest
from serve_app.deployments.replica.replica import BaseModelReplica
from serve_app.engine.drawing.pipeline import PassOutcome
from tests.replicas.wrapped import WrappedPipeline

HANGS, BREAKS, IS_FULL = "the device hangs", "the device breaks", "the device is full"
OVERFLOWS = "the numbers overflow"
HANGS_AFTER_STEP, HANGS_AFTER_PREVIEW = "the device hangs after a step", "the device hangs after a preview"
# It begins no pass before somebody leaves a mark of that name.
WAITS = "the device waits"


class Failing(WrappedPipeline):
    """A base's pipeline, whose `generate` does first what the prompt says."""

    def __init__(self, pipeline: Any, marks: Path) -> None:
        super().__init__(pipeline)
        self._marks = marks

    def generate(self, requests: Sequence[GenerationRequest], **callbacks: Any) -> PassOutcome:
        import torch

        for request in requests:
            if request.prompt == IS_FULL:
                torch.empty(1 << 60, dtype=torch.uint8)
            if request.prompt == HANGS and self._is_first(request):
                threading.Event().wait()
            if request.prompt == BREAKS and self._is_first(request):
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            while request.prompt == WAITS and not (self._marks / WAITS).exists():
                time.sleep(0.02)
            if request.prompt == HANGS_AFTER_STEP:
                callbacks["on_step"] = self._hanging_after(callbacks["on_step"], request)
            if request.prompt == HANGS_AFTER_PREVIEW:
                callbacks["on_preview"] = self._hanging_after(callbacks["on_preview"], request)
        with ExitStack() as ends:
            if requests[0].prompt == OVERFLOWS:
                hook = self._pipeline.components["unet"].register_forward_hook(_overflowing)
                ends.callback(hook.remove)
            return self._pipeline.generate(requests, **callbacks)

    def _hanging_after(self, tell: Callable[..., None], request: GenerationRequest) -> Callable[..., None]:
        def tell_and_hang(*told: Any) -> None:
            tell(*told)
            if self._is_first(request):
                threading.Event().wait()

        return tell_and_hang

    def _is_first(self, request: GenerationRequest) -> bool:
        mark = self._marks / request.prompt
        is_first = not mark.exists()
        mark.touch()
        return is_first


def _overflowing(unet: Any, given: Any, made: tuple[Any, ...]) -> tuple[Any, ...]:
    return (made[0] * float("inf"), *made[1:])


@serve.deployment
class FailingReplica(BaseModelReplica.func_or_class):
    """`BaseModelReplica` on a device that fails; its marks lie in the service's cache folder."""

    async def __init__(self, base: BaseModelConfig, config: AppConfig, environment: Environment, keeper: Any) -> None:
        await super().__init__(base, config, environment, keeper)
        self._worker._pipeline = Failing(self._worker._pipeline, environment.cache_dir)
