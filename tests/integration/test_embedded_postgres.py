"""The embedded PostgreSQL server: its life, its crashes, and what it says when it cannot start."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from orchestrator.dev import postgres_install
from orchestrator.dev.postgres import SUPERUSER, EmbeddedPostgres
from orchestrator.errors import OrchestratorError
from tests.support.databases import TEST_TUNING, scratch_directory, temporary_server
from tests.support.processes import ROOT
from tests.support.waiting import eventually

# Starts a server as its argument says, prints where it is, and waits to be told to end (or to be killed).
OWNER = """
import sys
import tempfile
from pathlib import Path
from orchestrator.dev.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), keep=sys.argv[2] == "keep", tuning={"shared_buffers": "16MB"})
server.start()
print(server.port, flush=True)
sys.stdin.read()
"""

# Runs a program where the account of the server does not exist, except for its group if that is named, too. What
# removes accounts would refuse to: servers of other tests run as this one.
NEW_MACHINE = """
cp -a /etc "$1"
sed -i '/^embedded_postgres:/d' "$1/passwd" "$1/shadow" "$1/group" "$1/gshadow"
mount --bind "$1" /etc
[ "$2" = nothing ] || groupadd --system "$2"
mkdir "$1/counted"
mount -t tmpfs tmpfs "$1/counted"
printf '#!/bin/sh\necho one >>%s.runs\nexec %s "$@"\n' "$1" "$(command -v useradd)" >"$1/counted/useradd"
chmod +x "$1/counted/useradd"
export PATH="$1/counted:$PATH"
shift 2
exec "$@"
"""
# Starts three servers at one instant, in processes of their own, and prints the name of each one's account.
FIRST_START = """
import os
import pwd
import sys
from pathlib import Path
from orchestrator.dev.postgres import EmbeddedPostgres
gate, opener = os.pipe()
starting = []
for _ in range(3):
    starting.append(os.fork())
    if starting[-1] == 0:
        os.close(opener)
        os.read(gate, 1)
        with EmbeddedPostgres.temporary(tuning={"shared_buffers": "16MB"}, parent=Path(sys.argv[1])) as server:
            name = pwd.getpwuid((server.data_dir / "cluster").stat().st_uid).pw_name
            os.write(1, f"{name}\\n".encode())  # at once, or those of several would mix
        sys.exit()
os.close(opener)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in starting]))
"""


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that the server's account can reach; pytest keeps its own private to this user."""
    with tempfile.TemporaryDirectory(dir=scratch_directory()) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="module")
def kept_server() -> Iterator[EmbeddedPostgres]:
    with tempfile.TemporaryDirectory(dir=scratch_directory()) as name:
        Path(name).chmod(0o711)
        server = EmbeddedPostgres(Path(name) / "postgres", tuning=TEST_TUNING)
        yield server
        server.remove()


@pytest.fixture
def server(kept_server: EmbeddedPostgres) -> EmbeddedPostgres:
    """A running server whose data is kept, whatever the test before did to it."""
    return kept_server.start()


