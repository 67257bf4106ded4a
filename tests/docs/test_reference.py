"""docs/reference says what the program does: each page is as `make docs` would write it."""

from __future__ import annotations

import difflib

from docs.generate import DIRECTORY, pages


def test_the_pages_of_the_reference_are_current(database_url: str) -> None:
    stale: list[str] = []
    for name, wanted in pages(database_url).items():
        found = (DIRECTORY / name).read_text(encoding="utf-8")
        stale += difflib.unified_diff(found.splitlines(), wanted.splitlines(), f"{name}, as it is", name, "", "", 0, "")
    assert not stale, "\n".join(["docs/reference is stale, run: make docs", *stale[:40]])


def test_the_reference_holds_no_page_that_nothing_writes(database_url: str) -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == pages(database_url).keys()
