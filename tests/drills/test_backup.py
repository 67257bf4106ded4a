"""The scripts of ops/backup: what they make, and that nothing that goes wrong with a backup stays hidden."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest

from orchestrator.dev.operating_system import free_port, until
from orchestrator.dev.postgres_install import find_installation
from tests.integration.cli_support import invoke
from tests.support.backups import Site, site
from tests.support.processes import ROOT
from tests.support.sql_client import Client
from tests.support.tools import tool

SCRIPTS = ROOT / "ops" / "backup"


@pytest.fixture(scope="module")
def backed_up() -> Iterator[Site]:
    """A site with a dump, a full backup, two incremental ones, and WAL after each."""
    with site() as made:
        made.made("dump")
        for _ in range(3):
            done = made.run("base-backup")
            assert (done.returncode, done.stderr) == (0, "")
            made.archive_all()
        yield made


@pytest.fixture
def kept(backed_up: Site) -> Iterator[Path]:
    """A copy of these backups, to be damaged."""
    copied = backed_up.copy(f"copy-{free_port()}")
    yield copied
    shutil.rmtree(copied)


@pytest.fixture
def fresh(backed_up: Site) -> Iterator[Path]:
    """An empty directory for backups."""
    made = backed_up.home / f"fresh-{free_port()}"
    made.mkdir()
    backed_up.own(made)
    yield made
    shutil.rmtree(made)


def last(site: Site, kind: str) -> tuple[Any, ...]:
    """The newest row of a kind: what went wrong, the size and the place."""
    with Client(site.url) as client:
        [row] = client.rows(
            "select problem, bytes, location from orchestrator.backup_run where kind = %s order by run desc limit 1",
            kind,
        )
    return tuple(row)


def dumps(root: Path) -> list[str]:
    """The names of all files beside complete dumps, too."""
    return sorted(path.name for path in (root / "dumps").iterdir())


def backups(root: Path) -> list[Path]:
    return sorted((root / "base").glob("2*/2*"))


def segments(root: Path) -> list[Path]:
    return sorted(path for path in (root / "wal").iterdir() if re.fullmatch(r"[0-9A-F]{24}\.(gz|zst)", path.name))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def full(fresh: Path, at_bytes: int) -> str:
    """A PATH on which the disks of pg_dump and pg_basebackup are full after so many bytes."""
    programs = fresh / "programs"
    programs.mkdir()
    for name in ("pg_dump", "pg_basebackup"):
        script = programs / name
        real = find_installation().bin_dir / name
        script.write_text(f'#!/bin/bash\ntrap "" XFSZ\nulimit -f {at_bytes // 1024}\nexec {real} "$@"\n')
        script.chmod(0o755)
    return f"{programs}:{find_installation().bin_dir}:{os.environ['PATH']}"


# Form


def test_the_scripts_have_no_faults_that_shellcheck_knows() -> None:
    scripts = sorted(str(path) for path in SCRIPTS.iterdir() if path.suffix == ".sh" or os.access(path, os.X_OK))
    scripts = [path for path in scripts if Path(path).is_file()]
    assert len(scripts) == 7
    done = subprocess.run(
        [tool("shellcheck"), "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# Dumps


def test_a_dump_has_its_checksum_and_is_recorded(backed_up: Site, fresh: Path) -> None:
    made = backed_up.made("dump", root=fresh)
    assert dumps(fresh) == [made.name, f"{made.name}.sha256"]
    checked = subprocess.run(["sha256sum", "--check", f"{made.name}.sha256"], cwd=made.parent, capture_output=True)
    assert checked.returncode == 0
    assert last(backed_up, "logical") == (None, made.stat().st_size, str(made))
    listed = subprocess.run(
        [find_installation().bin_dir / "pg_restore", "--list", made], capture_output=True, text=True, check=True
    ).stdout
    assert "Compression: gzip" in listed
    assert "TABLE DATA orchestrator ingest_offset" in listed


@pytest.mark.parametrize("way", ["url", "url_file", "jdbc", "parts"])
def test_a_dump_needs_no_password_on_its_command_line(backed_up: Site, fresh: Path, tmp_path: Path, way: str) -> None:
    server = urlsplit(backed_up.url)
    secret = "p%/&?'\\ x"
    with psycopg.connect(backed_up.url, autocommit=True) as admin:
        admin.execute(f"create role {way} login superuser password $${secret}$$".encode())
    where = f"{server.hostname}:{server.port}/orchestrator"
    file = fresh / "secret"
    file.write_text(secret + "\n")
    url = f"postgresql://{way}:{quote(secret, safe='')}@{where}"
    env = {
        "url": {"DATABASE_URL": url},
        "url_file": {"DATABASE_URL": "", "DATABASE_URL_FILE": str(file)},
        "jdbc": {
            "DATABASE_URL": f"jdbc:postgresql://{where}?user={way}&password={quote(secret, safe='')}&sslmode=disable"
        },
        "parts": {
            "DATABASE_URL": "", "DB_HOST": "127.0.0.1", "DB_PORT": str(server.port), "DB_NAME": "orchestrator",
            "DB_USER": way, "DB_PASSWORD_FILE": str(file),
        },
    }[way]  # fmt: skip
    if way == "url_file":
        file.write_text(url)
    backed_up.own(file)
    programs = fresh / "programs"
    programs.mkdir()
    for name in ("pg_dump", "psql"):
        (programs / name).write_text(
            f'#!/bin/bash\nprintf "%s\\n" "$*" >>{fresh}/arguments\nexec {find_installation().bin_dir}/{name} "$@"\n'
        )
        (programs / name).chmod(0o755)
    env["PATH"] = f"{programs}:{find_installation().bin_dir}:{os.environ['PATH']}"
    backed_up.made("dump", root=fresh, **env)
    arguments = (fresh / "arguments").read_text()
    assert "--format=custom" in arguments
    assert "p%" not in arguments
    assert "password" not in arguments


def test_old_dumps_are_deleted_only_when_a_newer_good_one_exists(backed_up: Site, fresh: Path) -> None:
    folder = fresh / "dumps"
    folder.mkdir()
    old, young, other = "orchestrator-20200101T000000Z", "orchestrator-29990101T000000Z", "another-20200101T000000Z"
    for name in (old, young, other):
        (folder / f"{name}.dump").write_text(name)
        (folder / f"{name}.dump.sha256").write_text(name)
    backed_up.own(fresh)
    backed_up.refused("dump", root=fresh, PATH=full(fresh, 65536))
    assert f"{old}.dump" in dumps(fresh)
    made = backed_up.made("dump", root=fresh)
    kept = {name.split(".")[0] for name in dumps(fresh)}
    assert kept == {young, other, made.stem}


@pytest.mark.parametrize(
    ("script", "folder", "name"), [("dump", "dumps", "orchestrator-{}.dump"), ("base-backup", "base", "{}")]
)
def test_a_backup_waits_for_a_name_that_is_free(
    backed_up: Site, fresh: Path, script: str, folder: str, name: str
) -> None:
    (fresh / folder).mkdir()
    now = datetime.now(UTC)
    seconds = [now + timedelta(seconds=ahead) for ahead in range(8)]
    taken = [fresh / folder / name.format(f"{each:%Y%m%dT%H%M%SZ}") for each in seconds]
    for path in taken:
        path.write_text("taken")
    backed_up.own(fresh)
    made = backed_up.made(script, root=fresh)
    assert made.relative_to(fresh / folder).parts[0] > taken[-1].name
    assert {path.read_text() for path in taken} == {"taken"}


def test_a_dump_that_fills_the_disk_fails_is_recorded_and_leaves_the_others(backed_up: Site, fresh: Path) -> None:
    made = backed_up.made("dump", root=fresh)
    told = backed_up.refused("dump", root=fresh, PATH=full(fresh, 65536))
    assert "dump: pg_dump failed: " in told
    assert dumps(fresh) == [made.name, f"{made.name}.sha256"]
    assert last(backed_up, "logical")[0].startswith("pg_dump failed: ")
    doctor = invoke("doctor", env={"DATABASE_URL": backed_up.url, "COLUMNS": "400"})
    assert "dump: pg_dump failed: " in doctor.stdout
    assert "the last good dump is 0 minutes old" in doctor.stdout
    backed_up.made("dump", root=fresh)
    assert last(backed_up, "logical")[0] is None


def test_a_dump_that_is_truncated_unnoticed_by_pg_dump_is_not_kept(backed_up: Site, fresh: Path) -> None:
    programs = fresh / "programs"
    programs.mkdir()
    script = programs / "pg_dump"
    script.write_text(
        f'#!/bin/bash\n{find_installation().bin_dir}/pg_dump "$@"\n'
        'for last; do :; done\nfile=${last#--file=}\ntruncate -s -2000 "$file"\n'
    )
    script.chmod(0o755)
    path = f"{programs}:{find_installation().bin_dir}:{os.environ['PATH']}"
    assert "dump: pg_restore failed: " in backed_up.refused("dump", root=fresh, PATH=path)
    assert dumps(fresh) == []


def hanging(fresh: Path, program: str) -> str:
    """A PATH on which the program does its work and then hangs; it tells so by the file ``hangs``."""
    programs = fresh / "programs"
    programs.mkdir()
    script = programs / program
    script.write_text(
        f'#!/bin/bash\n{find_installation().bin_dir}/{program} "$@"\ntouch {fresh}/hangs\nread -r <>{fresh}/never\n'
    )
    script.chmod(0o755)
    os.mkfifo(fresh / "never")
    return f"{programs}:{find_installation().bin_dir}:{os.environ['PATH']}"


@contextmanager
def hung(site: Site, root: Path, path: str, script: str, *arguments: str) -> Iterator[None]:
    """A script that hangs in one of its programs, and is killed at the end with all of them."""
    site.own(root)
    process = site.start(script, *arguments, root=root, PATH=path)
    for _ in until(30):
        if (root / "hangs").exists():
            break
    yield
    os.killpg(process.pid, 9)
    process.communicate(timeout=30)


def test_what_a_killed_dump_left_is_removed_by_the_next_one(backed_up: Site, fresh: Path) -> None:
    with hung(backed_up, fresh, hanging(fresh, "pg_dump"), "dump"):
        assert [name.endswith(".partial") for name in dumps(fresh)] == [True]
        assert "another dump is at work" in backed_up.refused("dump", root=fresh)
    assert len(dumps(fresh)) == 1
    made = backed_up.made("dump", root=fresh)
    assert dumps(fresh) == [made.name, f"{made.name}.sha256"]


def test_what_a_killed_base_backup_left_is_removed_by_the_next_one(backed_up: Site, fresh: Path) -> None:
    with hung(backed_up, fresh, hanging(fresh, "pg_verifybackup"), "base-backup"):
        assert "another base-backup, or verify, is at work" in backed_up.refused("base-backup", root=fresh)
    assert backups(fresh) == []
    assert os.listdir(fresh / "base") == [".made"]
    made = backed_up.made("base-backup", root=fresh)
    assert backups(fresh) == [made]
    assert os.listdir(fresh / "base") == [made.parent.name]


def test_what_a_killed_restore_left_is_removed_by_the_next_one(backed_up: Site, kept: Path) -> None:
    arguments = ["restore", "--to", "latest", "--into", str(kept / "restored")]
    with hung(backed_up, kept, hanging(kept, "pg_verifybackup"), *arguments):
        assert not (kept / "restored").exists()
    assert (kept / "restored.partial").exists()
    backed_up.made(*arguments, root=kept, DATABASE_URL="")
    assert (kept / "restored" / "recovery.signal").exists()
    assert not (kept / "restored.partial").exists()


def test_a_dump_of_a_server_that_is_away_fails_and_keeps_what_there_is(backed_up: Site, fresh: Path) -> None:
    made = backed_up.made("dump", root=fresh)
    away = f"postgresql://orchestrator:secret@127.0.0.1:{free_port()}/orchestrator"
    told = backed_up.refused("dump", root=fresh, DATABASE_URL=away)
    assert "the database cannot be reached" in told
    assert "secret" not in told
    assert dumps(fresh) == [made.name, f"{made.name}.sha256"]


@pytest.mark.parametrize(
    ("script", "env", "told"),
    [
        ("dump", {"BACKUP_DIRECTORY": "/nowhere"}, "BACKUP_DIRECTORY: /nowhere is no directory; mount the volume"),
        ("dump", {"BACKUP_COMPRESSION": "lzma"}, "BACKUP_COMPRESSION: expected gzip or zstd, got lzma"),
        ("dump", {"BACKUP_KEEP_DAYS": "0"}, "BACKUP_KEEP_DAYS: expected a number from 1 to 9999, got 0"),
        ("dump", {"DATABASE_URL": "host=one password=hush"}, "DATABASE_URL: expected postgresql://USER@HOST:PORT/"),
        ("dump", {"DATABASE_URL_FILE": "/nowhere"}, "DATABASE_URL and DATABASE_URL_FILE are both set"),
        ("verify", {"DATABASE_URL": "", "DATABASE_URL_FILE": "/nowhere"}, "DATABASE_URL_FILE: cannot read the file"),
        ("base-backup", {"BACKUP_KEEP_CHAINS": "x"}, "BACKUP_KEEP_CHAINS: expected a number from 1 to 9999, got x"),
        ("archive-wal", {"BACKUP_DIRECTORY": "/nowhere"}, "expected two arguments, %p %f"),
    ],
)
def test_a_wrong_setting_is_named(backed_up: Site, script: str, env: dict[str, Any], told: str) -> None:
    said = backed_up.refused(script, **env)
    assert told in said
    assert "hush" not in said


def test_a_login_needs_no_more_rights_than_the_guide_says(backed_up: Site, fresh: Path) -> None:
    with psycopg.connect(backed_up.url, autocommit=True) as admin:
        admin.execute("create role night login replication password 'secret'")
        admin.execute("grant pg_read_all_data, orchestrator_ops to night")
    server = urlsplit(backed_up.url)
    url = f"postgresql://night:secret@{server.hostname}:{server.port}/orchestrator"
    for script in ("dump", "base-backup", "base-backup"):
        backed_up.made(script, root=fresh, DATABASE_URL=url)
    backed_up.archive_all()
    backed_up.made("verify", DATABASE_URL=url)
    assert [last(backed_up, kind)[0] for kind in ("logical", "base", "verify")] == [None] * 3


# Physical backups


def test_an_incremental_backup_is_smaller_and_a_new_chain_ends_an_old_one(backed_up: Site, fresh: Path) -> None:
    first, second = (backed_up.made("base-backup", root=fresh) for _ in range(2))
    assert first.parent == second.parent
    assert last(backed_up, "base")[1] < sum(path.stat().st_size for path in first.rglob("*") if path.is_file()) / 2
    chains = {first.parent.name}
    for _ in range(2):
        chains.add(backed_up.made("base-backup", "--full", root=fresh).parent.name)
    assert len(chains) == 3
    assert sorted(path.name for path in (fresh / "base").iterdir()) == sorted(chains)[1:]


def test_a_backup_is_full_when_the_one_before_it_cannot_be_built_upon(backed_up: Site, kept: Path) -> None:
    newest = backups(kept)[-1]
    (newest / "backup_manifest").unlink()
    done = backed_up.run("base-backup", root=kept)
    assert done.returncode == 0, done.stderr
    assert "an incremental backup is not possible, so this one is full" in done.stderr
    assert Path(done.stdout.strip()).parent != newest.parent


def test_a_physical_backup_that_fills_the_disk_fails_and_leaves_the_others(backed_up: Site, kept: Path) -> None:
    before = backups(kept)
    told = backed_up.refused("base-backup", "--full", root=kept, PATH=full(kept, 1 << 20))
    assert "base-backup: pg_basebackup failed: " in told
    assert backups(kept) == before
    assert [path for path in (kept / "base").iterdir() if path.name.startswith(".")] == []
    assert last(backed_up, "base")[0].startswith("pg_basebackup failed: ")


def test_backups_that_are_complete_within_one_second_have_names_of_their_own(backed_up: Site, fresh: Path) -> None:
    programs = fresh / "programs"
    programs.mkdir()
    real = find_installation().bin_dir / "psql"
    # The clock of the database stands still for as long as the first two names are asked for.
    (programs / "psql").write_text(
        f"""#!/bin/bash
        input=$(cat)
        case $input in *YYYYMMDD*) echo >>{fresh}/asked; set -- $(wc -l <{fresh}/asked)
            echo 2026112{{}}T000000Z | sed "s/{{}}/$(($1 < 4 ? 1 : $1))/"; exit ;; esac
        exec {real} "$@" <<<"$input"
        """
    )
    (programs / "psql").chmod(0o755)
    backed_up.own(fresh)
    path = f"{programs}:{find_installation().bin_dir}:{os.environ['PATH']}"
    first, second = (backed_up.made("base-backup", root=fresh, PATH=path, BACKUP_CHAIN_DAYS="9999") for _ in range(2))
    assert backups(fresh) == [first, second]
    assert (first.name, second.name) == ("20261121T000000Z", "20261124T000000Z")
    assert not (first / ".made").exists()


def test_wal_before_the_first_chain_that_is_kept_is_deleted(backed_up: Site, kept: Path) -> None:
    assert len(segments(kept)) > 2
    backed_up.made("base-backup", "--full", root=kept, BACKUP_KEEP_CHAINS="1")
    [only] = backups(kept)
    begins = re.search(r"file ([0-9A-F]{24})", (only / "backup_label").read_text())
    assert begins is not None
    assert [path.name for path in segments(kept) if path.name[:24] < begins[1]] == []


# The archive of WAL


@pytest.fixture
def segment(backed_up: Site, fresh: Path) -> Path:
    path = fresh / "segment"
    path.write_bytes(b"one segment" * 1000)
    backed_up.own(path)
    return path


def test_a_segment_is_archived_once_and_never_replaced(backed_up: Site, fresh: Path, segment: Path) -> None:
    name = "000000010000000000000001"
    for compression in ("gzip", "zstd"):
        tool(compression)
        assert backed_up.run("archive-wal", str(segment), name, root=fresh, BACKUP_COMPRESSION=compression).stderr == ""
    assert os.listdir(fresh / "wal") == [f"{name}.gz"]
    before = (fresh / "wal" / f"{name}.gz").read_bytes()
    segment.write_bytes(b"another")
    told = backed_up.refused("archive-wal", str(segment), name, root=fresh)
    assert "exists with another content: two servers may share this archive" in told
    assert (fresh / "wal" / f"{name}.gz").read_bytes() == before
    into = fresh / "back"
    backed_up.made("restore-wal", name, str(into), root=fresh)
    assert into.read_bytes() == b"one segment" * 1000


def test_a_segment_that_does_not_fit_is_not_archived(backed_up: Site, fresh: Path, segment: Path) -> None:
    segment.write_bytes(os.urandom(1 << 20))
    script = fresh / "limited"
    script.write_text(f'#!/bin/bash\ntrap "" XFSZ\nulimit -f 100\nexec {backed_up.scripts}/archive-wal "$@"\n')
    script.chmod(0o755)
    backed_up.own(fresh)
    shutil.copy(script, backed_up.scripts / "limited")
    backed_up.own(backed_up.scripts)
    backed_up.refused("limited", str(segment), "000000010000000000000001", root=fresh)
    assert os.listdir(fresh / "wal") == []


def test_a_missing_segment_ends_the_recovery_and_a_broken_one_stops_the_server(
    backed_up: Site, fresh: Path, segment: Path
) -> None:
    one, other = "000000010000000000000001", "000000010000000000000002"
    backed_up.made("archive-wal", str(segment), one, root=fresh)
    into = str(fresh / "back")
    assert backed_up.run("restore-wal", other, into, root=fresh).returncode == 1
    cut_in_half(fresh / "wal" / f"{one}.gz")
    assert backed_up.run("restore-wal", one, into, root=fresh).returncode == 200
    shutil.rmtree(fresh / "wal")
    assert backed_up.run("restore-wal", one, into, root=fresh).returncode == 200
    assert not Path(into).exists()


def test_wal_that_cannot_be_archived_is_told_of_until_it_is(backed_up: Site) -> None:
    with Client(backed_up.url) as client:
        client.rows("alter system set archive_command = 'false'")
        try:
            client.rows("select pg_reload_conf()")
            client.rows("select pg_logical_emit_message(false, 'tests', 'x')")
            client.rows("select pg_switch_wal()")
            problem = "select problem from orchestrator.backups() where kind = 'wal'"
            for _ in until(60):
                if client.value(problem) is not None:
                    break
            assert client.value(problem).startswith("archive_command failed for 0000")
            doctor = invoke("doctor", env={"DATABASE_URL": backed_up.url, "COLUMNS": "400"})
            assert "archived WAL: archive_command failed for 0000" in doctor.stdout
            assert doctor.exit_code == 1
        finally:
            client.rows("alter system reset archive_command")
            client.rows("select pg_reload_conf()")
        backed_up.archive_all()
        assert client.value(problem) is None


# Verification


def test_what_is_whole_passes_the_verification(backed_up: Site, kept: Path) -> None:
    backed_up.made("verify", root=kept)
    assert last(backed_up, "verify")[0] is None


def break_dump(root: Path) -> Path:
    [dump] = (root / "dumps").glob("*.dump")
    cut_in_half(dump)
    return dump


def lose_dump(root: Path) -> Path:
    [dump] = (root / "dumps").glob("*.dump")
    dump.unlink()
    return dump


def lose_checksum(root: Path) -> Path:
    [dump] = (root / "dumps").glob("*.dump")
    Path(f"{dump}.sha256").unlink()
    return dump


def break_base(root: Path) -> Path:
    backup = backups(root)[0]
    cut_in_half(max((backup / "base").rglob("*"), key=lambda path: path.stat().st_size))
    return backup


def lose_a_file_of_a_base(root: Path) -> Path:
    backup = backups(root)[0]
    (backup / "global" / "pg_control").unlink()
    return backup


def lose_an_incremental(root: Path) -> Path:
    backup = backups(root)[1]
    shutil.rmtree(backup)
    return backup.parent


def break_segment(root: Path) -> Path:
    cut_in_half(segments(root)[1])
    return segments(root)[1]


def lose_segment(root: Path) -> Path:
    gone = segments(root)[1]
    gone.unlink()
    return gone.with_suffix("")


def lose_last_segment(root: Path) -> Path:
    gone = segments(root)[-1]
    gone.unlink()
    return gone.with_suffix("")


def lose_everything(root: Path) -> Path:
    for name in ("dumps", "base", "wal"):
        shutil.rmtree(root / name)
    return root


@pytest.mark.parametrize(
    "damage",
    [
        break_dump, lose_dump, lose_checksum, break_base, lose_a_file_of_a_base, lose_an_incremental, break_segment,
        lose_segment, lose_last_segment, lose_everything,
    ],
)  # fmt: skip
def test_what_is_broken_or_missing_is_noticed_before_it_is_needed(backed_up: Site, kept: Path, damage: Any) -> None:
    what = damage(kept).name
    told = backed_up.refused("verify", root=kept)
    assert what in told
    assert " wrong, such as: " in last(backed_up, "verify")[0]


def test_backups_are_verified_without_the_database_too(backed_up: Site, kept: Path) -> None:
    away = f"postgresql://127.0.0.1:{free_port()}/orchestrator"
    what = break_dump(kept).name
    told = backed_up.refused("verify", root=kept, DATABASE_URL=away)
    assert "the database cannot be reached, so this run is not recorded" in told
    assert f"{what}: its content is not what was written" in told


# Restores that are refused


def refused_restore(site: Site, root: Path, to: str = "latest", into: str = "restored") -> str:
    target = root / into
    told = site.refused("restore", "--to", to, "--into", str(target), root=root, DATABASE_URL="")
    assert not (target / "PG_VERSION").exists()
    assert not target.with_name(f"{target.name}.partial").exists()
    return told


def test_a_restore_onto_files_is_refused_and_touches_nothing(backed_up: Site, kept: Path) -> None:
    (kept / "restored").mkdir()
    (kept / "restored" / "file").write_text("x")
    assert "restored is not empty; name a new directory" in refused_restore(backed_up, kept)
    assert (kept / "restored" / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("2020-01-01 00:00:00+00", "is before the first backup, which was complete at 20"),
        ("2999-01-01 00:00:00+00", "is in the future"),
        ("2026-01-01 00:00:00", "expected latest or a time with its zone"),
        ("yesterday", "expected latest or a time with its zone"),
        ("'; drop table x; --+00", "expected latest or a time with its zone"),
        ("", "expected --to latest or --to TIME"),
    ],
)
def test_a_restore_to_no_possible_moment_is_refused(backed_up: Site, kept: Path, to: str, told: str) -> None:
    assert told in refused_restore(backed_up, kept, to)


def test_a_restore_to_the_latest_moment_is_refused_when_a_segment_is_missing(backed_up: Site, kept: Path) -> None:
    gone = segments(kept)[-2]
    newest = (backups(kept)[-1] / "backup_label").read_text()
    for backup in backups(kept)[1:]:  # the segment is needed from the first backup on
        if gone.name[:24] not in newest:
            shutil.rmtree(backup)
    gone.unlink()
    told = refused_restore(backed_up, kept)
    assert f"segment {gone.name[:24]} is missing" in told
    assert "restore to a moment before it" in told


def test_a_restore_from_a_broken_or_incomplete_chain_is_refused(backed_up: Site, kept: Path) -> None:
    lose_an_incremental(kept)
    assert "pg_combinebackup failed" in refused_restore(backed_up, kept)


def test_a_restore_without_any_backup_is_refused(backed_up: Site, fresh: Path) -> None:
    assert "holds no backup" in refused_restore(backed_up, fresh)


def test_a_restore_as_root_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("this user is not root")
    done = subprocess.run(
        [SCRIPTS / "restore", "--to", "latest", "--into", "/nowhere/new"],
        env={"PATH": os.environ["PATH"], "BACKUP_DIRECTORY": "/tmp"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "run this as the account that runs PostgreSQL" in done.stderr
