"""Log lines: JSON objects for collectors, or text for people. Every JSON line names its deployment and role.

What a call passes as ``extra={"event_id": …}`` appears as a field. All loggers of the process use the one handler
installed here; uvicorn does so when it is started with ``log_config=None``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from orchestrator.errors import SettingsError
from orchestrator.settings import Settings

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
"""Attributes that a record has without `extra`; the last is uvicorn's coloured copy of its message."""
_TALKATIVE = {
    # At DEBUG it logs every request, the log-in with its password included.
    "aiokafka.conn": "INFO",
    # A line for each request says little at a thousand requests a second; the metrics count them.
    "uvicorn.access": "WARNING",
    "aiohttp.access": "WARNING",
    "httpx": "WARNING",
    # It logs every try, several times a second; we log once that a broker is away or a topic missing.
    "aiokafka": "CRITICAL",
}
"""Loggers of libraries, and the least severity that they log."""
_NEVER_IN_DETAIL = ("aiokafka.conn",)
# PostgreSQL adds whole rows and lines of COPY to an error; they hold what clients sent.
_ROWS = re.compile(r"^(DETAIL|CONTEXT):.*?(?=\n\n(?:The above|During)|\Z)", re.MULTILINE | re.DOTALL)
# No message or value may forge a line or control the reader's terminal; a traceback keeps its lines.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {10: "\\n", 13: "\\r"}
_CONTROLS_BUT_LINES = {code: escape for code, escape in _CONTROLS.items() if code not in (9, 10)}
MAX_TEXT_CHARS = 4096
"""Longest message, and longest text in a field; the middle of a longer one is left out."""
MAX_TRACE_CHARS = 16_384
MAX_LINE_BYTES = 1 << 17
_SHORT_CHARS = 512  # of each field, where the line would be longer
_MAX_BITS, _MAX_ITEMS, _DEPTH = 1024, 100, 4
_REPORT_S = 60.0  # between two reports that LOG_FILE cannot be written


