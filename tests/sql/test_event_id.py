"""The id of an event: the same in SQL and in Python, for every input that either accepts."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.events import event_id, random_event_id
from tests.support.databases import Databases
from tests.support.sql_client import Client

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECONDS = (datetime(2201, 1, 1, tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
times = st.integers(0, MICROSECONDS - 1).map(lambda micros: EPOCH + timedelta(microseconds=micros))


@pytest.fixture(scope="module")
def client(databases: Databases) -> Iterator[Client]:
    with databases.migrated() as url, Client(url) as client:
        yield client


def in_sql(client: Client, triples: list[tuple[str, str, datetime]]) -> list[str]:
    return client.column(
        """select orchestrator.event_id(source, job, at)::text
        from unnest(%s::text[], %s::text[], %s::timestamptz[]) with ordinality as t (source, job, at, n) order by n""",
        *map(list, zip(*triples, strict=True)),
    )


@given(triples=st.lists(st.tuples(texts, texts, times), min_size=1, max_size=40))
@example(triples=[("", "", EPOCH)])
@example(triples=[("a", "bc", EPOCH), ("ab", "c", EPOCH)])
@example(triples=[("\U0001f9ed", "\U0010ffff", datetime(2200, 12, 31, 23, 59, 59, 999999, UTC))])
@settings(max_examples=100, deadline=None)
def test_sql_and_python_give_the_same_id(client: Client, triples: list[tuple[str, str, datetime]]) -> None:
    assert in_sql(client, triples) == [event_id(*triple) for triple in triples]


def test_sql_and_python_give_the_same_20_000_ids(client: Client) -> None:
    rng = random.Random(7)
    alphabet = "aZ09:/ \t\n\\'\"{}äßñ\u0301\u200d漢字\uffff\U0001f600\U0010fffd"

    def text() -> str:
        return "".join(rng.choices(alphabet, k=rng.choice([0, 1, 2, 36, 200])))

    triples = [(text(), text(), EPOCH + timedelta(microseconds=rng.randrange(MICROSECONDS))) for _ in range(20_000)]
    assert in_sql(client, triples) == [event_id(*triple) for triple in triples]


@given(at=times)
@settings(max_examples=100, deadline=None)
def test_an_id_is_a_version_7_uuid_of_the_millisecond_it_is_due(client: Client, at: datetime) -> None:
    [(seeded, drawn, extracted)] = client.rows(
        """select i, orchestrator.random_event_id(at), uuid_extract_timestamp(i)
        from (select at, orchestrator.event_id('s', 'j', at) as i from (select %s::timestamptz) t (at)) t""",
        at,
    )
    millisecond = at - timedelta(microseconds=at.microsecond % 1000)
    assert extracted == millisecond
    for made in (seeded, drawn, uuid.UUID(random_event_id(at))):
        assert (made.version, made.variant) == (7, uuid.RFC_4122)
        assert made.int >> 80 == (millisecond - EPOCH) // timedelta(milliseconds=1)


def test_random_ids_differ(client: Client) -> None:
    ids = client.column("select orchestrator.random_event_id('2030-01-01T00:00:00Z') from generate_series(1, 1000)")
    assert len(set(ids)) == 1000


@pytest.mark.parametrize(
    "arguments",
    [(None, "job", EPOCH), ("source", None, EPOCH), ("source", "job", None)],
    ids=["source", "external id", "time"],
)
def test_no_id_without_all_three(client: Client, arguments: tuple[object, ...]) -> None:
    assert client.value("select orchestrator.event_id(%s::text, %s::text, %s::timestamptz)", *arguments) is None


def test_the_session_s_time_zone_and_date_style_do_not_matter(client: Client) -> None:
    expected = event_id("s", "j", datetime(2030, 1, 31, 8, tzinfo=UTC))
    with client.transaction():
        client.rows("set local timezone = 'Pacific/Chatham'")
        client.rows("set local datestyle = 'German'")
        got = client.value("select orchestrator.event_id('s', 'j', '2030-01-31T08:00:00Z'::timestamptz)::text")
    assert got == expected
