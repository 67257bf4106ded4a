"""Destinations as operators set, pause and see them; what claims make of it is in test_limits.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb

from tests.sql.conftest import Connect
from tests.support.databases import Databases
from tests.support.sql_client import NOON, Client, results, seconds

API = "https://api.example/hook"
DEFAULTS: dict[str, Any] = {
    "rate_per_second": None,
    "burst": 1,
    "max_parallel": None,
    "adaptive": False,
    "timeout": None,
    "retry_policy": None,
    "signing_secret": None,
    "secret_headers": None,
    "spread": None,
    "breaker_failures": 10,
    "breaker_ratio": 0.5,
    "breaker_minimum": 20,
    "breaker_window": seconds(30),
    "breaker_cooldown": seconds(5),
    "breaker_max_cooldown": seconds(300),
}
OTHERS: dict[str, Any] = {
    "rate_per_second": 12.5,
    "burst": 7,
    "max_parallel": 3,
    "adaptive": True,
    "timeout": seconds(2.5),
    "retry_policy": "default",
    "signing_secret": "acme.v2",
    "secret_headers": {"authorization": "acme-token", "x-tenant": "acme_tenant"},
    "spread": seconds(90),
    "breaker_failures": 4,
    "breaker_ratio": 0.25,
    "breaker_minimum": 6,
    "breaker_window": seconds(10),
    "breaker_cooldown": seconds(1),
    "breaker_max_cooldown": seconds(60),
}


def configure(client: Client, name: str | None = "api.example", *, clear: Any = (), **settings: Any) -> Any:
    """The row that `configure_destination` answers."""
    values = {key: Jsonb(value) if isinstance(value, dict) else value for key, value in settings.items()}
    arguments = [sql.SQL("{} => {}").format(sql.Identifier(f"p_{key}"), sql.Placeholder(key)) for key in values]
    query = sql.SQL("select * from orchestrator.configure_destination({})").format(
        sql.SQL(", ").join([sql.SQL("%(name)s"), *arguments, sql.SQL("p_clear => %(clear)s")])
    )
    with client.connection.cursor(row_factory=namedtuple_row) as cursor:
        return cursor.execute(query, {"name": name, "clear": list(clear), **values}).fetchone()


def settings_of(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in DEFAULTS}


def act(client: Client, function: str, *arguments: Any) -> Any:
    """The one row that a function answers; None: it answered none."""
    query = sql.SQL("select * from orchestrator.{}({})").format(
        sql.Identifier(function), sql.SQL(", ").join(sql.Placeholder() * len(arguments))
    )
    with client.connection.cursor(row_factory=namedtuple_row) as cursor:
        return cursor.execute(query, arguments).fetchone()


def refusal(client: Client, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        configure(client, *arguments, **settings)
    assert client.column("select name from orchestrator.destination where name <> 'kept.example'") == []
    return str(refused.value.diag.message_primary)


def claimed(client: Client) -> int:
    return len(client.claim())


# Names


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("api.example", "api.example"),
        ("API.Example", "api.example"),
        ("api.example:8443", "api.example:8443"),
        ("api.example:443", "api.example"),
        ("api.example:80", "api.example"),
        ("https://API.example/hook?a=b", "api.example"),
        ("HTTPS://api.example:443", "api.example"),
        ("https://api.example:80/", "api.example:80"),
        ("http://api.example:80?x", "api.example"),
        ("http://localhost:9099/hook", "localhost:9099"),
        ("10.0.0.7:8080", "10.0.0.7:8080"),
        ("[::1]:8080", "[::1]:8080"),
        ("https://[FE80::1]/x", "[fe80::1]"),
        ("*.example", "*.example"),
        ("*.Example:*", "*.example:*"),
        ("kafka:Orders.v2", "kafka:Orders.v2"),
        ("KAFKA:Orders", "kafka:Orders"),
        ("kafka:", "kafka:"),
        ("kafka:orders.*", "kafka:orders.*"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("https://api.example/hook", "api.example"),
        ("https://Api.Example:443/hook?", "api.example"),
        ("http://[FE80::1]:80/", "[fe80::1]"),
        ("api.example.", "api.example."),
        ("a_b.example", "a_b.example"),
        ("1.example:1", "1.example:1"),
        ("10.0.*", "10.0.*"),
        ("api.example:8*", "api.example:8*"),
        ("kafka.:9092", "kafka.:9092"),
        ("http://kafka:9092/", "kafka.:9092"),
    ],
)
def test_a_destination_name_is_brought_into_the_form_that_events_have(
    client: Client, given_name: str, name: str
) -> None:
    assert configure(client, given_name).name == name
    assert configure(client, name).name == name
    assert client.column("select name from orchestrator.destination") == [name]


@pytest.mark.parametrize("url", ["https://api.example/hook", "http://api.example:8080/x", "https://api.example:443?a"])
def test_the_url_of_an_event_names_its_destination(client: Client, url: str) -> None:
    client.schedule(destination=url)
    assert configure(client, url).waiting == 1


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (None, "got nothing"),
        ("", "got nothing"),
        ("*", "got * alone: limits are per destination; orchestrator.pause_all() pauses everything"),
        ("**", "pause_all() pauses everything"),
        ("api example", "white space"),
        (" api.example", "white space"),
        ("api.example\n", "white space or a control character"),
        ("api.example\x01", "a control character"),
        ("user:secret@api.example", "an @: a user name and password are no part of it"),
        ("https://user:secret@api.example/", "an @"),
        ("api.example/hook", "got api.example/hook: limits go by host and port, not by path"),
        ("api.example?x", "not by path"),
        ("ftp://api.example", "not by path"),
        ("https://", "got https://"),
        ("::1", "got ::1"),
        ("api.example:", "got api.example:"),
        ("api.example:port", "got api.example:port"),
        ("kafka:a b", "white space"),
        ("kafka:a/b", "a topic has at most 249 letters, digits, dots, underscores and hyphens"),
        ("kafka:" + "a" * 250, "a topic has at most 249"),
        ("a" * 301, "got 301 characters"),
        ("bücher.example", "xn-- form"),
        ("*.bücher.example", "xn-- form"),
        ("https://bücher.example/", "xn-- form"),
        ("api.example:0", "a port is from 1 to 65535"),
        ("api.example:08443", "a port is from 1 to 65535"),
        ("api.example:65536", "a port is from 1 to 65535"),
        ("[::1]:0", "a port is from 1 to 65535"),
        ("[::1::2]", "no address is written so"),
        ("[1.2.3.4.5]", "no address is written so"),
        ("api..example", "no host has such a name"),
        (".example", "no host has such a name"),
        ("*..example", "no host has such a name"),
        ("-api.example", "no host has such a name"),
        ("api-.example", "no host has such a name"),
        ("a" * 64 + ".example", "no host has such a name"),
        ("a,b", "no host has such a name"),
        ("*.a;b", "no host has such a name"),
        ("10.0.0", "no host has such a name"),
        ("10.0.0.256", "no host has such a name"),
        ("10.0.0.07", "no host has such a name"),
        ("2130706433", "no host has such a name"),
        ("0x7f000001", "no host has such a name"),
        (".", "no host has such a name"),
        ("..", "no host has such a name"),
        ("kafka:.", "no topic has such a name"),
        ("KAFKA:..", "no topic has such a name"),
    ],
)
def test_a_name_that_can_be_no_destination_is_refused(client: Client, name: str | None, complaint: str) -> None:
    told = refusal(client, name)
    assert told.startswith("name: expected a host such as")
    assert complaint in told
    assert "secret" not in told
    for function in ("pause_destination", "resume_destination", "delete_destination", "close_breaker"):
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            act(client, function, name)


# Settings


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"rate_per_second": 0}, "rate_per_second: expected more than 0 and at most 100000, got 0"),
        ({"rate_per_second": -1}, "rate_per_second: expected more than 0 and at most 100000, got -1"),
        ({"rate_per_second": math.nan}, "rate_per_second: expected more than 0 and at most 100000, got NaN"),
        ({"rate_per_second": math.inf}, "rate_per_second: expected more than 0 and at most 100000, got Infinity"),
        ({"rate_per_second": -math.inf}, "got -Infinity"),
        ({"rate_per_second": 1_000_001}, "got 1000001"),
        ({"rate_per_second": 1e-300}, "rate_per_second: expected at least 0.000001, one in eleven days, got 1e-300"),
        ({"burst": 0}, "burst: expected 1 to 1000000, got 0"),
        ({"burst": -3}, "burst: expected 1 to 1000000, got -3"),
        ({"burst": 1_000_001}, "burst: expected 1 to 1000000, got 1000001"),
        ({"max_parallel": 0}, "max_parallel: expected 1 to 100000, got 0"),
        ({"max_parallel": 100_001}, "max_parallel: expected 1 to 100000, got 100001"),
        ({"adaptive": True}, "adaptive: expected max_parallel with it"),
        ({"timeout": seconds(0)}, "timeout: expected 0.1 s to 10 min, got 00:00:00"),
        ({"timeout": seconds(601)}, "timeout: expected 0.1 s to 10 min, got 00:10:01"),
        ({"retry_policy": "patient"}, "retry_policy: there is no policy named patient; see table"),
        ({"spread": seconds(0)}, "spread: expected more than 0 and at most 7 days, got 00:00:00"),
        ({"spread": seconds(-5)}, "spread: expected more than 0 and at most 7 days, got -1 days +23:59:55"),
        ({"spread": timedelta(days=8)}, "spread: expected more than 0 and at most 7 days, got 8 days"),
        ({"breaker_failures": -1}, "breaker_failures: expected 0 (not by that) to 1000000, got -1"),
        ({"breaker_ratio": -0.1}, "breaker_ratio: expected 0 (not by that) to 1, got -0.1"),
        ({"breaker_ratio": 1.5}, "breaker_ratio: expected 0 (not by that) to 1, got 1.5"),
        ({"breaker_ratio": math.nan}, "breaker_ratio: expected 0 (not by that) to 1, got NaN"),
        ({"breaker_minimum": 0}, "breaker_minimum: expected 1 to 1000000, got 0"),
        ({"breaker_window": seconds(0.5)}, "breaker_window: expected 1 s to 1 hour, got 00:00:00.5"),
        ({"breaker_cooldown": seconds(0)}, "breaker_cooldown: expected 0.1 s to 1 hour, got 00:00:00"),
        ({"breaker_cooldown": seconds(600)}, "breaker_cooldown: expected at most breaker_max_cooldown, got 00:10:00"),
        ({"breaker_max_cooldown": seconds(1)}, "breaker_cooldown: expected at most breaker_max_cooldown, got 00:00:05"),
        ({"breaker_max_cooldown": timedelta(days=2)}, "breaker_max_cooldown: expected 0.1 s to 1 day, got 2 days"),
        ({"signing_secret": ""}, "signing_secret: expected the name of a secret"),
        ({"signing_secret": "../etc/passwd"}, "signing_secret: expected the name of a secret"),
        ({"secret_headers": {"host": "a"}}, "secret_headers: expected no host header: it is set on delivery"),
        ({"secret_headers": {"Webhook-Id": "a"}}, "secret_headers: expected no Webhook-Id header"),
        ({"secret_headers": {"x y": "a"}}, "secret_headers: expected a header name"),
        ({"secret_headers": {"X-A": "a", "x-a": "b"}}, "secret_headers: expected each header once"),
        ({"secret_headers": {"x-a": 1}}, "secret_headers: expected a string for x-a"),
        ({"secret_headers": {"x-a": "a/b"}}, "secret_headers: expected for x-a the name of a secret"),
        ({"clear": ["rate"]}, "p_clear: expected names of settings (rate_per_second, burst,"),
        ({"clear": [None]}, "p_clear: expected names of settings"),
        ({"clear": ["burst"], "burst": 2}, "burst: given, and in p_clear: leave one of them out"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name_and_changes_nothing(
    client: Client, wanted: dict[str, Any], complaint: str
) -> None:
    assert complaint in refusal(client, **wanted)


def test_a_topic_takes_no_secrets(client: Client) -> None:
    assert "only webhooks are signed" in refusal(client, "kafka:orders", signing_secret="a")
    assert "headers of webhooks" in refusal(client, "kafka:orders", secret_headers={"x-a": "a"})


@pytest.mark.parametrize("place", ["signing_secret", "secret_headers"])
def test_a_secret_in_place_of_its_name_is_refused_and_not_repeated(client: Client, place: str) -> None:
    secret = "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"
    wanted: dict[str, Any] = {place: secret if place == "signing_secret" else {"x-key": f"{secret}="}}
    told = refusal(client, **wanted)
    assert "the name of a secret" in told
    assert secret not in told


def test_a_destination_begins_with_the_documented_defaults(client: Client) -> None:
    answer = configure(client)
    assert settings_of(answer) == DEFAULTS
    assert (answer.waiting, answer.overlaps) == (0, [])
    assert answer.lane >= 64
    assert client.value("select limited from orchestrator.lane where lane = %s", answer.lane) is False


def test_settings_that_are_given_are_set_and_all_others_are_left(client: Client) -> None:
    assert settings_of(configure(client, **OTHERS)) == OTHERS
    assert settings_of(configure(client)) == OTHERS
    for name, value in OTHERS.items():
        client.rows("delete from orchestrator.lane where name is not null")
        client.rows("delete from orchestrator.destination")
        needs: dict[str, Any] = {"max_parallel": 3} if name == "adaptive" else {}
        assert settings_of(configure(client, **{name: value}, **needs)) == DEFAULTS | {name: value} | needs


@pytest.mark.parametrize("name", list(DEFAULTS))
def test_settings_that_are_cleared_return_to_their_defaults_and_all_others_are_left(client: Client, name: str) -> None:
    configure(client, **OTHERS)
    also = {"adaptive"} if name == "max_parallel" else set()
    expected = {key: DEFAULTS[key] if key in {name} | also else value for key, value in OTHERS.items()}
    assert settings_of(configure(client, clear=[name, *also])) == expected


def test_max_parallel_cannot_be_cleared_alone_while_adaptive_needs_it(client: Client) -> None:
    configure(client, max_parallel=5, adaptive=True)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="adaptive: expected max_parallel with it"):
        configure(client, clear=["max_parallel"])


def test_a_refusal_names_the_default_that_a_cleared_setting_would_have(client: Client) -> None:
    configure(client, breaker_cooldown=seconds(1), breaker_max_cooldown=seconds(2))
    complaint = "breaker_cooldown: expected at most breaker_max_cooldown, got 00:00:05"
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=complaint):
        configure(client, clear=["breaker_cooldown"])


def test_zero_failures_and_ratio_keep_a_breaker_from_opening(client: Client) -> None:
    answer = configure(client, breaker_failures=0, breaker_ratio=0)
    assert (answer.breaker_failures, answer.breaker_ratio) == (0, 0)
    assert client.rows("select breaker_failures, breaker_ratio from orchestrator.destination") == [(None, None)]
    client.schedule_many(40, destination=API)
    for _ in range(3):
        moment = NOON.timestamp()
        leases = client.claim()
        client.finish(results(leases, "retry", status_code=503, started_at=moment, finished_at=moment))
        client.rows("update orchestrator.timer set due_at = %s", NOON)
    assert client.value("select breaker from orchestrator.destinations") == "closed"


def test_secret_headers_are_kept_in_lower_case_and_an_empty_set_is_none(client: Client) -> None:
    assert configure(client, secret_headers={"Authorization": "a"}).secret_headers == {"authorization": "a"}
    assert configure(client, secret_headers={}).secret_headers is None


def test_a_new_limit_holds_from_the_next_claim_on(client: Client) -> None:
    client.schedule_many(20, destination=API)
    configure(client, rate_per_second=1, burst=5)
    client.claim_on()
    assert client.value("select count(*) from orchestrator.timer where lease_until is not null") == 5
    configure(client, clear=["rate_per_second"])
    client.claim_on()
    assert client.value("select count(*) from orchestrator.timer where lease_until is not null") == 20


def test_a_new_rate_forgets_the_slots_given_under_the_old_one_and_other_settings_do_not(client: Client) -> None:
    slot = "select next_slot_at from orchestrator.lane where name = 'api.example'"
    configure(client, rate_per_second=0.001)
    client.schedule_many(3, destination=API)
    client.claim_on()
    given = client.value(slot)
    assert given > NOON
    configure(client, timeout=seconds(3), max_parallel=9)
    assert client.value(slot) == given
    configure(client, rate_per_second=10)
    assert client.value(slot) is None
    assert claimed(client) == 1


def test_a_new_bound_forgets_the_adaptive_bound_found_before(client: Client) -> None:
    configure(client, max_parallel=8, adaptive=True)
    found = "select parallel_now from orchestrator.lane where name = 'api.example'"
    client.rows("update orchestrator.lane set parallel_now = 2.5, held_by = 'parallel' where name is not null")
    configure(client, timeout=seconds(3))
    assert client.value(found) == 2.5
    configure(client, max_parallel=9)
    assert client.value(found) is None
    assert client.value("select state from orchestrator.destinations") == "ok"


def test_a_lower_bound_says_how_many_attempts_are_above_it(client: Client) -> None:
    configure(client, max_parallel=5)
    client.schedule_many(5, destination=API)
    assert len(client.claim_on()) == 5
    note = configure(client, max_parallel=2).note
    assert "5 attempts are under way: the next starts when fewer than 2 are" in note


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "no event waits that it would hold for at present"),
        ({"burst": 5}, "burst does nothing without rate_per_second"),
        ({"name": "https://api.example/hook"}, "it holds for all of the host: paths have no limits of their own"),
    ],
)
def test_a_note_says_what_an_operator_may_not_expect(client: Client, wanted: dict[str, Any], said: str) -> None:
    note = configure(client, **wanted).note
    assert said in note
    assert "it holds from the next claim on, and attempts under way are left alone" in note


def test_a_note_says_that_a_pause_or_an_open_breaker_holds(client: Client) -> None:
    act(client, "pause_destination", "api.example")
    client.rows("update orchestrator.lane set breaker = 'half_open' where name is not null")
    act(client, "pause_all")
    note = configure(client).note
    assert "it is paused; its breaker is half open; everything is paused" in note


# What waits


def test_waiting_events_are_counted_for_a_name(client: Client) -> None:
    client.schedule_many(3, destination=API)
    client.schedule_many(2, destination=API, scheduled_at=NOON + timedelta(days=3))
    client.schedule_many(4, destination="https://api.example:8443/")
    client.schedule_many(6, destination="orders", delivery_type="KAFKA")
    client.schedule_many(5, destination=None, delivery_type="KAFKA")
    names = ("api.example", "api.example:8443", "kafka:orders", "kafka:", "none.example")
    assert [configure(client, name).waiting for name in names] == [5, 4, 6, 5, 0]
    client.claim_on()
    assert configure(client).waiting == 2


def test_waiting_events_are_counted_for_a_pattern_without_those_that_another_governs(client: Client) -> None:
    for n, host in enumerate(["a.shop.example", "b.shop.example", "c.shop.example", "other.example"], start=1):
        client.schedule_many(n, destination=f"https://{host}/")
    assert configure(client, "*.shop.example").waiting == 6
    assert configure(client, "c.shop.example").waiting == 3
    assert configure(client, "*.shop.example").waiting == 3
    assert configure(client, "*.example").waiting == 4
    assert configure(client, "nothing-*.example").waiting == 0


# Overlaps


def test_overlaps_say_which_goes_first(client: Client) -> None:
    configure(client, "*.example")
    assert configure(client, "api.example").overlaps == ["*.example gives way: an exact name goes first"]
    assert configure(client, "api.*").overlaps == [
        "*.example goes first where both match",
        "api.example goes first: an exact name",
    ]
    assert configure(client, "*.example").overlaps == [
        "api.* gives way where both match",
        "api.example goes first: an exact name",
    ]
    assert configure(client, "other.org").overlaps == []


def test_a_destination_that_is_only_watched_overlaps_nothing(client: Client) -> None:
    client.value("select orchestrator.ensure_dedicated_lane('api.example', false)")
    assert configure(client, "*.example").overlaps == []


def test_a_pattern_that_overlaps_many_destinations_names_some_of_them(client: Client) -> None:
    for n in range(30):
        client.value("select orchestrator.ensure_dedicated_lane(%s, true)", f"h{n:02}.example")
    overlaps = configure(client, "*.example").overlaps
    assert overlaps[0] == "h00.example goes first: an exact name"
    assert (len(overlaps), overlaps[-1]) == (21, "and 10 more")


@pytest.fixture(scope="module")
def shared(databases: Databases) -> Iterator[Client]:
    with databases.migrated() as url, Client(url) as client:
        client.at(NOON)
        yield client


_PATTERNS = st.text(alphabet="ab*", min_size=1, max_size=5).filter(lambda text: text.strip("*"))


def _match(name: str, pattern: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(_match(name[n:], pattern[1:]) for n in range(len(name) + 1))
    return bool(name) and name[0] == pattern[0] and _match(name[1:], pattern[1:])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=_PATTERNS, second=_PATTERNS)
def test_overlapping_patterns_are_those_that_have_a_name_in_common(shared: Client, first: str, second: str) -> None:
    if first == second:
        return
    names = ["".join(letters) for size in range(1, 9) for letters in itertools.product("ab", repeat=size)]
    common = [name for name in names if _match(name, first) and _match(name, second)]
    # Where both are names there is nothing in common, as they differ.
    with shared.connection.transaction(force_rollback=True):
        configure(shared, first)
        overlaps = configure(shared, second).overlaps
        assert bool(overlaps) == bool(common), common[:5]
        for name in common[:3]:
            winner = shared.value("select orchestrator.destination_for(%s)", name)
            if name in (first, second):
                assert winner == name
            else:
                expected = second if f"{first} gives way" in overlaps[0] else first
                assert winner == expected


# Several operators at once


def test_two_operators_who_configure_one_destination_wait_for_one_another(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    first, second = connect(), connect()
    configure(first)
    with first.transaction():
        configure(first, rate_per_second=5)
        waiting = threads.submit(configure, second, max_parallel=2)
        observer.wait_until_blocked(second)
        configure(first, burst=3)
    answer = waiting.result(10)
    assert (answer.rate_per_second, answer.burst, answer.max_parallel) == (5, 3, 2)


def test_two_operators_who_configure_a_new_destination_make_it_once(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    first, second = connect(), connect()
    with first.transaction():
        lane = configure(first, rate_per_second=5).lane
        waiting = threads.submit(configure, second, max_parallel=2)
        observer.wait_until_blocked(second)
    answer = waiting.result(10)
    assert (answer.lane, answer.rate_per_second, answer.max_parallel) == (lane, 5, 2)
    assert observer.value("select count(*) from orchestrator.lane where lane > 63") == 1


def test_operators_and_claims_do_not_deadlock(connect: Connect, observer: Client, threads: ThreadPoolExecutor) -> None:
    """All of them again and again on the same few destinations; a deadlock would be an error of one of them."""
    owner = connect()
    hosts = [f"h{n}.example" for n in range(4)]
    for host in hosts:
        owner.schedule_many(50, destination=f"https://{host}/", max_retries=50)

    def operate(number: int) -> None:
        client = connect()
        for n in range(15):
            name = hosts[(n * number) % 4]
            match (n + number) % 5:
                case 0:
                    configure(client, name, rate_per_second=1000 + n, max_parallel=5)
                case 1:
                    act(client, "pause_destination", name)
                case 2:
                    act(client, "resume_destination", name)
                case 3:
                    act(client, "delete_destination", name)
                case 4:
                    act(client, "pause_all")
                    act(client, "resume_all")

    def dispatch() -> None:
        client = connect()
        for n in range(40):
            client.at(NOON + timedelta(hours=n))
            client.finish(results(client.claim(20), "retry", status_code=503))

    work = [threads.submit(operate, number) for number in (1, 2, 3)] + [threads.submit(dispatch) for _ in range(2)]
    for each in work:
        each.result(60)
    assert observer.value("select count(*) from orchestrator.timer") == 200


# Deleting


def test_a_deleted_destination_s_events_are_delivered_without_its_limits(client: Client) -> None:
    configure(client, rate_per_second=0.01)
    client.schedule_many(10, destination=API)
    assert len(client.claim_on()) == 1
    answer = act(client, "delete_destination", "https://api.example/x")
    assert (answer.name, answer.waiting) == ("api.example", 9)
    assert "what waits moves to shared lanes as it falls due, without limits" in answer.note
    assert len(client.claim_on()) == 9
    assert client.rows("select * from orchestrator.destinations") == []


def test_deleting_a_name_leaves_its_events_to_the_pattern(client: Client) -> None:
    configure(client, "*.example", rate_per_second=0.01)
    configure(client, "api.example")
    client.schedule_many(5, destination=API)
    assert "what waits moves to *.example" in act(client, "delete_destination", "api.example").note
    assert len(client.claim_on()) == 1


def test_deleting_a_pattern_frees_the_events_it_held(client: Client) -> None:
    configure(client, "*.example", rate_per_second=0.01)
    client.schedule_many(5, destination=API)
    client.claim_on()
    assert act(client, "delete_destination", "*.example").waiting == 4
    assert len(client.claim_on()) == 4


def test_deleting_a_destination_ends_its_pause(client: Client) -> None:
    act(client, "pause_destination", "api.example")
    client.schedule(destination=API)
    act(client, "delete_destination", "api.example")
    assert len(client.claim_on()) == 1


def test_a_destination_that_is_not_configured_is_not_deleted(client: Client) -> None:
    client.value("select orchestrator.ensure_dedicated_lane('watched.example', false)")
    assert act(client, "delete_destination", "none.example") is None
    assert act(client, "delete_destination", "watched.example") is None
    assert client.column("select name from orchestrator.destinations") == ["watched.example"]


def test_a_destination_deleted_and_configured_again_keeps_no_earlier_setting(client: Client) -> None:
    lane = configure(client, **OTHERS).lane
    act(client, "delete_destination", "api.example")
    again = configure(client)
    assert settings_of(again) == DEFAULTS
    assert again.lane != lane


# Pausing


def heard(listener: Client) -> list[str]:
    return [note.payload for note in listener.connection.notifies(timeout=2, stop_after=1)]


def test_a_paused_destination_waits_and_goes_on_when_resumed(client: Client, connect: Connect) -> None:
    listener = connect()
    listener.rows("listen orchestrator_due")
    ids = client.schedule_many(3, destination=API)
    heard(listener)
    answer = act(client, "pause_destination", "https://API.example/hook")
    lane = client.value("select lane from orchestrator.lane where name = 'api.example'")
    shared = client.value("select hashtextextended('api.example', 0) & 63")
    assert set(heard(listener)) == {f"hold {lane}", f"hold {shared}"}, "dispatchers may know its events by either"
    assert (answer.name, answer.paused_at, answer.in_flight, answer.waiting) == ("api.example", NOON, 0, 3)
    assert client.claim_on() == []
    client.at(NOON + seconds(60))
    answer = act(client, "resume_destination", "api.example")
    assert heard(listener) == [str((NOON + seconds(60)).timestamp()) + "00000"]
    assert (answer.resumed, answer.paused_at, answer.waiting) == (True, None, 3)
    assert answer.note == f"it was paused since {NOON.isoformat()}"
    assert {lease.event_id for lease in client.claim_on()} == set(ids)


def test_a_second_pause_keeps_the_time_of_the_first(client: Client) -> None:
    act(client, "pause_destination", "api.example")
    client.at(NOON + seconds(60))
    answer = act(client, "pause_destination", "api.example")
    assert answer.paused_at == NOON
    assert "it was paused before" in answer.note
    assert act(client, "resume_destination", "api.example").resumed
    again = act(client, "resume_destination", "api.example")
    assert (again.resumed, again.note) == (False, "it was not paused")
    ends = client.rows("select last_paused_at, resumed_at from orchestrator.lane where name is not null")
    assert ends == [(NOON, NOON + seconds(60))]


def test_a_pause_leaves_attempts_under_way_alone(client: Client) -> None:
    uid = client.schedule(destination=API)
    leases = client.claim()
    configure(client)
    act(client, "pause_destination", "api.example")
    assert client.finish(results(leases)) == []
    assert client.status(uid) == "delivered"


def test_a_pause_survives_other_changes_of_the_configuration(client: Client) -> None:
    act(client, "pause_destination", "api.example")
    configure(client, rate_per_second=5)
    client.schedule(destination=API)
    assert client.claim_on() == []


def test_a_host_paused_out_of_a_pattern_keeps_the_pattern_s_limits(client: Client) -> None:
    configure(client, "*.example", **OTHERS)
    note = act(client, "pause_destination", "api.example").note
    assert "it was part of *.example, and has its settings as its own now" in note
    act(client, "resume_destination", "api.example")
    assert settings_of(configure(client)) == OTHERS
    client.schedule_many(20, destination=API, spread_seconds=0.001)
    assert len(client.at(NOON + seconds(1)).claim_on()) == OTHERS["max_parallel"]


def test_resuming_or_closing_an_unknown_destination_returns_no_row(client: Client) -> None:
    assert act(client, "resume_destination", "none.example") is None
    assert act(client, "close_breaker", "none.example") is None
    assert client.rows("select * from orchestrator.destinations") == []


def test_all_deliveries_can_be_paused_and_resumed(client: Client, connect: Connect) -> None:
    listener = connect()
    listener.rows("listen orchestrator_due")
    act(client, "pause_destination", "api.example")
    heard(listener)
    client.schedule_many(2, destination=API)
    client.schedule_many(3)
    client.claim(1)
    heard(listener)
    answer = act(client, "pause_all")
    assert (answer.paused_at, answer.in_flight) == (NOON, 1)
    assert heard(listener) == ["hold *"]
    assert client.claim_on() == []
    client.at(NOON + seconds(9))
    assert "it was paused before" in act(client, "pause_all").note
    assert client.schedule()
    assert "everything is paused" in act(client, "resume_destination", "api.example").note
    act(client, "pause_destination", "api.example")
    answer = act(client, "resume_all")
    assert (answer.paused_at, answer.resumed, answer.destinations_paused) == (None, True, 1)
    assert "destinations that were paused by themselves still are" in answer.note
    assert len(client.claim_on()) == 3
    assert act(client, "resume_all").resumed is False
    ends = client.rows("select last_paused_at, resumed_at from orchestrator.control")
    assert ends == [(NOON, NOON + seconds(9))]


# Breakers


def test_a_breaker_is_closed_by_hand(client: Client) -> None:
    client.schedule_many(30, destination=API)
    leases, moment = client.claim(20), NOON.timestamp()
    client.finish(results(leases, "retry", status_code=503, started_at=moment, finished_at=moment))
    [row] = client.rows("select state, next_try_at, configured from orchestrator.destinations")
    assert row == ("breaker_open", NOON + seconds(5), False)
    assert client.claim_on() == []
    answer = act(client, "close_breaker", "api.example")
    assert (answer.closed, answer.waiting) == (True, 30)
    assert "it opens again when attempts go on failing" in answer.note
    assert client.value("select state from orchestrator.destinations") == "ok"
    assert len(client.claim_on()) == 10
    assert act(client, "close_breaker", "api.example").note == "it was closed"


# Asking


class Shown(NamedTuple):
    state: str
    in_flight: int
    due: int


def shown(client: Client, name: str = "api.example") -> Shown:
    [row] = client.rows("select state, in_flight, due from orchestrator.destinations where name = %s", name)
    return Shown(*row)


def test_the_view_counts_events_that_are_due_and_in_flight(client: Client) -> None:
    configure(client, max_parallel=3)
    client.schedule_many(10, destination=API)
    client.schedule_many(5, destination=API, scheduled_at=NOON + timedelta(hours=1))
    assert shown(client) == ("ok", 0, 10)
    client.claim_on()
    assert shown(client) == ("held_by_parallel", 3, 7)
    configure(client, clear=["max_parallel"], rate_per_second=1)
    client.claim_on()
    assert shown(client) == ("held_by_rate", 4, 6)
    client.at(NOON + seconds(3600))
    assert shown(client).in_flight == 0


def test_one_destination_is_found_by_any_of_its_names(client: Client) -> None:
    configure(client, **OTHERS)
    found = client.value("select orchestrator.get_destination('https://API.example:443/x')")
    assert found == {
        "name": "api.example",
        "configured": True,
        "state": "ok",
        **{key: value for key, value in OTHERS.items() if not isinstance(value, timedelta)},
        **{f"{key}_seconds": value.total_seconds() for key, value in OTHERS.items() if isinstance(value, timedelta)},
        "paused_at": None,
        "breaker": "closed",
        "opened_at": None,
        "next_try_at": None,
        "failures": 0,
        "held_by": None,
        "parallel_now": None,
        "in_flight": 0,
        "due": 0,
        "changed_at": NOON.isoformat(),
    }
    assert client.value("select orchestrator.get_destination('none.example')") is None


@pytest.mark.parametrize("size", [1, 2, 100])
def test_pages_show_each_destination_once_by_name(client: Client, size: int) -> None:
    names = ["*.example", "a.example", "b.example", "kafka:", "kafka:orders", "[::1]:8080", "zz.example"]
    for name in names:
        configure(client, name)
    seen: list[str] = []
    after = None
    while page := client.column("select orchestrator.list_destinations(%s, %s) ->> 'name'", size, after):
        assert len(page) <= size
        seen += page
        after = page[-1]
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize(
    ("name", "governing"),
    [
        ("api.example", "api.example"),
        ("https://web.example/x", "*.example"),
        ("*.example", "*.example"),
        ("kafka:orders", None),
        ("other.org", None),
    ],
)
def test_the_destination_whose_limits_govern_a_name_can_be_asked_for(
    client: Client, name: str, governing: str | None
) -> None:
    configure(client, "*.example")
    configure(client, "api.example")
    assert client.value("select orchestrator.destination_for(%s)", name) == governing


def test_destinations_that_stand_still_are_counted(client: Client) -> None:
    query = "select * from orchestrator.standstills()"
    assert client.rows(query) == [(None, 0, 0)]
    for name in ("a.example", "b.example", "*.org"):
        act(client, "pause_destination", name)
    configure(client, "c.example")
    client.rows("update orchestrator.lane set breaker = 'open' where name in ('c.example', 'a.example')")
    act(client, "pause_all")
    assert client.rows(query) == [(NOON, 3, 2)]
    statistics = client.statistics()
    assert (statistics["paused_at"], statistics["destinations_paused"], statistics["breakers_open"]) == (
        NOON.isoformat(),
        3,
        2,
    )


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_step_of_the_clock_harms_no_pause(client: Client, hours: int) -> None:
    client.schedule_many(2, destination=API)
    act(client, "pause_destination", "api.example")
    act(client, "pause_all")
    client.at(NOON + timedelta(hours=hours))
    assert client.claim_on() == []
    act(client, "resume_all")
    assert client.claim_on() == []
    act(client, "resume_destination", "api.example")
    client.at(max(NOON, NOON + timedelta(hours=hours)))
    assert len(client.claim_on()) == 2
