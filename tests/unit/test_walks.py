"""The walks through the code in docs/explanation name files and functions; both are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

EXPLANATION = Path(__file__).parents[2] / "docs" / "explanation"
_STEP = re.compile(r"^\| \d+ \| \[[^\]]+\]\(([^)]+)\) \| ([^|]+) \|", re.MULTILINE)
_NAME = re.compile(r"`([\w.]+)`")


def steps() -> Iterator[tuple[str, str]]:
    for link, names in _STEP.findall((EXPLANATION / "architecture.md").read_text(encoding="utf-8")):
        for name in _NAME.findall(names):
            yield link, name


@pytest.mark.parametrize(("link", "name"), list(steps()))
def test_a_step_of_a_walk_names_a_function_that_its_file_defines(link: str, name: str) -> None:
    text = (EXPLANATION / link).read_text(encoding="utf-8")
    for part in name.split("."):
        assert re.search(rf"\b(?:class|def|function) (?:orchestrator\.)?{part}\b", text), f"{link}: no {part}"
