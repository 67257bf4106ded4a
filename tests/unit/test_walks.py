"""The walks and the rules in docs/explanation name files and functions; both are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

EXPLANATION = Path(__file__).parents[2] / "docs" / "explanation"
_STEP = re.compile(r"^\| \d+ \| \[[^\]]+\]\(([^)]+)\) \| ([^|]+) \|", re.MULTILINE)
_NAME = re.compile(r"`([\w.]+)`")
_LINKED_NAME = re.compile(r"\[`(\w+)`\]\(([^)]+)\)")


def steps() -> Iterator[tuple[str, str]]:
    for link, names in _STEP.findall((EXPLANATION / "architecture.md").read_text(encoding="utf-8")):
        for name in _NAME.findall(names):
            yield link, name


def rules() -> dict[str, str]:
    """The rules by their titles."""
    sections = (EXPLANATION / "rules.md").read_text(encoding="utf-8").split("\n### ")[1:]
    return dict(section.split("\n", 1) for section in sections)


def is_defined(link: str, name: str) -> bool:
    text = (EXPLANATION / link).read_text(encoding="utf-8")
    return re.search(rf"\b(?:class|def|function) (?:orchestrator\.)?{name}\b", text) is not None


@pytest.mark.parametrize(("link", "name"), list(steps()))
def test_a_step_of_a_walk_names_a_function_that_its_file_defines(link: str, name: str) -> None:
    assert [part for part in name.split(".") if not is_defined(link, part)] == []


@pytest.mark.parametrize("rule", rules())
def test_a_rule_names_what_keeps_it_and_a_test_that_proves_it(rule: str) -> None:
    text = rules()[rule]
    names = _LINKED_NAME.findall(text)
    assert "- Kept by " in text
    assert [name for name, _ in names if name.startswith("test_")] != []
    assert [(link, name) for name, link in names if not is_defined(link, name)] == []
