"""The log: what each line holds, whatever the texts are, through rotation and a full disk; and how it is shipped."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.logs import MAX_LINE_BYTES, MAX_TEXT_CHARS, ConsoleFormatter, JsonFormatter, LogFile
from orchestrator.settings import Settings
from tests.conftest import Spawn
from tests.support.dispatching import finished, soon
from tests.support.processes import ROOT
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client
from tests.support.tools import tool
from tests.support.waiting import eventually

OPS = ROOT / "ops" / "logging"
GUIDE = ROOT / "docs" / "guides" / "logs.md"
IN_EACH_LINE = ["ts", "level", "logger", "message", "deployment", "customer", "environment", "role", "pid"]
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def documented() -> dict[str, str]:
    """Field → type, in the order of the guide."""
    return dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as client:
        yield client


class _Unprintable:
    def __str__(self) -> str:
        raise ValueError("no text")


HOSTILE = {
    "newlines": "a\nb\r\nc\u2028d\x85e",
    "ansi": "\x1b[2J\x1b]0;title\x07\x9b31m",
    "quotes": '"}{"level":"CRITICAL"',
    "surrogates": "\ud800x\udfff\udcff",
    "astral": "\U0001f600" * 10,
    "megabyte": "x" * (1 << 20),
    "megabyte of escapes": "\ud800" * (1 << 20),
    "nul": "\0" * 5000,
    "huge number": 10**5000,
    "no number": float("nan"),
    "bytes": b"\xff\n",
    "unprintable": _Unprintable(),
    "deep": json.loads("[" * 500 + "]" * 500),
    "wide": {f"k\ud800{n}": "\x1b" * 500 for n in range(500)},
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("place", ["message", "field", "exception"])
def test_a_hostile_text_stays_one_bounded_line_that_every_reader_takes(value: object, place: str) -> None:
    settings = Settings.from_env({"CUSTOMER_NAME": "ocean"})
    record = logging.makeLogRecord({"name": "n", "levelname": "ERROR", "msg": "told"})
    text = value if isinstance(value, str) else ascii(value)[:100_000] if not isinstance(value, int) else "1"
    if place == "message":
        record.msg, record.args = "%s", (text,)
    elif place == "field":
        record.error = value
    else:
        record.exc_info = (LookupError, LookupError(text), None)
    line = JsonFormatter(settings, "api").format(record)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= MAX_LINE_BYTES
    read = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    json.dumps(read, ensure_ascii=False).encode()  # no lone surrogate: strict readers refuse those
    assert list(read)[:9] == IN_EACH_LINE
    assert read["customer"] == "ocean"
    told = ConsoleFormatter().format(record)
    assert "\x1b" not in told
    assert len(told) < 8 * MAX_TEXT_CHARS


class _Lines:
    """A log file, and a logger that writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handler = LogFile(str(path))
        self.handler.setFormatter(JsonFormatter(Settings.from_env({}), "api"))

    def log(self, message: str) -> None:
        self.handler.handle(logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": message}))

    def read(self, *paths: Path) -> list[Any]:
        found = paths or (self.path,)
        return [json.loads(line)["message"] for path in found for line in path.read_text().splitlines()]


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Callable[..., _Lines]]:
    opened: list[_Lines] = []

    def open_(path: Path = tmp_path / "log") -> _Lines:
        opened.append(_Lines(path))
        return opened[-1]

    yield open_
    for each in opened:
        each.handler.close()


