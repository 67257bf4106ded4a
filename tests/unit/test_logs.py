from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SettingsError
from orchestrator.logs import ConsoleFormatter, JsonFormatter, configure
from orchestrator.settings import Settings

SETTINGS = Settings.from_env(
    {"DEPLOYMENT_NAME": "event-scheduler-ocean", "CUSTOMER_NAME": "ocean", "ENVIRONMENT": "test"}
)
log = logging.getLogger("orchestrator.test")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers = []
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = before
    for name in ("uvicorn.access", "aiohttp.access", "httpx"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Logs to a file from here on; the call reads what it holds."""
    path = tmp_path / "orchestrator.log"
    configure(Settings.from_env({"CUSTOMER_NAME": "ocean", "LOG_FILE": str(path)}), "dispatch")
    return lambda: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(message: str, **extra: Any) -> logging.LogRecord:
    return log.makeRecord(log.name, logging.INFO, __file__, 1, message, (), None, extra=extra)


def test_a_line_names_the_happening_the_logger_and_the_subject(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    log.warning("retry %d of %d", 1, 3, extra={"event_id": "e1", "attempt": 2})
    (line,) = lines()
    assert line.pop("ts").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "orchestrator.test",
        "message": "retry 1 of 3",
        "deployment": "event-scheduler",
        "customer": "ocean",
        "environment": "development",
        "role": "dispatch",
        "pid": os.getpid(),
        "event_id": "e1",
        "attempt": 2,
    }


def test_lines_of_servers_and_warnings_have_the_same_form(lines: Callable[[], list[dict[str, Any]]]) -> None:
    logging.getLogger("uvicorn.error").info("started", extra={"color_message": "\x1b[1mstarted"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    found = lines()
    assert [line["logger"] for line in found] == ["uvicorn.error", "py.warnings"]
    assert "color_message" not in found[0]


def test_requests_are_logged_one_by_one_only_when_debugging(tmp_path: Path) -> None:
    for level, written in (("INFO", False), ("DEBUG", True), ("INFO", False)):
        path = tmp_path / level
        path.unlink(missing_ok=True)
        configure(Settings.from_env({"LOG_FILE": str(path), "LOG_LEVEL": level}), "api")
        logging.getLogger("uvicorn.access").info("GET /")
        assert bool(path.read_text(encoding="utf-8")) is written


def test_the_log_level_is_the_least_that_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log"
    configure(Settings.from_env({"LOG_FILE": str(path), "LOG_LEVEL": "ERROR"}), "api")
    log.warning("not this")
    log.error("but this")
    assert [json.loads(line)["message"] for line in path.read_text(encoding="utf-8").splitlines()] == ["but this"]


def test_a_file_renamed_by_rotation_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    configure(Settings.from_env({"LOG_FILE": str(path)}), "api")
    log.error("first")
    path.rename(tmp_path / "log.1")
    log.error("second")
    assert "second" in path.read_text(encoding="utf-8")
    assert "second" not in (tmp_path / "log.1").read_text(encoding="utf-8")


def test_a_file_that_cannot_be_opened_is_a_settings_error(tmp_path: Path) -> None:
    settings = Settings.from_env({"LOG_FILE": str(tmp_path / "missing" / "log")})
    with pytest.raises(SettingsError, match=r"LOG_FILE: expected a file that can be written, got '.*missing/log'"):
        configure(settings, "api")


def test_configuring_the_log_again_replaces_the_first_output(lines: Callable[[], list[dict[str, Any]]]) -> None:
    configure(SETTINGS, "api")
    log.error("elsewhere")
    assert lines() == []


@pytest.mark.parametrize(
    ("log_format", "terminal", "is_json"),
    [("", True, False), ("", False, True), ("json", True, True), ("console", False, False)],
)
def test_terminals_get_text_and_pipes_get_json_unless_configured_otherwise(
    log_format: str,
    terminal: bool,
    is_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    configure(Settings.from_env({"LOG_FORMAT": log_format}), "api")
    log.error("hello", extra={"event_id": "e1"})
    line = capsys.readouterr().err
    assert line.startswith("{") is is_json
    assert line.endswith("orchestrator.test: hello  event_id=e1\n") is not is_json


def test_an_exception_is_told_with_its_traceback_on_one_line_of_json(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    try:
        raise LookupError("gone")
    except LookupError:
        log.exception("failed")
    (line,) = lines()
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("LookupError: gone")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.text(), json_values)
def test_every_logged_value_is_one_line_of_valid_json(message: str, value: Any) -> None:
    line = JsonFormatter(SETTINGS, "api").format(record("%s", value=value)).encode("utf-8")
    assert len(line.splitlines()) == 1
    found = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert (found["customer"], found["role"]) == ("ocean", "api")
    found = json.loads(JsonFormatter(SETTINGS, "api").format(record(message)))
    assert found["message"] == message


def test_a_value_that_contains_itself_is_still_logged_as_one_line() -> None:
    value: list[Any] = []
    value.append(value)
    assert json.loads(JsonFormatter(SETTINGS, "api").format(record("round", value=value)))["message"] == "round"


def test_a_field_cannot_pose_as_another_customer() -> None:
    line = JsonFormatter(SETTINGS, "api").format(record("x", customer="air", role="admin"))
    assert (json.loads(line)["customer"], json.loads(line)["role"]) == ("ocean", "api")


@given(st.text(), st.text())
def test_text_for_people_keeps_to_one_line_and_leaves_the_terminal_alone(message: str, value: str) -> None:
    line = ConsoleFormatter().format(record(message, value=value))
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in line)


def test_text_for_people_shows_a_traceback_on_its_own_lines() -> None:
    try:
        raise LookupError("\x1b[2Jgone")
    except LookupError:
        told = log.makeRecord(log.name, logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    first, *rest = ConsoleFormatter().format(told).splitlines()
    assert first.endswith("ERROR    orchestrator.test: failed")
    assert rest[-1] == "LookupError: \\x1b[2Jgone"
