"""The id of an event: the same in SQL and in Python, for every input that either accepts."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.events.submission import bucket, bucket_of_key, event_id, random_event_id
from tests.support.databases import Databases
from tests.support.sql_client import Client

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST = datetime(2200, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
MICROSECONDS = (datetime(2201, 1, 1, tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
times = st.integers(0, MICROSECONDS - 1).map(lambda micros: EPOCH + timedelta(microseconds=micros))


@pytest.fixture(scope="module")
def client(databases: Databases) -> Iterator[Client]:
    with databases.migrated() as url, Client(url) as client:
        yield client


Named = tuple[str, str, datetime, str | None]


def in_sql(client: Client, named: list[Named]) -> list[tuple[str, int, int]]:
    """Of each its id, the bucket in that, and the bucket of its key."""
    return [
        (row[0], row[1], row[2])
        for row in client.rows(
            """select i::text, orchestrator.bucket(i), orchestrator.bucket_of_key(coalesce(key, job))
            from unnest(%s::text[], %s::text[], %s::timestamptz[], %s::text[])
              with ordinality as t (source, job, at, key, n)
            cross join lateral orchestrator.event_id(source, job, at, key) i order by n""",
            *map(list, zip(*named, strict=True)),
        )
    ]


def in_python(named: list[Named]) -> list[tuple[str, int, int]]:
    ids = [event_id(*each) for each in named]
    return [
        (one, bucket(one), bucket_of_key(job if key is None else key))
        for one, (_, job, _, key) in zip(ids, named, strict=True)
    ]


@given(named=st.lists(st.tuples(texts, texts, times, st.none() | texts), min_size=1, max_size=40))
@example(named=[("", "", EPOCH, None), ("", "", EPOCH, "")])
@example(named=[("a", "bc", EPOCH, None), ("ab", "c", EPOCH, None), ("a", "b", EPOCH, "c"), ("a", "", EPOCH, "bc")])
@example(named=[("s" * 200, "\U0010fffd" * 200, EPOCH, "ß" * 200)])
@example(named=[("\U0001f9ed", "\U0010ffff", LAST, None), ("\U0001f9ed", "\U0010ffff", LAST, "e\u0301")])
@settings(max_examples=100, deadline=None)
def test_sql_and_python_give_the_same_id_and_bucket(client: Client, named: list[Named]) -> None:
    found = in_python(named)
    assert in_sql(client, named) == found
    assert len({one for one, _, _ in found}) == len(set(named))
    assert all(held == of_key for _, held, of_key in found)


def test_sql_and_python_give_the_same_20_000_ids(client: Client) -> None:
    rng = random.Random(7)
    alphabet = "aZ09:/ \t\n\\'\"{}äßñ\u0301\u200d漢字\uffff\U0001f600\U0010fffd"

    def text() -> str:
        return "".join(rng.choices(alphabet, k=rng.choice([0, 1, 2, 36, 200])))

    named: list[Named] = [
        (text(), text(), EPOCH + timedelta(microseconds=rng.randrange(MICROSECONDS)), rng.choice([None, text()]))
        for _ in range(20_000)
    ]
    assert in_sql(client, named) == in_python(named)


def test_buckets_are_even(client: Client) -> None:
    """4,096 of them for 40,960 ids: none may be far from ten."""
    for made in ("orchestrator.event_id('s', n::text, '2030-01-01Z')", "orchestrator.random_event_id('2030-01-01Z')"):
        used, most = client.rows(
            f"""select count(*), max(c) from (
              select count(*) as c from generate_series(1, 40960) n group by orchestrator.bucket({made})) b"""
        )[0]
        assert used > 4080
        assert most < 40


@given(at=times, place=st.integers(0, 4095))
@settings(max_examples=30, deadline=None)
def test_a_random_id_is_in_the_requested_bucket(client: Client, at: datetime, place: int) -> None:
    assert client.value("select orchestrator.bucket(orchestrator.random_event_id(%s, %s))", at, place) == place


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
def test_an_id_needs_source_external_id_and_time(client: Client, arguments: tuple[object, ...]) -> None:
    assert client.value("select orchestrator.event_id(%s::text, %s::text, %s::timestamptz)", *arguments) is None


def test_ids_do_not_depend_on_the_session_s_time_zone_and_date_style(client: Client) -> None:
    expected = event_id("s", "j", datetime(2030, 1, 31, 8, tzinfo=UTC))
    with client.transaction():
        client.rows("set local timezone = 'Pacific/Chatham'")
        client.rows("set local datestyle = 'German'")
        got = client.value("select orchestrator.event_id('s', 'j', '2030-01-31T08:00:00Z'::timestamptz)::text")
    assert got == expected
