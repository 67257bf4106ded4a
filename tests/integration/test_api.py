"""Submitting, reading and cancelling over HTTP, on a real server and a real database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import psycopg
import pytest

from orchestrator.api.routes import events
from orchestrator.database import Database
from orchestrator.events.submission import event_id
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, fields, running_api, submission, tomorrow
from tests.support.times import READ, REFUSED

T = TypeVar("T")


@pytest.fixture
async def client(settings: MakeSettings) -> AsyncIterator[httpx.AsyncClient]:
    chosen = settings(MAX_BODY_BYTES="100000", MAX_PAYLOAD_BYTES="50000", MAX_BATCH_EVENTS="20")
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        yield client


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


async def submit(client: httpx.AsyncClient, **changes: Any) -> str:
    response = await client.post("/api/v1/events", json=submission(**changes))
    assert response.status_code == 201, response.text
    found: str = response.json()["id"]
    return found


async def test_a_submission_is_kept_and_can_be_read_where_location_says(client: httpx.AsyncClient) -> None:
    at = tomorrow()
    sent = submission(external_job_id="job-1", scheduled_at=at.isoformat(), headers={"X-A": "é"}, max_retries=7)
    response = await client.post("/api/v1/events", json=sent)
    assert response.status_code == 201
    expected_id = event_id("orders", "job-1", at)
    assert response.json() == {
        "id": expected_id,
        "external_job_id": "job-1",
        "scheduled_at": at.isoformat(),
        "status": "scheduled",
        "duplicate": False,
        "event_status": "scheduled",
    }
    event = (await client.get(response.headers["location"])).json()
    assert event["id"] == expected_id
    assert event["status"] == "scheduled"
    assert (event["payload"], event["headers"], event["max_retries"]) == ({"a": 1}, {"X-A": "é"}, 7)
    assert event["outcomes"] == []


async def test_the_api_reads_times_in_every_accepted_form(client: httpx.AsyncClient) -> None:
    """By tests/times.json; in a batch, alone, as the time of a reschedule, and in a filter."""
    event = submission(scheduled_at=tomorrow().isoformat())
    for texts in batched(READ, 20):
        batch = {"events": [event | {"expires_at": text} for text in texts]}
        results = (await client.post("/api/v1/events/batch", json=batch)).json()["results"]
        found = [(await client.get(f"/api/v1/events/{result['id']}")).json()["expires_at"] for result in results]
        assert [datetime.fromisoformat(at) for at in found] == [READ[text] for text in texts]
    for text in ("2030-01-31 13:00+05", "2030-01-31t08:00:00z", "2030-01-31T08:00:00.0000004Z"):
        uid = await submit(client, expires_at=text)
        later = {"scheduled_at": (tomorrow() + timedelta(hours=1)).isoformat(), "expires_at": text}
        assert (await client.post(f"/api/v1/events/{uid}/reschedule", json=later)).status_code == 200
        which = {"from": "2029-01-31T08:00Z", "until": text, "dry_run": True}
        assert (await client.post("/api/v1/events/cancel", json=which)).status_code == 200
        parameters = {"from": "2029-01-31T08:00Z", "until": text}
        assert (await client.get("/api/v1/events/statistics", params=parameters)).status_code == 200
    for values in batched(REFUSED, 20):
        batch = {"events": [event | {"expires_at": value} for value in values]}
        results = (await client.post("/api/v1/events/batch", json=batch)).json()["results"]
        assert [result["error"]["field"] for result in results] == ["expires_at"] * len(values)


async def test_submitting_a_cancelled_or_rescheduled_event_again_says_so(client: httpx.AsyncClient) -> None:
    cancelled, moved = (submission(external_job_id=f"job-{n}") for n in range(2))
    first, second = [(await client.post("/api/v1/events", json=each)).json()["id"] for each in (cancelled, moved)]
    assert (await client.delete(f"/api/v1/events/{first}")).status_code == 200
    later = {"scheduled_at": (tomorrow() + timedelta(hours=3)).isoformat()}
    response = await client.post(f"/api/v1/events/{second}/reschedule", json=later)
    successor = response.json()["successor"]
    again = await client.post("/api/v1/events", json=cancelled)
    assert (again.status_code, again.json()["id"]) == (200, first)
    assert (again.json()["status"], again.json()["event_status"]) == ("duplicate", "cancelled")
    answer = (await client.post("/api/v1/events/batch", json={"events": [cancelled, moved]})).json()
    assert [result["event_status"] for result in answer["results"]] == ["cancelled", "rescheduled"]

    # Back to where it was, and the same again.
    back = {"scheduled_at": moved["scheduled_at"]}
    answers = [(await client.post(f"/api/v1/events/{successor}/reschedule", json=back)).json() for _ in range(2)]
    assert [answer["result"] for answer in answers] == ["rescheduled", "already_rescheduled"]
    assert answers[0]["successor"] == answers[1]["successor"] not in (second, successor)
    again = await client.post("/api/v1/events", json=moved)
    assert (again.json()["id"], again.json()["event_status"]) == (second, "rescheduled")


async def test_submitting_an_event_again_changes_nothing_and_says_so(client: httpx.AsyncClient) -> None:
    sent = submission(external_job_id="job-1")
    first = await client.post("/api/v1/events", json=sent)
    second = await client.post("/api/v1/events", json=sent | {"payload": "other"})
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.json() == first.json() | {"status": "duplicate", "duplicate": True}
    assert (await client.get(second.headers["location"])).json()["payload"] == {"a": 1}


async def test_submissions_without_an_external_id_are_never_duplicates(client: httpx.AsyncClient) -> None:
    assert await submit(client) != await submit(client)


async def test_the_payload_is_kept_byte_for_byte(client: httpx.AsyncClient) -> None:
    payload = '{ "b":1.50,\t"a" : 1e2, "a": "\\u00e9\\\\n" }'
    raw = json.dumps(submission()).replace('{"a": 1}', payload).encode()
    response = await client.post("/api/v1/events", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 201
    assert payload in (await client.get(response.headers["location"])).text


async def test_priority_and_spread_of_a_submission_are_kept(client: httpx.AsyncClient) -> None:
    first = await submit(client, priority=9, spread_seconds=604_800)
    sent = submission(priority=0, spread_seconds=0.00001)
    batch = (await client.post("/api/v1/events/batch", json={"events": [sent]})).json()
    events = [(await client.get(f"/api/v1/events/{name}")).json() for name in (first, batch["results"][0]["id"])]
    assert [(event["priority"], event["spread_seconds"]) for event in events] == [(9, 604_800), (0, 0.00001)]


async def test_many_concurrent_submissions_are_each_kept_once(client: httpx.AsyncClient) -> None:
    at = tomorrow().isoformat()
    sent = [submission(external_job_id=f"job-{n % 50}", scheduled_at=at) for n in range(100)]
    responses = await asyncio.gather(*(client.post("/api/v1/events", json=one) for one in sent))
    assert sorted(response.status_code for response in responses) == [200] * 50 + [201] * 50
    assert len({response.json()["id"] for response in responses}) == 50


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"source": ""}, "source"),
        ({"scheduled_at": "2030-01-31T09:00:00"}, "scheduled_at"),
        ({"destination": "http://user:secret@example.com/"}, "destination"),
        ({"payload": "\x00"}, "payload"),
        ({"max_retries": 101}, "max_retries"),
        ({"priority": 1.5}, "priority"),
        ({"spread_seconds": -1}, "spread_seconds"),
        ({"unknown": 1}, "unknown"),
    ],
)
async def test_a_broken_rule_is_a_422_that_names_the_field(
    client: httpx.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    response = await client.post("/api/v1/events", json=submission(**changes))
    problem = assert_problem(response, 422, "validation")
    assert fields(problem) == {field}
    assert problem["instance"] == "/api/v1/events"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scheduled_at": "2199-01-31T09:00:00Z"}, "scheduled_at"),
        ({"scheduled_at": "1970-01-01T00:00:00Z"}, "scheduled_at"),
        ({"scheduled_at": "1969-12-31T23:59:59Z"}, "scheduled_at"),
        ({"scheduled_at": "9999-12-31T23:59:59-01:00"}, "scheduled_at"),
        ({"retry_policy": "nobody_made_this"}, "retry_policy"),
    ],
)
async def test_an_event_that_cannot_be_kept_now_is_a_409_that_names_the_field(
    client: httpx.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    response = await client.post("/api/v1/events", json=submission(**changes))
    assert fields(assert_problem(response, 409, "refused")) == {field}


async def test_malformed_json_is_a_400_that_says_where(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/api/v1/events", "/api/v1/events/batch"):
        response = await client.post(path, content=b'{"source": }', headers=headers)
        assert "byte 11" in assert_problem(response, 400, "malformed-json")["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_a_body_that_is_not_declared_as_plain_json_is_a_415(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    content = json.dumps(submission()).encode()
    assert_problem(await client.post("/api/v1/events", content=content, headers=headers), 415, "unsupported-media-type")


async def test_json_may_be_declared_with_its_charset(client: httpx.AsyncClient) -> None:
    headers = {"content-type": 'Application/JSON; charset="UTF-8"'}
    content = json.dumps(submission()).encode()
    assert (await client.post("/api/v1/events", content=content, headers=headers)).status_code == 201


async def test_a_body_beyond_the_limit_is_a_413_whether_or_not_its_length_is_declared(
    client: httpx.AsyncClient,
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    for content in (b" " * 100_001, chunks()):
        assert_problem(await client.post("/api/v1/events", content=content, headers=headers), 413, "too-large")


async def test_a_body_may_come_in_chunks(client: httpx.AsyncClient) -> None:
    raw = json.dumps(submission()).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for byte in raw:
            yield bytes([byte])

    response = await client.post("/api/v1/events", content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 201


async def test_a_batch_has_a_result_for_each_item_and_a_bad_item_fails_no_other(client: httpx.AsyncClient) -> None:
    kept = submission(external_job_id="kept-before")
    kept_id = await submit(client, **kept)
    items: list[Any] = [submission(), submission(source=""), kept, 7, submission(scheduled_at="2199-01-31T09:00:00Z")]
    response = await client.post("/api/v1/events/batch", json={"events": [*items, submission()]})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["accepted"], answer["duplicates"], answer["rejected"]) == (2, 1, 3)
    results = answer["results"]
    assert [result["index"] for result in results] == [0, 1, 2, 3, 4, 5]
    assert [result.get("error", {}).get("field") for result in results] == [
        None,
        "source",
        None,
        "body",
        "scheduled_at",
        None,
    ]
    duplicate = {"status": "duplicate", "duplicate": True, "event_status": "scheduled"}
    assert results[2] == {"index": 2, "id": kept_id, **duplicate}
    for index in (0, 5):
        assert (await client.get(f"/api/v1/events/{results[index]['id']}")).status_code == 200


async def test_an_item_repeated_in_a_batch_is_kept_once(client: httpx.AsyncClient) -> None:
    item = submission(external_job_id="twice")
    answer = (await client.post("/api/v1/events/batch", json={"events": [item, item]})).json()
    assert (answer["accepted"], answer["duplicates"]) == (1, 1)
    assert answer["results"][0]["id"] == answer["results"][1]["id"]


@pytest.mark.parametrize("body", [[], {}, {"events": []}, {"events": 1}, {"events": [{}] * 21}, {"events": [], "a": 1}])
async def test_a_wrong_envelope_of_a_batch_is_a_422(client: httpx.AsyncClient, body: Any) -> None:
    assert_problem(await client.post("/api/v1/events/batch", json=body), 422, "validation")


async def test_the_newest_event_of_an_external_id_is_the_one_scheduled_last(client: httpx.AsyncClient) -> None:
    at = tomorrow()
    for hours in (1, 3, 2):
        await submit(client, external_job_id="j", scheduled_at=(at + timedelta(hours=hours)).isoformat())
    event = (await client.get("/api/v1/events/external/j")).json()
    assert event["id"] == event_id("orders", "j", at + timedelta(hours=3))


@pytest.mark.parametrize(
    "job",
    [
        "a/b",
        "all",
        "a/all",
        "a b",
        "é😀",
        "%2F",
        "%252F",
        "...",
        "a/..",
        "../a",
        "./",
        "a?b#c",
        "?",
        "#",
        "&",
        "+",
        "\\",
        ";a=b",
        " ",
        " a",
        "a ",
        "a\t",
        "\n",
        "\r\n",
        "\x01",
        "\x7f",
        "\x80",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "e\u0301",
        "reschedule",
        "/",
        "//",
        "x" * 200,
        "😀" * 200,
    ],
)
async def test_an_external_id_may_hold_any_character(client: httpx.AsyncClient, job: str) -> None:
    kept = await submit(client, external_job_id=job)
    path = f"/api/v1/events/external/{quote(job, safe='').replace('.', '%2E')}"
    assert (await client.get(path)).json()["id"] == kept
    assert [event["id"] for event in (await client.get(f"{path}/all")).json()["events"]] == [kept]
    later = {"scheduled_at": (tomorrow() + timedelta(hours=1)).isoformat()}
    moved = (await client.post(f"{path}/reschedule", json=later)).json()
    assert moved["id"] == kept
    cancelled = (await client.delete(path)).json()["events"]
    assert [(event["id"], event["result"]) for event in cancelled] == [
        (moved["successor"], "cancelled"),
        (kept, "finished"),
    ]


@pytest.mark.parametrize("job", [".", ".."])
async def test_an_external_id_that_no_path_can_hold_is_refused(client: httpx.AsyncClient, job: str) -> None:
    response = await client.post("/api/v1/events", json=submission(external_job_id=job))
    assert fields(assert_problem(response, 422, "validation")) == {"external_job_id"}
    batch = {"events": [submission(external_job_id=job), submission(external_job_id=job * 3)]}
    answer = (await client.post("/api/v1/events/batch", json=batch)).json()
    assert answer["results"][0]["error"]["field"] == "external_job_id"
    assert answer["accepted"] == 1


async def test_pages_hold_every_event_once_newest_first(client: httpx.AsyncClient) -> None:
    at = tomorrow()
    # Two of each share an instant, so that a page can end between them.
    kept = {
        await submit(
            client, external_job_id="j", source=f"s{n}", scheduled_at=(at + timedelta(hours=n // 2)).isoformat()
        )
        for n in range(7)
    }
    seen: list[dict[str, Any]] = []
    query: dict[str, str] = {"limit": "3"}
    while True:
        page = (await client.get("/api/v1/events/external/j/all", params=query)).json()
        seen += page["events"]
        if page["next"] is None:
            break
        assert len(page["events"]) == 3
        query["cursor"] = page["next"]
    assert len(seen) == 7
    assert {event["id"] for event in seen} == kept
    places = [(event["scheduled_at"], event["id"]) for event in seen]
    assert places == sorted(places, reverse=True)


async def test_an_unknown_external_id_is_a_404_and_its_list_is_empty(client: httpx.AsyncClient) -> None:
    assert_problem(await client.get("/api/v1/events/external/nobody"), 404, "not-found")
    assert_problem(await client.delete("/api/v1/events/external/nobody"), 404, "not-found")
    assert (await client.get("/api/v1/events/external/nobody/all")).json() == {"events": [], "next": None}


@pytest.mark.parametrize("cursor", ["", "x", "%00", "AAAA", "WzEsMl0", "WyIyMDI2LTAxLTAxIiwieCJd"])
async def test_a_cursor_that_was_not_given_out_is_a_400_that_names_it(client: httpx.AsyncClient, cursor: str) -> None:
    response = await client.get(f"/api/v1/events/external/j/all?cursor={cursor}")
    assert fields(assert_problem(response, 400, "bad-cursor")) == {"cursor"}


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "", "1.5", "9" * 50, "١"])
async def test_a_limit_out_of_bounds_is_a_422(client: httpx.AsyncClient, limit: str) -> None:
    response = await client.get("/api/v1/events/external/j/all", params={"limit": limit})
    assert fields(assert_problem(response, 422, "validation")) == {"limit"}


@pytest.mark.parametrize("path", ["/api/v1/events/not-a-uuid", "/api/v1/events/%00", "/api/v1/events/1"])
async def test_an_id_that_is_not_a_uuid_is_a_422(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "DELETE"):
        assert fields(assert_problem(await client.request(method, path), 422, "validation")) == {"id"}


@pytest.mark.parametrize("job", ["%00", "x" * 201, "%FF", "a%C3", "%ED%A0%80", "%C0%AF"])
async def test_an_external_id_that_cannot_exist_is_a_422(client: httpx.AsyncClient, job: str) -> None:
    response = await client.get(f"/api/v1/events/external/{job}")
    assert fields(assert_problem(response, 422, "validation")) == {"external_job_id"}


async def test_an_unknown_event_is_a_404(client: httpx.AsyncClient) -> None:
    for unknown in ("019c1347-d2fb-705e-a717-2a27dd38d28f", "4fc0a1d5-1d3f-4d57-9ac4-1bb3b1d0b0c5"):
        for method in ("GET", "DELETE"):
            assert_problem(await client.request(method, f"/api/v1/events/{unknown}"), 404, "not-found")


async def test_a_cancel_is_answered_and_may_be_repeated(client: httpx.AsyncClient) -> None:
    kept = await submit(client)
    first = await client.delete(f"/api/v1/events/{kept.upper()}")
    assert first.status_code == 200
    assert first.json() == {"id": kept, "result": "cancelled", "status": "cancelled"}
    second = await client.delete(f"/api/v1/events/{kept}")
    assert second.json() == {"id": kept, "result": "already_cancelled", "status": "cancelled"}
    event = (await client.get(f"/api/v1/events/{kept}")).json()
    assert event["status"] == "cancelled"
    assert [outcome["result"] for outcome in event["outcomes"]] == ["cancelled"]


def claim_everything_due(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert connection.execute("select * from orchestrator.claim_due_events(100)").fetchall()


async def test_an_event_in_flight_is_not_cancelled_and_the_answer_says_which(
    client: httpx.AsyncClient, database_url: str
) -> None:
    due = datetime.now(UTC)
    kept = await submit(client, external_job_id="j", scheduled_at=due.isoformat())
    await asyncio.to_thread(claim_everything_due, database_url)
    problem = assert_problem(await client.delete(f"/api/v1/events/{kept}"), 409, "not-cancellable")
    assert (problem["id"], problem["event_status"]) == (kept, "in_flight")
    problem = assert_problem(await client.delete("/api/v1/events/external/j"), 409, "not-cancellable")
    assert problem["events"] == [{"id": kept, "result": "in_flight", "status": "in_flight"}]


async def test_cancelling_an_external_id_cancels_all_its_cancellable_events(
    client: httpx.AsyncClient, database_url: str
) -> None:
    due = datetime.now(UTC)
    running = await submit(client, external_job_id="j", scheduled_at=due.isoformat())
    await asyncio.to_thread(claim_everything_due, database_url)
    waiting = await submit(client, external_job_id="j")
    response = await client.delete("/api/v1/events/external/j")
    assert response.status_code == 200
    assert {(event["id"], event["result"]) for event in response.json()["events"]} == {
        (running, "in_flight"),
        (waiting, "cancelled"),
    }


async def test_statistics_count_the_events_by_state(client: httpx.AsyncClient) -> None:
    await submit(client)
    await client.delete(f"/api/v1/events/{await submit(client)}")
    statistics = (await client.get("/api/v1/events/statistics")).json()
    assert statistics["scheduled"] == 1
    assert (statistics["totals"]["accepted"], statistics["totals"]["cancelled"], statistics["live"]) == (2, 1, 1)


async def test_statistics_count_outcomes_by_minute_source_and_destination(client: httpx.AsyncClient) -> None:
    for source, target in (("a", "http://one.example/"), ("a", "http://two.example:81/"), ("b", "http://one.example/")):
        await submit(client, source=source, destination=target)

    async def counts(**query: str) -> list[tuple[Any, ...]]:
        response = await client.get("/api/v1/events/statistics", params=query)
        assert response.status_code == 200, response.text
        found = response.json()["counts"]
        return sorted((each["source"], each["destination"], each["value"]) for each in found if not each["minute"])

    assert await counts(by="source,destination") == [
        ("a", "one.example", 1),
        ("a", "two.example:81", 1),
        ("b", "one.example", 1),
    ]
    assert await counts(by="source,source", destination="one.example") == [("a", None, 1), ("b", None, 1)]
    assert await counts(source="a") == [(None, None, 2)]
    assert await counts(source="%", by="source") == []
    assert await counts(until="2000-01-01T00:00:00Z") == []
    assert await counts(**{"from": "0001-01-01T00:00:00+01:00", "until": "9999-12-31T23:59:59-01:00"}) == [
        (None, None, 3)
    ]
    minutes = (await client.get("/api/v1/events/statistics?by=minute")).json()["counts"]
    assert sum(each["value"] for each in minutes) == 3
    assert all(each["minute"].endswith(":00+00:00") and each["name"] == "accepted" for each in minutes)


async def test_statistics_of_more_counts_than_allowed_are_refused(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_COUNTS", 1)
    for source in "ab":
        await submit(client, source=source)
    response = await client.get("/api/v1/events/statistics?by=source")
    assert "more than 1 counts" in assert_problem(response, 422, "validation")["detail"]


async def test_a_wrong_parameter_of_the_statistics_is_named(client: httpx.AsyncClient) -> None:
    for query, status, kind, field in (
        ("by=", 422, "validation", "by"),
        ("by=hour", 422, "validation", "by"),
        ("by=minute,", 422, "validation", "by"),
        ("by=minute%0A", 422, "validation", "by"),
        ("from=yesterday", 422, "validation", "from"),
        ("until=2030-01-01T00:00:00", 422, "validation", "until"),
        ("source=", 422, "validation", "source"),
        ("destination=*.example", 422, "validation", "destination"),
        ("from=2030-01-01T00:00:00Z&until=2029-01-01T00:00:00Z", 409, "empty-range", "until"),
        ("from=2150-01-01T00:00:00Z", 409, "empty-range", "from"),
    ):
        response = await client.get(f"/api/v1/events/statistics?{query}")
        assert fields(assert_problem(response, status, kind)) == {field}


@pytest.mark.parametrize(
    "path",
    ["/", "/api/v1/events/", "/api/v1/event", "/api/v1/events/external", "/api/v1/events/batch/reschedule", "/%00"],
)
async def test_an_unknown_path_is_a_404_problem(client: httpx.AsyncClient, path: str) -> None:
    assert_problem(await client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/v1/events", {"POST"}),
        ("GET", "/api/v1/events/batch", {"POST"}),
        ("GET", "/api/v1/events/cancel", {"POST"}),
        ("GET", "/api/v1/events/019c1347-d2fb-705e-a717-2a27dd38d28f/reschedule", {"POST"}),
        ("DELETE", "/api/v1/events/statistics", {"GET", "HEAD"}),
        ("PATCH", "/api/v1/events/019c1347-d2fb-705e-a717-2a27dd38d28f", {"GET", "HEAD", "DELETE"}),
        ("POST", "/api/v1/events/external/j", {"GET", "HEAD", "DELETE"}),
        ("DELETE", "/api/v1/events/external/j/all", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
    ],
)
async def test_a_wrong_method_is_a_405_that_lists_the_right_ones(
    client: httpx.AsyncClient, method: str, path: str, allowed: set[str]
) -> None:
    response = await client.request(method, path)
    assert_problem(response, 405, "method-not-allowed")
    assert set(response.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/events/{}", "/events/external/{}", "/events/external/{}/all", "/destinations/{}"])
@pytest.mark.parametrize("part", ["%ff", "%c0%80", "%ED%A0%80", "%F4%90%80%80", "%00", "a%ff"])
async def test_a_path_that_is_not_utf_8_is_refused_by_name(client: httpx.AsyncClient, path: str, part: str) -> None:
    for method in ("GET", "DELETE"):
        if method == "DELETE" and path.endswith("all"):
            continue
        response = await client.request(method, "/api/v1" + path.format(part))
        assert response.status_code in (404, 422), response.text
        assert response.headers["content-type"] == "application/problem+json"