def test_lines_that_a_full_disk_does_not_take_are_counted_in_the_log_once_it_has_room(
    lines: Callable[..., _Lines], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    log = lines()
    for n in range(3):
        log.log(f"lost {n}")
    told = capsys.readouterr().err
    assert f"LOG_FILE {tmp_path}/log cannot be written: No space left on device" in told
    assert told.count("lost") == 1  # once a minute
    (tmp_path / "log").unlink()
    log.log("kept")
    assert log.read() == ["lines of this log could not be written", "kept"]
    assert json.loads(log.path.read_text().splitlines()[0])["lines"] == 3


def test_a_line_that_was_cut_does_not_spoil_the_next_one(
    lines: Callable[..., _Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write = lines(), os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
        log.log("cut")
    log.log("whole")
    first, *rest = log.path.read_text().splitlines()
    assert len(first) == 10
    assert [json.loads(line)["message"] for line in rest if line] == ["lines of this log could not be written", "whole"]


def test_a_directory_that_has_gone_raises_into_no_caller(lines: Callable[..., _Lines], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    log = lines(folder / "log")
    log.path.unlink()
    folder.rmdir()
    log.log("lost")
    folder.mkdir()
    log.log("kept")
    assert log.read() == ["lines of this log could not be written", "kept"]


def test_real_logrotate_loses_no_line_of_several_writers(lines: Callable[..., _Lines], tmp_path: Path) -> None:
    logrotate = tool("logrotate")
    folder = tmp_path / "logs"
    folder.mkdir(mode=0o755)
    given = (OPS / "logrotate.conf").read_text().replace("/var/log/orchestrator", str(folder))
    # Each rotation of this test needs a name of its own, and falls into one second.
    config = tmp_path / "logrotate.conf"
    config.write_text(given.replace("    dateext\n", "").replace("    dateformat -%Y%m%d-%s\n", ""))
    config.chmod(0o644)
    writers = [lines(folder / "ocean.log") for _ in range(3)]
    stop = threading.Event()
    counts = [0] * len(writers)

    def write(number: int) -> None:
        while not stop.is_set():
            writers[number].log(f"{number}-{counts[number]}")
            counts[number] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(writers))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            before = list(counts)
            command = [str(logrotate), "--force", "--state", str(tmp_path / "state"), str(config)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            while any(count <= old for count, old in zip(counts, before, strict=True)):
                stop.wait(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    kept = sorted(folder.glob("ocean.log*"))
    assert [path.name for path in kept if path.suffix == ".gz"] == [f"ocean.log.{n}.gz" for n in (2, 3, 4)]
    found: list[str] = []
    for path in kept:
        read = ["gzip", "-dc", str(path)] if path.suffix == ".gz" else ["cat", str(path)]
        text = subprocess.run(read, capture_output=True, text=True, check=True).stdout
        found += [json.loads(line)["message"] for line in text.splitlines()]
    assert sorted(found) == sorted(f"{number}-{n}" for number, count in enumerate(counts) for n in range(count))


async def test_a_full_disk_under_the_log_stops_no_delivery(spawn: Spawn, client: Client, receiver: Receiver) -> None:
    dispatcher = spawn("dispatch", LOG_FILE="/dev/full")
    url = receiver.script("/hook", Answer(503), Answer())
    client.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('at-once', 0, '{0 s}')")
    event_id = client.schedule(destination=url, scheduled_at=soon(0), retry_policy="at-once")
    await finished(client, [event_id], 30)
    assert len(receiver.requests) == 2
    assert "LOG_FILE /dev/full cannot be written: No space left on device" in dispatcher.log()
    assert await dispatcher.stop() == 0


async def test_one_id_leads_through_every_line_about_an_event(
    spawn: Spawn, client: Client, receiver: Receiver, tmp_path: Path
) -> None:
    path = tmp_path / "lines.log"
    named = {"DEPLOYMENT_NAME": "event-scheduler-ocean", "CUSTOMER_NAME": "ocean", "ENVIRONMENT": "test"}
    dispatcher = spawn("dispatch", LOG_FILE=str(path), LOG_LEVEL="DEBUG", **named)
    url = receiver.script("/hook", Answer(500, b"line\nforged \x1b[2J"), Answer(400)) + "?key=s3cret"
    client.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('at-once', 0, '{0 s}')")
    event_id = client.schedule(
        destination=url, scheduled_at=soon(0), retry_policy="at-once", traceparent=TRACE, headers={"x-key": "s3cret"}
    )
    await finished(client, [event_id], 30)
    found = await eventually(
        lambda: [line for line in map(json.loads, path.read_text().splitlines()) if line.get("event_id") == event_id][
            :2
        ],
        10,
    )
    await eventually(lambda: path.read_text().count("event is dead") == 1, 10)
    assert await dispatcher.stop() == 0
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    about = [line for line in lines if line.get("event_id") == event_id]
    assert [line["message"] for line in about] == ["attempt failed, will be repeated", "event is dead"]
    assert found[0] in about
    for line in lines:
        assert list(line)[:9] == IN_EACH_LINE
        assert (line["deployment"], line["customer"], line["environment"]) == ("event-scheduler-ocean", "ocean", "test")
        assert (line["role"], line["pid"]) == ("dispatch", dispatcher.pid)
        assert set(line) <= set(documented())
    for line in about:
        # No correlation id was given: the trace's stands in for it, here and in the deliveries.
        assert (line["correlation_id"], line["trace_id"], line["span_id"]) == (TRACE[3:35], TRACE[3:35], TRACE[36:52])
    assert {request.headers["x-correlation-id"] for request in receiver.requests} == {TRACE[3:35]}
    assert "s3cret" not in text


def _keys(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Dict):
            yield from (key.value for key in each.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _fields_of(function: ast.AST) -> Iterator[str]:
    """The keys of the dictionaries that a function passes to a logger as `extra`, by name or as they are."""
    for call in ast.walk(function):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if not (isinstance(call.func.value, ast.Name) and call.func.value.id == "_log"):
            continue
        for extra in (keyword.value for keyword in call.keywords if keyword.arg == "extra"):
            yield from _keys(extra)
            names = {each.id for each in ast.walk(extra) if isinstance(each, ast.Name)}
            for each in ast.walk(function):
                if isinstance(each, ast.Assign | ast.AugAssign | ast.AnnAssign) and each.value is not None:
                    target = each.targets[0] if isinstance(each, ast.Assign) else each.target
                    if isinstance(target, ast.Name) and target.id in names:
                        yield from _keys(each.value)
                    elif isinstance(target, ast.Subscript) and ast.unparse(target.value) in names:
                        yield ast.literal_eval(target.slice)


def test_the_guide_describes_every_field_that_the_program_logs_and_no_other() -> None:
    told = set(IN_EACH_LINE) | {"exception", "stack", "lines"}
    told |= {"event_id", "correlation_id", "trace_id", "span_id"}  # of followed()
    told |= {"took_ms", "more", "did", "skipped"}  # of maintenance
    told |= {"results"}  # of LockHolders.tell()
    for path in (ROOT / "orchestrator").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                told.update(_fields_of(node))
    assert set(documented()) == told


def test_the_index_template_maps_every_field_of_the_guide_with_its_type() -> None:
    template = json.loads((OPS / "index-template.json").read_text())
    mapped = template["template"]["mappings"]["properties"]["orchestrator"]["properties"]
    assert {name: each["type"] for name, each in mapped.items()} == documented()
    assert list(documented())[:9] == IN_EACH_LINE
    assert template["template"]["settings"]["index.lifecycle.name"] == "logs-orchestrator"
    assert "data_stream" in template  # without one, nothing rolls over


def test_lines_are_deleted_after_thirty_days() -> None:
    phases = json.loads((OPS / "ilm-policy.json").read_text())["policy"]["phases"]
    assert phases["delete"] == {"min_age": "30d", "actions": {"delete": {}}}
    assert phases["hot"]["actions"]["rollover"]["max_age"] == "1d"
    assert "maxage 30" in (OPS / "logrotate.conf").read_text()
    setup = (OPS / "setup.sh").read_text()
    assert "put _ilm/policy/logs-orchestrator ilm-policy.json" in setup
    assert "put _index_template/logs-orchestrator index-template.json" in setup


@pytest.mark.parametrize("path", ["logging/compose.yml", "logging/filebeat.yml", "tracing/otel-collector.yaml"])
def test_a_configuration_is_sound_yaml(path: str) -> None:
    rules = (
        "{extends: default, rules: {line-length: {max: 120}, document-start: disable, braces: {max-spaces-inside: 0}}}"
    )
    done = subprocess.run([str(tool("yamllint")), "-s", "-d", rules, str(ROOT / "ops" / path)], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_the_setup_script_is_sound() -> None:
    done = subprocess.run([str(tool("shellcheck")), str(OPS / "setup.sh")], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_the_compose_file_is_sound() -> None:
    command = [str(tool("docker-compose")), "-f", str(OPS / "compose.yml"), "config", "-q"]
    done = subprocess.run(command, capture_output=True, env={"PATH": os.environ["PATH"], "LOG_DIRECTORY": "/tmp"})
    assert done.returncode == 0, done.stderr.decode()
