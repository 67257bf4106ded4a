"""What the documents point at is there, and those that are read first are short."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.processes import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "ops/**/*.md", "sql/**/*.md")
    for path in ROOT.glob(pattern)
)
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
_FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
_ANCHOR = re.compile(r"<a (?:id|name)=\"([^\"]+)\"")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
_FILE = re.compile(r"(?:\.ci|docs|examples|ops|orchestrator|sql|tests)/[\w./-]*")


def prose(path: Path) -> str:
    return _FENCED.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The fragments of a document's headings, as GitHub makes them, and those that it names itself."""
    seen: Counter[str] = Counter()
    found = set(_ANCHOR.findall(prose(path)))
    for heading in _HEADING.findall(prose(path)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(document: Path) -> Iterator[str]:
    for link in _LINK.findall(_CODE.sub("", prose(document))):
        if _ELSEWHERE.match(link):
            continue
        path, _, fragment = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.is_relative_to(ROOT) or not target.exists():
            yield f"{link}: there is no such file"
        elif fragment and target.suffix == ".md" and fragment not in anchors(target):
            yield f"{link}: {target.relative_to(ROOT)} has no such heading"


@each_document
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    assert list(broken(document)) == []


@each_document
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    named = [code for _, code in _CODE.findall(prose(document)) if _FILE.fullmatch(code)]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("document", "most"), [("README.md", 1000), ("sql/README.md", 900)])
def test_a_document_that_is_read_first_is_short(document: str, most: int) -> None:
    assert len((ROOT / document).read_text(encoding="utf-8").split()) <= most
