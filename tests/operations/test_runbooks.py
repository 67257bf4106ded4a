"""Runbooks: what they tell people to type at night works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import psycopg
import pytest

from orchestrator.cli import main
from tests.support.processes import ROOT

RUNBOOKS = sorted((ROOT / "ops/runbooks").glob("*.md"))


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def parse(command: click.Command, arguments: list[str]) -> None:
    """Parses a command line as the program would, down to the last command's options; runs nothing."""
    context = command.make_context("orchestrator", arguments)
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command = found
        context = command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_the_sql_of_a_runbook_runs_on_a_migrated_database(path: Path, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for block in blocks(path, "sql"):
            connection.execute(block.encode())


def test_sql_that_cannot_run_would_be_found(database_url: str, tmp_path: Path) -> None:
    page = tmp_path / "Wrong.md"
    page.write_text("```sql\nselect no_such_column from orchestrator.timer;\n```\n", encoding="utf-8")
    with psycopg.connect(database_url, autocommit=True) as connection, pytest.raises(psycopg.errors.UndefinedColumn):
        connection.execute(blocks(page, "sql")[0].encode())


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_the_commands_of_a_runbook_exist_with_these_options(path: Path) -> None:
    for block in blocks(path, "sh"):
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "orchestrator", line
            parse(main, arguments)


@pytest.mark.parametrize(
    "line", ["no-such-command", "stats --no-such-option", "destinations show", "stats --from never"]
)
def test_a_command_that_does_not_exist_would_be_found(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse(main, shlex.split(line))


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_settings_and_commands_in_the_text_of_a_runbook_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    of_others = {"PID", "GID", "NAME", "FILE", "DATABASE_READ_URL", "SERVER_SSL_CERT_FILE", "ERROR"}
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})(?:=\S*)?`", text)) - of_others
    assert {name for name in named if f"`{name}`" not in known} == set()
    for command in re.findall(r"`orchestrator ((?:[a-z][a-z-]* ?)+)`", text):
        if command.split()[0] not in ("dispatch", "listen"):  # names of sessions, too
            parse(main, command.split())
