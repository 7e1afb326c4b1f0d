from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.api.app import create_app
from serve_app.catalog.replica_report import DayUsage, QuarantinedAdapters
from serve_app.config import IngressSettings
from serve_app.core import AdapterRef
from serve_app.errors import HubUnavailable, NameTaken, NotReady
from serve_app.settings import Canary
from tests.unit.api.fake_registry import BASE
from tests.unit.api.fakes import FakeGateway

SOURCE = {"uri": "acme/sketch"}


def test_the_list_says_what_is_known_of_each_adapter(client: TestClient) -> None:
    assert client.get("/v1/loras").json() == {
        "object": "list",
        "data": [
            {
                "id": "demo/sketch", "object": "lora", "revision": "0123abcd" * 5, "base_model": "demo/sdxl", "rank": 8,
                "size_bytes": 4096, "layers_matched": 48, "alias_of": None, "aliases": [],
                "resident": [{"replica": "r1", "tier": "applied"}], "hits": 3, "last_used": 1000.5,
                "instance_prompt": "sks", "has_picture": False, "quarantine": [],
                "defaults": {
                    "scale": 0.8, "num_inference_steps": None, "guidance_scale": None, "scheduler": None,
                    "scheduler_options": {}, "sigmas": None, "timesteps": None, "negative_prompt": None,
                    "trigger_words": "sks",
                },
            }
        ],
    }  # fmt: skip


def test_one_adapter_says_what_the_list_says_of_it_and_why_it_is_refused_for_now(
    client: TestClient, gateway: FakeGateway
) -> None:
    (listed,) = client.get("/v1/loras").json()["data"]
    assert client.get("/v1/loras/demo/sketch").json() == listed
    rows = gateway.registry.rows
    keys = ("acme/secret@1/f", rows["demo/sketch"].adapter.spec.key)
    held = QuarantinedAdapters(keys, (1.0, 8.0), "its last 2 tries failed: the image overflows", 59)
    rows["demo/sketch"] = replace(rows["demo/sketch"], quarantined=(("r1", held),))
    for row in (client.get("/v1/loras").json()["data"][0], client.get("/v1/loras/demo/sketch").json()):
        assert row["quarantine"] == [
            {"replica": "r1", "scale": 8.0, "beside": 1, "reason": held.reason, "retry_after_s": 59}
        ]
    missing = client.get("/v1/loras/demo/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_replicas_say_what_they_do_and_hold(client: TestClient) -> None:
    assert client.get("/v1/replicas").json() == {
        "object": "list",
        "data": [
            {
                "id": "r1", "base_model": "demo/sdxl", "state": "RUNNING", "device": "cpu", "waiting": 1, "running": 2,
                "applied": [{"id": "demo/sketch", "scale": {"denoiser": 0.5, "text_encoder": 1.0}}],
                "adapters": [{"id": "demo/sketch", "tier": "device"}], "backlog_s": 1.235,
            }
        ],
    }  # fmt: skip


def test_bases_say_what_a_form_must_know(client: TestClient) -> None:
    (base,) = client.get("/v1/bases").json()
    assert (base["id"], base["aliases"], base["is_default"]) == ("demo/sdxl", ["xl"], True)
    assert base["defaults"] == {"steps": 30, "guidance_scale": 7.5, "width": 512, "height": 512, "strength": 0.8}
    assert base["limits"]["max_pixels"] == 1024 * 1024
    assert base["limits"]["side_multiple"] == 16
    assert base["schedulers"] == ["DDIMScheduler", "Euler Karras"]
    assert base["tasks"] == {"text": ["negative_prompt"]}
    assert base["fused"] == [{"id": "me/turbo", "scale": 0.8}]
    assert (base["family"], base["tokens"], base["has_previews"]) == ("SDXL", 77, True)
    assert base["fuses_adapters"] is True
    assert (base["state"], base["since"], base["expected_s"], base["reason"]) == ("running", None, 0.0, None)


def test_a_canary_says_of_which_base_and_for_what_share(client: TestClient, gateway: FakeGateway) -> None:
    (base,) = client.get("/v1/bases").json()
    assert (base["canary_of"], base["share"]) == (None, None)
    gateway.registry.served = (BASE, BASE.model_copy(update={"id": "demo/next", "aliases": ()}))
    gateway.registry.shared = {"demo/sdxl": Canary(base="demo/next", share=0.05)}
    told = {base["id"]: (base["canary_of"], base["share"]) for base in client.get("/v1/bases").json()}
    assert told == {"demo/sdxl": (None, None), "demo/next": ("demo/sdxl", 0.05)}


def test_usage_is_listed_by_day_key_and_base(client: TestClient, gateway: FakeGateway) -> None:
    gateway.registry.drawn = (
        DayUsage("2026-11-30", "bob", "demo/sdxl", 1, 0.5),
        DayUsage("2026-11-29", "alice", "demo/sdxl", 3, 1.23456),
        DayUsage("2026-11-29", None, "demo/sdxl", 2, 1.0),
    )
    rows = client.get("/v1/usage").json()["data"]
    assert [(row["day"], row["key"]) for row in rows] == [
        ("2026-11-29", None), ("2026-11-29", "alice"), ("2026-11-30", "bob"),
    ]  # fmt: skip
    assert rows[1] == {
        "day": "2026-11-29", "key": "alice", "base_model": "demo/sdxl", "images": 3, "device_seconds": 1.235,
    }  # fmt: skip


@pytest.mark.parametrize(("days", "since"), [("1", "2026-11-30"), ("31", "2026-10-31"), ("400", "2025-10-27")])
def test_usage_is_read_for_so_many_days_with_today(gateway: FakeGateway, days: str, since: str) -> None:
    gateway.reset()
    client = TestClient(create_app(gateway, IngressSettings(), now=lambda: 1_796_083_199.0))
    assert client.get(f"/v1/usage?days={days}").status_code == 200
    assert gateway.registry.usage_asked == [since]


@pytest.mark.parametrize("days", ["0", "401", "-1", "all", "١", ""])
def test_usage_is_kept_for_so_many_days_alone(client: TestClient, days: str) -> None:
    reply = client.get("/v1/usage", params={"days": days})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "days")


