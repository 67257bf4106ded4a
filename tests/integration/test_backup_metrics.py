"""The metrics of backups, as a process that serves the API tells them."""

from __future__ import annotations

import math
import re

import httpx

from tests.support.sql_client import Client


async def test_the_age_and_the_failures_of_backups_are_metrics(api: httpx.AsyncClient, client: Client) -> None:
    began, ended = "2026-11-20 12:00:00+00", "2026-11-20 12:10:00+00"
    client.rows("select orchestrator.record_backup('logical', %s, %s)", began, ended)
    client.rows("select orchestrator.record_backup('base', %s, %s)", began, ended)
    client.rows("select orchestrator.record_backup('base', now(), now(), p_problem => 'the disk is full')")
    text = (await api.get("/metrics")).text
    found = {
        (name, kind): float(value)
        for name, kind, value in re.findall(r'^orchestrator_backup_(\w+)\{.*kind="(\w+)".*\} (\S+)$', text, re.M)
    }
    ended_s = client.value("select extract(epoch from %s::timestamptz)::float8", ended)
    assert found["last_success_timestamp_seconds", "logical"] == ended_s
    assert found["last_success_timestamp_seconds", "base"] == ended_s
    assert math.isnan(found["last_success_timestamp_seconds", "verify"])
    assert ("last_success_timestamp_seconds", "wal") in found
    assert {kind: found["failing", kind] for kind in ("logical", "base", "verify", "wal")} == {
        "logical": 0, "base": 1, "verify": 0, "wal": 0,
    }  # fmt: skip
