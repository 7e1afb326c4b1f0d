import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "diffusers", "transformers"}
LIGHT_MODULES = [
    "serve_app.api.app",
    "serve_app.catalog.catalog",
    "serve_app.store.store",
    "serve_app.config",
    "serve_app.core",
    "serve_app.errors",
    "serve_app.redaction",
    "serve_app.demo.embedded",
    "serve_app.engine.worker.scheduling",
    "serve_app.deployments.ingress.resolve_defaults",
    "serve_app.deployments.ingress.dispatch",
]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_the_http_side_loads_neither_torch_nor_ray(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())


@pytest.mark.parametrize("module", ["serve_app.cli.main", "serve_app.cli.inspect", "serve_app.cli.pull"])
def test_commands_that_start_no_service_load_no_ray(module: str) -> None:
    program = f"import sys, {module}, serve_app.cli.sources; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ray" not in loaded.stdout.split()


def test_the_ingress_loads_no_torch() -> None:
    program = "import sys, serve_app.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not (HEAVY - {"ray"}) & set(loaded.stdout.split())
