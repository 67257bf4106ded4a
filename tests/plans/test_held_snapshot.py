"""While another session holds a snapshot, no call reads more for each event that has ended since."""

from __future__ import annotations

from datetime import timedelta
from itertools import cycle, islice
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.support.databases import Databases
from tests.support.sql_client import NOON, Client, event, results

ROUNDS = 150
EVENTS = 20
FLOWS = ["shared lane", "dedicated lane with a bound", "priorities"]
SUBMIT_BATCH = """select * from orchestrator.submit_batch(
  array[orchestrator.random_event_id(orchestrator.now())], array[orchestrator.now()], '{3}', '{1}', '{tests}', '{HTTP}'
, '{https://receiver.example/hook}', '{null}', array['1'::json])"""
CALLS = {
    "submit": "select * from orchestrator.submit_events(%(events)s)",
    "submit directly": "select orchestrator.open_direct()",
    "submit in one call": SUBMIT_BATCH,
    "claim": "select * from orchestrator.claim_due_events(100)",
    "next due": "select orchestrator.next_due_at()",
    "next lease end": "select orchestrator.next_lease_end()",
    "backlog": "select orchestrator.backlog()",
}


class Flow:
    """Events of one destination that are due at once and delivered, a round a second."""

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.clock = client.at(NOON), NOON
        self.priorities = [0, 1, 2] if name == "priorities" else [0]
        if name == "dedicated lane with a bound":
            client.rows("select orchestrator.configure_destination('receiver.example', p_max_parallel => 1000)")
            while client.value("select rerouted_by from orchestrator.control") is not None:
                client.rows("select orchestrator.run_maintenance()")

    def tick(self) -> list[dict[str, Any]]:
        """Goes on by a second; returns events that are due by then."""
        self.clock += timedelta(seconds=1)
        self.client.at(self.clock)
        given = islice(cycle(self.priorities), EVENTS)
        return [event(scheduled_at=self.clock.isoformat(), priority=priority) for priority in given]

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.client.submit(*self.tick())
            leases = self.client.claim_on()
            assert len(leases) == EVENTS
            assert self.client.finish(results(leases)) == []
            self.client.rows("select orchestrator.raise_floors()")

    def pages(self) -> dict[str, int]:
        """How many pages each call reads, while some events are under way and others due."""
        return {name: self._pages(call) for name, call in CALLS.items()}

    def _pages(self, call: str) -> int:
        with psycopg.ClientCursor(self.client.connection) as cursor:
            cursor.execute("begin")
            cursor.execute("select orchestrator.submit_events(%s)", (Jsonb(self.tick()),))
            cursor.execute("select orchestrator.claim_due_events(%s)", (EVENTS // 2,))
            events = Jsonb(self.tick())
            cursor.execute(f"explain (analyze, buffers, format json) {call}", {"events": events})
            [[[document]]] = cursor.fetchall()
            cursor.execute("rollback")
        plan = document["Plan"]
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("name", FLOWS)
def test_calls_read_no_more_for_what_has_ended_since_a_snapshot_was_taken(databases: Databases, name: str) -> None:
    with databases.migrated() as url, Client(url) as holding, Client(url) as client:
        flow = Flow(client, name)
        flow.run(5)
        flow.pages()  # plans are made
        holding.rows("begin isolation level repeatable read")
        holding.rows("select from orchestrator.control")
        flow.run(ROUNDS)
        few = flow.pages()
        flow.run(2 * ROUNDS)
        many = flow.pages()
    grown = {call: (few[call], many[call]) for call in CALLS if many[call] > 1.2 * few[call] + 20}
    assert not grown, "pages read after a few rounds, and after many"
