"""Destinations, pauses and the forecast over the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from orchestrator.api.requests.destination_settings import DESTINATION_SETTINGS
from orchestrator.api.routes.database_gauges import Reading
from orchestrator.database import Database
from orchestrator.database.destinations import SETTING_COLUMNS
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, fields, running_api, submission
from tests.support.sql_client import Client

PATH = "/api/v1/destinations"
API = "https://api.example/hook"
DEFAULTS = {
    "rate_per_second": None,
    "burst": 1,
    "max_parallel": None,
    "adaptive": False,
    "timeout_seconds": None,
    "retry_policy": None,
    "signing_secret": None,
    "secret_headers": None,
    "spread_seconds": None,
    "breaker_failures": 10,
    "breaker_ratio": 0.5,
    "breaker_minimum": 20,
    "breaker_window_seconds": 30,
    "breaker_cooldown_seconds": 5,
    "breaker_max_cooldown_seconds": 300,
}
OTHERS = {
    "rate_per_second": 12.5,
    "burst": 7,
    "max_parallel": 3,
    "adaptive": True,
    "timeout_seconds": 2.5,
    "retry_policy": "default",
    "signing_secret": "acme.v2",
    "secret_headers": {"authorization": "acme-token"},
    "spread_seconds": 90,
    "breaker_failures": 0,
    "breaker_ratio": 0.25,
    "breaker_minimum": 6,
    "breaker_window_seconds": 10,
    "breaker_cooldown_seconds": 1,
    "breaker_max_cooldown_seconds": 60,
}


@pytest.fixture
def chosen(settings: MakeSettings) -> Settings:
    return settings(MAX_BODY_BYTES="10000", MAX_PAYLOAD_BYTES="10000")


@pytest.fixture
async def api(chosen: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        yield client


def at(name: str) -> str:
    return f"{PATH}/{quote(name, safe='')}"


async def put(api: httpx.AsyncClient, name: str, **wanted: Any) -> Any:
    response = await api.put(at(name), json=wanted)
    assert response.status_code == 200, response.text
    return response.json()


def settings_of(destination: Any) -> dict[str, Any]:
    return {name: destination[name] for name in DESTINATION_SETTINGS}


def submit(client: Client, count: int, destination: str = API, *, after_s: float = 0) -> None:
    client.schedule_many(count, destination=destination, scheduled_at=datetime.now(UTC) + timedelta(seconds=after_s))


def test_every_destination_setting_of_the_database_has_a_name_in_the_api() -> None:
    assert [setting.column for setting in DESTINATION_SETTINGS.values()] == list(SETTING_COLUMNS)


async def test_a_put_sets_the_given_settings_and_all_others_to_their_defaults(api: httpx.AsyncClient) -> None:
    first = await put(api, "api.example")
    assert settings_of(first["destination"]) == DEFAULTS
    second = await put(api, "api.example", **OTHERS)
    assert settings_of(second["destination"]) == OTHERS
    found = (await api.get(at("api.example"))).json()
    assert found == second["destination"]
    assert (await put(api, "api.example", **settings_of(found)))["destination"].keys() == found.keys()
    third = await put(api, "api.example", burst=3.0, rate_per_second=None)
    assert settings_of(third["destination"]) == DEFAULTS | {"burst": 3}


@pytest.mark.parametrize(
    "name", ["API.example", "localhost:9099", "*.shop.example", "kafka:orders.v1", "kafka:", "[::1]:8080"]
)
async def test_a_destination_name_in_a_path_is_url_encoded(api: httpx.AsyncClient, name: str) -> None:
    kept = name.lower()
    assert (await put(api, name, max_parallel=2))["destination"]["name"] == kept
    for spelled in (name, kept):
        assert (await api.get(at(spelled))).json()["name"] == kept
    assert (await api.post(f"{at(name)}/pause")).json()["name"] == kept
    assert (await api.delete(at(name))).json()["name"] == kept


async def test_a_put_says_how_many_events_wait_and_which_patterns_overlap(
    api: httpx.AsyncClient, client: Client
) -> None:
    submit(client, 3, after_s=600)
    await put(api, "*.example")
    answer = await put(api, "api.example", rate_per_second=5)
    assert answer["waiting"] == 3
    assert answer["overlaps"] == ["*.example gives way: an exact name goes first"]
    assert "it holds from the next claim on" in answer["note"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"rate_per_second": 0}, "expected 0.000001 to 100000, got 0"),
        ({"rate_per_second": -5}, "expected 0.000001 to 100000, got -5"),
        ({"rate_per_second": "5"}, 'expected 0.000001 to 100000, got "5"'),
        ({"burst": 0}, "expected a whole number from 1 to 1000000, got 0"),
        ({"burst": 1.5}, "expected a whole number from 1 to 1000000, got 1.5"),
        ({"max_parallel": 10**30}, "expected a whole number from 1 to 100000, got 10000"),
        ({"adaptive": "yes"}, 'expected true or false, got "yes"'),
        ({"timeout_seconds": 601}, "expected 0.1 to 600, got 601"),
        ({"retry_policy": "No"}, "expected a name of 1 to 63 characters from a-z"),
        ({"signing_secret": "whsec_AAAA"}, "expected the name of a secret, a file of SECRETS_DIRECTORY"),
        ({"signing_secret": 7}, "expected the name of a secret"),
        ({"secret_headers": {"host": "a"}}, "expected no host header: it is set on delivery"),
        ({"secret_headers": {"x-a": "a/b"}}, "expected for each header the name of a secret"),
        ({"secret_headers": ["x-a"]}, "expected an object of header names"),
        ({"breaker_ratio": 1.01}, "expected 0 to 1, got 1.01"),
        ({"timeout": 5}, "unknown field; expected rate_per_second, burst"),
    ],
    ids=str,
)
async def test_a_wrong_setting_is_a_422_that_names_field_value_and_remedy(
    api: httpx.AsyncClient, wanted: dict[str, Any], reason: str
) -> None:
    problem = assert_problem(await api.put(at("api.example"), json=wanted), 422, "validation")
    [error] = problem["errors"]
    assert error["field"] in wanted
    assert reason in error["reason"]
    assert (await api.get(PATH)).json() == {"destinations": [], "next": None}


async def test_every_rule_that_is_broken_is_named(api: httpx.AsyncClient) -> None:
    response = await api.put(at("api.example"), json={"burst": 0, "max_parallel": 0, "nope": 1})
    assert fields(assert_problem(response, 422, "validation")) == {"burst", "max_parallel", "nope"}


async def test_a_secret_in_place_of_its_name_is_not_repeated(api: httpx.AsyncClient) -> None:
    secret = "c2VjcmV0/c2VjcmV0+c2VjcmV0=="
    for wanted in ({"signing_secret": secret}, {"secret_headers": {"x-a": secret}}, {"secret_headers": secret}):
        response = await api.put(at("api.example"), json=wanted)
        assert response.status_code == 422
        assert secret not in response.text


@pytest.mark.parametrize(
    ("name", "wanted", "field"),
    [
        ("api.example", {"retry_policy": "patient"}, "retry_policy"),
        ("api.example", {"adaptive": True}, "adaptive"),
        ("api.example", {"breaker_cooldown_seconds": 400}, "breaker_cooldown_seconds"),
        ("kafka:orders", {"signing_secret": "a"}, "signing_secret"),
    ],
)
async def test_settings_that_contradict_each_other_are_a_409(
    api: httpx.AsyncClient, name: str, wanted: dict[str, Any], field: str
) -> None:
    response = await api.put(at(name), json=wanted)
    assert fields(assert_problem(response, 409, "not-configurable")) == {field}


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "malformed-json"),
        (b'{"burst": 1} x', 400, "malformed-json"),
        (b"\xff", 400, "malformed-json"),
        (b'{"retry_policy": "\xff"}', 400, "malformed-json"),
        (b'{"secret_headers": ' + b"[" * 5000 + b"]" * 4000 + b"}", 400, "malformed-json"),
        (b"[1]", 422, "validation"),
        (b'"x"', 422, "validation"),
        (b'{"x": "' + b"a" * 10_000 + b'"}', 413, "too-large"),
    ],
)
async def test_a_body_that_is_no_object_of_settings_is_refused(
    api: httpx.AsyncClient, body: bytes, status: int, kind: str
) -> None:
    response = await api.put(at("api.example"), content=body, headers={"content-type": "application/json"})
    assert_problem(response, status, kind)


@pytest.mark.parametrize(
    "name", ["*", "a b", "user:pw@host", "host/path", "kafka:a/b", "a" * 301, "host:", "https://x"]
)
async def test_a_name_that_can_be_no_destination_is_a_422(api: httpx.AsyncClient, name: str) -> None:
    for response in (
        await api.get(at(name)),
        await api.put(at(name), json={}),
        await api.delete(at(name)),
        await api.post(f"{at(name)}/pause"),
        await api.post(f"{at(name)}/resume"),
    ):
        problem = assert_problem(response, 422, "validation")
        assert fields(problem) == {"name"}
        assert "POST /api/v1/pause" in problem["detail"]


async def test_an_unknown_destination_is_a_404_that_says_which_pattern_holds(api: httpx.AsyncClient) -> None:
    for response in (
        await api.get(at("api.example")),
        await api.delete(at("api.example")),
        await api.post(f"{at('api.example')}/resume"),
    ):
        assert assert_problem(response, 404, "not-found")["detail"] == "There is no destination api.example."
    await put(api, "*.example")
    problem = assert_problem(await api.get(at("api.example")), 404, "not-found")
    assert problem["detail"] == "There is no destination api.example; *.example holds for it."


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_pages_show_each_destination_once_by_name(api: httpx.AsyncClient, client: Client, limit: int) -> None:
    names = ["a.example", "b.example", "kafka:", "kafka:orders", "*.org"]
    for name in names:
        await put(api, name)
    client.value("select orchestrator.ensure_dedicated_lane('é.example', false)")
    seen: list[str] = []
    query: dict[str, Any] = {"limit": limit}
    while True:
        page = (await api.get(PATH, params=query)).json()
        assert len(page["destinations"]) <= limit
        seen += [each["name"] for each in page["destinations"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert sorted(seen) == sorted([*names, "é.example"])


@pytest.mark.parametrize(
    ("query", "status", "kind"),
    [
        ({"limit": "0"}, 422, "validation"),
        ({"limit": "1001"}, 422, "validation"),
        ({"limit": "x"}, 422, "validation"),
        ({"cursor": "x"}, 400, "bad-cursor"),
        ({"cursor": ""}, 400, "bad-cursor"),
        ({"cursor": "00"}, 400, "bad-cursor"),
    ],
)
async def test_a_wrong_parameter_of_a_page_is_refused(
    api: httpx.AsyncClient, query: dict[str, str], status: int, kind: str
) -> None:
    assert fields(assert_problem(await api.get(PATH, params=query), status, kind)) == set(query)


async def test_a_cursor_that_is_no_text_is_harmless(api: httpx.AsyncClient) -> None:
    assert (await api.get(PATH, params={"cursor": "ff80"})).status_code == 200


async def test_a_destination_is_paused_and_resumed(api: httpx.AsyncClient, client: Client) -> None:
    submit(client, 2)
    paused = (await api.post(f"{at('api.example')}/pause")).json()
    assert (paused["name"], paused["waiting"], paused["in_flight"]) == ("api.example", 2, 0)
    assert (await api.get(at("api.example"))).json()["state"] == "paused"
    assert (await api.post(f"{at('api.example')}/pause")).json()["paused_at"] == paused["paused_at"]
    assert client.claim_on() == []
    resumed = (await api.post(f"{at('api.example')}/resume")).json()
    assert (resumed["resumed"], resumed["paused_at"], resumed["waiting"]) == (True, None, 2)
    assert len(client.claim_on()) == 2


async def test_all_deliveries_are_paused_and_resumed_by_request(api: httpx.AsyncClient, client: Client) -> None:
    submit(client, 2)
    paused = (await api.post("/api/v1/pause")).json()
    statistics = (await api.get("/api/v1/events/statistics")).json()
    assert statistics["paused_at"] == paused["paused_at"]
    assert client.claim_on() == []
    assert (await api.post("/api/v1/events", json=submission())).status_code == 201
    assert (await api.post("/api/v1/resume")).json()["resumed"] is True
    assert (await api.post("/api/v1/resume")).json()["resumed"] is False
    assert len(client.claim_on()) == 2


async def test_a_deleted_destination_has_no_limits_any_more(api: httpx.AsyncClient, client: Client) -> None:
    await put(api, "api.example", rate_per_second=0.01)
    submit(client, 3)
    assert len(client.claim_on()) == 1
    deleted = (await api.delete(at("api.example"))).json()
    assert (deleted["name"], deleted["waiting"]) == ("api.example", 2)
    assert len(client.claim_on()) == 2
    assert_problem(await api.delete(at("api.example")), 404, "not-found")


# Forecast


async def test_the_forecast_says_where_the_herd_will_be(api: httpx.AsyncClient, client: Client) -> None:
    await put(api, "api.example", rate_per_second=1)
    submit(client, 200, after_s=300)
    submit(client, 5, "https://free.example/", after_s=30)
    found = (await api.get("/api/v1/forecast")).json()
    assert (found["due"], found["bucket_seconds"], found["others"]) == (205, 60, 0)
    limited, free = found["destinations"]
    assert (limited["name"], limited["due"], limited["late"] > 100) == ("api.example", 200, True)
    assert (free["name"], free["due"], free["late"]) == ("free.example", 5, 0)
    query: dict[str, Any] = {"bucket_seconds": 10, "until_seconds": 600, "destination": "free.example"}
    found = (await api.get("/api/v1/forecast", params=query)).json()
    assert (found["due"], found["bucket_seconds"]) == (5, 10)


async def test_a_forecast_of_too_many_buckets_makes_them_longer(api: httpx.AsyncClient) -> None:
    found = (await api.get("/api/v1/forecast", params={"bucket_seconds": 1, "until_seconds": 604_800})).json()
    assert found["bucket_seconds"] == 60


@pytest.mark.parametrize(
    "query",
    [
        {"bucket_seconds": "0"},
        {"bucket_seconds": "86401"},
        {"bucket_seconds": "1.5"},
        {"until_seconds": "0"},
        {"until_seconds": "604801"},
        {"until_seconds": "-1"},
        {"destination": "*"},
        {"destination": "a/b"},
    ],
    ids=str,
)
async def test_a_forecast_with_wrong_parameters_is_a_422(api: httpx.AsyncClient, query: dict[str, str]) -> None:
    response = await api.get("/api/v1/forecast", params=query)
    assert fields(assert_problem(response, 422, "validation")) == set(query)


# Metrics


def gauges(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    parts = [line.removeprefix("orchestrator_").replace("{", " {", 1).split(" ") for line in lines]
    return {part[0]: part[-1] for part in parts}


async def test_metrics_count_destinations_that_stand_still(
    api: httpx.AsyncClient, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("paused", "destinations_paused", "breakers_open")
    found = gauges((await api.get("/metrics")).text)
    assert [found[name] for name in names] == ["0.0", "0.0", "0.0"]
    await api.post("/api/v1/pause")
    await api.post(f"{at('a.example')}/pause")
    await api.post(f"{at('b.example')}/pause")
    client.rows("update orchestrator.lane set breaker = 'open' where name = 'a.example'")
    found = gauges((await api.get("/metrics")).text)
    assert [found[name] for name in names] == ["0.0", "0.0", "0.0"]  # asked at most once in some seconds
    monkeypatch.setattr(Reading, "is_old", True)
    found = gauges((await api.get("/metrics")).text)
    assert [found[name] for name in names] == ["1.0", "2.0", "1.0"]
    client.rows("drop function orchestrator.standstills() cascade")
    response = await api.get("/metrics")
    assert response.status_code == 200
    assert [gauges(response.text)[name] for name in names] == ["NaN", "NaN", "NaN"]