def test_no_reply_names_a_place_on_this_machine(client: TestClient) -> None:
    for path in ("/v1/loras", "/v1/replicas", "/v1/bases"):
        assert "secret" not in client.get(path).text


def test_an_alias_is_added_and_listed(client: TestClient, gateway: FakeGateway) -> None:
    source = {"uri": "hf://acme/sketch", "revision": "v1", "filename": "a.safetensors"}
    reply = client.post("/v1/loras", json={"lora_name": "mine", "source": source})
    assert reply.status_code == 200
    assert (reply.json()["id"], reply.json()["alias_of"]) == ("mine", "acme/sketch")
    ((alias, may_replace, preload),) = gateway.registry.added
    assert alias.target == AdapterRef("acme/sketch", revision="v1", filename="a.safetensors")
    assert (alias.name, may_replace, preload) == ("mine", False, 0)
    assert [row["id"] for row in client.get("/v1/loras").json()["data"]] == ["demo/sketch", "mine"]


def test_an_alias_may_have_defaults_of_its_own(client: TestClient, gateway: FakeGateway) -> None:
    defaults = {
        "scale": 0.5, "num_inference_steps": 4, "guidance_scale": 0.0,
        "scheduler": "LCM", "scheduler_options": {"shift": 2}, "sigmas": None, "timesteps": None,
        "negative_prompt": "blurry", "trigger_words": "sks",
    }  # fmt: skip
    reply = client.post("/v1/loras", json={"lora_name": "mine", "source": SOURCE, "defaults": defaults})
    assert reply.status_code == 200
    ((alias, _, _),) = gateway.registry.added
    assert alias.target.defaults == AdapterDefaults(
        0.5, 4, 0.0, "LCM", (("shift", 2),), negative_prompt="blurry", trigger_words="sks"
    )


