"""The applications of a Serve file, from all settings of a service in one mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.cli.serve_file import BASE_PATH, INGRESS_PATH
from serve_app.config import IngressArguments, SharedSettings, serve_name
from serve_app.deployments.front.own_routes import INGRESS_NAME
from serve_app.live_settings import BASES


def applications(settings: Mapping[str, Any], name: str = "loraplex") -> list[dict[str, Any]]:
    shared = {key: value for key, value in settings.items() if key in SharedSettings.model_fields}
    own = {key: value for key, value in settings.items() if key in IngressArguments.model_fields}
    live = {key: value for key, value in settings.items() if key in BASES}
    ingress = {
        "name": name,
        "import_path": INGRESS_PATH,
        "args": {"shared": shared, **own},
        "deployments": [{"name": INGRESS_NAME, "user_config": live}],
    }
    return [
        ingress,
        *(
            {
                "name": base.get("application", serve_name(base["id"])),
                "route_prefix": None,
                "import_path": BASE_PATH,
                "args": {"shared": shared, "base": base},
            }
            for base in settings["bases"]
        ),
    ]
