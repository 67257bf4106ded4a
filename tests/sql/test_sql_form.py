"""SQL has one form: ruff knows Python alone, so this is its counterpart."""

from __future__ import annotations

import re

import pytest

from tests.support.processes import ROOT
from tests.support.sql_files import SQL_FILES

MAX_COLUMNS, MAX_COMMENT, MAX_LINES = 120, 110, 120  # the last: of a function, which is two screens
# Databases have been migrated with the texts up to this one, so these stay as they are.
FROZEN = "sql/schema/0010_delivery.sql"
FILES = SQL_FILES[SQL_FILES.index(FROZEN) + 1 :]
_FUNCTION = re.compile(r"^create or replace function orchestrator\.(\w+)\(.*?(?:\$\$;|^return [^;]+;)$", re.M | re.S)
_NOT_CODE = re.compile(r"--.*|'(?:[^']|'')*'|\"[^\"]*\"|^\\.*", re.M)


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _lengths() -> list[object]:
    return [
        pytest.param(each[0].count("\n") + 1, id=f"{name.rpartition('/')[2]}:{each[1]}")
        for name in FILES
        for each in _FUNCTION.finditer(_text(name))
    ]


@pytest.mark.parametrize("name", FILES)
def test_lines_of_sql_are_short_and_clean(name: str) -> None:
    lines = _text(name).split("\n")
    assert [(n, len(line)) for n, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS] == []
    assert [n for n, line in enumerate(lines, 1) if "\t" in line or line != line.rstrip()] == []
    assert lines[-1] == "", "it ends without a newline"
    assert lines[-2] != "", "it ends with more than one newline"


@pytest.mark.parametrize("name", FILES)
def test_comments_of_sql_are_narrow(name: str) -> None:
    lines = _text(name).split("\n")
    assert [(n, len(line)) for n, line in enumerate(lines, 1) if "-- " in line and len(line) > MAX_COMMENT] == []


@pytest.mark.parametrize("name", FILES)
def test_sql_sets_one_parameter_a_line(name: str) -> None:
    assert re.findall(r"^set \w+ = .* set \w+ = .*", _text(name), re.M) == []


@pytest.mark.parametrize("name", FILES)
def test_sql_is_in_lower_case(name: str) -> None:
    """Literals, quoted names, comments and what is psql's are not looked at."""
    assert re.findall(r"\b\w*[A-Z]\w*\b(?!')", _NOT_CODE.sub("''", _text(name))) == []


@pytest.mark.parametrize("lines", _lengths())
def test_a_sql_function_fits_on_two_screens(lines: int) -> None:
    assert lines <= MAX_LINES
