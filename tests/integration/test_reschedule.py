"""Rescheduling over the API and by the command line."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import httpx
import pytest

from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, fields, submission, tomorrow
from tests.integration.cli_support import Call, answer, invoke, refused, told
from tests.support.dispatching import arrivals, dispatching, finished
from tests.support.receiver import Receiver
from tests.support.sql_client import NOON, Client, event, results

UNKNOWN = "019c1347-d2fb-705e-a717-2a27dd38d28f"
LATER = (NOON + timedelta(days=2)).isoformat()
KEPT = ("source", "delivery_type", "destination", "payload", "headers", "max_retries", "ordering_key", "priority")


def at(event_id: str) -> str:
    return f"/api/v1/events/{event_id}/reschedule"


def by_job(job: str) -> str:
    return f"/api/v1/events/external/{job}/reschedule"


async def found(api: httpx.AsyncClient, event_id: str) -> Any:
    response = await api.get(f"/api/v1/events/{event_id}")
    assert response.status_code == 200, response.text
    return response.json()


# Over the API


async def test_a_successor_takes_the_place_of_an_event_and_each_names_the_other(api: httpx.AsyncClient) -> None:
    sent = submission(headers={"X-A": "é"}, max_retries=7, ordering_key="k", priority=3, payload=[1.50])
    first = (await api.post("/api/v1/events", json=sent)).json()["id"]
    response = await api.post(at(first.upper()), json={"scheduled_at": LATER})
    assert response.status_code == 200, response.text
    told = response.json()
    assert told == {
        "id": first,
        "successor": told["successor"],
        "result": "rescheduled",
        "status": "rescheduled",
    }
    old, new = await found(api, first), await found(api, told["successor"])
    assert (old["status"], old["successor"], old["due_at"]) == ("rescheduled", new["id"], None)
    assert [(outcome["result"], outcome["successor"]) for outcome in old["outcomes"]] == [("rescheduled", new["id"])]
    assert (new["status"], new["predecessor"], new["outcomes"]) == ("scheduled", first, [])
    assert datetime.fromisoformat(new["scheduled_at"]) == datetime.fromisoformat(LATER)
    assert {name: new[name] for name in KEPT} == {name: old[name] for name in KEPT}


async def test_the_new_time_may_be_in_any_zone(api: httpx.AsyncClient, client: Client) -> None:
    zone = timezone(timedelta(hours=22, minutes=2))
    given = {"scheduled_at": datetime.fromisoformat(LATER).astimezone(zone).isoformat()}
    told = (await api.post(at(client.schedule()), json=given)).json()
    assert datetime.fromisoformat((await found(api, told["successor"]))["scheduled_at"]).isoformat() == LATER


async def test_a_repeated_reschedule_changes_nothing_and_another_time_belongs_to_the_successor(
    api: httpx.AsyncClient, client: Client
) -> None:
    first = client.schedule(scheduled_at=NOON + timedelta(days=1))
    done = (await api.post(at(first), json={"scheduled_at": LATER})).json()
    again = await api.post(at(first), json={"scheduled_at": LATER})
    assert (again.status_code, again.json()) == (200, done | {"result": "already_rescheduled"})
    other = {"scheduled_at": (NOON + timedelta(days=3)).isoformat()}
    problem = assert_problem(await api.post(at(first), json=other), 409, "not-reschedulable")
    assert (problem["id"], problem["event_status"]) == (first, "rescheduled")
    assert f"reschedule {done['successor']} instead" in problem["detail"]
    assert (await api.post(at(done["successor"]), json=other)).json()["result"] == "rescheduled"
    assert client.value("select count(*) from orchestrator.timer") == 1


@pytest.mark.parametrize("days", [(1, 200), (200, 1), (200, 300)])
async def test_events_on_both_sides_of_the_horizon_are_rescheduled_alike(
    api: httpx.AsyncClient, days: tuple[int, int]
) -> None:
    old, new = (tomorrow() + timedelta(days=each) for each in days)
    first = (await api.post("/api/v1/events", json=submission(scheduled_at=old.isoformat()))).json()["id"]
    told = (await api.post(at(first), json={"scheduled_at": new.isoformat()})).json()
    assert (await found(api, first))["status"] == "rescheduled"
    assert (await found(api, told["successor"]))["due_at"].replace("+00:00", "") == f"{new:%Y-%m-%dT%H:%M:%S.%f}"
    cancelled = await api.delete(f"/api/v1/events/{told['successor']}")
    assert cancelled.json()["result"] == "cancelled"


async def test_an_expiry_is_kept_unless_another_is_given(api: httpx.AsyncClient, client: Client) -> None:
    at_noon, expires_at = NOON + timedelta(days=1), NOON + timedelta(days=3)
    first = client.schedule(scheduled_at=at_noon, expires_at=expires_at.isoformat())
    second = (await api.post(at(first), json={"scheduled_at": LATER, "expires_at": None})).json()["successor"]
    assert datetime.fromisoformat((await found(api, second))["expires_at"]) == expires_at
    late = {"scheduled_at": expires_at.isoformat()}
    assert fields(assert_problem(await api.post(at(second), json=late), 409, "refused")) == {"expires_at"}
    late["expires_at"] = (expires_at + timedelta(microseconds=1)).isoformat()
    third = (await api.post(at(second), json=late)).json()["successor"]
    assert datetime.fromisoformat((await found(api, third))["expires_at"]) == expires_at + timedelta(microseconds=1)


async def test_an_external_id_names_its_only_live_event(api: httpx.AsyncClient, client: Client) -> None:
    ended = client.schedule(external_job_id="a/b", scheduled_at=NOON + timedelta(days=3))
    client.cancel(ended)
    live = client.schedule(external_job_id="a/b", scheduled_at=NOON + timedelta(days=1))
    told = (await api.post(by_job("a%2Fb"), json={"scheduled_at": LATER})).json()
    assert (told["id"], told["result"]) == (live, "rescheduled")
    again = (await api.post(by_job("a%2Fb"), json={"scheduled_at": LATER})).json()
    assert again == told | {"result": "already_rescheduled"}
    client.schedule(external_job_id="a/b", scheduled_at=NOON + timedelta(days=4))
    problem = assert_problem(await api.post(by_job("a%2Fb"), json={"scheduled_at": LATER}), 409, "refused")
    assert fields(problem) == {"external_job_id"}
    assert "give the id of one" in problem["detail"]


async def test_a_time_at_which_the_same_event_is_due_already_is_refused(api: httpx.AsyncClient, client: Client) -> None:
    client.schedule(external_job_id="j", scheduled_at=NOON + timedelta(days=2))
    other = client.schedule(external_job_id="j", scheduled_at=NOON + timedelta(days=1))
    assert fields(assert_problem(await api.post(at(other), json={"scheduled_at": LATER}), 409, "refused")) == {
        "scheduled_at"
    }
    assert client.status(other) == "scheduled"


async def test_an_event_in_flight_or_finished_stays_as_it_is_and_the_answer_says_what_to_do(
    api: httpx.AsyncClient, client: Client
) -> None:
    event_id = client.schedule(scheduled_at=datetime.now(UTC))
    [lease] = client.claim()
    problem = assert_problem(await api.post(at(event_id), json={"scheduled_at": LATER}), 409, "not-reschedulable")
    assert (problem["id"], problem["event_status"]) == (event_id, "in_flight")
    assert "try again when this attempt has ended" in problem["detail"]
    client.finish(results([lease], started_at=0.0, finished_at=0.0))
    problem = assert_problem(await api.post(at(event_id), json={"scheduled_at": LATER}), 409, "not-reschedulable")
    assert problem["event_status"] == "delivered"
    assert "submit a new event instead" in problem["detail"]
    assert client.value("select count(*) from orchestrator.event") == 1


@pytest.mark.parametrize("apart", [False, True])
async def test_of_many_reschedules_at_once_one_decides(api: httpx.AsyncClient, client: Client, apart: bool) -> None:
    first = client.schedule(scheduled_at=NOON + timedelta(days=1))
    times = [(NOON + timedelta(days=2, seconds=n * apart)).isoformat() for n in range(8)]
    responses = await asyncio.gather(*(api.post(at(first), json={"scheduled_at": time}) for time in times))
    statuses = Counter(response.status_code for response in responses)
    assert statuses == ({200: 1, 409: 7} if apart else {200: 8})
    done = [response.json() for response in responses if response.status_code == 200]
    assert Counter(each["result"] for each in done)["rescheduled"] == 1
    assert {each["successor"] for each in done} == {done[0]["successor"]}
    assert client.value("select count(*) from orchestrator.timer") == 1


async def test_rescheduling_an_unknown_event_is_a_404(api: httpx.AsyncClient) -> None:
    for path in (at(UNKNOWN), by_job("nobody")):
        assert_problem(await api.post(path, json={"scheduled_at": LATER}), 404, "not-found")
    assert fields(assert_problem(await api.post(at("7"), json={"scheduled_at": LATER}), 422, "validation")) == {"id"}
    response = await api.post(by_job("x" * 201), json={"scheduled_at": LATER})
    assert fields(assert_problem(response, 422, "validation")) == {"external_job_id"}


WRONG_BODIES: list[tuple[Any, set[str] | None]] = [
    ({}, {"scheduled_at"}),
    ([], {"body"}),
    ({"scheduled_at": None}, {"scheduled_at"}),
    ({"scheduled_at": "tomorrow"}, {"scheduled_at"}),
    ({"scheduled_at": "+1h"}, {"scheduled_at"}),
    ({"scheduled_at": "2030-01-31T09:00:00"}, {"scheduled_at"}),
    ({"scheduled_at": 1769850000}, {"scheduled_at"}),
    ({"scheduled_at": LATER, "expires_at": ""}, {"expires_at"}),
    ({"scheduled_at": LATER, "at": LATER, "to": 1}, {"at", "to"}),
    ({"expires_at": "x", "when": 1}, {"scheduled_at", "expires_at", "when"}),
    ({f"field_{n}": n for n in range(100)}, None),
]


async def test_a_body_that_breaks_rules_is_a_422_that_names_each_field(api: httpx.AsyncClient, client: Client) -> None:
    for path in (at(client.schedule(scheduled_at=NOON + timedelta(days=1))), by_job("j")):
        for body, wrong in WRONG_BODIES:
            problem = assert_problem(await api.post(path, json=body), 422, "validation")
            assert fields(problem) == wrong or (wrong is None and len(problem["errors"]) == 20)


async def test_a_body_that_is_no_json_or_too_large_is_refused(api: httpx.AsyncClient) -> None:
    json_type = {"content-type": "application/json"}
    for content in (b"", b'{"scheduled_at": }', b'{"scheduled_at": "\xff"}', b'{"a": "\\ud800"}'):
        assert_problem(await api.post(at(UNKNOWN), content=content, headers=json_type), 400, "malformed-json")
    deep = b'{"scheduled_at": %b' % (b"[" * 5000)
    assert_problem(await api.post(at(UNKNOWN), content=deep, headers=json_type), 400, "malformed-json")
    too_large = b'{"scheduled_at": "%b"}' % (b"9" * 10_000)
    assert_problem(await api.post(at(UNKNOWN), content=too_large, headers=json_type), 413, "too-large")
    assert_problem(await api.post(at(UNKNOWN), content=b"{}"), 415, "unsupported-media-type")


NEVER_KEPT = [
    ({"scheduled_at": "2150-01-31T09:00:00Z"}, "scheduled_at"),
    ({"scheduled_at": "9999-12-31T23:59:59-01:00"}, "scheduled_at"),
    ({"scheduled_at": "1969-12-31T23:59:59Z"}, "scheduled_at"),
    ({"scheduled_at": "1970-01-01T00:00:00Z"}, "scheduled_at"),
    ({"scheduled_at": "0001-01-01T00:00:00+01:00"}, "scheduled_at"),
    ({"scheduled_at": LATER, "expires_at": LATER}, "expires_at"),
    ({"scheduled_at": LATER, "expires_at": "9999-12-31T23:59:59-01:00"}, "expires_at"),
]


async def test_times_that_cannot_be_kept_are_a_409_and_change_nothing(api: httpx.AsyncClient, client: Client) -> None:
    event_id = client.schedule(scheduled_at=NOON + timedelta(days=1))
    for given, field in NEVER_KEPT:
        assert fields(assert_problem(await api.post(at(event_id), json=given), 409, "refused")) == {field}
    assert client.status(event_id) == "scheduled"
    assert client.value("select count(*) from orchestrator.event") == 1


async def test_only_the_successor_is_delivered(
    api: httpx.AsyncClient, settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    [kept] = client.submit(event(destination=receiver.url("/hook"), scheduled_at=NOON + timedelta(days=1)))
    async with dispatching(settings()):
        now = {"scheduled_at": datetime.now(UTC).isoformat()}
        told = (await api.post(at(str(kept.id)), json=now)).json()
        await finished(client, [told["successor"]])
    assert arrivals(receiver.requests) == {told["successor"]: 1}
    assert client.status(told["successor"]) == "delivered"


# By the command line


def test_the_command_names_the_successor_and_the_story_shows_both_events(call: Call, client: Client) -> None:
    first = client.schedule(scheduled_at=NOON + timedelta(days=1))
    done = answer(call("reschedule", first, "--at", LATER, "--json"))
    assert (done["id"], done["result"], done["status"]) == (first, "rescheduled", "rescheduled")
    assert f"already rescheduled as {done['successor']}, due " in told(call("reschedule", first, "--at", LATER))
    story = told(call("get", first))
    assert re.search(rf"rescheduled to +{done['successor']}", story)
    assert re.search(rf"rescheduled +as {done['successor']}", story)
    assert re.search(rf"rescheduled from +{first}", told(call("get", done["successor"])))
    told_next = told(call("reschedule", done["successor"], "--in", "1h30m", "--expires-at", "+2h"))
    assert told_next.startswith(f"{done['successor']}  rescheduled as ")
    due, expires = client.rows(
        """select scheduled_at - orchestrator.now(), expires_at - orchestrator.now() from orchestrator.event_status
        where status = 'scheduled'"""
    )[0]
    assert timedelta(minutes=89) < due <= timedelta(minutes=90) < timedelta(minutes=119) < expires


def test_the_command_reschedule_takes_an_external_id(call: Call, client: Client) -> None:
    client.schedule(external_job_id="j", scheduled_at=NOON + timedelta(days=1))
    for option in ("--external-id", "--external-job-id"):
        assert "rescheduled as " in told(call("reschedule", option, "j", "--in", f"{len(option)}d"))
    assert (
        refused(call("reschedule", "--external-id", "x", "--in", "1d")) == "there is no event with the external id 'x'"
    )


def test_the_command_reschedule_fails_with_the_remedy_when_it_is_too_late(call: Call, client: Client) -> None:
    event_id = client.schedule(scheduled_at=datetime.now(UTC))
    client.claim()
    said = refused(call("reschedule", event_id, "--in", "1h"))
    assert said == (
        f"{event_id} was not rescheduled: it is being delivered (in_flight); try again when this attempt has ended"
    )
    assert answer(call("reschedule", event_id, "--in", "1h", "--json"), 1)["result"] == "in_flight"
    assert "400 days ahead" in refused(call("reschedule", client.schedule(external_job_id="j"), "--in", "500d"))
    assert UNKNOWN in refused(call("reschedule", UNKNOWN, "--in", "1h"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["x", "--in", "1h"], "expected a UUID"),
        (["--in", "1h"], "expected either ID or --external-id"),
        ([UNKNOWN], "expected either --at or --in"),
        ([UNKNOWN, "--in", "1h", "--at", "now"], "expected either --at or --in"),
        ([UNKNOWN, "--in", "5"], "--in': expected a duration such as 10s, 5m, 1h30m or 2d, got '5'"),
        ([UNKNOWN, "--in", "0s"], "--in': expected a duration"),
        ([UNKNOWN, "--in", "-1h"], "--in': expected a duration"),
        ([UNKNOWN, "--in", "9" * 5000 + "d"], "--in': expected a duration"),
        ([UNKNOWN, "--at", "noon"], "--at': expected an RFC 3339 time with a zone"),
        ([UNKNOWN, "--at", "2030-01-31T09:00:00"], "--at': expected an RFC 3339 time with a zone"),
        ([UNKNOWN, "--at", "+1h", "--expires-at", ""], "--expires-at': expected an RFC 3339 time"),
    ],
)
def test_the_command_reschedule_used_wrongly_says_how_it_is_used(arguments: list[str], complaint: str) -> None:
    said = refused(invoke("reschedule", *arguments), 2)
    assert complaint in said
    assert len(said) < 300
