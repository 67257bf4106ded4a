"""A real nginx with the configuration of ops/nginx, before instances on ports of this machine."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.dev.operating_system import free_port, until
from tests.support.processes import ROOT
from tests.support.tools import tool

_STARTS_S = 30.0

CONFIGURATION = ROOT / "ops" / "nginx" / "nginx.conf"


class Nginx(NamedTuple):
    """`plain` and `tls` are its ports."""

    plain: int
    tls: int
    folder: Path

    def requests(self) -> list[dict[str, Any]]:
        """What its access log says, a request each."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()


def configured(folder: Path, instances: tuple[int, int], certificate: Path, text: str | None = None) -> Nginx:
    """Writes the configuration into the folder, with ports and files of this machine in place of the container's."""
    nginx = Nginx(free_port(), free_port(), folder)
    text = CONFIGURATION.read_text() if text is None else text
    for old, new in (
        ("/tmp/", f"{folder}/"),
        *((f"api-{number}:8080", f"127.0.0.1:{port}") for number, port in enumerate(instances, start=1)),
        ("listen 8088", f"listen 127.0.0.1:{nginx.plain}"),
        ("listen 8443", f"listen 127.0.0.1:{nginx.tls}"),
        ("worker_processes auto", "worker_processes 1"),
        ("error_log stderr", f"error_log {folder}/error.log"),
        ("/dev/stdout", f"{folder}/access.log"),
    ):
        assert old in text, f"{old} is not in the configuration"
        text = text.replace(old, new)
    text = re.sub(r"/etc/nginx/tls/[\w.-]+", str(certificate), text)
    (folder / "nginx.conf").write_text(text)
    folder.chmod(0o755)
    return nginx


def _program(nginx: Nginx) -> list[str]:
    return [str(tool("nginx")), "-p", str(nginx.folder), "-c", str(nginx.folder / "nginx.conf")]


def checked(nginx: Nginx) -> str:
    """What `nginx -t` says; it must find no fault."""
    command = [*_program(nginx), "-t"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@contextmanager
def running(nginx: Nginx) -> Iterator[Nginx]:
    """Runs it in the foreground; it listens when the block begins."""
    checked(nginx)
    command = [*_program(nginx), "-g", "daemon off;"]
    with (nginx.folder / "output.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _await_listening(process, nginx)
        yield nginx
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def _await_listening(process: subprocess.Popen[bytes], nginx: Nginx) -> None:
    for _ in until(_STARTS_S):
        assert process.poll() is None, (nginx.folder / "output.log").read_text() + nginx.errors()
        try:
            for port in (nginx.plain, nginx.tls):
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            continue
        return
    raise AssertionError(f"nginx does not listen after {_STARTS_S:g} s: {nginx.errors()}")
