"""Pieces of Markdown that every page is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def page(title: str, introduction: str, *blocks: str) -> str:
    return "\n\n".join((f"# {title}", "<!-- Written by `make docs`; do not edit. -->", introduction, *blocks)) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def fenced(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"


def code(text: str) -> str:
    """Text in backticks, of which it may hold some itself."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def plain(text: str) -> str:
    """Text on one line that is no Markdown, and is not to be read as such."""
    return re.sub(r"([*\\]|<(?=[A-Za-z/!?]))", r"\\\1", " ".join(text.split()))


def sentence(text: str) -> str:
    """The text with a full stop."""
    return text if not text or text[-1] in ".?!" else text + "."