def query(url: str, statement: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def postmaster_pid(server: EmbeddedPostgres) -> int:
    return int((server.data_dir / "cluster" / "postmaster.pid").read_text().split()[0])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Owner:
    """Another process that owns a server."""

    def __init__(self, data_dir: Path, mode: str) -> None:
        command = [sys.executable, "-c", OWNER, str(data_dir), mode]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env={"PATH": os.environ["PATH"]}
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def finish(self) -> None:
        """Lets it come to its normal end."""
        self.process.communicate(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def test_a_server_listens_on_loopback_and_a_private_socket_and_asks_for_the_password(
    server: EmbeddedPostgres,
) -> None:
    assert query(server.url(), "select host(inet_server_addr())") == "127.0.0.1"
    assert query(server.url(unix_socket=True), "select inet_server_addr()") is None
    for address in (
        f"127.0.0.1:{server.port}/postgres",
        f"/postgres?host={server.data_dir}&port={server.port}",
    ):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://{SUPERUSER}:wrong@{address}")


def test_a_server_is_durable_unicode_checksummed_and_in_utc_by_default() -> None:
    expected = {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "data_checksums": "on",
        "server_encoding": "UTF8",
        "timezone": "UTC",
        "jit": "off",
        "max_connections": "200",
    }
    with EmbeddedPostgres.temporary() as server:
        shown = {name: query(server.url(), f"show {name}") for name in expected}
        assert shown == expected
        assert query(server.url(), "select upper('straße ñ')") == "STRAßE Ñ"


def test_a_temporary_server_leaves_nothing_behind_when_it_is_closed() -> None:
    with temporary_server() as server:
        pid = postmaster_pid(server)
    assert not server.data_dir.exists()
    assert not is_alive(pid)


def test_data_and_port_stay_when_it_is_stopped_or_killed_and_started_again(server: EmbeddedPostgres) -> None:
    url = server.ensure_database("kept")
    query(url, "create table t as select 1 as n")
    for end in (server.stop, server.kill):
        end()
        assert not server.is_running()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url)
        server.start()
        query(url, "update t set n = n + 1")
    server.restart()
    assert query(url, "select n from t") == 3
    assert server.ensure_database("kept") == url


def test_a_kill_ends_every_process_of_the_server_at_once(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("select pg_advisory_lock(1)")
        backend = connection.info.backend_pid
        server.kill()
        assert not is_alive(backend)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    server.start()
    assert query(server.url(), "select pg_try_advisory_lock(1)") is True


def test_starting_a_running_server_again_changes_nothing(server: EmbeddedPostgres) -> None:
    pid = postmaster_pid(server)
    server.start()
    assert postmaster_pid(server) == pid


def test_a_second_process_uses_the_running_server_and_leaves_it_running(server: EmbeddedPostgres) -> None:
    guest = Owner(server.data_dir, "keep")
    guest.finish()
    assert guest.port == server.port
    assert query(server.url(), "select 1") == 1


def test_a_server_in_use_by_another_process_is_not_removed(open_path: Path) -> None:
    owner = Owner(open_path / "postgres", "keep")
    ours = EmbeddedPostgres(open_path / "postgres").start()
    with pytest.raises(OrchestratorError, match="another process is using this server"):
        ours.remove()
    ours.stop()
    assert query(ours.url(), "select 1") == 1
    owner.finish()
    ours.remove()


def test_a_server_ends_with_its_owner_and_another_takes_the_data_over(open_path: Path) -> None:
    owner = Owner(open_path / "postgres", "keep")
    ours = EmbeddedPostgres(open_path / "postgres", tuning=TEST_TUNING).start()
    pid = postmaster_pid(ours)
    query(ours.url(), "create table t ()")
    owner.finish()
    assert not is_alive(pid)
    ours.start()
    assert query(ours.url(), "select to_regclass('t')::text") == "t"
    ours.remove()


def test_a_server_that_its_dead_owner_leaves_stopping_is_waited_for_and_started_again(open_path: Path) -> None:
    home = open_path / "postgres"
    owner = Owner(home, "keep")
    owner.process.send_signal(signal.SIGTERM)
    owner.process.communicate(timeout=30)
    with EmbeddedPostgres(home, tuning=TEST_TUNING) as server:
        assert query(server.url(), "select 1") == 1
    server.remove()


async def test_a_temporary_server_is_removed_even_when_its_owner_is_killed(open_path: Path) -> None:
    home = open_path / "postgres"
    owner = Owner(home, "temporary")
    pid = int((home / "cluster" / "postmaster.pid").read_text().split()[0])
    owner.kill()
    await eventually(lambda: not is_alive(pid) and not home.exists())


async def test_a_kept_server_is_stopped_but_not_removed_when_its_owner_is_killed(open_path: Path) -> None:
    home = open_path / "postgres"
    owner = Owner(home, "keep")
    pid = int((home / "cluster" / "postmaster.pid").read_text().split()[0])
    owner.kill()
    await eventually(lambda: not is_alive(pid))
    with EmbeddedPostgres(home, tuning=TEST_TUNING) as server:
        assert "not properly shut down" not in server.log_file.read_text()
    server.remove()


def test_a_ctrl_c_for_the_owner_does_not_reach_the_server(server: EmbeddedPostgres) -> None:
    assert os.getsid(postmaster_pid(server)) != os.getsid(0)


def test_a_stale_pid_file_that_names_a_living_process_is_no_obstacle(server: EmbeddedPostgres) -> None:
    server.kill()
    pid_file = server.data_dir / "cluster" / "postmaster.pid"
    pid_file.write_text(pid_file.read_text().replace(pid_file.read_text().split()[0], str(os.getpid()), 1))
    assert not server.is_running()
    server.start()
    assert query(server.url(), "select 1") == 1


def test_a_creation_that_was_interrupted_is_begun_again(open_path: Path) -> None:
    home = open_path / "postgres"
    (home / "cluster.partial").mkdir(parents=True)
    (home / "cluster.partial" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(home, keep=False, tuning=TEST_TUNING) as server:
        assert query(server.url(), "select 1") == 1


def test_a_server_uses_less_memory_where_the_system_refuses_the_wanted_amount() -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system never refuses memory")
    with EmbeddedPostgres.temporary(tuning={"shared_buffers": "7TB", "huge_pages": "off"}) as server:
        assert query(server.url(), "show shared_buffers") == "128MB"


def test_a_taken_port_is_reported_with_its_number(open_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.dev.postgres._BUSY_TIMEOUT_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = EmbeddedPostgres(open_path / "postgres", port=port, keep=False, tuning=TEST_TUNING)
        with pytest.raises(OrchestratorError, match=f"127.0.0.1:{port}"), server:
            pass
    assert not server.data_dir.exists()


def test_a_server_that_does_not_start_says_why() -> None:
    server = EmbeddedPostgres.temporary(tuning={"no_such_setting": "1"})
    with pytest.raises(OrchestratorError, match="no_such_setting"), server:
        pass


def test_data_of_another_major_version_is_refused_and_left_alone(server: EmbeddedPostgres) -> None:
    server.stop()
    version = server.data_dir / "cluster" / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(OrchestratorError, match=r"PostgreSQL 17, but version 18"):
        server.start()
    assert version.read_text() == "17\n"
    version.write_text("18\n")


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OrchestratorError, match=r"pip install 'scheduled-event-orchestrator\[embedded\]'"):
        EmbeddedPostgres(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another account")
class TestAsRoot:
    @pytest.mark.parametrize("left", ["nothing", postgres_install.ACCOUNT])
    def test_servers_that_start_at_one_instant_on_a_new_machine_have_one_account(
        self, open_path: Path, left: str
    ) -> None:
        if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode != 0:
            pytest.skip("unshare --mount is refused here, and without it this machine's accounts cannot be set aside")
        machine = ["unshare", "--mount", "sh", "-euc", NEW_MACHINE, "-", str(open_path / "etc"), left]
        done = subprocess.run(
            [*machine, sys.executable, "-c", FIRST_START, str(open_path)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        assert done.stdout.splitlines() == [postgres_install.ACCOUNT] * 3
        # Any number that ran at once would go well most of the time.
        assert (open_path / "etc.runs").read_text() == "one\n"

    def test_data_for_a_private_directory_is_kept_elsewhere_and_the_directory_stays_private(
        self, open_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgres_install, "RELOCATED", open_path / "elsewhere")
        (open_path / "elsewhere").mkdir(mode=0o755)
        private = open_path / "private"
        private.mkdir(mode=0o700)
        for _ in range(2):
            with EmbeddedPostgres(private / "postgres", tuning=TEST_TUNING) as server:
                assert server.data_dir.parent == open_path / "elsewhere"
                query(server.url(), "create table if not exists t ()")
        assert private.stat().st_mode & 0o777 == 0o700
        assert list(private.iterdir()) == []
        server.remove()

    def test_a_strict_umask_and_a_private_home_for_temporary_files_are_no_obstacle(
        self, open_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgres_install, "RELOCATED", open_path / "elsewhere")
        private = open_path / "private"
        private.mkdir(mode=0o700)
        before = os.umask(0o077)
        try:
            with EmbeddedPostgres.temporary(tuning=TEST_TUNING, parent=private) as server:
                assert query(server.url(), "select 1") == 1
        finally:
            os.umask(before)
        assert list(private.iterdir()) == []
        assert not server.data_dir.exists()

    def test_programs_in_a_private_directory_are_run_from_a_copy(
        self, open_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copies = open_path / "copies"
        monkeypatch.setattr(postgres_install, "COPIES", copies)
        left = copies / f"postgres-{importlib.metadata.version('embedded-postgres')}.partial" / "embedded_postgres"
        left.mkdir(parents=True)  # by one who was killed
        monkeypatch.setattr(postgres_install, "_is_open_to", lambda account, package: "copies" in str(package))
        with temporary_server() as server:
            assert Path(f"/proc/{postmaster_pid(server)}/exe").readlink().is_relative_to(copies)
        assert [made.name for made in copies.iterdir()] == [left.parent.name.removesuffix(".partial")]
