from __future__ import annotations

import json
import logging

from ray._common.formatters import JSONFormatter

from serve_app.deployments.shared.logs import SafeLines, keep_lines_safe
from serve_app.errors import ModelNotFound

TOKEN = "hf_" + "abcdefghijklmnopqrst"
KEY = "sk-" + "live-of-a-caller-1234"


def written(record: logging.LogRecord) -> str:
    assert SafeLines().filter(record)
    return logging.Formatter("%(message)s").format(record)


def record_of(message: str, *arguments: object, error: Exception | None = None) -> logging.LogRecord:
    raised = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("serve_app", logging.INFO, __file__, 1, message, arguments, raised)


def test_a_credential_in_a_line_is_cut_down() -> None:
    line = written(record_of("request %s for %s and %s", 7, TOKEN, f"../{KEY}/x"))
    assert line == "request 7 for hf_*** and ../sk-***/x"


def test_a_credential_in_a_traceback_is_cut_down() -> None:
    try:
        raise ValueError(f"Bearer {TOKEN}")
    except ValueError as error:
        line = written(record_of("failed", error=error))
    assert "ValueError: Bearer hf_***" in line
    assert TOKEN not in line


def test_a_credential_that_a_caller_puts_into_a_name_is_in_no_sentence() -> None:
    assert str(ModelNotFound(f"a/{TOKEN}")).startswith("model a/hf_*** was not found")


def test_names_that_look_a_little_like_credentials_stay() -> None:
    for name in ("hf_demo/x", "hf-internal-testing/tiny", "sk-8/sdxl", "task-generation-of-many-things"):
        assert name in written(record_of("%s", name))


def test_what_serve_adds_to_a_line_holds_no_credential_either() -> None:
    record = record_of("POST /models/%s 404 3.0ms", TOKEN)
    record.route, record.request_id = f"/models/{TOKEN}", KEY
    assert SafeLines().filter(record)
    line = logging.Formatter("%(request_id)s %(route)s -- %(message)s").format(record)
    assert line == "sk-*** /models/hf_*** -- POST /models/hf_*** 404 3.0ms"


def test_every_handler_of_serve_is_given_the_filter_once() -> None:
    serve = logging.getLogger("ray.serve")
    handler = logging.NullHandler()
    serve.addHandler(handler)
    try:
        for _ in range(2):
            keep_lines_safe()
        assert [type(known) for known in handler.filters] == [SafeLines]
    finally:
        serve.removeHandler(handler)


def test_a_line_of_a_thread_that_knows_no_request_names_its_own_in_json() -> None:
    record = record_of("request %s begins on the device", "r7")
    record.__dict__["request_id"] = "r7"  # as `extra` puts it there
    assert SafeLines().filter(record)
    line = json.loads(JSONFormatter().format(record))
    assert line["request_id"] == "r7"
    assert line["message"] == "request r7 begins on the device"


FORGED = "a\n2026-11-29 INFO forged\r\n\x1b[2K\u2028\u202eb\x00\x85"


def test_nothing_that_a_caller_sends_starts_a_line() -> None:
    record = record_of("request r7 for %s", FORGED)
    record.route, record.request_id = f"/models/{FORGED}", FORGED
    assert SafeLines().filter(record)
    line = logging.Formatter("%(request_id)s %(route)s -- %(message)s").format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert "\\u000a2026-11-29 INFO forged" in line


def test_a_traceback_that_quotes_a_caller_starts_no_line_of_the_caller_s() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        first, *traced = written(record_of("failed", error=error)).splitlines()
    assert first == "failed"
    assert all(line.startswith("  ") for line in traced)
    assert "\x1b" not in "".join(traced)
