"""How little an idle deployment asks of its database: statements that each role sends while there is nothing to do."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter

import psycopg

from orchestrator.dev.postgres import EmbeddedPostgres
from tests.conftest import Spawn
from tests.support.brokers import Kafka
from tests.support.waiting import eventually

QUIET_S = 2.0
COUNTED_S = 12.0
MOST_PER_S = 0.2

STATEMENT = re.compile(r"^by (orchestrator [a-z]+): LOG:  (?:statement|execute [^:]*): (.*)$", re.MULTILINE)


class Statements:
    """The statements in a server's log, by who sent them, from the time this is made."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._log_file = server.log_file
        self._begins_at = self._log_file.stat().st_size

    def __call__(self) -> list[tuple[str, str]]:
        text = self._log_file.read_bytes()[self._begins_at :].decode(errors="replace")
        return STATEMENT.findall(text)


async def test_idle_roles_send_at_most_one_statement_in_five_seconds(
    postgres_server: EmbeddedPostgres, kafka: Kafka, spawn: Spawn
) -> None:
    url = postgres_server.url("orchestrator")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("alter system set log_statement = 'all'")
        connection.execute("alter system set log_line_prefix = 'by %a: '")
        connection.execute("select pg_reload_conf()")
    ours = {**kafka.environ, "DATABASE_URL": url, "CUSTOMER": kafka.unique("idle"), "KAFKA_PARTITIONS": "2"}
    assert await spawn("topics", "create", **ours).wait() == 0
    seen = Statements(postgres_server)
    roles = [spawn(role, ALLOW_ANONYMOUS="true", **ours) for role in ("api", "ingest", "dispatch", "maintain")]
    for role in roles:
        await role.wait_for_log("ready")
    await eventually(lambda: {"orchestrator ingest", "orchestrator outbox"} <= {by for by, _ in seen()})
    counted, quiet_since = -1, time.monotonic()

    def is_quiet() -> bool:
        nonlocal counted, quiet_since
        count = sum(by != "orchestrator dispatch" for by, _ in seen())
        if count != counted:
            counted, quiet_since = count, time.monotonic()
        return time.monotonic() > quiet_since + QUIET_S

    await eventually(is_quiet, 30.0)
    idle = Statements(postgres_server)
    await asyncio.sleep(COUNTED_S)
    told = idle()
    counts = Counter(by for by, _ in told if by != "orchestrator dispatch")
    # That the log is read at all: the publisher looks at the outbox every ten seconds.
    assert counts["orchestrator outbox"] >= 1, told
    assert all(count <= MOST_PER_S * COUNTED_S for count in counts.values()), told
    assert all(role.returncode is None for role in roles)
