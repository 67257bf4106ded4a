"""An embedded PostgreSQL 18 server, for development, the demo, benchmarks and tests.

    with EmbeddedPostgres.temporary() as server:
        psycopg.connect(server.url("postgres"))

A server's directory holds its data (``cluster``), ``server.log``, the superuser's ``password``, a ``lock``,
and its Unix socket. The process that starts a server owns it and stops it at its exit; killed, its guard
does (directory_ownership.py). Another process that starts the same directory meanwhile uses the owner's server.

Connections need a password although only this machine can connect: a superuser who is trusted without one
would let every local user run programs as the server's account.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from orchestrator.database.connection import connect_blocking
from orchestrator.dev.directory_ownership import DirectoryOwnership
from orchestrator.dev.operating_system import free_port, is_alive, kill_family, runs_with_argument, until
from orchestrator.dev.postgres_install import Installation, find_installation
from orchestrator.dev.postgres_tuning import configuration, default_tuning, memory_bytes
from orchestrator.errors import OrchestratorError

SUPERUSER = "orchestrator"

_START_TIMEOUT_S = 300.0  # recovery after a crash replays up to max_wal_size
_STOP_TIMEOUT_S = 120.0  # a stop writes out all shared buffers
_BUSY_TIMEOUT_S = 15.0  # until a port or a dead server's shared memory is free
_SOCKET_PATH_MAX = 100


class EmbeddedPostgres:
    """A PostgreSQL server on 127.0.0.1 and on a Unix socket, whose data is in `data_dir`.

    `port` 0 chooses a free one at the first start; later starts of this object use the same. With `keep`
    the data stays, flushed to disk, for the next server of that directory; without it `close` removes the
    directory. `tuning` overrides and adds to the settings that suit this machine (`default_tuning`).

    `start`, `stop`, `kill` and `restart` may follow one another in any order. At the end call `close`, or
    use the object in a `with` statement; an exit of the process closes it too.
    """

    def __init__(
        self, data_dir: Path, *, port: int = 0, keep: bool = True, tuning: Mapping[str, str] | None = None
    ) -> None:
        self._install: Installation = find_installation()
        # Differs from the argument where root keeps data for an account that could not reach it.
        self.data_dir: Path = self._install.reachable_directory(data_dir)
        self.port: int = port
        self._keep = keep
        self._tuning = dict(tuning or {})
        self._server: subprocess.Popen[bytes] | None = None
        self._ownership = DirectoryOwnership(self.data_dir, temporary=not keep)
        self._creator_pid = os.getpid()

    @classmethod
    def temporary(cls, *, tuning: Mapping[str, str] | None = None, parent: Path | None = None) -> Self:
        """A server in a new directory below `parent` (default: the system's for such); `close` removes it."""
        home = Path(tempfile.mkdtemp(prefix="orchestrator-postgres-", dir=parent))
        server = cls(home, keep=False, tuning=tuning)
        if server.data_dir != home:
            home.rmdir()
        return server

    @property
    def log_file(self) -> Path:
        return self.data_dir / "server.log"

    @property
    def _cluster(self) -> Path:
        return self.data_dir / "cluster"

    @property
    def _password(self) -> Path:
        return self.data_dir / "password"

    @property
    def _socket_dir(self) -> Path | None:
        fits = len(os.fsencode(self.data_dir / ".s.PGSQL.65535")) <= _SOCKET_PATH_MAX
        return self.data_dir if fits else None

    def url(self, database: str = "postgres", *, unix_socket: bool = False) -> str:
        """The superuser's URL of a database: TCP, or the Unix socket where its path is short enough."""
        password = self._password.read_text()
        if unix_socket and self._socket_dir is not None:
            host = quote(str(self._socket_dir), safe="")
            return f"postgresql://{SUPERUSER}:{password}@/{quote(database)}?host={host}&port={self.port}"
        return f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{self.port}/{quote(database)}"

    def ensure_database(self, database: str) -> str:
        """Creates the database unless it exists, and returns its URL."""
        with (
            connect_blocking(self.url(), "dev") as connection,
            contextlib.suppress(psycopg.errors.DuplicateDatabase),
        ):
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(database)))
        return self.url(database)

    def is_running(self) -> bool:
        """Whether the server accepts connections."""
        pid, state = self._postmaster()
        return pid is not None and state == "ready"

    def start(self) -> Self:
        """Starts the server, creating its data first if need be, and returns when it accepts connections.

        Does nothing when it runs already, whoever started it. Raises OrchestratorError with the end of the
        server's log when it does not start.
        """
        for _ in until(_START_TIMEOUT_S):
            if self._ownership.take(_STOP_TIMEOUT_S):
                break
            if self.is_running():
                self.port = self._postmaster_port()
                return self
        else:
            raise OrchestratorError(
                f"{self.data_dir}: another process holds this directory's lock, but its server does not"
                f" become ready; see {self.log_file}"
            )
        atexit.register(self.close)
        if self._wait_ready():  # left by an owner whose guard died with it, or by an earlier start
            self.port = self._postmaster_port()
            return self
        if not self._cluster.exists():
            self._install.create_cluster(
                self._cluster,
                superuser=SUPERUSER,
                password_file=self._password,
                durable=self._keep,
                locks=self._ownership.locks,
            )
        self._install.check_version(self._cluster)
        self._launch()
        return self

    def stop(self) -> None:
        """Stops the server, rolling back what runs (a "fast" shutdown), unless another process owns it."""
        if not self._ownership.held:
            return
        self._end_server([signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
        if self._keep:
            self._release()

    def kill(self) -> None:
        """Ends all of the server's processes with SIGKILL, as a crash would; the next start recovers."""
        pid, _ = self._postmaster()
        if pid is None:
            return
        family = kill_family(pid)
        self._reap()
        for _ in until(_STOP_TIMEOUT_S):
            if not any(is_alive(process) for process in family):
                break

    def restart(self) -> None:
        """Stops and starts the server on the same port."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stops the server; removes its directory if it is temporary."""
        if os.getpid() != self._creator_pid:  # a fork's copy of this object owns nothing
            return
        self.stop()
        if not self._keep:
            self.remove()

    def remove(self) -> None:
        """Stops the server and removes its directory with all data."""
        if not self._ownership.take(_STOP_TIMEOUT_S):
            raise OrchestratorError(f"{self.data_dir}: another process is using this server; stop that first")
        self.stop()
        self._release()
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _release(self) -> None:
        self._ownership.give_up()
        atexit.unregister(self.close)

    # The running server

    def _postmaster(self) -> tuple[int | None, str]:
        """The process id and state of this directory's server; (None, "") when none runs."""
        if self._server is not None and self._server.poll() is not None:
            self._server = None
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
            pid = int(lines[0])
            # After a crash the number may be another program's.
            if not runs_with_argument(pid, str(self._cluster)):
                return None, ""
        except (OSError, ValueError, IndexError):
            return None, ""
        return pid, lines[7].strip() if len(lines) > 7 else ""

    def _postmaster_port(self) -> int:
        return int((self._cluster / "postmaster.pid").read_text().splitlines()[3])

    def _wait_ready(self) -> bool:
        """Waits until the server accepts connections; False when there is none, or not any more."""
        for _ in until(_START_TIMEOUT_S):
            if self.is_running():
                return True
            if self._server is None and self._postmaster()[0] is None:
                return False
        raise OrchestratorError(f"{self.data_dir}: the server does not become ready; see {self.log_file}")

    def _end_server(self, signals: list[signal.Signals]) -> None:
        for number in signals:
            pid, _ = self._postmaster()
            if pid is None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if any(self._postmaster()[0] is None for _ in until(_STOP_TIMEOUT_S)):
                break
        self._reap()

    def _reap(self) -> None:
        if self._server is not None:
            self._server.wait(_STOP_TIMEOUT_S)
            self._server = None

    # Launching

    def _launch(self) -> None:
        """Starts the server, adapting to what a machine may refuse: the port, or that much shared memory."""
        settings = default_tuning(memory_bytes(), shutil.disk_usage(self.data_dir).free) | self._tuning
        smaller_buffers = ["128MB", "32MB"]
        give_up = time.monotonic() + _BUSY_TIMEOUT_S
        # Left by a crash, and nobody's: see _postmaster. PostgreSQL itself only compares process ids.
        for stale in (self._cluster / "postmaster.pid", *self.data_dir.glob(".s.PGSQL.*")):
            stale.unlink(missing_ok=True)
        while True:
            port = self.port or free_port()
            complaint = self._try_launch(settings, port)
            if complaint is None:
                self.port = port
                return
            if "map anonymous shared memory" in complaint and smaller_buffers:
                settings["shared_buffers"] = smaller_buffers.pop(0)
                continue
            # A port or a killed server's memory can still be held for a moment.
            passing = any(reason in complaint for reason in ("could not bind", "is still in use"))
            if not passing or time.monotonic() > give_up:
                raise OrchestratorError(f"{self.data_dir}: PostgreSQL did not start on 127.0.0.1:{port}:\n{complaint}")
            time.sleep(0.1)

    def _try_launch(self, settings: dict[str, str], port: int) -> str | None:
        """None when the server is up, else the end of what it wrote to its log."""
        addresses = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": str(self._socket_dir or ""),
            "unix_socket_permissions": "0700",
        }
        (self._cluster / "postgresql.conf").write_text(configuration(settings | addresses))
        with self.log_file.open("ab") as log:
            before = log.tell()
            self._server = self._install.popen("postgres", ["-D", str(self._cluster)], cwd=self.data_dir, output=log)
        if self._wait_ready():
            return None
        with self.log_file.open("rb") as log:
            log.seek(before)
            return log.read()[-4000:].decode(errors="replace").strip()
