"""/metrics while the database answers, refuses, hangs and comes back: a number, or none; never an old one."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.api.routes.database_gauges import DatabaseGauges, Reading
from orchestrator.database import Database
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import until
from tests.support.cutting_proxy import CuttingProxy
from tests.support.sql_client import Client

SHARED = {
    "orchestrator_due_oldest_age_seconds",
    "orchestrator_xmin_horizon_age_seconds",
    "orchestrator_xmin_horizon_age_transactions",
    "orchestrator_timer_rows",
    "orchestrator_timer_bytes",
    "orchestrator_database_size_bytes",
    "orchestrator_database_connections",
    "orchestrator_database_connections_max",
    "orchestrator_paused",
    "orchestrator_lock_holders",
    "orchestrator_partition_days_ahead",
    "orchestrator_dead_letters",
}


def shown(metrics: Metrics) -> dict[str, list[float]]:
    text, _ = metrics.exposition()
    return {
        family.name: [sample.value for sample in family.samples]
        for family in text_string_to_metric_families(text.decode())
    }


async def test_the_gauges_of_a_database_that_goes_away_are_unknown_and_come_back(
    database_url: str, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reading, "is_old", True)  # ask each time
    async with CuttingProxy(database_url) as proxy:
        chosen = settings(DATABASE_URL=proxy.url, DB_POOL_MIN_IDLE="0")
        metrics = Metrics(chosen)
        async with Database(chosen, role="api") as database:
            gauges = DatabaseGauges(database, metrics)
            await gauges.refresh()
            found = shown(metrics)
            assert found["orchestrator_database_up"] == [1]
            assert not [name for name in SHARED if any(map(math.isnan, found[name]))]
            assert found["orchestrator_events_due_soon"] == [0, 0, 0]

            proxy.cut_at("standstills")

            async def is_away() -> bool:
                await gauges.refresh()
                return shown(metrics)["orchestrator_database_up"] == [0]

            await until(is_away, 60.0)
            found = shown(metrics)
            assert [name for name in SHARED if not all(map(math.isnan, found[name]))] == []
            assert found["orchestrator_events_due_soon"] == []

            proxy.mend()
            await until(lambda: _is_back(gauges, metrics), 60.0)
            found = shown(metrics)
            assert not [name for name in SHARED if any(map(math.isnan, found[name]))]


async def _is_back(gauges: DatabaseGauges, metrics: Metrics) -> bool:
    await gauges.refresh()
    return shown(metrics)["orchestrator_database_up"] == [1]


async def test_what_one_login_may_not_ask_leaves_the_other_gauges_alone(database_url: str) -> None:
    with Client(database_url) as client:
        client.rows("drop function orchestrator.vital_signs() cascade")
    chosen = Settings.from_env({"DATABASE_URL": database_url})
    metrics = Metrics(chosen)
    async with Database(chosen, role="api") as database:
        await DatabaseGauges(database, metrics).refresh()
    found = shown(metrics)
    assert found["orchestrator_database_up"] == [1]
    assert math.isnan(found["orchestrator_due_oldest_age_seconds"][0])
    assert found["orchestrator_paused"] == [0]
