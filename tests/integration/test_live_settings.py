"""What a running service takes over from its Serve file: settings and bases change, and nothing else starts again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.client import ServeControllerClient
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.local_service import application_of, delete_service
from serve_app.cli.bases.changes import Change, with_base, without_base
from serve_app.config import digest_of
from serve_app.deployments.front.own_routes import INGRESS_NAME
from tests.faults.breaking import replica_pids, until
from tests.serve_files import applications
from tests.service import Service, base_settings, processes_of
from tests.written_files import logs

NAME = "live"
KEPT, OTHER, ADDED, NEXT = "demo/sd15", "demo/sdxl", "demo/third", "demo/next"
KEY = "a-key-of-the-test"
PAGE = "https://pages.example"
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
REFUSED = b"not taken over, the settings before hold on: ingress.replicas: goes into args"


def base(base_id: str, **settings: Any) -> dict[str, Any]:
    source = {"embedded": OTHER if base_id == OTHER else KEPT}
    return base_settings(base_id, source=source, application=application_of(base_id, NAME), **settings)


def _client() -> ServeControllerClient:
    client = _get_global_client()
    assert client is not None, "Serve runs"
    return client


class Deployed:
    """A service from a Serve file, which can be given another `user_config` and other bases."""

    def __init__(self, port: int, cache: Path) -> None:
        self.service = Service(f"http://127.0.0.1:{port}/{NAME}")
        self._settings = {
            "service": NAME,
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "cache_dir": str(cache),
            "ingress": {"replicas": 1, "num_cpus": 0.1},
        }
        self._bases = [base(KEPT)]

    def deploy(
        self, user_config: dict[str, Any], bases: list[dict[str, Any]] | None = None, *, missing: str = ""
    ) -> None:
        """Do what `serve deploy` does with the file; the application of a `missing` base is not in it."""
        self._bases = self._bases if bases is None else bases
        ingress, *others = applications({**self._settings, "bases": self._bases}, NAME)
        ingress["route_prefix"] = f"/{NAME}"
        ingress["deployments"][0]["user_config"] |= user_config
        here = [one for one in others if one["args"]["base"]["id"] != missing]
        self._carry_out({"applications": [ingress, *here]})

    def change(self, change_of: Callable[[dict[str, Any]], Change]) -> None:
        """Do what `loraplex bases` does, with what Serve says without a dashboard."""
        self._carry_out(change_of(_client().get_serve_details()).serve_file)

    def _carry_out(self, serve_file: dict[str, Any]) -> None:
        _client().deploy_apps(ServeDeploySchema.model_validate(serve_file))

    def allowed(self) -> str | None:
        """Return the page that may read the service's answers, None where this one may not."""
        return self.service.http.get("/health", headers={"origin": PAGE}).headers.get("access-control-allow-origin")

    def answers(self, model: str) -> tuple[int, str]:
        """Return the status and the text of one request."""
        reply = self.service.ask("a star", model=model, num_inference_steps=2)
        return reply.status_code, "" if reply.status_code == 200 else reply.text

    @property
    def processes(self) -> set[int]:
        return {process.pid for process in processes_of(f"ServeReplica:{NAME}")}


