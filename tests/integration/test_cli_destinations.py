"""The commands about destinations, pauses and the forecast, and the story of an event that was held back."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.doctor import diagnose
from tests.integration.cli_support import Call, answer, refused, told
from tests.support.sql_client import Client, results

API = "https://api.example/hook"


def submit(client: Client, count: int = 1, destination: str = API, *, after_s: float = 0, **more: Any) -> list[str]:
    """Accepts events due so many seconds from now, or before."""
    at = datetime.now(UTC) + timedelta(seconds=after_s)
    return client.schedule_many(count, destination=destination, scheduled_at=at, **more)


# destinations


def test_every_setting_is_set_by_an_option_and_shown(call: Call) -> None:
    options = [
        *("--rate", "12.5", "--burst", "7", "--max-parallel", "3", "--adaptive", "--timeout", "2.5"),
        *("--retry-policy", "default", "--signing-secret", "acme", "--secret-header", "Authorization: acme-token"),
        *("--secret-header", "x-tenant:acme_tenant", "--spread", "90", "--breaker-failures", "4"),
        *("--breaker-ratio", "0.25", "--breaker-minimum", "6", "--breaker-window", "10"),
        *("--breaker-cooldown", "1", "--breaker-max-cooldown", "60"),
    ]
    set_to = answer(call("destinations", "set", "https://API.example/hook", *options, "--json"))
    found = answer(call("destinations", "show", "api.example", "--json"))
    assert set_to["destination"] == found
    assert (
        found.items()
        >= {
            "name": "api.example",
            "rate_per_second": 12.5,
            "burst": 7,
            "max_parallel": 3,
            "adaptive": True,
            "timeout_seconds": 2.5,
            "retry_policy": "default",
            "signing_secret": "acme",
            "secret_headers": {"authorization": "acme-token", "x-tenant": "acme_tenant"},
            "spread_seconds": 90,
            "breaker_failures": 4,
            "breaker_ratio": 0.25,
            "breaker_minimum": 6,
            "breaker_window_seconds": 10,
            "breaker_cooldown_seconds": 1,
            "breaker_max_cooldown_seconds": 60,
        }.items()
    )
    shown = told(call("destinations", "show", "api.example"))
    for text in ("12.5 a second, in bursts of up to 7", "3 of 3", "acme-token", "4 failures in a row, or 25% of at"):
        assert text in shown
    again = answer(call("destinations", "set", "api.example", "--fixed", "--json"))["destination"]
    assert again == found | {"adaptive": False, "changed_at": again["changed_at"]}
    cleared = ["rate", "burst", "max-parallel", "timeout", "retry-policy", "signing-secret", "secret-header", "spread"]
    cleared += [f"breaker-{name}" for name in ("failures", "ratio", "minimum", "window", "cooldown", "max-cooldown")]
    told(call("destinations", "set", "api.example", *[part for name in cleared for part in ("--clear", name)]))
    shown = told(call("destinations", "show", "api.example"))
    for text in ("no limit", "no bound", "10 failures in a row, or 50% of at least 20 attempts in 30.0 s"):
        assert text in shown


def test_destinations_set_says_how_many_events_wait_and_which_patterns_overlap(call: Call, client: Client) -> None:
    submit(client, 3, after_s=600)
    told(call("destinations", "set", "*.example", "--rate", "5"))
    shown = told(call("destinations", "set", API, "--rate", "5"))
    assert "3 events wait for it: it holds from the next claim on" in shown
    assert "paths have no limits of their own" in shown
    assert "! *.example gives way: an exact name goes first" in shown


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rate", "0"], "--rate: expected more than 0 and at most 100000, got 0"),
        (["--rate", "nan"], "--rate: expected more than 0 and at most 100000, got NaN"),
        (["--burst", "0"], "--burst: expected 1 to 1000000, got 0"),
        (["--burst", "99999999999"], "--burst: expected a smaller number, got 99999999999"),
        (["--timeout", "inf"], "--timeout: expected seconds, got inf"),
        (["--timeout", "601"], "--timeout: expected 0.1 s to 10 min"),
        (["--adaptive"], "--adaptive: expected max_parallel with it"),
        (["--secret-header", "host: a"], "--secret-header: expected no host header"),
        (["--rate", "5", "--clear", "rate"], "--rate: given, and in p_clear"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_the_name_of_its_option(call: Call, options: list[str], complaint: str) -> None:
    assert refused(call("destinations", "set", "api.example", *options)).startswith(complaint)
    assert answer(call("destinations", "list", "--json")) == []


def test_a_header_without_a_colon_is_refused_without_repeating_it(call: Call) -> None:
    complaint = refused(call("destinations", "set", "api.example", "--secret-header", "hunter2"), 2)
    assert "expected 'Header: name of a secret'" in complaint
    assert "hunter2" not in complaint


@pytest.mark.parametrize("command", ["show", "resume", "close-breaker", "delete"])
def test_an_unknown_destination_is_named_with_the_pattern_that_holds_instead(call: Call, command: str) -> None:
    assert "there is no destination 'api.example'; orchestrator destinations list" in refused(
        call("destinations", command, "api.example")
    )
    told(call("destinations", "set", "*.example"))
    assert "there is no destination 'api.example'; the limits of *.example hold for it" in refused(
        call("destinations", command, "api.example")
    )
    assert "pauses everything" in refused(call("destinations", command, "*"))


def test_destinations_are_listed_by_page(call: Call, client: Client) -> None:
    assert told(call("destinations", "list")) == "No destination is configured.\n"
    for name in ("a.example", "b.example", "c.example"):
        told(call("destinations", "set", name, "--rate", "5", "--burst", "2", "--max-parallel", "4"))
    client.value("select orchestrator.ensure_dedicated_lane('d.example', false)")
    page = answer(call("destinations", "list", "--limit", "2", "--json"))
    assert [each["name"] for each in page] == ["a.example", "b.example"]
    shown = told(call("destinations", "list", "--limit", "2"))
    assert re.search(r"a\.example +ok +5 +2 +4 +0 +0", shown)
    assert "There are more: --after b.example" in shown
    shown = told(call("destinations", "list", "--after", "b.example"))
    assert "a.example" not in shown
    assert re.search(r"d\.example +ok +0 +0 +not configured: attempts failed", shown)


def test_a_paused_destination_waits_until_it_is_resumed(call: Call, client: Client) -> None:
    submit(client, 2)
    paused = told(call("destinations", "pause", API))
    assert "api.example is paused; 2 events wait for it: no attempt begins until it is resumed" in paused
    assert client.claim_on() == []
    assert re.search(r"api\.example +paused", told(call("destinations", "list")))
    assert re.search(r"paused +1  destinations, until they are resumed", told(call("stats")))
    assert "api.example is not paused; 2 events wait for it: it was paused" in told(
        call("destinations", "resume", "api.example")
    )
    assert len(client.claim_on()) == 2
    assert answer(call("destinations", "resume", "api.example", "--json"))["resumed"] is False


def test_all_deliveries_are_paused_and_resumed_by_command(call: Call, client: Client) -> None:
    submit(client)
    assert told(call("pause")).startswith("Everything is paused, with 0 in flight: no attempt begins anywhere")
    assert client.claim_on() == []
    assert re.search(r"paused +all +since", told(call("stats")))
    assert answer(call("pause", "--json"))["paused_at"] == answer(call("stats", "--json"))["paused_at"]
    assert told(call("resume")).startswith("Everything is resumed: it was paused since")
    assert len(client.claim_on()) == 1
    assert answer(call("resume", "--json"))["resumed"] is False


def open_breaker(client: Client) -> None:
    submit(client, 20)
    moment = datetime.now(UTC).timestamp()
    client.finish(results(client.claim(), "retry", status_code=503, started_at=moment, finished_at=moment))
    assert client.value("select breaker from orchestrator.destinations") == "open"


def test_a_breaker_is_shown_and_closed(call: Call, client: Client) -> None:
    open_breaker(client)
    shown = told(call("destinations", "show", "api.example"))
    assert re.search(r"breaker +open since .*, next trial .* \(in", shown)
    assert "for its breaker, because attempts failed" in shown
    assert re.search(r"breakers open +1 ", told(call("stats")))
    assert "api.example has its breaker closed" in told(call("destinations", "close-breaker", "api.example"))
    assert answer(call("destinations", "close-breaker", "api.example", "--json"))["closed"] is False


def test_a_deleted_destination_has_no_limits_any_more(call: Call, client: Client) -> None:
    told(call("destinations", "set", "api.example", "--rate", "0.01"))
    submit(client, 3)
    assert len(client.claim_on()) == 1
    shown = told(call("destinations", "delete", "api.example"))
    assert "api.example is no longer configured; 2 events wait for it: what waits moves to shared lanes" in shown
    assert len(client.claim_on()) == 2


def test_destination_names_cannot_drive_the_terminal(call: Call, client: Client) -> None:
    client.rows(
        "insert into orchestrator.destination (name, configured, changed_at) values (%s, true, now())", "[red]x"
    )
    client.rows("insert into orchestrator.lane (lane, name) values (64, '[red]x')")
    assert "[red]x" in told(call("destinations", "list"))


# forecast


def test_the_forecast_draws_the_herd_against_each_rate(call: Call, client: Client) -> None:
    told(call("destinations", "set", "api.example", "--rate", "2"))
    submit(client, 900, after_s=600)
    submit(client, 50, "https://free.example/", after_s=1200)
    shown = told(call("forecast"))
    assert "950 events due within 60 min" in shown
    assert re.search(r"most at \d\d:\d\d: 900 in 60\.0 s\. 780 will be late\.", shown)
    assert re.search(r"api\.example +2/s", shown)
    herd = r"900 events due, most at .*; 780 late, of those due from .* to .*, by up to 6 min; at most 780 wait"
    assert re.search(rf"{herd}; drained at (\d+ \w+ )?\d\d:\d\d", " ".join(shown.split()))
    assert all(mark in shown for mark in ("█", "┄", "waiting"))
    assert re.search(r"free\.example +50 +", shown)
    assert max(map(len, shown.splitlines())) <= 160


def test_the_forecast_of_one_destination_leaves_out_the_others(call: Call, client: Client) -> None:
    told(call("destinations", "set", "*.example", "--rate", "2"))
    submit(client, 5, after_s=60)
    submit(client, 7, "https://other.org/", after_s=60)
    found = answer(call("forecast", "--minutes", "10", "--destination", API, "--json"))
    assert [(each["name"], each["due"]) for each in found["destinations"]] == [("*.example", 5)]
    assert found["bucket_seconds"] == 10
    shown = told(call("forecast", "--minutes", "10", "--destination", API))
    assert "5 events due within 10 min" in shown
    assert "None will be late." in shown
    assert "other.org" not in shown


def test_the_forecast_names_destinations_that_stand_still(call: Call, client: Client) -> None:
    submit(client, 5, after_s=60)
    told(call("destinations", "pause", "api.example"))
    shown = told(call("forecast"))
    assert "5 will be late." in shown
    assert "wait until it is resumed" in shown
    told(call("pause"))
    assert "Everything is paused: no delivery begins until orchestrator resume." in told(call("forecast"))


def test_an_empty_forecast_is_one_line(call: Call) -> None:
    assert told(call("forecast", "--hours", "2.5")) == "No event is due within 2.5 h.\n"


@pytest.mark.parametrize("hours", ["0.01", "1", "24", "168"])
def test_the_forecast_fits_its_buckets_to_how_far_it_looks(call: Call, client: Client, hours: str) -> None:
    submit(client, 3, after_s=5)
    found = answer(call("forecast", "--hours", hours, "--json"))
    assert found["due"] == 3
    assert float(hours) * 3600 / found["bucket_seconds"] <= 96
    assert max(map(len, told(call("forecast", "--hours", hours)).splitlines())) <= 160


@pytest.mark.parametrize(
    ("options", "exit_code", "complaint"),
    [
        (["--hours", "1", "--minutes", "5"], 2, "--hours and --minutes: give one of them"),
        (["--hours", "0"], 1, "until: expected more than 0 and at most 7 days"),
        (["--hours", "nan"], 1, "until: expected seconds, got nan"),
        (["--hours", "169"], 1, "until: expected more than 0 and at most 7 days"),
        (["--bucket", "0"], 1, "bucket: expected 1 s to 1 day"),
        (["--hours", "168", "--bucket", "1"], 1, "bucket: expected at most 10080 of them"),
        (["--destination", "a/b"], 1, "name: expected a host such as"),
    ],
    ids=str,
)
def test_a_forecast_with_wrong_options_is_refused(
    call: Call, options: list[str], exit_code: int, complaint: str
) -> None:
    assert refused(call("forecast", *options), exit_code).startswith(complaint)


# get


def test_the_story_of_an_event_says_why_it_waited(call: Call, client: Client) -> None:
    [uid] = submit(client, after_s=-5, spread_seconds=0.5)
    [lease] = client.claim()
    moment = datetime.now(UTC).timestamp()
    client.rows(
        """select * from orchestrator.finish_events(array[%s::uuid], array[1], array['retry'], array[503],
          array[%s::float8], array[%s::float8], array['HTTP 503'], p_claimed_at => array[%s::float8],
          p_waited => array['{"rate": 1500, "pause": 60000}'])""",
        lease.event_id,
        moment + 0.1,
        moment + 0.35,
        moment,
    )
    shown = told(call("get", uid))
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    steps = ("attempt 1 retried", "attempt 1", "attempt 2 due", "accepted", "due", "claimed")
    row = re.compile(rf"20\S+ \S+Z(?: \(in [^)]*\))?(?: \+\S+ \S+)? ({'|'.join(steps)})")
    found_steps = [found[1] for found in map(row.match, lines) if found]
    assert found_steps[:3] == ["accepted", "due", "claimed"]
    assert found_steps[-3:] == ["attempt 1", "attempt 1 retried", "attempt 2 due"]
    assert set(found_steps) == set(steps)
    assert "spread: " in shown
    assert "waited 60.0 s for the end of a pause, waited 1.5 s for the rate of its destination" in " ".join(lines)
    assert re.search(r"\+250 ms +attempt 1 retried +HTTP 503", shown)
    found = answer(call("get", uid, "--json"))
    assert found["outcomes"][0]["waited"] == {"rate": 1500, "pause": 60000}
    assert found["outcomes"][0]["claimed_at"] < found["outcomes"][0]["started_at"]
    assert 0 < found["spread_ms"] < 500


def story(call: Call, uid: str) -> str:
    """The story in one line, however it was folded."""
    return " ".join(told(call("get", uid)).split())


def test_the_story_says_why_an_event_waits_now(call: Call, client: Client) -> None:
    [uid] = submit(client)
    assert "attempt 1 due" in story(call, uid)
    told(call("destinations", "pause", "api.example"))
    assert "api.example is paused since" in story(call, uid)
    told(call("pause"))
    assert "everything is paused since" in story(call, uid)
    told(call("resume"))
    told(call("destinations", "resume", "api.example"))
    told(call("destinations", "set", "api.example", "--rate", "0.01"))
    [second] = submit(client)
    assert len(client.claim_on()) == 1
    assert len(client.claim_on()) == 0
    held = second if client.status(uid) == "in_flight" else uid
    assert "waits for the rate of api.example, 0.01 a second" in story(call, held)


def test_the_story_says_which_event_goes_before(call: Call, client: Client) -> None:
    [first] = submit(client, after_s=-2, ordering_key="k")
    [second] = submit(client, after_s=-1, ordering_key="k")
    assert [lease.event_id for lease in client.claim_on()] == [first]
    assert f"waits for event {first}, which has its ordering key and comes first" in story(call, second)
    assert answer(call("get", second, "--json"))["waits_for"] == first


def test_the_story_says_that_a_breaker_is_open(call: Call, client: Client) -> None:
    open_breaker(client)
    uid = client.value("select event_id::text from orchestrator.timer limit 1")
    assert "the breaker of api.example is open, next try" in story(call, uid)


# doctor


@pytest.fixture
def diagnosed(environ: Callable[..., dict[str, str]]) -> Callable[[], dict[str, tuple[str, str]]]:
    """Check → level and text of what doctor found there last."""

    def run() -> dict[str, tuple[str, str]]:
        return {finding.check: (finding.level, f"{finding.what} → {finding.mend}") for finding in diagnose(environ())}

    return run


def test_doctor_names_destinations_that_stand_still(
    call: Call, client: Client, diagnosed: Callable[[], dict[str, tuple[str, str]]]
) -> None:
    found = diagnosed()
    assert {found[check][0] for check in ("pauses", "breakers", "rates")} == {"ok"}
    open_breaker(client)
    told(call("destinations", "pause", "other.example"))
    told(call("destinations", "set", "slow.example", "--rate", "0.01"))
    submit(client, 50, "https://slow.example/", after_s=-1)
    found = diagnosed()
    assert "1 destination paused: other.example since" in found["pauses"][1]
    assert "orchestrator destinations resume NAME" in found["pauses"][1]
    assert "open for 1 destination, because attempts fail: api.example since" in found["breakers"][1]
    assert "slow.example (49 events at 0.01 a second)" in found["rates"][1]
    told(call("pause"))
    client.rows("update orchestrator.timer set due_at = due_at - interval '1 hour'")
    found = diagnosed()
    assert found["backlog"][0] == "warning"
    assert "everything is paused; to continue: orchestrator resume" in found["backlog"][1]
