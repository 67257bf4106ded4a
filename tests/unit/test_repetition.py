"""Nothing is written twice: no six lines in a row of the program stand in two places."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.processes import ROOT

LINES = 6
_SAYS_NOTHING = re.compile(r"[\W_]*|#.*|try:|else:|finally:|raise|return|pass")


def lines_that_do_something(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each; imports, signatures, docstrings and lone words are none."""
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import() | ast.ImportFrom():
                skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                skipped.update(range(node.lineno, node.body[0].lineno))
            case ast.Expr(value=ast.Constant(value=str())):
                skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(text.splitlines(), 1):
        if number not in skipped and not _SAYS_NOTHING.fullmatch(line.strip()):
            yield number, line.strip()


def repeated(paths: Iterable[Path]) -> list[str]:
    """Pairs of places whose next six lines are the same; a longer run has a pair for each of its lines."""
    first: dict[tuple[str, ...], str] = {}
    found = []
    for path in paths:
        said = list(lines_that_do_something(path))
        for start in range(len(said) - LINES + 1):
            place = f"{path.relative_to(ROOT)}:{said[start][0]}"
            before = first.setdefault(tuple(line for _, line in said[start : start + LINES]), place)
            if before != place:
                found.append(f"{before} ~ {place}")
    return found


def test_no_six_lines_of_the_program_stand_twice() -> None:
    assert repeated(sorted((ROOT / "orchestrator").rglob("*.py"))) == []
