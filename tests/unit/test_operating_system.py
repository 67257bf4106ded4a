"""What is shared by processes that start at once: locks of a directory, ports, and a secret."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from orchestrator.dev.environment import kept_webhook_secret
from orchestrator.dev.operating_system import exclusive, free_port
from orchestrator.errors import OrchestratorError

# Takes the lock of a directory, starts a child that holds it too, and waits to be killed.
HOLDER = """
import subprocess
import sys
from pathlib import Path
from orchestrator.dev.operating_system import exclusive
with exclusive(Path(sys.argv[1]), 10.0) as lock:
    child = subprocess.Popen(["cat"], pass_fds=[lock])
    print("held", flush=True)
    child.wait()
"""


def test_a_lock_is_had_by_one_at_a_time_and_says_where_it_is_kept(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path, 1.0),
        pytest.raises(OrchestratorError, match=str(tmp_path)),
        exclusive(tmp_path, 0.05),
    ):
        pass
    with exclusive(tmp_path, 1.0):
        assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_until_the_child_of_a_killed_holder_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline()
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    with pytest.raises(OrchestratorError, match="another process"), exclusive(tmp_path, 0.05):
        pass
    holder.stdin.close()  # which ends the child
    with exclusive(tmp_path, 10.0):
        pass
    holder.stdout.close()


def test_processes_are_given_different_ports_though_nobody_listens_yet() -> None:
    program = (
        "from orchestrator.dev.operating_system import free_port\nprint(*(free_port() for _ in range(50)))\ninput()"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    lines = [other.stdout.readline() for other in others if other.stdout is not None]
    ports = [int(port) for line in lines for port in line.split()] + [free_port() for _ in range(50)]
    for other in others:
        other.communicate(b"\n")
    assert len(set(ports)) == 150


def test_a_port_is_given_again_when_all_were_and_nobody_listens_on_it() -> None:
    assert len({free_port() for _ in range(300)}) < 100
    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert server.getsockname()[1] not in {free_port() for _ in range(150)}


def test_a_forked_process_has_ports_of_its_own() -> None:
    program = (
        "import os\n"
        "from orchestrator.dev.operating_system import free_port\n"
        "free_port()\n"
        "os.fork()\n"
        "ports = [free_port() for _ in range(99)]\n"
        "os.write(1, f'{ports}'.strip('[]').encode() + b', ')\n"
        "os._exit(0)\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert len(set(printed.split(b", ")[:-1])) == 198


def test_processes_that_make_the_webhook_secret_at_one_instant_keep_the_same(tmp_path: Path) -> None:
    together = Barrier(6)

    def keep(directory: Path) -> str:
        together.wait()
        return kept_webhook_secret(directory)

    with ThreadPoolExecutor(6) as threads:
        for n in range(20):
            directory = tmp_path / str(n)
            assert len(set(threads.map(keep, [directory] * 6))) == 1
            assert [kept.stat().st_mode & 0o777 for kept in directory.iterdir()] == [0o600]
