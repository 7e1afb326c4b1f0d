"""What Ray does not publish is used in the files that docs/routing.md lists, and in no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "serve_app"
# A private module of Ray; an attribute, a hook or a switch of Serve's that its documentation does not have.
INTERNAL = re.compile(
    r"ray(\.\w+)*\._[\w.]+|proxy_router|_get_global_client|_push_\w+|__serve_\w+|RAY_SERVE_\w+|ray\.serve"
    r"|_get_cold_start_\w+|_do_request"
)


def names_of(tree: ast.AST) -> Iterator[str]:
    """Yield what code names in imports, attributes, functions and strings; not what its docstrings say."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if "._" in alias.name)
        elif isinstance(node, ast.ImportFrom) and "._" in (node.module or ""):
            yield str(node.module)
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_table_names_every_file_that_uses_what_ray_does_not_publish() -> None:
    using = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(INTERNAL.fullmatch(name) for name in names_of(ast.parse(path.read_text())))
    }
    page = (ROOT / "docs/routing.md").read_text()
    table = page[page.index("What Ray does not publish") :].split("\n\n")[1]
    assert using == set(re.findall(r"^\| `([\w/]+\.py)`", table, re.MULTILINE))


def test_each_row_of_the_table_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs/routing.md").read_text()
    table = page[page.index("What Ray does not publish") :].split("\n\n")[1]
    tests = re.findall(r"`(tests/[\w/.]+)`", table)
    assert len(tests) == len(re.findall(r"^\| `", table, re.MULTILINE))
    assert [test for test in tests if not (ROOT / test).exists()] == []
