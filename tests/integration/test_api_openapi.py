"""The OpenAPI document is true: a fuzzer that believes it finds no answer that it does not describe."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Route

from orchestrator.api.app import api_app
from orchestrator.api.auth import key_hash, new_key
from orchestrator.api.openapi.document import document
from orchestrator.api.routes.health import Health
from orchestrator.database import Database
from orchestrator.events.parsing import parse_submission
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import running_api
from tests.support.brokers import Kafka
from tests.support.exploring import explored_seed

CONFIGURATION = Path(__file__).parents[1] / "schemathesis.toml"
EXAMPLES = 10
MORE_EXAMPLES = 30
# The coverage phase, two thirds of the work, is left to the test of an open API: bodies are judged alike in all.


async def fuzz(settings: Settings, directory: Path, *arguments: str, examples: int = EXAMPLES) -> tuple[int, str]:
    """Runs schemathesis against the server of these settings; its exit status and what it printed."""
    seed = explored_seed()
    fixed, seeded = ["--generation-deterministic"], ["--generation-database=none", "--seed", str(seed)]
    process = await asyncio.create_subprocess_exec(
        *("nice", sys.executable),  # other tests, which run beside this one, look at the time
        *("-m", "schemathesis.cli", "--config-file", str(CONFIGURATION), "run", "--no-color"),
        *("--max-examples", str(examples), "--no-shrink", "--suppress-health-check=too_slow"),
        *(fixed if seed is None else seeded),
        *arguments,
        f"http://127.0.0.1:{settings.server_port}/openapi.json",
        cwd=directory,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode()


@pytest.mark.hypothesis
@pytest.mark.timeout(600)
async def test_every_answer_of_an_open_api_is_described(settings: MakeSettings, tmp_path: Path) -> None:
    chosen = settings()
    async with Database(chosen, role="api") as database, running_api(chosen, database):
        status, printed = await fuzz(chosen, tmp_path)
    assert status == 0, printed


@pytest.mark.hypothesis
@pytest.mark.timeout(600)
async def test_every_answer_of_an_api_that_needs_keys_is_described(settings: MakeSettings, tmp_path: Path) -> None:
    chosen = settings(ALLOW_ANONYMOUS="false")
    key = new_key()
    async with Database(chosen, role="api") as database:
        await database.create_api_key("fuzzer", key_hash(key), ["admin"])
        async with running_api(chosen, database):
            authorization = f"Authorization: Bearer {key}"
            status, printed = await fuzz(chosen, tmp_path, "--header", authorization, "--phases", "fuzzing")
    assert status == 0, printed


@pytest.mark.hypothesis
@pytest.mark.timeout(600)
async def test_every_answer_of_an_api_that_hands_events_to_kafka_is_described(
    kafka: Kafka, settings: MakeSettings, tmp_path: Path
) -> None:
    topic = kafka.unique("submissions")
    await kafka.create_topic(topic, 3)
    chosen = settings(KAFKA_TOPIC_SUBMISSION=topic, **kafka.environ)
    async with Database(chosen, role="api") as database, running_api(chosen, database):
        only = "--include-path-regex", "^/api/v1/events(/batch)?$"  # all that Kafka changes
        status, printed = await fuzz(chosen, tmp_path, *only, "--phases", "examples,fuzzing", examples=MORE_EXAMPLES)
    assert status == 0, printed


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        ({}, {"200", "201"}),
        ({"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}, {"202"}),
        ({"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "SUBMIT_FALLBACK": "database"}, {"200", "201", "202"}),
    ],
)
def test_the_answers_to_a_submission_are_described_as_configured(
    settings: MakeSettings, given: dict[str, str], answers: set[str]
) -> None:
    paths = document(settings(DATABASE_URL="postgresql://localhost/none", **given))["paths"]
    described = paths["/api/v1/events"]["post"]["responses"]
    assert {status for status in described if status.startswith("2")} == answers


@pytest.mark.parametrize("management", [{}, {"MANAGEMENT_SERVER_PORT": "8081"}])
async def test_the_document_lists_exactly_the_existing_routes(
    settings: MakeSettings, management: dict[str, str]
) -> None:
    chosen = settings(**management)
    metrics = Metrics(chosen)
    async with (
        Database(chosen, role="api") as database,
        api_app(chosen, database, metrics, Health(database, metrics)) as app,
    ):
        routes = {
            (route.path_format, method)
            for route in app.routes
            if isinstance(route, Route)
            for method in (route.methods or set()) - {"HEAD"}
        }
    described = {
        (path, method.upper()) for path, operations in document(chosen)["paths"].items() for method in operations
    }
    assert described == routes


def test_the_examples_are_submissions(settings: MakeSettings) -> None:
    chosen = settings(DATABASE_URL="postgresql://localhost/none")
    examples = document(chosen)["components"]["schemas"]["Submission"]["examples"]
    parsed = [parse_submission(json.dumps(example).encode(), chosen) for example in examples]
    assert [submission.destination for submission in parsed] == [example["destination"] for example in examples]


def test_the_document_asks_for_keys_just_when_the_api_does(settings: MakeSettings) -> None:
    url = "postgresql://localhost/none"
    assert {} in document(settings(DATABASE_URL=url))["security"]
    assert {} not in document(settings(DATABASE_URL=url, ENVIRONMENT="production"))["security"]


def undescribed(schema: object, path: str) -> Iterator[str]:
    """The properties in a part of the document that have no description."""
    if isinstance(schema, dict):
        for name, inner in schema.items():
            if name == "properties":
                yield from (f"{path}.{field}" for field, of in inner.items() if not of.get("description"))
            yield from undescribed(inner, f"{path}.{name}")
    elif isinstance(schema, list):
        for number, inner in enumerate(schema):
            yield from undescribed(inner, f"{path}[{number}]")


def test_the_document_describes_every_schema_property_and_parameter(settings: MakeSettings) -> None:
    described = document(settings(DATABASE_URL="postgresql://localhost/none"))
    schemas = described["components"]["schemas"]
    parameters = [
        (f"{method} {path}", parameter)
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
        for parameter in operation.get("parameters", ())
    ]
    assert list(undescribed(schemas, "")) == []
    assert [name for name, schema in schemas.items() if not schema.get("description")] == []
    assert [(where, of["name"]) for where, of in parameters if not of.get("description")] == []
