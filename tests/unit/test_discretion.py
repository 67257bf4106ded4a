"""Nothing that may hold a secret is quoted: not in a fault, nor in a setting's error, a log line or an excerpt."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from orchestrator.api.problems import Problem, as_problem
from orchestrator.api.requests.destination_settings import settings_of
from orchestrator.api.requests.fields import fields_of, unprocessable
from orchestrator.cli.submit import submit
from orchestrator.dispatch.http.redaction import without_credentials
from orchestrator.dispatch.http.request import custom_headers
from orchestrator.dispatch.http.secrets import SecretError, Secrets
from orchestrator.errors import OrchestratorError, SettingsError, ValidationError
from orchestrator.events.parsing import parse_batch, parse_submission, submission_row
from orchestrator.events.submission import Submission
from orchestrator.ingest.commands import read_command
from orchestrator.logs import ConsoleFormatter, JsonFormatter, configure
from orchestrator.settings import Settings
from orchestrator.settings.jaas import PLAIN
from orchestrator.settings.table import settings_table

CANARY = "canary-5ecret"
LIMITS = Settings.from_env({})
EVENT: dict[str, Any] = {
    "source": "s",
    "scheduled_at": "2030-01-01T00:00:00Z",
    "destination": "https://example.com/hook",
    "payload": {"password": CANARY},
    "headers": {"authorization": f"Bearer {CANARY}"},
}
CHANGES: list[dict[str, Any]] = [
    {"source": 1},
    {"source": {"authorization": CANARY}},
    {"source": [CANARY]},
    {"scheduled_at": "soon"},
    {"scheduled_at": "1969-01-01T00:00:00Z"},
    {"expires_at": {"x": CANARY}},
    {"headers": f"authorization: Bearer {CANARY}"},
    {"headers": [f"authorization: Bearer {CANARY}"]},
    {"headers": {"authorization": [CANARY]}},
    {"headers": {"authorization": f"Bearer {CANARY}\n"}},
    {"headers": {"authorization": CANARY * 500}},
    {"headers": {"authorization": CANARY, "Authorization": CANARY}},
    {"headers": {f"authorization: Bearer {CANARY}": ""}},
    {"headers": {"content-length": CANARY}},
    {"headers": {"authorization": f"\x00{CANARY}"}},
    {"headers": {f"x{n}": CANARY for n in range(21)}},
    {"header": {"authorization": CANARY}},
    {"payload": f"\x00{CANARY}"},
    {"payload": CANARY * 100_000},
    {"destination": f"https://user:{CANARY}@example.com/"},
    {"destination": f"ftp://user:{CANARY}@example.com/"},
    {"destination": f"https://example.com:99999/?token={CANARY}"},
    {"destination": f"https://example.com/?token={CANARY} "},
    {"destination": f"https://example.com/#{CANARY}"},
    {"destination": {"url": f"https://user:{CANARY}@example.com/"}},
    {"destination": [f"https://user:{CANARY}@example.com/"]},
    {"destination": f"user:{CANARY}@example.com"},
    {"delivery_type": "KAFKA", "destination": f"https://user:{CANARY}@example.com/"},
    {"delivery_type": "KAFKA", "destination": f"user:{CANARY}@broker"},
    {"delivery_type": "KAFKA", "destination": f"topic?password={CANARY}"},
    {"delivery_type": f"https://user:{CANARY}@example.com/"},
    {"max_retries": {"x": CANARY}},
    {"retry_policy": f"https://user:{CANARY}@example.com/"},
    {"priority": [CANARY]},
]


def told(error: OrchestratorError) -> str:
    problem = as_problem(error)
    return f"{error} {error!r} {getattr(error, 'errors', '')} {problem.document('/').decode()}"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: json.dumps(change)[:60])
def test_a_fault_of_a_submission_does_not_quote_possible_secrets(change: dict[str, Any]) -> None:
    raw = json.dumps(EVENT | change).encode()
    for read in (parse_submission, lambda raw, limits: submission_row(raw, limits, 0)):
        with pytest.raises(ValidationError) as caught:
            read(raw, LIMITS)
        assert CANARY not in told(caught.value)
    good, bad = parse_batch(b'{"events":[%b,%b]}' % (json.dumps(EVENT).encode(), raw), LIMITS)
    assert isinstance(good, Submission)
    assert isinstance(bad, ValidationError)
    assert CANARY not in told(bad)


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps([EVENT]),
        json.dumps(json.dumps(EVENT)),
        json.dumps(EVENT)[:-1],
        json.dumps(EVENT)[:-2] + '\\"}',
        json.dumps({"events": EVENT}),
        json.dumps({"events": json.dumps([EVENT])}),
        json.dumps({"event": [EVENT]}),
        json.dumps({"events": [EVENT], "headers": {"authorization": CANARY}}),
        json.dumps({"command": "cancel", "event_id": {"authorization": CANARY}}),
        json.dumps({"command": "cancel", "authorization": CANARY}),
        json.dumps({"command": [CANARY]}),
    ],
)
def test_a_fault_of_a_whole_body_does_not_quote_it(raw: str) -> None:
    for read in (
        lambda: parse_submission(raw.encode(), LIMITS),
        lambda: parse_batch(raw.encode(), LIMITS),
        lambda: read_command(raw.encode()),
    ):
        with pytest.raises(ValidationError) as caught:
            read()
        assert CANARY not in told(caught.value)


@pytest.mark.parametrize(
    "sent",
    [
        {"signing_secret": [CANARY]},
        {"signing_secret": f"whsec_{CANARY}"},
        {"secret_headers": f"authorization: {CANARY}"},
        {"secret_headers": {"authorization": f"Bearer {CANARY}"}},
        {"secret_headers": {"authorization": {"value": CANARY}}},
        {"token": CANARY},
        {"rate_per_second": {"x": CANARY}},
        [CANARY],
        CANARY,
    ],
)
def test_a_fault_of_a_destinations_settings_does_not_quote_secrets(sent: Any) -> None:
    with pytest.raises(Problem) as caught:
        raise unprocessable(settings_of(fields_of(json.dumps(sent).encode()))[1])
    assert CANARY not in caught.value.document("/").decode()


ENVIRONMENTS: list[dict[str, str]] = [
    {"DATABASE_URL": f"mysql://u:{CANARY}@h/db"},
    {"DATABASE_URL": f"postgresql://u:{CANARY}@h:99999/db"},
    {"DATABASE_URL": f"postgresql://u:{CANARY}@h/db"},
    {"DATABASE_URL": f"postgresql://h/db?user=u&password={CANARY}"},
    {"DATABASE_URL": f"postgresql://h/db?sslpassword={CANARY}"},
    {"DATABASE_URL": f"postgresql://h/db?oauth_client_secret={CANARY}"},
    {"DATABASE_URL": f"jdbc:postgresql://h/db?user=u&password={CANARY}&x=1"},
    {"DATABASE_URL": f"postgresql://h/db?nonsense={CANARY}"},
    {"DATABASE_URL": f"host=h password={CANARY}"},
    {"DB_HOST": f"u:{CANARY}@h"},
    {"DB_NAME": f"db?password={CANARY}" + "x" * 99},
    {"DB_PASSWORD": CANARY},
    {"DB_PORT": f"5432?password={CANARY}"},
    {"KAFKA_BOOTSTRAP_SERVERS": f"u:{CANARY}@h:9092"},
    {"KAFKA_BOOTSTRAP_SERVERS": f"a:9092,SASL_SSL://u:{CANARY}@h:9092"},
    {"KAFKA_SASL_PASSWORD": CANARY},
    {"KAFKA_SASL_PASSWORD": CANARY, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL"},
    {"KAFKA_SASL_JAAS_CONFIG": f'{PLAIN} required username="u" password="{CANARY}";'},
    {"KAFKA_SASL_JAAS_CONFIG": f'{PLAIN} required username="u" password="{CANARY}'},
    {"KAFKA_SASL_JAAS_CONFIG": CANARY},
    {"KAFKA_SASL_JAAS_CONFIG": f'x.IAMLoginModule required password="{CANARY}";'},
    {"KAFKA_TOPIC_READY": f"u:{CANARY}@h"},
    {"WEBHOOK_SECRETS": f"whsec_{CANARY}"},
    {"WEBHOOK_SECRETS": CANARY},
    {"HTTP_ALLOW_NETWORKS": f"whsec_{CANARY}"},
    {"SERVER_PORT": f"orch_{CANARY}"},
    {"LOG_LEVEL": f"password={CANARY}"},
    {"SECRETS_DIRECTORY": f"/none?token={CANARY}"},
    {"REDIS_PASSWORD": CANARY},
    {"DB_PASSWORT": CANARY},
]


@pytest.mark.parametrize("environ", ENVIRONMENTS, ids=lambda environ: " ".join(environ))
def test_settings_are_shown_and_refused_without_their_secrets(environ: dict[str, str]) -> None:
    try:
        settings = Settings.from_env(environ)
        said = f"{settings!r} {settings.notices} {settings_table(environ)}"
    except SettingsError as error:
        said = str(error)
    assert said
    assert CANARY not in said


@pytest.mark.parametrize(
    "wrong", [["--header", f"Authorization Bearer {CANARY}", "--payload", "1"], ["--payload", f"{{{CANARY}"]]
)
def test_a_command_line_does_not_repeat_credentials(wrong: list[str]) -> None:
    done = CliRunner().invoke(submit, ["--destination", "https://example.com/", *wrong])
    assert done.exit_code == 2
    assert "expected" in done.output
    assert CANARY not in done.output


def test_a_secret_where_its_name_belongs_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(SecretError) as caught:
        Secrets(str(tmp_path)).header(f"Bearer {CANARY}")
    assert CANARY not in str(caught.value)
    with pytest.raises(ValueError, match="authorization") as malformed:
        custom_headers({f"authorization: {CANARY}": ""})
    assert CANARY not in str(malformed.value)


@pytest.mark.parametrize(
    ("headers", "secret_headers", "query"),
    [
        ({"authorization": f"Bearer {CANARY}"}, (), ""),
        ({"x-api-key": CANARY}, (), ""),
        ({"x-plain": CANARY}, ("X-Plain",), ""),
        ({"cookie": f'a="{CANARY}"'}, (), ""),
        ({}, (), f"a=1&access_token={CANARY}"),
    ],
)
def test_an_echo_of_a_request_is_kept_without_its_credentials(
    headers: dict[str, str], secret_headers: tuple[str, ...], query: str
) -> None:
    echo = f"no: {headers} {json.dumps(headers)} /hook?{query} {CANARY if not headers else ''}"
    said = without_credentials(echo, headers, secret_headers, query)
    assert said.startswith("no: ")
    assert CANARY not in said


def test_an_answer_without_credentials_is_kept_unchanged() -> None:
    headers = {"x-tenant": "ocean", "authorization": "abc"}
    assert without_credentials("ocean: abc is short", headers, (), "n=ocean") == "ocean: abc is short"


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers, root.level = before
    for name in ("uvicorn.access", "aiohttp.access", "httpx", "aiokafka", "aiokafka.conn"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_logging_as_before")
def test_not_even_detailed_logs_hold_secrets(tmp_path: Path) -> None:
    path = tmp_path / "log"
    configure(Settings.from_env({"LOG_FILE": str(path), "LOG_LEVEL": "DEBUG"}), "api")
    access = ("127.0.0.1:1", "GET", f"/api/v1/events/statistics?api_key={CANARY}", "1.1", 401)
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', *access)
    logging.getLogger("aiokafka.conn").debug("Request: SaslAuthenticate(%s)", CANARY)
    lines = path.read_text()
    assert "/api/v1/events/statistics HTTP" in lines
    assert CANARY not in lines


def test_a_traceback_leaves_out_the_rows_that_postgresql_quotes() -> None:
    row = f'{{"a":\n\n"{CANARY}"}}'
    text = f'it breaks a rule\nDETAIL:  Failing row contains (1, {row}).\nCONTEXT:  COPY x, line 1: "{CANARY}"'
    try:
        try:
            raise psycopg.IntegrityError(text)
        except psycopg.Error as error:
            raise OrchestratorError("it failed") from error
    except OrchestratorError:
        record = logging.getLogger("x").makeRecord("x", 40, __file__, 1, "failed", (), sys.exc_info())
    for formatter in (JsonFormatter(LIMITS, "api"), ConsoleFormatter()):
        line = formatter.format(record)
        assert CANARY not in line
        assert "it breaks a rule" in line
        assert "OrchestratorError: it failed" in line
