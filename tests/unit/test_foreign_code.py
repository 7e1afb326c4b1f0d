"""What no module here may do, read from its source: run what it was given, or fetch from wherever it is told."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import serve_app

PACKAGE = Path(serve_app.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

# They run code that a file brings along.
UNPACKERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "imp", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "torch.jit.load", "yaml.unsafe_load",
         "yaml.full_load", "numpy.load", "np.load", "os.system", "os.popen"}  # fmt: skip
# They fetch from an address.
CLIENTS = {"httpx", "httpx2", "requests", "aiohttp", "urllib3", "urllib.request", "http.client", "huggingface_hub",
           "socket", "ftplib"}  # fmt: skip
# The Hub that is configured, and the command line, which talks to the service it is told of.
FETCHES = ("catalog/sources/", "engine/base/fetching.py", "deployments/shared/hub_cache.py", "cli/", "bench/")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    yield from ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def is_one_of(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def test_nothing_unpacks_or_runs_what_it_was_given() -> None:
    for name, tree in SOURCES.items():
        assert [module for module in imported(tree) if is_one_of(module, UNPACKERS)] == [], name
        assert [call for call, _ in calls(tree) if call in CALLS] == [], name


def test_no_base_may_bring_code_of_its_own() -> None:
    fixed = {"trust_remote_code": False, "use_safetensors": True}
    seen: set[str] = set()
    for name, tree in SOURCES.items():
        for _, call in calls(tree):
            for keyword in call.keywords:
                assert keyword.arg != "custom_pipeline", name
                if keyword.arg in fixed:
                    seen.add(keyword.arg)
                    assert ast.unparse(keyword.value) == str(fixed[keyword.arg]), f"{name}: {keyword.arg}"
    assert seen == set(fixed)


def test_only_the_way_to_the_hub_can_fetch_from_an_address() -> None:
    for name, tree in SOURCES.items():
        if not name.startswith(FETCHES):
            clients = [module for module in imported(tree) if is_one_of(module, CLIENTS)]
            # Errors of the Hub's client may be told apart anywhere.
            assert [module for module in clients if not module.startswith("huggingface_hub.errors")] == [], name