@pytest.mark.parametrize(("asked", "replicas"), [(None, 0), (False, 0), (True, 1), (0, 0), (3, 3)])
def test_an_alias_may_be_preloaded_on_so_many_replicas(
    client: TestClient, gateway: FakeGateway, asked: object, replicas: int
) -> None:
    body = {"lora_name": "mine", "source": SOURCE, "preload": asked, "replace": True}
    assert client.post("/v1/loras", json=body).status_code == 200
    ((_, may_replace, preload),) = gateway.registry.added
    assert (may_replace, preload) == (True, replicas)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"source": SOURCE}, "'lora_name' is missing"),
        ({"lora_name": "mine"}, "'source' is missing"),
        ({"lora_name": "mine", "source": "acme/sketch"}, "'source' must be an object"),
        ({"lora_name": "mine", "source": {"url": "x"}}, "unknown parameter 'source.url'; did you mean 'uri'?"),
        ({"lora_name": "mine", "source": {"uri": "/etc/passwd"}}, "never an address or a path"),
        ({"lora_name": "mine", "source": {"uri": "../../etc/passwd"}}, "never an address or a path"),
        ({"lora_name": "mine", "source": {"uri": "~/lora"}}, "never an address or a path"),
        ({"lora_name": "mine", "source": {"uri": "https://example.org/x.safetensors"}}, "never an address or a path"),
        ({"lora_name": "mine", "source": {"uri": "hf:///etc/passwd"}}, "never an address or a path"),
        ({"lora_name": "mine", "source": SOURCE, "preload": -1}, "'preload' is -1"),
        ({"lora_name": "mine", "source": SOURCE, "preload": "yes"}, "'preload"),
        ({"lora_name": "m", "source": SOURCE, "defaults": {"steps": 4}}, "unknown parameter 'defaults.steps'"),
        (
            {"lora_name": "m", "source": SOURCE, "defaults": {"num_inference_steps": 2, "timesteps": [1, 0]}},
            "takes one of 'num_inference_steps', 'sigmas' and 'timesteps'",
        ),
        ({"lora_name": "", "source": SOURCE}, "'lora_name' is 0 characters long"),
    ],
)
def test_an_alias_that_cannot_be_meant_is_refused(
    client: TestClient, gateway: FakeGateway, body: dict[str, Any], says: str
) -> None:
    reply = client.post("/v1/loras", json=body)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]
    assert gateway.registry.added == []


def test_a_preload_asks_for_one_replica_unless_it_says_more(client: TestClient, gateway: FakeGateway) -> None:
    for body in (None, {}, {"replicas": 4}):
        reply = client.post("/v1/loras/demo/sketch/preload", json=body)
        assert reply.status_code == 200
    assert reply.json() == {"id": "demo/sketch", "object": "lora", "asked": 4, "replicas": ["r1"]}
    assert gateway.registry.preloads == [("demo/sketch", 1), ("demo/sketch", 1), ("demo/sketch", 4)]
    assert client.post("/v1/loras/demo/sketch/preload", json={"replicas": 0}).status_code == 400


def test_a_removal_says_whether_a_name_is_gone(client: TestClient) -> None:
    client.post("/v1/loras", json={"lora_name": "me/mine", "source": SOURCE})
    assert client.delete("/v1/loras/me/mine").json() == {
        "id": "me/mine", "object": "lora", "deleted": True, "replicas": ["r1"],
    }  # fmt: skip
    assert client.delete("/v1/loras/demo/sketch").json()["deleted"] is False
    assert client.delete("/v1/loras/me/mine").status_code == 404


@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [
        (NameTaken("mine", "it is a base model"), 409, None),
        (NotReady("the registry"), 503, "5"),
        (HubUnavailable("acme/sketch", "the Hub cannot be reached", 7), 503, "7"),
    ],
)
def test_what_goes_wrong_is_told_in_the_shape_of_v1(
    client: TestClient, gateway: FakeGateway, failure: Exception, status: int, retry: str | None
) -> None:
    gateway.registry.failure = failure
    reply = client.post("/v1/loras", json={"lora_name": "mine", "source": SOURCE})
    assert reply.status_code == status
    assert reply.json()["error"]["message"] == str(failure)
    assert reply.headers.get("retry-after") == retry


def test_the_document_knows_the_registry(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/loras", "/v1/loras/{name}", "/v1/loras/{name}/preload", "/v1/replicas", "/v1/bases"} <= set(
        document["paths"]
    )
    body = document["paths"]["/v1/loras"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/NewLora"}
    assert {"NewLora", "LoraSource", "PreloadOrder", "Lora", "Replica", "Base"} <= set(
        document["components"]["schemas"]
    )
