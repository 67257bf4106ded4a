"""Dead letters over the API and by the command line: listed, shown, tried again at a rate, and forgotten."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from orchestrator.cli import bulk_commands
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, fields
from tests.integration.cli_support import Call, answer, invoke, refused, told
from tests.support.dispatching import arrivals, dispatching, finished
from tests.support.receiver import Receiver
from tests.support.sql_client import Client, results

PATH = "/api/v1/dead-letters"
SHOP, BANK = "https://hooks.shop.example/a", "https://hooks.bank.example:8443/"
UNKNOWN = "019c1347-d2fb-705e-a717-2a27dd38d28f"


def bury(client: Client, count: int = 1, *, error: str = "gone", ago_s: float = 0, **changes: Any) -> list[str]:
    """Events that died so long ago."""
    changes.setdefault("scheduled_at", datetime.now(UTC) - timedelta(seconds=ago_s))
    ids = client.schedule_many(count, **changes)
    client.finish(results(client.claim(), "fail", error=error, started_at=0.0, finished_at=0.0))
    client.rows(
        "update orchestrator.dead_letter set died_at = died_at - make_interval(secs => %s) where event_id = any (%s)",
        ago_s,
        ids,
    )
    return ids


@pytest.fixture
def dead(client: Client) -> dict[str, list[str]]:
    return {
        "shop": bury(client, 2, destination=SHOP, error="timeout: no answer within 30 s"),
        "bank": bury(client, 2, destination=BANK, error="HTTP 410 (100% gone)", ago_s=3600),
        "topic": bury(client, 2, delivery_type="KAFKA", destination="Orders", error="no such TOPIC", ago_s=7200),
        "other": bury(client, 2, destination=SHOP, source='a"b%_', ago_s=10),
    }


def hours_ago(hours: float) -> str:
    return (datetime.now(UTC) - timedelta(hours=hours)).isoformat()


FILTERS: list[tuple[dict[str, str], set[str]]] = [
    ({"source": 'a"b%_'}, {"other"}),
    ({"source": "%"}, set()),
    ({"destination": "hooks.shop.example"}, {"shop", "other"}),
    ({"destination": "HOOKS.bank.example:8443"}, {"bank"}),
    ({"destination": "hooks.*.example"}, {"shop", "other"}),
    ({"destination": "kafka:Orders"}, {"topic"}),
    ({"reason": "TimeOut"}, {"shop"}),
    ({"reason": "topic"}, {"topic"}),
    ({"reason": "%"}, {"bank"}),
    ({"reason": "_"}, set()),
    ({"from": hours_ago(0.5)}, {"shop", "other"}),
    ({"from": hours_ago(1.5), "until": hours_ago(0.5)}, {"bank"}),
    ({"until": hours_ago(0.5), "source": "tests", "reason": "no such"}, {"topic"}),
    ({"from": "0001-01-01T00:00:00+01:00", "until": "9999-12-31T23:59:59-01:00", "reason": "gone"}, {"bank", "other"}),
]


def ids(dead: dict[str, list[str]], kinds: set[str]) -> set[str]:
    return {each for kind in kinds for each in dead[kind]}


def listed(client: Client) -> set[str]:
    return set(client.column("select event_id::text from orchestrator.dead_letter"))


async def posted(api: httpx.AsyncClient, what: str, **body: Any) -> Any:
    response = await api.post(f"{PATH}/{what}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


# Over the API


async def test_a_filter_means_the_same_to_list_redrive_and_purge(
    api: httpx.AsyncClient, client: Client, dead: dict[str, list[str]]
) -> None:
    for which, meant in FILTERS:
        found = (await api.get(PATH, params=which)).json()
        assert ({each["id"] for each in found["dead_letters"]}, found["next"]) == (ids(dead, meant), None), which
        for what, done in (("redrive", "redriven"), ("purge", "purged")):
            told = await posted(api, what, **which, dry_run=True)
            assert (told["matched"], told[done], set(told["examples"])) == (2 * len(meant), 0, ids(dead, meant)), which
    assert listed(client) == ids(dead, set(dead))


async def test_pages_hold_every_dead_letter_once_newest_first(
    api: httpx.AsyncClient, client: Client, dead: dict[str, list[str]]
) -> None:
    client.rows("update orchestrator.dead_letter set died_at = date_trunc('hour', died_at)")  # so that many share one
    seen: list[dict[str, Any]] = []
    query = {"limit": "3"}
    while True:
        page = (await api.get(PATH, params=query)).json()
        seen += page["dead_letters"]
        if page["next"] is None:
            break
        assert len(page["dead_letters"]) == 3
        query["cursor"] = page["next"]
    assert {each["id"] for each in seen} == ids(dead, set(dead))
    places = [(each["died_at"], each["id"]) for each in seen]
    assert places == sorted(places, reverse=True)
    [letter] = [each for each in seen if each["id"] == dead["bank"][0]]
    assert (letter["source"], letter["destination"], letter["destination_name"], letter["reason"]) == (
        "tests",
        BANK,
        "hooks.bank.example:8443",
        "HTTP 410 (100% gone)",
    )


async def test_a_redrive_keeps_to_its_rate_from_call_to_call(api: httpx.AsyncClient, client: Client) -> None:
    kept = bury(client, 6, scheduled_at=datetime.now(UTC))
    began = datetime.now(UTC)
    body: dict[str, Any] = {"rate_per_second": 2, "limit": 4, "after": None, "start_at": None}
    first = await posted(api, "redrive", **body)
    assert (first["seen"], first["redriven"]) == (4, 4)
    second = await posted(api, "redrive", **body | {"after": first["next_after"], "start_at": first["next_start_at"]})
    assert (second["seen"], second["redriven"], second["next_after"]) == (2, 2, None)
    due = client.column("select due_at from orchestrator.timer order by due_at")
    assert [round((at - due[1]).total_seconds(), 6) for at in due[1:]] == [0, 0.5, 1, 1.5, 2]
    assert timedelta(0) <= due[1] - due[0] <= timedelta(seconds=0.5)  # the first is due when it is redriven
    assert timedelta(0) <= due[0] - began < timedelta(seconds=10)
    assert {client.status(each) for each in kept} == {"retrying"}
    assert listed(client) == set()


async def test_redriven_events_are_delivered_and_keep_their_history(
    api: httpx.AsyncClient, settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    kept = bury(client, 3, destination=receiver.url("/hook"), max_retries=1)
    async with dispatching(settings()):
        await posted(api, "redrive")
        await finished(client, kept)
    assert arrivals(receiver.requests) == dict.fromkeys(kept, 1)
    for event_id in kept:
        assert client.outcomes(event_id) == [(1, "dead"), (1, "redriven"), (2, "delivered")]


async def test_a_purge_forgets_dead_letters_and_leaves_their_events_dead(
    api: httpx.AsyncClient, client: Client, dead: dict[str, list[str]]
) -> None:
    body: dict[str, Any] = {"source": "tests", "limit": 5}
    first = await posted(api, "purge", **body)
    second = await posted(api, "purge", **body, after=first["next_after"])
    assert (first["purged"] + second["purged"], second["next_after"]) == (6, None)
    assert listed(client) == ids(dead, {"other"})
    assert client.status(dead["shop"][0]) == "dead"
    assert (await posted(api, "redrive", source="tests"))["redriven"] == 0
    assert client.statistics()["totals"]["purged"] == 6


WRONG_BODIES: list[tuple[Any, set[str]]] = [
    ([], {"body"}),
    ({"source": None}, {"source"}),
    ({"reason": ""}, {"reason"}),
    ({"reason": "x" * 1001}, {"reason"}),
    ({"reason": "a\0"}, {"reason"}),
    ({"destination": "https://a/b", "from": "now", "until": ""}, {"destination", "from", "until"}),
    ({"source": "a", "limit": 10_001, "dry_run": 1}, {"limit", "dry_run"}),
    ({"source": "a", "after": "x"}, {"after"}),
    ({"scheduled_at": "2030-01-01T00:00:00Z", "source": "a"}, {"scheduled_at"}),
]


async def test_a_body_that_breaks_rules_is_a_422_that_names_each_field(
    api: httpx.AsyncClient, client: Client, dead: dict[str, list[str]]
) -> None:
    for what in ("redrive", "purge"):
        for body, wrong in WRONG_BODIES:
            assert fields(assert_problem(await api.post(f"{PATH}/{what}", json=body), 422, "validation")) == wrong
    for rate in (0, -1, 100_001, "5", True, 1e-9):
        response = await api.post(f"{PATH}/redrive", json={"rate_per_second": rate})
        assert fields(assert_problem(response, 422, "validation")) == {"rate_per_second"}
    assert listed(client) == ids(dead, set(dead))


async def test_a_purge_of_everything_is_refused(api: httpx.AsyncClient) -> None:
    bodies: list[dict[str, Any]] = [{}, {"dry_run": True}, {"limit": 5, "after": UNKNOWN}]
    for body in bodies:
        problem = assert_problem(await api.post(f"{PATH}/purge", json=body), 422, "validation")
        assert "expected at least one of source, destination, from, until, reason" in problem["detail"]


async def test_a_wrong_parameter_of_the_list_is_named(api: httpx.AsyncClient) -> None:
    for query, status, kind, field in (
        ("source=", 422, "validation", "source"),
        ("destination=a%20b", 422, "validation", "destination"),
        ("from=yesterday", 422, "validation", "from"),
        ("reason=%00", 422, "validation", "reason"),
        ("limit=0", 422, "validation", "limit"),
        ("cursor=x", 400, "bad-cursor", "cursor"),
        ("from=2030-01-01T00:00:00Z&until=2030-01-01T00:00:00Z", 409, "empty-range", "until"),
    ):
        assert fields(assert_problem(await api.get(f"{PATH}?{query}"), status, kind)) == {field}


# By the command line


@pytest.fixture(autouse=True)
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_commands, "_LOOKED_AT", 3)


def test_dead_letters_are_listed_by_filter_and_shown_one_by_one(
    call: Call, client: Client, dead: dict[str, list[str]]
) -> None:
    everything = answer(call("dead-letters", "list", "--json"))
    assert [each["died_at"] for each in everything] == sorted((each["died_at"] for each in everything), reverse=True)
    narrowed = answer(call("dead-letters", "list", "--destination", BANK, "--from", "-2h", "--reason", "410", "--json"))
    assert {each["id"] for each in narrowed} == set(dead["bank"])
    shown = told(call("dead-letters", "list", "--limit", "3"))
    assert "timeout: no answer" in shown
    assert "There are more: --limit 15" in shown
    assert "No dead letter matches the filter." in told(call("dead-letters", "list", "--source", "nobody"))
    event_id = dead["topic"][0]
    story = told(call("dead-letters", "show", event_id))
    assert all(text in story for text in (event_id, "attempt 1 dead", "no such TOPIC"))
    assert answer(call("dead-letters", "show", event_id, "--json"))["status"] == "dead"
    live = client.schedule(scheduled_at=datetime.now(UTC) + timedelta(hours=1))
    assert "is not dead: its status is scheduled" in refused(call("dead-letters", "show", live))
    assert "there is no event" in refused(call("dead-letters", "show", UNKNOWN))


def test_a_redrive_by_command_asks_first_and_goes_on_until_all_events_are_done(
    call: Call, client: Client, dead: dict[str, list[str]]
) -> None:
    which = ("dead-letters", "redrive", "--source", "tests")
    assert "6 would be redriven" in told(call(*which, "--dry-run"))
    no = call(*which, typed="n\n")
    assert (no.exit_code, "Redrive 6 dead events? [y/N]" in no.stdout) == (1, True)
    assert len(listed(client)) == 8
    assert "looked at 8: 6 matched, 6 redriven" in told(call(*which, "--rate", "0.5", "--yes"))
    assert listed(client) == ids(dead, {"other"})
    due = client.column("select due_at from orchestrator.timer order by due_at")
    assert [round((at - due[0]).total_seconds()) for at in due] == [0, 2, 4, 6, 8, 10]
    done = answer(call("dead-letters", "redrive", "--yes", "--json"))
    assert (done["matched"], done["redriven"]) == (2, 2)


def test_a_limit_counts_only_dead_letters_that_match_the_filter(
    call: Call, client: Client, dead: dict[str, list[str]]
) -> None:
    for limit, left in ((1, 7), (4, 3), (9, 2)):
        done = answer(call("dead-letters", "redrive", "--source", "tests", "--limit", str(limit), "--yes", "--json"))
        assert done["redriven"] == done["matched"]
        assert len(listed(client)) == left
    assert listed(client) == ids(dead, {"other"})


def test_a_dead_event_is_redriven_by_its_id(call: Call, client: Client, dead: dict[str, list[str]]) -> None:
    event_id = dead["shop"][0]
    assert told(call("dead-letters", "redrive", event_id)) == f"{event_id}  redriven\n"
    assert listed(client) == ids(dead, set(dead)) - {event_id}
    assert "it is not dead (retrying)" in refused(call("dead-letters", "redrive", event_id))
    assert "there is no event" in refused(call("dead-letters", "redrive", UNKNOWN))
    other = dead["shop"][1]
    assert answer(call("dead-letters", "redrive", other, "--json")) == {"id": other, "result": "redriven"}


def test_a_purge_by_command_asks_first(call: Call, client: Client, dead: dict[str, list[str]]) -> None:
    which = ("dead-letters", "purge", "--until", "-30m")
    no = call(*which, typed="\n")
    assert (no.exit_code, "Purge 4 dead letters? [y/N]" in no.stdout) == (1, True)
    assert len(listed(client)) == 8
    assert answer(call(*which, "--yes", "--json"))["purged"] == 4
    assert "4 matched, 4 purged" in call("dead-letters", "purge", "--until", "now", typed="y\n").stdout
    assert listed(client) == set()
    purged = dead["shop"][0]
    assert "purged" in refused(call("dead-letters", "redrive", purged))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["show", "7"], "'7' is not a valid UUID"),
        (["list", "--limit", "0"], "0 is not in the range"),
        (["list", "--from", "then"], "--from': expected an RFC 3339 time"),
        (["redrive", "--rate", "0"], "--rate: expected more than 0 and at most 100,000 a second, got 0.0"),
        (["redrive", "--rate", "nan"], "--rate: expected more than 0"),
        (["redrive", "--limit", "0"], "0 is not in the range"),
        (["redrive", "--json"], "--json: cannot ask for confirmation"),
        (["redrive", UNKNOWN, "--rate", "5"], "ID: names one event"),
        (["redrive", UNKNOWN, "--source", "s"], "ID: names one event"),
        (["purge"], "expected a filter: --source, --destination, --from, --until or --reason; for all, --until now"),
        (["purge", "--yes", "--reason", ""], "--reason: expected a text"),
    ],
)
def test_the_command_dead_letters_used_wrongly_says_how_it_is_used(arguments: list[str], complaint: str) -> None:
    assert complaint in refused(invoke("dead-letters", *arguments), 2)
