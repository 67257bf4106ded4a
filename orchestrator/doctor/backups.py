"""Checks of backups: how old the last good ones are, and whether WAL is archived."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.database.backups import BACKUPS, Backup
from orchestrator.database.connection import BlockingConnection
from orchestrator.doctor.finding import Finding, is_production, ok, problem, warning
from orchestrator.settings import Settings

_NAMES = {"logical": "dump", "base": "physical backup", "verify": "verification of backups", "wal": "archived WAL"}
_OLD_S = {"logical": 26 * 3600.0, "base": 26 * 3600.0, "verify": 50 * 3600.0, "wal": 3600.0}
_MENDS = {
    "logical": "see the log of ops/backup/dump, which should run every night",
    "base": "see the log of ops/backup/base-backup, which should run every night",
    "verify": "see the log of ops/backup/verify, which names what cannot be restored",
    "wal": "set archive_timeout = 60s, and see the server's log: it keeps unarchived WAL until its disk is full",
}


def backup_findings(connection: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    found = [Backup(*row) for row in connection.execute(BACKUPS).fetchall()]
    row = connection.execute("select current_setting('archive_mode') <> 'off'").fetchone()
    archives = row == (True,)
    yield from (_finding(each) for each in found if each.kind != "wal" and _is_used(each))
    if archives:
        yield _finding(next(each for each in found if each.kind == "wal"))
    if not archives and all(each.last_success_s is None for each in found if each.kind in ("logical", "base")):
        what = "no backup of this database is recorded"
        if is_production(settings):
            yield warning(
                "backups", what, "run ops/backup/dump every night, or leave it if something else backs the server up"
            )
        else:
            yield ok("backups", what)


def _is_used(backup: Backup) -> bool:
    return backup.last_success_s is not None or backup.problem is not None


def _finding(backup: Backup) -> Finding:
    kind, _, age_s, trouble = backup
    name, old_s, mend = _NAMES[kind], _OLD_S[kind], _MENDS[kind]
    last = f"the last good {name} is {_age(age_s)} old" if age_s is not None else f"there is no {name} of this cluster"
    if trouble is not None:
        return problem("backups", f"{name}: {trouble}; {last}", mend)
    if age_s is None or age_s > 2 * old_s:
        return problem("backups", last, mend)
    return warning("backups", last, mend) if age_s > old_s else ok("backups", last)


def _age(seconds: float) -> str:
    return f"{seconds / 3600:.0f} hours" if seconds > 5400 else f"{max(0.0, seconds) / 60:.0f} minutes"
