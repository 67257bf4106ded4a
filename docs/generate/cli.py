"""docs/reference/cli.md, from the commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from docs.generate import markdown
from orchestrator.cli import COMMANDS, main

_INTRODUCTION = """\
`orchestrator COMMAND --help` prints the same. [Settings](settings.md) are environment variables. Exit codes: 0 done,
1 failed or refused, 2 wrong usage or settings."""
# Click's mark of a paragraph that keeps its lines.
_VERBATIM = "\b\n"


def page() -> str:
    blocks = []
    root = click.Context(main, info_name="orchestrator")
    for section, commands in COMMANDS.items():
        blocks.append(f"## {section}")
        for name in commands:
            blocks += _command(main, name, root)
    return markdown.page("Command line", _INTRODUCTION, *blocks)


def _command(group: click.Group, name: str, parent: click.Context) -> Iterator[str]:
    command = group.get_command(parent, name)
    if command is None:
        raise LookupError(f"{parent.command_path} lists {name}, and has no such command")
    context = click.Context(command, info_name=name, parent=parent)
    yield f"### {context.command_path}"
    yield markdown.fenced(" ".join((context.command_path, *command.collect_usage_pieces(context))))
    for paragraph in re.split(r"\n{2,}", inspect.cleandoc(command.help or "")):
        yield _paragraph(paragraph)
    options = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
    if rows := [(markdown.code(names), markdown.plain(about)) for names, about in options if "--help" not in names]:
        yield markdown.table(("option", "what it does"), rows)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            yield from _command(command, inner, context)


def _paragraph(text: str) -> str:
    return markdown.fenced(text.removeprefix(_VERBATIM)) if text.startswith(_VERBATIM) else markdown.plain(text)
