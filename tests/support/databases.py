"""Databases for tests: cloned from a template that was migrated once, dropped when a test is done."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from orchestrator.database.migrate import migrate
from orchestrator.dev.postgres import EmbeddedPostgres

# Fast and forgetful: these servers never outlive the run, and killing a server loses nothing that it has
# handed to the operating system.
TEST_TUNING = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
    "min_wal_size": "80MB",
    "autovacuum_naptime": "60s",
    "max_prepared_transactions": "8",
}

_SHARED_MEMORY = Path("/dev/shm")
_SHARED_MEMORY_NEEDED = 2 << 30


def scratch_directory() -> Path | None:
    """Where servers of tests keep their data: in memory, where a database is cloned up to 20 times faster.

    None, the system's directory for temporary files, where memory has too little room for that or is not for us.
    """
    if not os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        return None
    return _SHARED_MEMORY if shutil.disk_usage(_SHARED_MEMORY).free >= _SHARED_MEMORY_NEEDED else None


def temporary_server() -> EmbeddedPostgres:
    """A server for tests, not yet started; enter it or start it."""
    return EmbeddedPostgres.temporary(tuning=TEST_TUNING, parent=scratch_directory())


def sibling(url: str, database: str) -> str:
    """The same server's URL of another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


class Databases:
    """Makes databases on one server, reached by a URL of a user who may create them."""

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._prefix = f"orchestrator_test_{os.getpid()}"
        self._numbers = itertools.count(1)
        self._template: str | None = None

    @contextmanager
    def migrated(self) -> Iterator[str]:
        """The URL of a new database with the whole schema in it."""
        if self._template is None:
            template = f"{self._prefix}_template"
            self._execute("drop database if exists {} with (force)", template)  # a failed attempt's
            self._execute("create database {}", template)
            migrate(sibling(self._server_url, template))
            self._template = template
        with self._created("create database {} template {} strategy file_copy", self._template) as url:
            yield url

    @contextmanager
    def empty(self) -> Iterator[str]:
        """The URL of a new database with nothing in it."""
        with self._created("create database {}") as url:
            yield url

    def close(self) -> None:
        if self._template is not None:
            self._execute("drop database {} with (force)", self._template)

    @contextmanager
    def _created(self, statement: str, *names: str) -> Iterator[str]:
        name = f"{self._prefix}_{next(self._numbers)}"
        self._execute(statement, name, *names)
        try:
            yield sibling(self._server_url, name)
        finally:
            self._execute("drop database {} with (force)", name)

    def _execute(self, statement: str, *names: str) -> None:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
