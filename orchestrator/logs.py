"""Log lines: JSON objects for collectors, or text for people. Every JSON line names its deployment and role.

What a call passes as ``extra={"event_id": …}`` appears as a field. All loggers of the process use the one handler
installed here; uvicorn does so when it is started with ``log_config=None``.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
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


def configure(settings: Settings, role: str) -> None:
    """Sends all logging of this process to LOG_FILE or standard error; `role` says what the process does.

    The file may be rotated by renaming it: it is reopened when its name leads to another file. Raises SettingsError
    when it cannot be opened. May be called again; the last call holds.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if settings.log_file is not None:
        try:
            handler = WatchedFileHandler(settings.log_file, encoding="utf-8", errors="backslashreplace")
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


class _Discreet(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802  # logging's name
        return _ROWS.sub(r"\1: (left out)", super().formatException(ei))


class JsonFormatter(_Discreet):
    """``ts`` (UTC), ``level``, ``logger``, ``message``, deployment and role, fields of `extra`, ``exception``."""

    def __init__(self, settings: Settings, role: str) -> None:
        super().__init__()
        self._speaker = {
            "deployment": settings.deployment,
            "customer": settings.customer,
            "environment": settings.environment,
            "role": role,
        }

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._speaker,
        }
        for key, value in extra_fields(record).items():
            line.setdefault(key, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        try:
            return json.dumps(line, default=str, skipkeys=True, allow_nan=False)
        except ValueError:  # a value that contains itself, or one that JSON has no number for
            return json.dumps({key: str(value) for key, value in line.items()})


class ConsoleFormatter(_Discreet):
    """``12:30:01.250 INFO     orchestrator.api: message  key=value``, in local time."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = record.getMessage() + "".join(f"  {key}={value}" for key, value in extra_fields(record).items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:<8} {record.name}: {text.translate(_CONTROLS)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info).translate(_CONTROLS_BUT_LINES)
        if record.stack_info:
            line += "\n" + self.formatStack(record.stack_info).translate(_CONTROLS_BUT_LINES)
        return line
