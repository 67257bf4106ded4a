"""SQL reads the times that the API, the command line and Kafka read, and no others: tests/times.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.events.parsing import parse_submission
from orchestrator.events.submission import OutOfRangeError
from orchestrator.events.times import time_of
from orchestrator.settings import Settings
from tests.support.databases import Databases
from tests.support.sql_client import Client, event
from tests.support.times import READ, REFUSED

NOW = datetime(2028, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def client(databases: Databases) -> Iterator[Client]:
    with databases.migrated() as url, Client(url) as client:
        client.rows("select orchestrator.configure_retention(null, null, 36500)")
        yield client.at(NOW)


def test_times_are_kept_at_the_instant_they_name(client: Client) -> None:
    given = [event(scheduled_at=text, expires_at="2100-01-01T00:00:00Z") for text in READ]
    answers = client.submit(*given)
    assert [answer.reason for answer in answers] == [None] * len(given)
    kept: dict[str, datetime] = dict(client.rows("select id::text, scheduled_at from orchestrator.stored_event"))
    assert [kept[str(answer.id)] for answer in answers] == list(READ.values())
    expiring = [event(scheduled_at=NOW.isoformat(), expires_at=text) for text in READ]
    answers = client.submit(*expiring)
    kept = dict(client.rows("select id::text, expires_at from orchestrator.stored_event"))
    assert [kept[str(answer.id)] for answer in answers] == list(READ.values())


@pytest.mark.parametrize("field", ["scheduled_at", "expires_at"])
def test_a_text_that_is_no_time_is_refused(client: Client, field: str) -> None:
    fields = [{"scheduled_at": NOW.isoformat()} | {field: value} for value in REFUSED]
    answers = client.submit(*[event(**each) for each in fields])
    assert [(answer.result, answer.field) for answer in answers] == [("refused", field)] * len(REFUSED)


@pytest.mark.parametrize("text", ["2201-01-01T00:00:00Z", "2200-12-31T23:59:59.9999995Z", "9999-12-31T23:59:59Z"])
def test_an_expiry_after_the_last_schedulable_time_is_refused(client: Client, text: str) -> None:
    fields = event(scheduled_at=NOW.isoformat(), expires_at=text)
    [answer] = client.submit(fields)
    assert (answer.result, answer.field) == ("refused", "expires_at")
    with pytest.raises(OutOfRangeError, match="expires_at: expected a time from 1970 to 2200"):
        parse_submission(json.dumps(fields).encode(), Settings.from_env({}))
    reschedule = (
        "select result, field from orchestrator.reschedule_event(%s, %s, p_expires_at => orchestrator.as_time(%s))"
    )
    assert client.rows(reschedule, client.schedule(), NOW + timedelta(hours=1), text) == [("refused", "expires_at")]


@pytest.mark.parametrize(
    "settings", ["timezone = 'Asia/Kolkata'", "datestyle = 'German, DMY'", "intervalstyle = 'iso_8601'"]
)
def test_settings_of_the_session_do_not_change_how_times_are_read(client: Client, settings: str) -> None:
    with client.transaction():
        client.connection.execute(f"set local {settings}")
        found = client.column(
            """select extract(epoch from orchestrator.as_time(t))::float8
            from unnest(%s::text[]) with ordinality t (t, n) order by n""",
            list(READ),
        )
    assert found == [at.timestamp() for at in READ.values()]


PARTS = "2030-01-31 2030-02-30 T t 08:00 24:00 :00 :59 :60 .5 .1234565 Z z +05 +0530 -05:30 +24:00 -23:59 x"
parts = st.sampled_from([*PARTS.split(), " "])


@given(
    texts=st.lists(
        st.lists(parts, min_size=3, max_size=7).map("".join) | st.text(max_size=30).filter(lambda t: "\x00" not in t),
        min_size=20,
        max_size=60,
    )
)
@settings(max_examples=50, deadline=None)
def test_sql_and_python_read_the_same_times(client: Client, texts: list[str]) -> None:
    def read(text: str) -> datetime | None:
        try:
            return time_of(text).astimezone(UTC)
        except ValueError:
            return None

    storable = [text for text in texts if text.isprintable() or "\n" in text]
    found = client.rows("select t, orchestrator.as_time(t) from unnest(%s::text[]) t", storable)
    assert dict(found) == {text: read(text) for text in storable}


def test_infinite_times_from_psql_are_refused(client: Client) -> None:
    uid = client.schedule(scheduled_at="2030-05-05T00:00:00Z")
    for at in ("infinity", "-infinity", "294276-01-01", "4713-01-01 BC"):
        for call in (
            "select orchestrator.schedule_event('https://a.example', '1', %(at)s)",
            "select orchestrator.schedule_event('https://a.example', '1', p_expires_at => %(at)s)",
        ):
            with pytest.raises(Exception, match=r"expected|before the first day|days ahead"):
                client.connection.execute(call, {"at": at})
        for times in ((at, None), ("2030-05-06T00:00:00Z", at)):
            [(result, field)] = client.rows(
                "select result, field from orchestrator.reschedule_event(%s, %s, null, %s)", uid, *times
            )
            assert (result, field) == ("refused", "scheduled_at" if times[1] is None else "expires_at")
