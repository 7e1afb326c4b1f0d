"""A canary draws its share of the requests for its base, and none that it would refuse."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.config import AppConfig, Environment, IngressArguments
from serve_app.core import AdapterRef, GenerationRequest, GenerationResult, PixelImage, Timings, UnresolvedRequest
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.ingress.canaries import Canaries, is_drawn
from serve_app.deployments.ingress.dispatch import ServiceGateway
from serve_app.errors import OutOfBounds
from serve_app.live_settings import with_live_settings

BASE, NEXT, OTHER = "demo/sd15", "demo/sd15-next", "demo/sdxl"
SEPIA = "demo/sd15-sepia"


def base(base_id: str, **settings: Any) -> dict[str, Any]:
    embedded = OTHER if base_id == OTHER else BASE
    return {"id": base_id, "source": {"embedded": embedded}, "autoscaling": {"min_replicas": 1}, **settings}


class Asking:
    """An ingress with two bases and a canary, whose requests are answered by nobody; `drawn` are those sent on."""

    def __init__(
        self, folder: Path, share: float, canary: Mapping[str, Any] | None = None, *, runs: bool = True
    ) -> None:
        config = AppConfig.model_validate(
            {
                "bases": [base(BASE), base(OTHER), base(NEXT, **(canary or {}))],
                "adapters": {"embedded": True, "hub": {"enabled": False}},
                "canaries": {BASE: {"base": NEXT, "share": share}},
            }
        )
        sources = build_sources(config, Environment(cache_dir=folder), embedded_root=embedded_root())
        self.catalog = Catalog(config, sources, clock=time.monotonic)
        self.drawn: list[GenerationRequest] = []

        async def dispatch(request: GenerationRequest) -> GenerationResult:
            self.drawn.append(request)
            return GenerationResult("r", request.base_id, (PixelImage(1, 1, b""),), (5,), (), Timings(), 0.1, "cpu", 1)

        async def is_running(base_id: str) -> bool:
            return runs

        self.gateway = ServiceGateway(
            self.catalog,
            cast(Any, dispatch),
            registry=cast(Any, None),
            draw_seed=lambda: 5,
            is_ready=cast(Any, None),
            canaries=Canaries(config, is_running=is_running, family_of=self.catalog.family),
            on_refusal=lambda code: None,
        )

    async def bases(self, **asked: Any) -> list[str]:
        """Return which bases drew a request with sixteen seeds."""
        self.drawn.clear()
        for seed in range(16):
            await self.gateway.generate(UnresolvedRequest("a cat", seed=seed, **asked), request_id="r")
        return [request.base_id for request in self.drawn]


def test_a_share_is_a_share_and_grows_by_more_requests_alone() -> None:
    drawn = {
        share: {seed for seed in range(4000) if is_drawn(NEXT, share, seed=seed, prompt="")} for share in (0.1, 0.3)
    }
    assert len(drawn[0.1]) == pytest.approx(400, abs=60)
    assert len(drawn[0.3]) == pytest.approx(1200, abs=100)
    assert drawn[0.1] < drawn[0.3]


async def test_its_share_of_requests_is_drawn_by_the_canary_with_their_adapters(tmp_path: Path) -> None:
    asking = Asking(tmp_path, 0.5)
    sepia = (AdapterRef(SEPIA, 1.0),)
    for asked in ({"model": BASE}, {"model": SEPIA}, {"model": BASE, "adapters": sepia}, {"adapters": sepia}):
        first = await asking.bases(**asked)
        assert set(first) == {BASE, NEXT}, asked
        used = {tuple(use.spec.id for use in request.adapters) for request in asking.drawn}
        assert used == {() if asked == {"model": BASE} else (SEPIA,)}, "all of its adapters, whichever draws"
        assert await asking.bases(**asked) == first, "a request that is sent again is drawn by the same base"


async def test_who_names_the_canary_or_another_base_gets_that(tmp_path: Path) -> None:
    asking = Asking(tmp_path, 0.5)
    assert set(await asking.bases(model=NEXT, adapters=(AdapterRef(SEPIA, 1.0),))) == {NEXT}
    assert set(await asking.bases(model=OTHER)) == {OTHER}


async def test_a_canary_that_does_not_run_draws_nothing(tmp_path: Path) -> None:
    assert set(await Asking(tmp_path, 0.99, runs=False).bases(model=BASE)) == {BASE}


async def test_what_a_canary_refuses_its_base_draws(tmp_path: Path) -> None:
    asking = Asking(tmp_path, 0.99, {"limits": {"max_steps": 4}, "defaults": {"steps": 2}})
    assert NEXT in await asking.bases(model=BASE, steps=3)
    assert set(await asking.bases(model=BASE, steps=5)) == {BASE}
    with pytest.raises(OutOfBounds):
        await asking.bases(model=NEXT, steps=5)


async def test_a_canary_of_another_family_draws_nothing_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asking = Asking(tmp_path, 0.99, {"source": {"embedded": OTHER}})
    assert set(await asking.bases(model=BASE)) == {BASE}
    (said,) = {record.getMessage() for record in caplog.records if record.levelname == "ERROR"}
    assert said.startswith(f"{NEXT} draws nothing for {BASE}")


@pytest.mark.parametrize(
    ("canaries", "message"),
    [
        ({BASE: {"base": "demo/sd15-nxt", "share": 0.1}}, "is not the id of a base; did you mean 'demo/sd15-next'"),
        ({"demo/sd1": {"base": NEXT, "share": 0.1}}, "'demo/sd1' is not the id of a base"),
        ({BASE: {"base": NEXT, "share": 1.0}}, "share"),
        ({BASE: {"base": NEXT, "share": 0.0}}, "share"),
        ({BASE: {"base": NEXT, "share": 0.1}, NEXT: {"base": OTHER, "share": 0.1}}, "has a canary, and cannot be one"),
        ({BASE: {"base": NEXT, "share": 0.1}, OTHER: {"base": NEXT, "share": 0.1}}, "the canary of two bases"),
        ({OTHER: {"base": BASE, "share": 0.1}}, "is the default base"),
        ({BASE: {"base": OTHER, "share": 0.1}}, "needs min_replicas of 1 or more"),
    ],
)
def test_canaries_that_could_not_draw_are_refused(canaries: dict[str, Any], message: str) -> None:
    bases = [base(BASE), base(NEXT), base(OTHER, autoscaling={"min_replicas": 0})]
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        with_live_settings(IngressArguments(), {"bases": bases, "canaries": canaries})
