"""Cancelling all that a filter names, over the API and by the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from orchestrator.cli import bulk_commands
from tests.integration.api_support import assert_problem, fields
from tests.integration.cli_support import Call, answer, invoke, refused, told
from tests.support.sql_client import NOON, Client

PATH = "/api/v1/events/cancel"
SHOP, BANK = "https://Hooks.shop.example:443/a?b", "https://hooks.bank.example:8443/"
DAY = timedelta(days=1)


def scheduled(client: Client) -> dict[str, list[str]]:
    """Two events of each kind: near and far, to one host and another, and to a topic; of another source."""
    return {
        "shop": client.schedule_many(2, destination=SHOP, scheduled_at=NOON + DAY),
        "bank": client.schedule_many(2, destination=BANK, scheduled_at=NOON + DAY),
        "topic": client.schedule_many(2, delivery_type="KAFKA", destination="Orders", scheduled_at=NOON + 2 * DAY),
        "far": client.schedule_many(2, destination=SHOP, scheduled_at=NOON + 200 * DAY),
        "other": client.schedule_many(2, destination=SHOP, source='a"b%_', scheduled_at=NOON + DAY),
    }


async def cancelled(api: httpx.AsyncClient, **body: Any) -> Any:
    response = await api.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def left(client: Client, events: dict[str, list[str]]) -> set[str]:
    """The kinds of which none is cancelled; of the others all are."""
    statuses = {kind: {client.status(each) for each in ids} for kind, ids in events.items()}
    assert {status for each in statuses.values() for status in each} <= {"scheduled", "cancelled"}
    assert all(len(each) == 1 for each in statuses.values()), statuses
    return {kind for kind, each in statuses.items() if each == {"scheduled"}}


# Over the API


FILTERS: list[tuple[dict[str, Any], set[str]]] = [
    ({"source": "tests"}, {"shop", "bank", "topic", "far"}),
    ({"source": 'a"b%_'}, {"other"}),
    ({"source": "test"}, set()),
    ({"source": "%"}, set()),
    ({"destination": "hooks.shop.example"}, {"shop", "far", "other"}),
    ({"destination": "HOOKS.shop.example:443"}, {"shop", "far", "other"}),
    ({"destination": "hooks.bank.example"}, set()),
    ({"destination": "hooks.bank.example:8443"}, {"bank"}),
    ({"destination": "*.example"}, {"shop", "far", "other"}),
    ({"destination": "kafka:Orders"}, {"topic"}),
    ({"destination": "kafka:orders"}, set()),
    ({"from": (NOON + 2 * DAY).isoformat()}, {"topic", "far"}),
    ({"until": (NOON + 2 * DAY).isoformat()}, {"shop", "bank", "other"}),
    ({"from": "2020-01-01T00:00:00+22:02", "until": "2020-01-01T00:00:00-17:54"}, set()),
    ({"from": "0001-01-01T00:00:00+01:00", "until": "9999-12-31T23:59:59-01:00", "source": 'a"b%_'}, {"other"}),
    ({"source": "tests", "destination": "hooks.shop.example", "until": (NOON + 2 * DAY).isoformat()}, {"shop"}),
]


async def test_every_part_of_a_filter_narrows_it(api: httpx.AsyncClient, client: Client) -> None:
    events = scheduled(client)
    for body, meant in FILTERS:
        ids = {each for kind in meant for each in events[kind]}
        found = await cancelled(api, **body, dry_run=True)
        assert (found["matched"], found["cancelled"], set(found["examples"])) == (len(ids), 0, ids), body
    assert left(client, events) == events.keys()


async def test_events_that_match_the_filter_are_cancelled_and_no_others(api: httpx.AsyncClient, client: Client) -> None:
    events = scheduled(client)
    body = {"source": "tests", "destination": "hooks.shop.example"}
    rehearsed = await cancelled(api, **body, dry_run=True)
    assert await cancelled(api, **body) == rehearsed | {"cancelled": 4}
    assert left(client, events) == events.keys() - {"shop", "far"}
    assert (await cancelled(api, **body))["matched"] == 0


async def test_a_call_is_bounded_and_goes_on_where_the_one_before_ended(api: httpx.AsyncClient, client: Client) -> None:
    events = scheduled(client)
    tally = {"seen": 0, "matched": 0, "cancelled": 0}
    body: dict[str, Any] = {"source": "tests", "limit": 3, "after": None}
    for _ in range(10):
        done = await cancelled(api, **body)
        assert done["seen"] <= 3
        tally = {name: count + done[name] for name, count in tally.items()}
        body["after"] = done["next_after"]
        if body["after"] is None:
            break
    assert tally == {"seen": 10, "matched": 8, "cancelled": 8}
    assert left(client, events) == {"other"}


async def test_an_attempt_under_way_goes_on_and_is_counted(api: httpx.AsyncClient, client: Client) -> None:
    client.schedule_many(2, scheduled_at=datetime.now(UTC))
    client.claim(1)
    done = await cancelled(api, source="tests")
    assert (done["matched"], done["cancelled"], done["in_flight"]) == (2, 1, 1)


WRONG_BODIES: list[tuple[Any, set[str]]] = [
    ({}, {"body"}),
    ({"dry_run": True, "limit": 5}, {"body"}),
    ([], {"body"}),
    ({"source": None}, {"source"}),
    ({"source": ""}, {"source"}),
    ({"source": "x" * 201}, {"source"}),
    ({"source": "a\0b"}, {"source"}),
    ({"source": ["a", "b"]}, {"source"}),
    ({"destination": "https://hooks.shop.example/a"}, {"destination"}),
    ({"destination": "*"}, {"destination"}),
    ({"destination": "x" * 301}, {"destination"}),
    ({"destination": "a b\n"}, {"destination"}),
    ({"from": "yesterday"}, {"from"}),
    ({"from": "2030-01-31T09:00:00", "until": 7}, {"from", "until"}),
    ({"source": "a", "limit": 0}, {"limit"}),
    ({"source": "a", "limit": 10_001}, {"limit"}),
    ({"source": "a", "limit": "5"}, {"limit"}),
    ({"source": "a", "dry_run": "yes"}, {"dry_run"}),
    ({"source": "a", "after": "7"}, {"after"}),
    ({"source": "a", "reason": "x"}, {"reason"}),
    ({"sorce": "a"}, {"sorce"}),
]


async def test_a_request_that_breaks_a_rule_cancels_nothing(api: httpx.AsyncClient, client: Client) -> None:
    event_id = client.schedule()
    for body, wrong in WRONG_BODIES:
        assert fields(assert_problem(await api.post(PATH, json=body), 422, "validation")) == wrong
    assert client.status(event_id) == "scheduled"


async def test_an_empty_range_of_times_is_a_409(api: httpx.AsyncClient) -> None:
    for until in (NOON, NOON - DAY):
        body = {"from": NOON.isoformat(), "until": until.isoformat()}
        problem = assert_problem(await api.post(PATH, json=body), 409, "empty-range")
        assert fields(problem) == {"until"}
        assert "expected a time after from" in problem["detail"]


async def test_a_call_may_go_on_after_any_id(api: httpx.AsyncClient, client: Client) -> None:
    client.schedule()
    for after in ("4fc0a1d5-1d3f-4d57-9ac4-1bb3b1d0b0c5", "ffffffff-ffff-ffff-ffff-ffffffffffff"):
        done = await cancelled(api, source="tests", after=after.upper())
        assert (done["seen"], done["next_after"]) == (0, None)


# By the command line

FILTER = ("--source", "tests", "--destination", SHOP, "--from", "now", "--until", "+7d")


@pytest.fixture(autouse=True)
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_commands, "_LOOKED_AT", 3)


def test_a_dry_run_counts_events_and_names_some(call: Call, client: Client) -> None:
    events = scheduled(client)
    shown = told(call("cancel", *FILTER, "--dry-run"))
    assert "2 would be cancelled" in shown
    assert all(f"such as {each}" in shown for each in events["shop"])
    found = answer(call("cancel", *FILTER, "--dry-run", "--json"))
    assert (found["dry_run"], found["matched"], found["cancelled"], found["in_flight"]) == (True, 2, 0, 0)
    assert set(found["examples"]) == set(events["shop"])
    assert left(client, events) == events.keys()


def test_events_are_cancelled_after_a_confirmation(call: Call, client: Client) -> None:
    events = scheduled(client)
    no = call("cancel", *FILTER, typed="n\n")
    assert (no.exit_code, "Cancel 2 events? [y/N]" in no.stdout) == (1, True)
    assert left(client, events) == events.keys()
    assert "2 matched, 2 cancelled" in call("cancel", *FILTER, typed="y\n").stdout
    assert left(client, events) == events.keys() - {"shop"}
    assert "0 would be cancelled" in told(call("cancel", *FILTER))
    assert "looked at 8: 2 matched, 2 cancelled" in told(call("cancel", "--source", 'a"b%_', "--yes"))
    assert answer(call("cancel", "--from", "now", "--yes", "--json"))["cancelled"] == 6


def test_the_command_fails_when_events_were_left_in_flight(call: Call, client: Client) -> None:
    client.schedule_many(2, scheduled_at=datetime.now(UTC))
    client.claim(1)
    done = call("cancel", "--until", "+1d", "--yes")
    assert (done.exit_code, done.stdout) == (1, "looked at 2: 2 matched, 1 cancelled, 1 in flight\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "expected ID, --external-id, or a filter: --source, --destination, --from or --until"),
        (["--dry-run"], "--dry-run, --yes: for many events"),
        (["--external-id", "x", "--yes"], "for many events, without ID"),
        (["--external-id", "x", "--source", "s"], "for many events, without ID"),
        (["--source", ""], "--source: expected a text; leave the option out to mean all"),
        (["--source", "s", "--json"], "--json: cannot ask for confirmation; add --yes or --dry-run"),
        (["--from", "now", "--until", "-1h"], "--until: expected a time after --from"),
        (["--from", "monday"], "--from': expected an RFC 3339 time with a zone"),
        (["--until", "2030-01-31"], "--until': expected an RFC 3339 time with a zone"),
    ],
)
def test_the_command_cancel_used_wrongly_says_how_it_is_used(arguments: list[str], complaint: str) -> None:
    assert complaint in refused(invoke("cancel", *arguments), 2)


def test_an_invalid_destination_is_refused_by_its_option(call: Call) -> None:
    for name in ("*", "a b", "http://user@example.com/", "kafka:a/b", "x" * 301):
        said = refused(call("cancel", "--destination", name, "--yes"))
        assert said.startswith("--destination: expected a host such as")