@pytest.fixture(scope="module")
def deployed(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    running = Deployed(cluster, tmp_path_factory.mktemp("cache"))
    yield running
    delete_service(NAME)


@contextmanager
def load(url: str, model: str = "") -> Iterator[Counter[int]]:
    """Ask one time after another until the end of the block; count the statuses, of which there is one at first."""
    statuses, is_over, caller = Counter[int](), threading.Event(), Service(url)
    caller.http.headers["authorization"] = f"Bearer {KEY}"

    def ask_on() -> None:
        while not is_over.is_set():
            statuses[caller.ask("a star", model=model, seed=1, num_inference_steps=2).status_code] += 1

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        until(lambda: statuses[200] > 0, "an image")
        yield statuses
    finally:
        is_over.set()
        asking.join()


def test_limits_origins_and_keys_change_under_load_and_no_replica_starts_again(deployed: Deployed) -> None:
    deployed.deploy({"ingress": {"max_body": "1KiB"}})
    service = deployed.service
    until(lambda: service.http.get("/health").status_code == 200, "ready")
    assert service.ask("a star" + " " * 2000).status_code == 413
    before = deployed.processes
    assert len(before) == 3, "an ingress, a base and the keeper"
    with load(service.url) as statuses:
        deployed.deploy({"ingress": {"cors_origins": [PAGE]}})
        until(lambda: deployed.allowed() == PAGE, "the new origin")
        assert service.ask("a star" + " " * 2000, num_inference_steps=2).status_code == 200, "args' limit again"

        deployed.deploy({"ingress": {"cors_origins": [], "replicas": 7}})
        until(lambda: any(REFUSED in log for log in logs(f"*{NAME}_{INGRESS_NAME}*").values()), "the refusal")
        assert deployed.allowed() == PAGE
        key = {"name": "ops", "sha256": digest_of(KEY)}
        deployed.deploy({"ingress": {"cors_origins": [PAGE]}, "auth": {"keys": [key]}})
        until(lambda: service.ask("a star", num_inference_steps=2).status_code == 401, "the key")
        assert deployed.allowed() == PAGE
        drawn = statuses[200]
        until(lambda: statuses[200] > drawn, "an image for the key")
    assert set(statuses) == {200}
    assert deployed.processes == before
    deployed.deploy({})


def test_bases_are_added_changed_and_removed_under_load_and_no_other_process_starts_again(deployed: Deployed) -> None:
    deployed.deploy({}, [base(KEPT), base(OTHER)])
    until(lambda: deployed.answers(OTHER)[0] == 200, "two bases")
    (changed,) = replica_pids("base-demo--sdxl", app=NAME)
    untouched = deployed.processes - {changed}
    with ExitStack() as loads:
        kept, other = (loads.enter_context(load(deployed.service.url, model)) for model in (KEPT, OTHER))

        threads = {"num_cpus": 0.1, "torch_threads": 1, "max_batch_images": 1}
        deployed.deploy({"ingress": {"cors_origins": [PAGE]}}, [base(KEPT), base(OTHER, replica=threads)])
        deployed.change(lambda details: with_base(details, base(ADDED), NAME))
        until(lambda: deployed.answers(ADDED)[0] == 200, "the base that was added")
        until(lambda: changed not in (now := replica_pids("base-demo--sdxl", app=NAME)) and len(now) == 1, "a new one")
        drawn = other[200]
        until(lambda: other[200] > drawn, "an image of the base that was changed")
        assert set(other) == {200}
        (added,) = replica_pids("base-demo--third", app=NAME)

        deployed.change(lambda details: without_base(details, OTHER, NAME))
        until(lambda: other[404] > 0, "the refusal of the base that was removed")
        until(lambda: deployed.processes == untouched | {added}, "the end of its replica")
    assert set(kept) == {200}
    assert set(other) == {200, 404}
    assert f"base {OTHER} is not served any more; served are {KEPT}, {ADDED}" in deployed.answers(OTHER)[1]

    # It comes back at zero, where no replica tells the ingress that it is there again.
    deployed.deploy({}, [base(KEPT), base(ADDED), base(OTHER, autoscaling={"min_replicas": 0})], missing=OTHER)
    until(lambda: deployed.answers(OTHER)[0] == 503, "the base to be listed")
    assert f"there is no application {NAME}-demo--sdxl" in deployed.answers(OTHER)[1]
    deployed.deploy({})
    until(lambda: deployed.answers(OTHER)[0] == 200, "the base that came back")
    assert deployed.processes >= untouched | {added}


def held_in_memory() -> dict[str, str]:
    """Return the rights of mapped files of weights, by the parts of a base, in the process that holds them."""
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in processes_of("ray::IdleWeights")]
    lines = [line.split() for text in maps for line in text.splitlines() if line.endswith(".safetensors")]
    return {Path(line[-1]).parent.name: line[1] for line in lines}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system has no /proc")
def test_the_weights_of_a_base_stay_in_memory_while_its_application_is_there(deployed: Deployed) -> None:
    idle = {"num_cpus": 0.1, "torch_threads": 1, "idle": "host"}
    deployed.deploy({}, [base(KEPT), base(ADDED, replica=idle)])
    until(lambda: deployed.answers(ADDED)[0] == 200, "the base that stays in memory")
    until(lambda: {"unet", "vae", "text_encoder"} <= set(held_in_memory()), "its files in memory")
    assert not any("w" in rights for rights in held_in_memory().values()), "none can be written"
    deployed.deploy({}, [base(KEPT)])
    until(lambda: not processes_of("ray::IdleWeights"), "the end of what held it")


def test_a_canary_draws_its_share_and_is_taken_back_and_no_other_process_starts_again(deployed: Deployed) -> None:
    def drawn_by() -> Counter[str]:
        replies = [deployed.service.ask("a star", model=KEPT, seed=seed, num_inference_steps=2) for seed in range(16)]
        assert {reply.status_code for reply in replies} == {200}
        return Counter(reply.headers["x-base-model"] for reply in replies)

    deployed.deploy({}, [base(KEPT)])
    until(lambda: deployed.answers(OTHER)[0] != 200 and deployed.answers(KEPT)[0] == 200, "one base")
    until(lambda: len(deployed.processes) == 3, "an ingress, a base and the keeper")
    before = deployed.processes
    with load(deployed.service.url, KEPT) as statuses:
        deployed.deploy({"canaries": {KEPT: {"base": NEXT, "share": 0.5}}}, [base(KEPT), base(NEXT)])
        until(lambda: set(drawn_by()) == {KEPT, NEXT}, "the share of the canary")
        (canary,) = [row for row in deployed.service.http.get("/v1/bases").json() if row["canary_of"]]
        assert (canary["id"], canary["canary_of"], canary["share"]) == (NEXT, KEPT, 0.5)

        deployed.deploy({})
        until(lambda: set(drawn_by()) == {KEPT}, "the end of its share")
        deployed.deploy({}, [base(KEPT)])
        until(lambda: deployed.processes == before, "the end of its replica")
    assert set(statuses) == {200}
