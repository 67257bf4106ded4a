"""PostgreSQL's `json` takes every payload that a submission may have, and can read the strings in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import ValidationError
from orchestrator.events.parsing import parse_submission


@dataclass(frozen=True)
class Bounds:
    max_payload_bytes: int = 10_000
    max_batch_events: int = 1
    max_retries: int = 3


# Pieces of JSON, right and wrong, that grammars of JSON are known to disagree on.
WORDS = r"""
\u0000 \ud83d \ude00 \u00e9 \/ \x \ " é [ ] { } : , 1 -0 01 1e5 1E+400 - .5 1. NaN null true "a" ""
"""
pieces = st.sampled_from(WORDS.split()) | st.sampled_from(" \n\t\x01\x7f\ufeff")
texts = st.lists(pieces, min_size=1, max_size=8).map("".join) | st.lists(pieces, max_size=6).map(
    lambda inner: f'"{"".join(inner)}"'
)
broken_utf8 = st.binary(max_size=6).map(lambda raw: b'"' + raw + b'"')


@pytest.fixture
def connection(database_url: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500, deadline=None)
@given(payload=texts.map(str.encode) | broken_utf8)
def test_every_accepted_payload_is_json_to_postgresql_too(
    connection: psycopg.Connection[tuple[object, ...]], payload: bytes
) -> None:
    raw = (
        b'{"source": "s", "scheduled_at": "2030-01-31T09:00:00Z", "destination": "http://a/", "payload": '
        + payload
        + b"}"
    )
    try:
        kept = parse_submission(raw, Bounds()).payload
    except ValidationError:
        return
    row = connection.execute("select (%s::json) #>> '{}', %s::json::text", (kept.decode(), kept.decode())).fetchone()
    assert row is not None
    assert row[1] == kept.decode()
    if isinstance(value := json.loads(kept), str):
        assert row[0] == value
