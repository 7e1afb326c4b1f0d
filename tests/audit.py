"""Known vulnerabilities of what is installed here, found by pip-audit: `python -m tests.audit`.

Owns the judgement: a known vulnerability is a fault unless `pyproject.toml` lists it as an exception with a reason and
an end, and so is an exception that is incomplete, has ended or fits nothing. Where no service answers that knows
vulnerabilities, this is said, and is a fault with `--strict` alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
OSV = "https://api.osv.dev/v1/query"
PROBE = {"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "1.0"}
PROBE_TIMEOUT_S = 3
# A question for each package, one after the other.
AUDIT_TIMEOUT_S = 300
SAYS_LITTLE = 20


@dataclass(frozen=True, slots=True)
class Exemption:
    """A known vulnerability that is put up with, and until when."""

    id: str
    package: str
    reason: str
    until: datetime.date


@dataclass(frozen=True, slots=True)
class Vulnerability:
    """One that a service knows, by all its names."""

    package: str
    version: str
    ids: tuple[str, ...]
    mended_in: tuple[str, ...]

    def is_meant_by(self, exemption: Exemption) -> bool:
        return exemption.package == self.package and exemption.id in self.ids


class NoAnswer(Exception):
    """No service that knows vulnerabilities answers."""


class AuditFailed(Exception):
    """pip-audit itself failed."""


def read_exemptions(text: str) -> tuple[list[Exemption], list[str]]:
    """Return the exceptions of a `pyproject.toml`, and what is wrong with the others."""
    listed: list[dict[str, Any]] = tomllib.loads(text).get("tool", {}).get("audit", {}).get("exceptions", [])
    good: list[Exemption] = []
    faults: list[str] = []
    for entry in listed:
        name = entry.get("id", "one without an id")
        if set(entry) != {"id", "package", "reason", "until"}:
            faults.append(f"the exception {name} must have 'id', 'package', 'reason' and 'until', and nothing else")
        elif not isinstance(entry["reason"], str) or len(entry["reason"].strip()) < SAYS_LITTLE:
            faults.append(f"the exception {name} gives no reason to speak of")
        elif not isinstance(entry["until"], datetime.date):
            faults.append(f"the exception {name} must end on a day, such as until = 2027-01-31")
        else:
            good.append(Exemption(str(name), str(entry["package"]), entry["reason"], entry["until"]))
    return good, faults


def judge(found: Iterable[Vulnerability], exemptions: Iterable[Exemption]) -> list[str]:
    """Return what is wrong: vulnerabilities that nobody excepted, and exceptions that fit none."""
    found, exemptions = list(found), list(exemptions)
    faults = [
        f"{one.package} {one.version} has {' / '.join(one.ids)}, {_mended(one)}"
        for one in found
        if not any(one.is_meant_by(exemption) for exemption in exemptions)
    ]
    faults += [
        f"the exception {one.id} of {one.package} applies to nothing that is installed; remove it"
        for one in exemptions
        if not any(vulnerability.is_meant_by(one) for vulnerability in found)
    ]
    return faults


def ended(exemptions: Iterable[Exemption], today: datetime.date) -> list[str]:
    """Return the exceptions that have run out."""
    return [f"the exception {one.id} of {one.package} ended on {one.until}" for one in exemptions if one.until < today]


def known_vulnerabilities(osv_url: str, folder: Path | None = None) -> list[Vulnerability]:
    """Return what a service knows of the packages that are installed: in this environment, or below a folder.

    Raises:
        NoAnswer: it does not answer.
        AuditFailed: it does, and there is no result all the same.
    """
    probe(osv_url)
    command = [
        sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable",
        "--vulnerability-service", "osv", "--osv-url", osv_url, "--timeout", str(PROBE_TIMEOUT_S),
    ]  # fmt: skip
    command += ["--path", str(folder)] if folder else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_TIMEOUT_S, check=False)
        return read_report(done.stdout)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"it took longer than {AUDIT_TIMEOUT_S} s") from None
    except ValueError:
        # It may have gone away under way.
        probe(osv_url)
        raise AuditFailed((done.stderr.strip().splitlines() or ["it said nothing"])[-1]) from None


def probe(osv_url: str) -> None:
    """Ask a service one question.

    Raises:
        NoAnswer: it does not answer as such a service does.
    """
    request = urllib.request.Request(osv_url, json.dumps(PROBE).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S) as reply:
            json.load(reply)
    except (OSError, ValueError) as error:
        raise NoAnswer(type(error).__name__) from None


def read_report(text: str) -> list[Vulnerability]:
    """Return the vulnerabilities of a report of pip-audit.

    Raises:
        ValueError: it is none.
    """
    report: dict[str, Any] = json.loads(text)
    return [
        Vulnerability(
            package=re.sub(r"[-_.]+", "-", package["name"]).lower(),
            version=package["version"],
            ids=(one["id"], *sorted(one["aliases"])),
            mended_in=tuple(one["fix_versions"]),
        )
        for package in report["dependencies"]
        for one in package.get("vulns", [])
    ]


def main(arguments: list[str] | None = None, *, today: datetime.date | None = None) -> int:
    """Print what is wrong; the exit code says whether anything is."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit")
    parser.add_argument("--strict", action="store_true", help="fail where no service answers")
    parser.add_argument("--osv-url", default=OSV, help="the service to ask")
    parser.add_argument("--path", type=Path, help="audit what is installed below a folder instead")
    parser.add_argument("--pyproject", type=Path, default=PYPROJECT, help="where exceptions are listed")
    asked = parser.parse_args(arguments)
    exemptions, faults = read_exemptions(asked.pyproject.read_text())
    faults += ended(exemptions, today or datetime.date.today())
    try:
        found = known_vulnerabilities(asked.osv_url, asked.path)
        faults += judge(found, exemptions)
        said = f"audit: {len(found)} known vulnerabilities, {len(exemptions)} excepted\n"
    except NoAnswer as error:
        said = f"audit: not audited: no vulnerability service answered ({error})\n"
        faults += ["nothing was audited"] if asked.strict else []
    except AuditFailed as error:
        said = ""
        faults.append(f"pip-audit failed: {error}")
    sys.stdout.write(said)
    for fault in faults:
        sys.stderr.write(f"audit: {fault}\n")
    return 1 if faults else 0


def _mended(one: Vulnerability) -> str:
    return f"mended in {', '.join(one.mended_in)}" if one.mended_in else "mended in no version yet"


if __name__ == "__main__":
    sys.exit(main())
