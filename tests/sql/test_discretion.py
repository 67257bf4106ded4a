"""What SQL refuses, it refuses without quoting what may hold a secret."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.support.sql_client import Client, event

CANARY = "canary-5ecret"
CHANGES: list[dict[str, Any]] = [
    {"destination": f"https://user:{CANARY}@example.com/"},
    {"destination": f"ftp://user:{CANARY}@example.com/"},
    {"destination": f"user:{CANARY}@example.com"},
    {"destination": f"/hook?token={CANARY}"},
    {"destination": f"user:{CANARY}@broker", "delivery_type": "KAFKA"},
    {"destination": f"__x?token={CANARY}", "delivery_type": "KAFKA"},
    {"destination": {"url": CANARY}},
    {"delivery_type": f"https://user:{CANARY}@example.com/"},
    {"headers": [f"authorization: {CANARY}"]},
    {"headers": f"authorization: {CANARY}"},
    {"headers": {"authorization": [CANARY]}},
    {"headers": {"authorization": f"{CANARY}\n"}},
    {"headers": {"authorization": CANARY * 500}},
    {"headers": {f"authorization: {CANARY}": "1"}},
    {"headers": {f"authorization: {CANARY}": 1}},
    {"max_retries": {CANARY: 1}},
    {"priority": [CANARY]},
    {"spread_seconds": {"x": CANARY}},
    {"scheduled_at": f"https://user:{CANARY}@example.com/"},
    {"retry_policy": f"https://user:{CANARY}@example.com/"},
    {"header": {"authorization": CANARY}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change)[:60])
def test_a_refused_submission_quotes_no_secret(client: Client, change: dict[str, Any]) -> None:
    good, bad = sorted(client.submit(event(), event(**change)), key=lambda answer: answer.n)
    assert (good.result, bad.result) == ("accepted", "refused")
    assert CANARY not in str(bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p_name", f"https://user:{CANARY}@example.com/"),
        ("p_name", f"ftp://user:{CANARY}@example.com/"),
        ("p_name", f"example.com/hook?token={CANARY}"),
        ("p_signing_secret", f"whsec_{CANARY}"),
        ("p_secret_headers", f'{{"authorization": "Bearer {CANARY}"}}'),
        ("p_secret_headers", f'["{CANARY}"]'),
    ],
)
def test_a_refused_destination_quotes_no_secret(client: Client, name: str, value: str) -> None:
    arguments = {"p_name": "example.com", name: value}
    call = ", ".join(f"{argument} => %({argument})s" for argument in arguments)
    with pytest.raises(psycopg.DataError) as caught:
        client.connection.execute(f"select orchestrator.configure_destination({call})", arguments)
    assert CANARY not in (caught.value.diag.message_primary or "")


def test_a_list_of_settings_to_clear_has_a_bound(client: Client) -> None:
    with pytest.raises(psycopg.DataError, match="p_clear: expected names of settings, got 1000000 of them"):
        client.rows(
            "select orchestrator.configure_destination('a.example', p_clear => array_fill('burst'::text, '{1000000}'))"
        )
