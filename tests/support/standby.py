"""A real standby: a copy of a running server that follows it, until it is promoted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg

from orchestrator.dev.operating_system import until
from orchestrator.dev.postgres import EmbeddedPostgres
from tests.support.databases import temporary_server


@contextmanager
def standby_of(primary: EmbeddedPostgres, *, synchronous: bool = True) -> Iterator[EmbeddedPostgres]:
    """A hot standby. A `synchronous` one is waited for with every commit: what the primary acknowledges, both have."""
    standby = temporary_server()
    try:
        shutil.copy(primary.data_dir / "password", standby.data_dir / "password")
        arguments = ["-D", str(standby.data_dir / "cluster"), "-d", primary.url(), "-X", "stream", "-c", "fast", "-R"]
        with tempfile.TemporaryFile() as output:
            copying = standby._install.popen(
                "pg_basebackup", [*arguments, "--no-sync"], cwd=standby.data_dir, output=output
            )
            copied = copying.wait() == 0
            output.seek(0)
            assert copied, output.read().decode()
        standby.start()
        with psycopg.connect(primary.url(), autocommit=True) as connection:
            for _ in until(15):
                if connection.execute("select 1 from pg_stat_replication where state = 'streaming'").fetchone():
                    break
            else:
                raise AssertionError("the standby does not follow")
            if synchronous:
                connection.execute("alter system set synchronous_standby_names = '*'")
                connection.execute("select pg_reload_conf()")
        yield standby
    finally:
        standby.close()


def promote(standby: EmbeddedPostgres) -> None:
    """Returns when it takes writes; it waits for no standby of its own."""
    with psycopg.connect(standby.url(), autocommit=True) as connection:
        connection.execute("select pg_promote()")
        connection.execute("alter system reset synchronous_standby_names")
        connection.execute("select pg_reload_conf()")


def both(first: EmbeddedPostgres, second: EmbeddedPostgres, database: str) -> str:
    """The URL that names both servers."""
    one, other = urlsplit(first.url(database)), urlsplit(second.url(database))
    return one._replace(netloc=f"{one.netloc},{other.hostname}:{other.port}").geturl()
