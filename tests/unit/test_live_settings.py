import re
from typing import Any

import pytest
from pydantic import ByteSize

from serve_app.config import BaseModelConfig, IngressArguments
from serve_app.live_settings import with_live_settings

KEY = {"name": "ops", "sha256": "ab" * 32}
BASE = {"id": "demo/sd15", "source": {"embedded": "demo/sd15"}}
ARGUMENTS = IngressArguments.model_validate(
    {
        "shared": {"log_level": "WARNING"},
        "ingress": {"replicas": 3, "max_body": "2MiB"},
        "auth": {"keys": [KEY], "limits_redis": "redis://127.0.0.1:1/0"},
    }
)


def test_live_settings_replace_those_of_args_and_leave_the_rest() -> None:
    changes = {"ingress": {"cors_origins": ["https://a.example"]}, "auth": {"keys": []}}
    live = with_live_settings(ARGUMENTS, {"bases": [BASE], **changes})
    assert (live.ingress.cors_origins, live.ingress.max_body, live.ingress.replicas) == (
        ("https://a.example",), ByteSize(2 * 1024**2), 3,
    )  # fmt: skip
    assert (live.auth.keys, live.auth.limits_redis) == ((), ARGUMENTS.auth.limits_redis)
    assert (live.bases, live.log_level) == ((BaseModelConfig.model_validate(BASE),), "WARNING")
    assert with_live_settings(ARGUMENTS, {"bases": [BASE]}).auth == ARGUMENTS.auth


@pytest.mark.parametrize(
    ("user_config", "told"),
    [
        ({}, "bases: Field required"),
        ({"bases": [BASE | {"limit": {}}]}, "bases.0: unknown key 'limit'; did you mean 'limits'?"),
        ({"bases": [BASE], "default_base": "demo/sdxl"}, "default_base 'demo/sdxl' is not a base"),
        (
            {"registry": {}},
            "registry: goes into args; without a restart change bases, default_base, canaries, ingress, auth",
        ),
        ({"default_bas": "demo/sd15"}, "default_bas: unknown key; did you mean 'default_base'?"),
        ({"ingress": {"replicas": 4}}, "ingress.replicas: goes into args; without a restart change body_timeout_s, "),
        ({"ingress": {"max_bdy": 4}}, "ingress: unknown key 'max_bdy'; did you mean 'max_body'?"),
        ({"ingress": {"max_body": "much"}}, "ingress.max_body: "),
        ({"ingress": 4}, "ingress: is not a mapping of settings"),
        ({"auth": {"keys": [KEY, KEY]}}, "auth.keys: two keys have the same name"),
        ({"auth": {"keys": [{"name": "a", "sha256": "s3cret"}]}}, "auth.keys.0.sha256: "),
    ],
)
def test_what_cannot_change_without_a_restart_is_refused_by_its_place(user_config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}") as refused:
        with_live_settings(ARGUMENTS, user_config)
    assert "s3cret" not in str(refused.value)
