"""docs/reference/settings.md, from the definitions of the settings."""

from __future__ import annotations

from docs.generate import markdown
from orchestrator.settings.table import render_markdown_table

_INTRODUCTION = """\
Settings are environment variables. Of several names, the first is the one to use, and the others are read as well.
`orchestrator config check` prints the settings in force, and where each comes from.

A secret can stand in a file: `DB_PASSWORD_FILE=/run/secrets/db-password` in place of `DB_PASSWORD`. The file is read
when a process starts; one line end at its end is not part of the secret. It is an error to set both, and a file that
is missing, empty, larger than 64 KiB, or not text in UTF-8 stops the start."""


def page() -> str:
    return markdown.page("Settings", _INTRODUCTION, render_markdown_table())
