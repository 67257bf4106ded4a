"""docs/reference/settings.md, from the definitions of the settings."""

from __future__ import annotations

from docs.generate import markdown
from orchestrator.settings.table import render_markdown_table

_INTRODUCTION = """\
Settings are environment variables. Of several names, the first is the one to use, and the others are read as well.
`orchestrator config check` prints the settings in force, and where each comes from."""


def page() -> str:
    return markdown.page("Settings", _INTRODUCTION, render_markdown_table())
