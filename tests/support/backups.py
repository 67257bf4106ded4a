"""A server that archives its WAL, and the scripts of ops/backup, run as the account of the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orchestrator.database.migrate import migrate
from orchestrator.dev.operating_system import until
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.dev.postgres_install import find_installation
from tests.support.databases import TEST_TUNING, scratch_directory
from tests.support.processes import ROOT
from tests.support.sql_client import Client

DATABASE = "orchestrator"


class Site:
    """A server, its scripts in `scripts`, and its backups in `root`."""

    def __init__(self, home: Path, **tuning: str) -> None:
        self.home = home
        self.closing = ExitStack()
        self.root = home / "backup"
        self.scripts = home / "scripts"
        self.root.mkdir()
        shutil.copytree(ROOT / "ops" / "backup", self.scripts)
        self._account = find_installation().account
        self.own(home)
        archive = f"BACKUP_DIRECTORY={self.root} {self.scripts}/archive-wal %p %f"
        self._tuning = TEST_TUNING | {
            "archive_mode": "on", "archive_command": archive, "summarize_wal": "on",
            "wal_keep_size": "0", "full_page_writes": "on",
        } | tuning  # fmt: skip
        self.server = EmbeddedPostgres.temporary(tuning=self._tuning, parent=home)

    @property
    def cluster(self) -> Path:
        return self.server.data_dir / "cluster"

    @property
    def url(self) -> str:
        return self.server.url(DATABASE)

    def own(self, *paths: Path) -> None:
        """Gives files to the account of the server."""
        account = self._account
        if account is not None:
            for path in [below for each in paths for below in (each, *each.rglob("*"))]:
                os.chown(path, account.pw_uid, account.pw_gid)

    def start(self, script: str, *arguments: str, root: Path | None = None, **env: str) -> subprocess.Popen[str]:
        """Starts a script; an empty variable is left out."""
        programs = find_installation().bin_dir
        given = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "BACKUP_DIRECTORY": str(root or self.root),
            "DATABASE_URL": self.url if self.cluster.exists() else "",
        } | env
        account = self._account
        as_account: dict[str, Any] = (
            {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        )
        return subprocess.Popen(
            [str(self.scripts / script), *arguments], env={name: value for name, value in given.items() if value},
            cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, **as_account,
        )  # fmt: skip

    def run(
        self, script: str, *arguments: str, root: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script to its end."""
        process = self.start(script, *arguments, root=root, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def made(self, script: str, *arguments: str, root: Path | None = None, **env: str) -> Path:
        """Runs a script that must succeed; returns the path that it prints, if it does."""
        done = self.run(script, *arguments, root=root, **env)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def refused(self, script: str, *arguments: str, root: Path | None = None, **env: str) -> str:
        """Runs a script that must fail; returns what it says."""
        done = self.run(script, *arguments, root=root, **env)
        assert done.returncode not in (0, 126, 127), done.stdout
        return done.stderr

    def archive_all(self) -> None:
        """Returns when all WAL until now is in the archive."""
        with Client(self.url) as client:
            # Something to archive, so that the switch ends a segment.
            client.rows("select pg_logical_emit_message(false, 'tests', 'x')")
            last = client.value("select pg_walfile_name(pg_switch_wal())")
        for _ in until(30):
            if any(self.root.glob(f"wal/{last}.*")):
                return
        raise AssertionError(f"{last} is not archived: {self.server.log_file.read_text()[-2000:]}")

    def copy(self, name: str) -> Path:
        """A copy of all backups, to be damaged. Nothing is left that the server could archive meanwhile."""
        self.archive_all()
        copied = self.home / name
        shutil.copytree(self.root, copied)
        self.own(copied)
        return copied

    def restore(self, to: str, *options: str) -> EmbeddedPostgres:
        """Restores to a moment, and returns when the server takes writes.

        It has the address of the one that is lost, if that does not run.
        """
        server = EmbeddedPostgres.temporary(tuning=self._tuning, parent=self.home)
        self.closing.callback(server.close)
        if not self.server.is_running():
            server.port = self.server.port
        self.made("restore", "--to", to, "--into", str(server.data_dir / "cluster"), *options, DATABASE_URL="")
        password = server.data_dir / "password"
        shutil.copy(self.server.data_dir / "password", password)
        self.own(password)
        server.start()
        with Client(server.url()) as client:
            for _ in until(120):
                if client.value("select pg_is_in_recovery()") is False:
                    return server
        raise AssertionError("it is still in recovery")

    def lose(self) -> None:
        """Ends the server as a crash does, and loses its disk."""
        self.server.kill()
        shutil.rmtree(self.cluster)


@contextmanager
def site(**tuning: str) -> Iterator[Site]:
    """A site whose server runs, with a migrated database; all of it is removed at the end."""
    home = Path(tempfile.mkdtemp(prefix="orchestrator-backup-", dir=scratch_directory()))
    try:
        made = Site(home, **tuning)
        with made.closing, made.server:
            migrate(made.server.ensure_database(DATABASE))
            yield made
    finally:
        shutil.rmtree(home, ignore_errors=True)
