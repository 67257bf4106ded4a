"""API keys: who may do what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from http.client import HTTPConnection
from time import monotonic

import pytest

from orchestrator.api import auth
from orchestrator.api.auth import key_hash, new_key, require_keys
from orchestrator.database import Database
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, running_api, submission

UNKNOWN_ID = "019c1347-d2fb-705e-a717-2a27dd38d28f"
REQUESTS = {
    "read": [
        ("GET", f"/api/v1/events/{UNKNOWN_ID}"),
        ("GET", "/api/v1/events/external/j"),
        ("GET", "/api/v1/events/external/j/all"),
        ("GET", "/api/v1/events/statistics"),
        ("GET", "/api/v1/dead-letters"),
        ("GET", "/api/v1/destinations"),
        ("GET", "/api/v1/destinations/api.example"),
        ("GET", "/api/v1/forecast"),
    ],
    "submit": [
        ("POST", "/api/v1/events"),
        ("POST", "/api/v1/events/batch"),
        ("DELETE", f"/api/v1/events/{UNKNOWN_ID}"),
        ("DELETE", "/api/v1/events/external/j"),
        ("POST", "/api/v1/events/cancel"),
        ("POST", f"/api/v1/events/{UNKNOWN_ID}/reschedule"),
        ("POST", "/api/v1/events/external/j/reschedule"),
    ],
    "admin": [
        ("POST", "/api/v1/dead-letters/redrive"),
        ("POST", "/api/v1/dead-letters/purge"),
        ("PUT", "/api/v1/destinations/api.example"),
        ("DELETE", "/api/v1/destinations/api.example"),
        ("POST", "/api/v1/destinations/api.example/pause"),
        ("POST", "/api/v1/destinations/api.example/resume"),
        ("POST", "/api/v1/pause"),
        ("POST", "/api/v1/resume"),
    ],
}
ALL_REQUESTS = [request for requests in REQUESTS.values() for request in requests]


@pytest.fixture
def closed(settings: MakeSettings) -> Settings:
    """Settings of an API that anonymous requests may not use."""
    return settings(ALLOW_ANONYMOUS="false")


@pytest.fixture
async def database(closed: Settings) -> AsyncIterator[Database]:
    async with Database(closed, role="api") as database:
        yield database


async def key_with(database: Database, *scopes: str) -> str:
    key = new_key()
    await database.create_api_key(f"key-{'-'.join(scopes)}", key_hash(key), scopes)
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_long_random_and_recognisable() -> None:
    assert auth._KEY.match(new_key().encode())
    assert len(new_key()) == 48
    assert new_key() != new_key()


@pytest.mark.parametrize(
    ("scope", "other"), [("read", "submit"), ("read", "admin"), ("submit", "read"), ("submit", "admin")]
)
async def test_a_key_may_do_what_its_scope_says_and_nothing_else(
    closed: Settings, database: Database, scope: str, other: str
) -> None:
    headers = bearer(await key_with(database, scope))
    async with running_api(closed, database) as client:
        for method, path in REQUESTS[scope]:
            assert (await client.request(method, path, headers=headers)).status_code not in (401, 403)
        for method, path in REQUESTS[other]:
            response = await client.request(method, path, headers=headers)
            assert other in assert_problem(response, 403, "forbidden")["detail"]
            assert f'scope="{other}"' in response.headers["www-authenticate"]


async def test_every_route_needs_its_listed_scope(closed: Settings, database: Database) -> None:
    await key_with(database, "read")
    async with running_api(closed, database) as client:
        documented = (await client.get("/openapi.json")).json()["paths"]
    needed = {
        (method.upper(), path, operation["description"].split("`")[1])
        for path, operations in documented.items()
        for method, operation in operations.items()
        if method in ("get", "post", "put", "delete") and operation.get("security") != []
    }
    names = {UNKNOWN_ID: "{id}", "j": "{external_job_id}", "api.example": "{name}"}
    listed = {
        (method, "/".join(names.get(part, part) for part in path.split("/")), scope)
        for scope, requests in REQUESTS.items()
        for method, path in requests
    }
    assert needed == listed


async def test_a_delivery_to_this_api_needs_a_key_even_where_others_need_none(settings: MakeSettings) -> None:
    chosen = settings(ALLOW_ANONYMOUS="true")
    delivery = {"orchestrator-attempt": "1"}
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        for method, path in ALL_REQUESTS:
            assert_problem(await client.request(method, path, headers=delivery), 401, "unauthorized")
        key = await key_with(database, "submit")
        answer = await client.post("/api/v1/events", json=submission(), headers=delivery | bearer(key))
        assert answer.status_code == 201


async def test_the_scope_admin_may_do_everything(closed: Settings, database: Database) -> None:
    headers = bearer(await key_with(database, "admin"))
    async with running_api(closed, database) as client:
        for method, path in ALL_REQUESTS:
            assert (await client.request(method, path, headers=headers)).status_code not in (401, 403)


async def test_a_request_without_a_valid_key_is_a_401(closed: Settings, database: Database) -> None:
    key = await key_with(database, "admin")
    wrong = [
        {},
        bearer(new_key()),
        bearer("orch_short"),
        bearer(key + "x"),
        {"Authorization": "Basic YTpi"},
        {"X-API-Key": new_key()},
        {"X-API-Key": ""},
        {"Authorization": "Bearer"},
    ]
    async with running_api(closed, database) as client:
        for method, path in ALL_REQUESTS:
            for headers in wrong:
                response = await client.request(method, path, headers=headers)
                assert_problem(response, 401, "unauthorized")
                assert response.headers["www-authenticate"].startswith("Bearer")
        for path in ("/openapi.json", "/health", "/ready", "/metrics"):
            assert (await client.get(path)).status_code == 200


async def test_a_key_may_come_in_either_header(closed: Settings, database: Database) -> None:
    key = await key_with(database, "read")
    async with running_api(closed, database) as client:
        for headers in (
            {"Authorization": f"bearer  {key}"},
            {"X-API-Key": key},
            {"X-API-Key": key, "Authorization": "Basic YTpi"},
            {"X-API-Key": key, "Authorization": f"Bearer {key}"},
            {"X-API-Key": key, "Authorization": "Bearer for-the-gateway"},
            {"X-API-Key": key, "Authorization": "Bearer"},
            [("X-API-Key", key), ("X-API-Key", key)],
        ):
            assert (await client.get("/api/v1/events/statistics", headers=headers)).status_code == 200, headers


async def test_blanks_around_a_key_are_no_part_of_it(closed: Settings, database: Database) -> None:
    key = await key_with(database, "read")

    def status(name: str, value: str) -> int:
        """httpx would not send such a header."""
        connection = HTTPConnection("127.0.0.1", closed.server_port, timeout=10)
        with closing(connection):
            connection.request("GET", "/api/v1/events/statistics", headers={name: value})
            return connection.getresponse().status

    async with running_api(closed, database):
        for name, value in (
            ("X-API-Key", f" {key} \t "),
            ("X-API-KEY", f"{key} "),
            ("Authorization", f"BEARER \t {key}  "),
            ("authorization", f"Bearer\t{key}"),
            ("Authorization", f"  bearer {key}"),
        ):
            assert await asyncio.to_thread(status, name, value) == 200, (name, value)
        assert await asyncio.to_thread(status, "Authorization", " ") == 401


async def test_two_keys_that_differ_in_one_request_are_refused(closed: Settings, database: Database) -> None:
    key = await key_with(database, "read")
    async with running_api(closed, database) as client:
        for headers in (
            {"X-API-Key": key, "Authorization": f"Bearer {new_key()}"},
            [("X-API-Key", key), ("X-API-Key", new_key())],
            [("X-API-Key", "a"), ("X-API-Key", "b")],
        ):
            response = await client.get("/api/v1/events/statistics", headers=headers)
            assert "several that differ" in assert_problem(response, 401, "unauthorized")["detail"]


async def test_a_wrong_key_is_refused_although_anonymous_requests_are_allowed(settings: MakeSettings) -> None:
    chosen = settings()
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        assert (await client.post("/api/v1/events", json=submission())).status_code == 201
        response = await client.post("/api/v1/events", json=submission(), headers=bearer(new_key()))
        assert_problem(response, 401, "unauthorized")


async def test_a_revoked_key_is_refused_once_the_cache_forgets_it(
    closed: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await key_with(database, "read")
    path = "/api/v1/events/statistics"
    async with running_api(closed, database) as client:
        assert (await client.get(path, headers=bearer(key))).status_code == 200
        assert await database.revoke_api_key("key-read")
        assert (await client.get(path, headers=bearer(key))).status_code == 200
        later = monotonic() + auth.CACHE_S
        monkeypatch.setattr(auth, "monotonic", lambda: later)
        assert_problem(await client.get(path, headers=bearer(key)), 401, "unauthorized")


async def test_a_new_key_works_although_it_was_tried_before(
    closed: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await key_with(database, "read")
    key = new_key()
    path = "/api/v1/events/statistics"
    async with running_api(closed, database) as client:
        assert_problem(await client.get(path, headers=bearer(key)), 401, "unauthorized")
        await database.create_api_key("late", key_hash(key), ["read"])
        later = monotonic() + auth.CACHE_S
        monkeypatch.setattr(auth, "monotonic", lambda: later)
        assert (await client.get(path, headers=bearer(key))).status_code == 200


async def test_an_api_without_any_usable_key_does_not_start(closed: Settings, database: Database) -> None:
    with pytest.raises(OrchestratorError, match="orchestrator keys create"):
        await require_keys(closed, database)
    await key_with(database, "submit")
    await require_keys(closed, database)


async def test_an_open_api_starts_without_keys(settings: MakeSettings) -> None:
    chosen = settings(ALLOW_ANONYMOUS="true")
    async with Database(chosen, role="api") as database:
        await require_keys(chosen, database)


async def test_the_cache_of_keys_has_a_bound_and_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "CACHE_SIZE", 2)
    cache = auth._Recent()
    for name in (b"a", b"b", b"c"):
        cache.put(name, None)
    assert [name in cache for name in (b"a", b"b", b"c")] == [False, True, True]


async def test_requests_that_arrive_together_share_one_look_up(closed: Settings, database: Database) -> None:
    key = await key_with(database, "read")
    looked_up = []
    original = database.api_key

    async def counting(digest: bytes) -> object:
        looked_up.append(digest)
        return await original(digest)

    database.api_key = counting  # type: ignore[method-assign,assignment]
    async with running_api(closed, database) as client:
        path = "/api/v1/events/statistics"
        responses = await asyncio.gather(*(client.get(path, headers=bearer(key)) for _ in range(20)))
    assert {response.status_code for response in responses} == {200}
    assert len(looked_up) == 1
