"""The audit of dependencies: pip-audit itself, asking a service on loopback that knows of a planted package."""

from __future__ import annotations

import datetime
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.audit import PYPROJECT, Exemption, Vulnerability, judge, main, read_exemptions, read_report

TODAY = datetime.date(2026, 11, 22)
REASON = "only its tests open such files, and nothing of it is reached from here"
PLANTED = Vulnerability("planted", "1.0", ("PYSEC-2026-1", "CVE-2026-1234"), ("1.1",))
ADVISORY = {
    "id": "CVE-2026-1234",
    "aliases": ["PYSEC-2026-1"],
    "summary": "opens doors",
    "affected": [
        {
            "package": {"name": "planted", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
        }
    ],
}


@dataclass
class Service:
    """One that knows of vulnerabilities, as OSV does."""

    url: str = ""
    asked: list[str] = field(default_factory=list[str])
    is_broken_for: str | None = None

    def answer(self, question: dict[str, dict[str, str]]) -> tuple[int, object]:
        name = question["package"]["name"]
        self.asked.append(name)
        if name == self.is_broken_for:
            return 500, {}
        return 200, {"vulns": [ADVISORY]} if name == "planted" else {}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    known = Service()
    # This one does answer, however busy this process is.
    monkeypatch.setattr("tests.audit.PROBE_TIMEOUT_S", 60)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, content = known.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        known.url = f"http://127.0.0.1:{server.server_port}/v1/query"
        yield known
        server.shutdown()
        thread.join()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with two packages, one of them vulnerable."""
    for name in ("planted", "sound"):
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    return tmp_path / "site"


def pyproject(folder: Path, *exceptions: str) -> str:
    path = folder / "pyproject.toml"
    path.write_text(f"[tool.audit]\nexceptions = [{', '.join(exceptions)}]\n")
    return str(path)


def excepted(id: str = "CVE-2026-1234", until: str = "2027-01-31") -> str:
    return f'{{id = "{id}", package = "planted", reason = "{REASON}", until = {until}}}'


def test_a_known_vulnerability_that_is_no_exception_fails_the_check(
    service: Service, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--osv-url", service.url, "--path", str(installed)]
    assert main([*where, "--pyproject", pyproject(tmp_path)], today=TODAY) == 1
    said = capsys.readouterr().err
    assert "planted 1.0 has" in said
    assert "CVE-2026-1234" in said
    assert "mended in 1.1" in said
    assert set(service.asked) == {"pip", "planted", "sound"}


def test_without_a_service_the_check_says_that_nothing_was_audited(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        asked = ["--osv-url", url, "--path", str(installed), "--pyproject", pyproject(tmp_path)]
        assert main(asked, today=TODAY) == 0
        assert "not audited: no vulnerability service answered" in capsys.readouterr().out
        assert main([*asked, "--strict"], today=TODAY) == 1


@pytest.mark.timeout(60)
def test_a_service_that_accepts_and_never_answers_is_waited_for_by_seconds(installed: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        asked = ["--osv-url", url, "--path", str(installed), "--pyproject", pyproject(tmp_path), "--strict"]
        assert main(asked, today=TODAY) == 1


@pytest.mark.slow
def test_an_audit_that_breaks_off_is_a_fault_and_no_pass(
    service: Service, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.is_broken_for = "sound"
    asked = ["--osv-url", service.url, "--path", str(installed), "--pyproject", pyproject(tmp_path)]
    assert main(asked, today=TODAY) == 1
    assert "pip-audit failed" in capsys.readouterr().err


def test_an_exception_counts_by_any_of_the_names_and_for_its_package_alone() -> None:
    for id in PLANTED.ids:
        assert judge([PLANTED], [Exemption(id, "planted", REASON, TODAY)]) == []
    faults = judge([PLANTED], [Exemption("CVE-2026-1234", "sound", REASON, TODAY)])
    assert [fault.split(" ", 2)[:2] for fault in faults] == [["planted", "1.0"], ["the", "exception"]]


def test_an_exception_that_fits_nothing_any_more_is_a_fault() -> None:
    (fault,) = judge([], [Exemption("CVE-2026-1234", "planted", REASON, TODAY)])
    assert "remove it" in fault


def test_an_exception_ends_even_where_no_service_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        listed = pyproject(tmp_path, excepted(until="2026-11-21"))
        assert main(["--osv-url", url, "--pyproject", listed], today=TODAY) == 1
    assert "ended on 2026-11-21" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ('{id = "CVE-1", package = "planted", until = 2027-01-31}', "must have 'id', 'package', 'reason'"),
        (f'{{id = "CVE-1", package = "planted", reason = "{REASON}"}}', "must have 'id', 'package', 'reason'"),
        ('{id = "CVE-1", package = "planted", reason = "later", until = 2027-01-31}', "no reason to speak of"),
        (f'{{id = "CVE-1", package = "planted", reason = "{REASON}", until = "2027"}}', "must end on a day"),
    ],
)
def test_an_exception_needs_a_reason_and_an_end(entry: str, fault: str) -> None:
    good, faults = read_exemptions(f"[tool.audit]\nexceptions = [{entry}]")
    assert good == []
    assert fault in faults[0]


def test_the_exceptions_of_this_repository_are_complete() -> None:
    assert read_exemptions(PYPROJECT.read_text())[1] == []


def test_what_is_no_report_is_not_read_as_a_clean_one() -> None:
    for text in ("", "No known vulnerabilities found", "{"):
        with pytest.raises(json.JSONDecodeError):
            read_report(text)
