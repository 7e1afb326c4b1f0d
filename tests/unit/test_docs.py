"""The pages about the code name files and modules that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = {path.name for path in (ROOT / "serve_app").iterdir() if path.is_dir()} | {"autoscaling", "work"}

FILES = sorted(set(re.findall(r"`((?:serve_app|tests)/[\w./-]+)`", ARCHITECTURE)))
DOTTED = sorted(set(re.findall(r"`((?:\w+\.)+\w+)`", ARCHITECTURE)))
MODULES = [name for name in DOTTED if name.split(".")[0] in ROOMS and not name.endswith((".py", ".md"))]


def _exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name that its module defines."""
    path = ROOT / "serve_app" / Path(*dotted.split("."))
    if path.with_suffix(".py").exists() or path.is_dir():
        return True
    module = path.parent.with_suffix(".py")
    return module.exists() and re.search(rf"^(?:def|class) {path.name}\b", module.read_text(), re.M) is not None


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_the_architecture_page_names_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", MODULES)
def test_every_module_that_the_architecture_page_names_exists(name: str) -> None:
    assert _exists(name)


def test_ten_changes_each_have_one_file() -> None:
    table = ARCHITECTURE.split("## Where to change what")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "to add" not in line]
    assert len(rows) == 10
    for row in rows:
        assert re.search(r"`serve_app/[\w./]+`", row), row
        assert re.search(r"`tests/unit/[\w./]+`", row), row


def test_every_room_is_on_the_architecture_page() -> None:
    rooms = (path.parent for path in (ROOT / "serve_app").rglob("__init__.py"))
    names = {room.name for room in rooms if "demo" not in room.parts}
    assert {name for name in names if f"{name}/" not in ARCHITECTURE} == set()


def test_the_architecture_page_has_the_import_orders_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for contract in contracts:
        if contract["type"] == "layers":
            order = " > ".join(contract["layers"]).replace("serve_app.", "")
            assert f"`{order}`" in ARCHITECTURE, contract["name"]


def test_every_page_of_the_docs_is_in_the_readme_or_linked() -> None:
    linked = (ROOT / "README.md").read_text() + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert [page for page in pages if f"({page}" not in linked and f"docs/{page}" not in linked] == []


TEST_FILES = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "tests").rglob("test_*.py")}
TEST_CODE = "".join((ROOT / name).with_suffix(".py").read_text() for name in TEST_FILES)
PAGES = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    for named in re.findall(r"`([^`\s]*test_\w+[^`\s]*)`", page.read_text()):
        file, _, test = named.partition("::")
        if "/" in file or file.endswith(".py"):
            assert any(f"/{name}".endswith(f"/{file.removesuffix('.py')}") for name in TEST_FILES), named
        if test.startswith("test_"):
            assert re.search(rf"^(?:async )?def {test.partition('[')[0].rstrip('…')}", TEST_CODE, re.M), named
