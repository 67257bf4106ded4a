"""A dispatcher knows of leases that ran out without a result."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from orchestrator.database.leases import Leases
from tests.conftest import MakeSettings
from tests.integration.api_support import until
from tests.support.sql_client import Client


async def test_a_claim_tells_a_dispatcher_how_many_leases_had_run_out(
    database_url: str, settings: MakeSettings
) -> None:
    with Client(database_url) as client:
        client.schedule_many(3, scheduled_at=datetime.now(UTC) - timedelta(seconds=5))
    async with Leases.open(settings(), "worker", None) as leases:
        first = await leases.claim(10, lease_s=0.01, lookahead_s=0.0)
        assert (len(first.events), first.expired) == (3, 0)
        again = []

        async def are_claimed_again() -> bool:
            again.append(await leases.claim(10, lease_s=60.0, lookahead_s=0.0))
            return sum(len(claims.events) for claims in again) == 3

        await until(are_claimed_again)
        assert sum(claims.expired for claims in again) == 3
        assert [event.attempt for claims in again for event in claims.events] == [2, 2, 2]
