from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from orchestrator import file_descriptors
from orchestrator.settings import Settings


@given(
    st.integers(200, 100_000),
    st.integers(1, 10_000),
    st.integers(2, 100),
    st.none() | st.integers(1, 100_000),
    st.booleans(),
)
def test_connections_of_clients_and_deliveries_leave_room_for_the_database_and_probes(
    limit: int, connections: int, pool: int, most: int | None, managed: bool
) -> None:
    environ = {"HTTP_MAX_CONNECTIONS": str(connections), "DB_POOL_MAX_SIZE": str(pool)}
    environ |= {"API_MAX_CONNECTIONS": str(most)} if most else {}
    settings = Settings.from_env(environ | ({"MANAGEMENT_SERVER_PORT": "8081"} if managed else {}))
    clients = file_descriptors.clients(settings, limit)
    assert 1 <= clients <= (most or file_descriptors.MOST_CLIENTS)
    assert clients <= 8 or clients * 9 // 8 + pool + 50 + 64 * managed <= limit
    deliveries = file_descriptors.deliveries(settings, limit)
    assert 1 <= deliveries <= connections
    assert deliveries <= 8 or 2 * deliveries + 60 + 64 <= limit
    assert bool(file_descriptors.shortages(settings, limit)) >= (deliveries < connections)


def test_config_check_and_doctor_say_when_there_are_too_few_descriptors() -> None:
    for command in ("config check", "doctor"):
        line = f"ulimit -n 256 && exec {sys.executable} -m orchestrator {command}"
        env = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "COLUMNS": "300"}
        told = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, env=env, check=False).stdout
        assert "HTTP_MAX_CONNECTIONS: 200 are too many for 256 file descriptors (ulimit -n); 62 are used" in told