def configure(settings: Settings, role: str) -> None:
    """Sends all logging of this process to LOG_FILE or standard error; `role` says what the process does.

    Raises SettingsError when the file cannot be opened. May be called again; the last call holds.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if settings.log_file is not None:
        try:
            handler = LogFile(settings.log_file)
        except OSError as error:
            reason = error.strerror or error
            raise SettingsError(
                f"LOG_FILE: expected a file that can be written, got {settings.log_file!r}: {reason}"
            ) from None
    console = settings.log_format == "console" or (
        settings.log_format is None and settings.log_file is None and sys.stderr.isatty()
    )
    handler.setFormatter(ConsoleFormatter() if console else JsonFormatter(settings, role))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    access = logging.getLogger("uvicorn.access")
    if _without_query not in access.filters:
        access.addFilter(_without_query)
    for name, level in _TALKATIVE.items():
        logger = logging.getLogger(name)
        logger.setLevel("NOTSET" if settings.log_level == "DEBUG" and name not in _NEVER_IN_DETAIL else level)
        logger.propagate = True  # uvicorn turns this off where it was once started with its own handlers


def _without_query(record: logging.LogRecord) -> bool:
    """Removes the query from the address in a line of uvicorn's access log: clients put keys there."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, address, *rest = record.args
        record.args = (client, method, str(address).partition("?")[0], *rest)
    return True


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class LogFile(logging.Handler):
    """Appends whole lines to a file, one system call each.

    The file may be rotated by renaming it: before each line, the name is looked at, and opened again when it leads to
    another file. A line that cannot be written, as on a full disk, is lost: it goes to standard error instead, once a
    minute, and no caller notices. The first line that succeeds again comes after one that says how many are missing.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = os.path.abspath(path)
        self._descriptor = self._open()
        self._missing = 0
        self._torn = False
        self._next_report_s = 0.0

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # whatever a caller has passed
            self.handleError(record)
            return
        try:
            self._follow_name()
            if self._missing:
                self._write(self.format(self._about_missing()))
                self._missing = 0
            self._write(line)
        except OSError as error:
            self._missing += 1
            self._report(error, line)

    def _write(self, line: str) -> None:
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        if self._torn:
            data = b"\n" + data
        written = os.write(self._descriptor, data)
        self._torn = written < len(data)
        if self._torn:
            raise OSError(f"only {written} of {len(data)} bytes were taken")

    def _follow_name(self) -> None:
        ours = os.fstat(self._descriptor)
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (ours.st_dev, ours.st_ino):
            descriptor = self._open()
            os.close(self._descriptor)
            self._descriptor, self._torn = descriptor, False

    def _about_missing(self) -> logging.LogRecord:
        message = "lines of this log could not be written"
        about = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message}
        return logging.makeLogRecord(about | {"lines": self._missing})

    def _report(self, error: OSError, line: str) -> None:
        now_s = time.monotonic()
        if now_s < self._next_report_s:
            return
        self._next_report_s = now_s + _REPORT_S
        with suppress(OSError, ValueError):  # it may be closed, or as full
            sys.stderr.write(f"LOG_FILE {self._path} cannot be written: {error.strerror or error}\n{line}\n")

    def close(self) -> None:
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _bounded(text: str, most: int = MAX_TEXT_CHARS) -> str:
    """The text, without its middle where it is too long, and with lone surrogates written as escapes."""
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]}… {len(text) - 2 * half} characters left out …{text[-half:]}"
    return text


def _plain(value: object, depth: int) -> Any:
    """The value as JSON has it, within bounds."""
    match value:
        case str():
            return _bounded(value)
        case None | bool():
            return value
        case int() if value.bit_length() <= _MAX_BITS:
            return value
        case float() if math.isfinite(value):
            return value
        case dict() if depth:
            items = islice(value.items(), _MAX_ITEMS)
            return {_text(key): _plain(inner, depth - 1) for key, inner in items}
        case list() | tuple() if depth:
            return [_plain(inner, depth - 1) for inner in value[:_MAX_ITEMS]]
    return _text(value)


def _text(value: object) -> str:
    try:
        return _bounded(str(value))
    except Exception:  # of whatever class it is; a line is worth more than one value
        return f"a {type(value).__name__} that cannot be shown"


class _Discreet(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802  # logging's name
        return _bounded(_ROWS.sub(r"\1: (left out)", super().formatException(ei)), MAX_TRACE_CHARS)


class JsonFormatter(_Discreet):
    """``ts`` (UTC), ``level``, ``logger``, ``message``, the process, fields of `extra`, ``exception``.

    Whatever a message holds, its line is one line of JSON with a bounded length.
    """

    def __init__(self, settings: Settings, role: str) -> None:
        super().__init__()
        self._speaker = {
            "deployment": settings.deployment,
            "customer": settings.customer,
            "environment": settings.environment,
            "role": role,
            "pid": os.getpid(),
        }

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _bounded(record.getMessage()),
            **self._speaker,
        }
        for key, value in extra_fields(record).items():
            line.setdefault(_bounded(key), _plain(value, _DEPTH))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = _bounded(self.formatStack(record.stack_info), MAX_TRACE_CHARS)
        text = json.dumps(line)
        if len(text) <= MAX_LINE_BYTES:
            return text
        return json.dumps({key: _bounded(str(value), _SHORT_CHARS) for key, value in line.items()})


class ConsoleFormatter(_Discreet):
    """``12:30:01.250 INFO     orchestrator.api: message  key=value``, in local time."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = _bounded(record.getMessage())
        text += "".join(f"  {key}={_text(value)}" for key, value in extra_fields(record).items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:<8} {record.name}: {text.translate(_CONTROLS)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info).translate(_CONTROLS_BUT_LINES)
        if record.stack_info:
            line += "\n" + self.formatStack(record.stack_info).translate(_CONTROLS_BUT_LINES)
        return line
