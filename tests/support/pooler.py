"""A real PgBouncer in front of a test's database."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit, urlunsplit

import pytest

from orchestrator.dev.operating_system import free_port

_STARTS_S = 20.0


@contextmanager
def pgbouncer(url: str, *, mode: str, pool_size: int = 8, ignore: str = "") -> Iterator[str]:
    """The URL of the same database through PgBouncer; skips the test where there is none.

    `ignore` are the startup parameters that it is told to take and forget.
    """
    program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed; make test-tools installs it")
    server, port = urlsplit(url), free_port()
    password = unquote(server.password or "").replace("'", "''")
    with TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)  # it does not run as root
        file = directory / "pgbouncer.ini"
        file.write_text(
            f"[databases]\n* = host={server.hostname} port={server.port} user={server.username} password='{password}'\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\ndefault_pool_size = {pool_size}\nmax_client_conn = 500\n"
            f"ignore_startup_parameters = {ignore}\n"
        )
        file.chmod(0o644)
        as_nobody = ["-u", "nobody"] if os.geteuid() == 0 else []
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen([program, *as_nobody, str(file)], stdout=log, stderr=subprocess.STDOUT)
            try:
                _await_port(process, port, directory / "log")
                yield urlunsplit(server._replace(netloc=f"{server.username}@127.0.0.1:{port}"))
            finally:
                process.terminate()
                process.wait()


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up = time.monotonic() + _STARTS_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"pgbouncer did not start: {log.read_text()}")
