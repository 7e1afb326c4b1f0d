from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from serve_app.api.pages.pages import STATIC

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
PAGES = ("/", "/docs")


def loaded(html: str) -> list[str]:
    """What a page's elements load by themselves."""
    return re.findall(r'<(?:link|script)[^>]* (?:href|src)="([^"]+)"', html)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_only_files_that_are_there_and_of_this_service(client: TestClient, path: str) -> None:
    html = client.get(path, headers=BROWSER).text
    names = loaded(html)
    assert names
    for name in names:
        assert client.get(f"/{name}").status_code == 200
    assert "//" not in "".join(names)


def test_every_module_that_a_script_imports_is_served(client: TestClient) -> None:
    imported = [name for script in STATIC.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', script.read_text())]
    assert imported
    for name in set(imported):
        response = client.get(f"/static/{name}")
        assert (response.status_code, response.headers["content-type"]) == (200, "text/javascript; charset=utf-8")


@pytest.mark.parametrize("path", [*PAGES, "/static/playground.js", "/static/mark.svg"])
def test_a_page_may_run_only_what_this_service_sends_and_nobody_may_frame_it(client: TestClient, path: str) -> None:
    headers = client.get(path, headers=BROWSER).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", PAGES)
def test_no_markup_holds_a_script_or_a_style_of_its_own(client: TestClient, path: str) -> None:
    html = client.get(path, headers=BROWSER).text
    assert not re.search(r"<style|<script(?![^>]* src=)| style=| on[a-z]+=", html)


def test_a_browser_that_holds_the_file_is_told_so(client: TestClient) -> None:
    first = client.get("/static/playground.css")
    again = client.get("/static/playground.css", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    changed = client.get("/static/playground.css", headers={"if-none-match": '"other"'})
    assert changed.content == first.content


def test_what_is_held_of_the_status_never_stands_for_the_page(client: TestClient) -> None:
    page = client.get("/", headers=BROWSER)
    status = client.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (status.status_code, status.content) == (200, b'{"ok":"ok"}')
    assert page.headers["vary"] == status.headers["vary"] == "accept"


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2fpage.py", "%2e%2e%2fpage.py", ""])
def test_only_the_files_of_the_pages_are_served(client: TestClient, name: str) -> None:
    response = client.get(f"/static/{name}")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_head_has_the_headers_of_get(client: TestClient) -> None:
    head, get = client.head("/static/mark.svg"), client.get("/static/mark.svg")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == get.headers["etag"]
