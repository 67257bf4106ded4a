"""``config``: the settings in force, and a table of all settings."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator import file_descriptors
from orchestrator.api.server import certificate
from orchestrator.cli.support import console, environ, json_option, plain, print_json
from orchestrator.database.session import SESSION, Session
from orchestrator.settings import DATABASE_PARTS, SETTINGS, Settings
from orchestrator.settings.env_file import read_env_file
from orchestrator.settings.secret_files import SUFFIX
from orchestrator.settings.table import Row, render_markdown_table, settings_table


@click.group()
def config() -> None:
    """Check and document the settings."""


@config.command()
@click.option(
    "--env-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Check the variables in this file instead of those of the environment.",
)
@json_option
def check(env_file: Path | None, as_json: bool) -> None:
    """Print the settings in force, with secrets masked; exit with 2 if one is wrong.

    Below the table, prints the parameters of every connection to the database, and doubtful settings that are no
    error: likely typos, and variables without effect.

    With --env-file, only the variables in the file count, so that every machine gives the same answer. A secret whose
    file is missing on this machine is then a notice, not an error.
    """
    elsewhere = env_file is not None
    given = environ() if env_file is None else read_env_file(env_file)
    rows = settings_table(given, elsewhere=elsewhere)
    ours = Settings.from_env(given, elsewhere=elsewhere)
    session = Session.of(ours.database_url, "…")
    connection = {**session.parameters, "options": session.options}
    pair = None if elsewhere else certificate.load(ours)
    doubts = [] if pair is None or (text := certificate.doubt(pair)) is None else [text]
    shortages = [] if elsewhere else file_descriptors.shortages(ours, file_descriptors.limit(hard=True))
    notices = [*ours.notices, *map(_overruled, session.overruled.items()), *doubts, *shortages]
    if as_json:
        settings = {row.name: {"value": row.value, "source": row.source, "default": row.default} for row in rows}
        print_json({"settings": settings, "connection": connection, "notices": notices})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for row in rows:
        value = plain(_no_value(row) if row.value is None else row.value)
        style = "dim" if row.source == "default" else ""
        table.add_row(row.name, Text(value, overflow="fold"), row.source, style=style)
    out = console()
    out.print(table)
    for name, value in connection.items():
        out.print(Text(f"every connection to the database: {name}={plain(value)}", style="dim", overflow="fold"))
    for notice in notices:
        out.print(Text(f"! {plain(notice)}", style="yellow"))


def _no_value(row: Row) -> str:
    return f"({'in a file that is not here' if row.source.endswith(SUFFIX) else row.default})"


def _overruled(setting: tuple[str, str]) -> str:
    name, value = setting
    return f"DATABASE_URL: {name}={value} in its options has no effect: the program sets {SESSION[name] or 'nothing'}"


@config.command()
@json_option
def table(as_json: bool) -> None:
    """Print all settings as the Markdown table of docs/reference."""
    if not as_json:
        click.echo(render_markdown_table())
        return
    print_json(
        [
            {
                "names": setting.names,
                "about": setting.about,
                "takes": setting.kind.expects,
                "default": setting.default,
                "secret": setting.secret,
                "file_names": setting.file_names,
            }
            for setting in (*SETTINGS.values(), *DATABASE_PARTS.values())
        ]
    )
