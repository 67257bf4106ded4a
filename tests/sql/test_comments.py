"""psql's \\d+ and \\df+ are the manual: everything has a comment, and every function is well formed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.sql_client import Client
from tests.support.sql_files import SQL_FILES

MAX_SENTENCES, MAX_WORDS = 2, 25
_COMMENT = re.compile(r"^comment on (\w+ [^']+?)\s+is\s+((?:'(?:[^']|'')*'\s*)+);", re.MULTILINE)
_LITERAL = re.compile(r"'((?:[^']|'')*)'")


def _comments(file: Path) -> dict[str, str]:
    """The comment that a file gives to each object."""
    text = file.read_text(encoding="utf-8")
    found = {
        re.sub(r"\s+", " ", each[1]): "".join(_LITERAL.findall(each[2])).replace("''", "'")
        for each in _COMMENT.finditer(text)
    }
    assert len(found) == len(re.findall(r"^comment on ", text, re.MULTILINE)), (
        f"{file}: not every comment is understood"
    )
    return found


# What each object has in the end: files are applied in this order.
COMMENTS = {each: text for file in SQL_FILES for each, text in _comments(ROOT / file).items()}


@pytest.mark.parametrize("what", COMMENTS, ids=list(COMMENTS))
def test_a_comment_has_two_short_sentences_at_most(what: str) -> None:
    sentences = re.split(r"(?<=[.!?])\s+", COMMENTS[what])
    assert len(sentences) <= MAX_SENTENCES
    assert [sentence for sentence in sentences if len(sentence.split()) > MAX_WORDS] == []


def test_every_table_and_view_has_a_comment(client: Client) -> None:
    missing = client.column(
        """select c.relname from pg_class c where c.relnamespace = 'orchestrator'::regnamespace
        and c.relkind in ('r', 'p', 'v', 'm') and not c.relispartition and obj_description(c.oid) is null"""
    )
    assert missing == []


def test_every_column_of_a_table_or_a_type_has_a_comment(client: Client) -> None:
    missing = client.column(
        """select c.relname || '.' || a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid
        where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p', 'c') and a.attnum > 0
          and not c.relispartition and not a.attisdropped and col_description(c.oid, a.attnum) is null"""
    )
    assert missing == []


def test_every_column_of_a_view_that_no_table_explains_has_a_comment(client: Client) -> None:
    missing = client.column(
        """select c.relname || '.' || a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid
        where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'v' and a.attnum > 0
          and col_description(c.oid, a.attnum) is null
          and not exists (select from pg_attribute b join pg_class t on t.oid = b.attrelid
            where t.relnamespace = c.relnamespace and t.relkind in ('r', 'p') and b.attname = a.attname)
        order by 1"""
    )
    assert missing == []


def test_every_function_has_a_comment(client: Client) -> None:
    missing = client.column(
        """select p.oid::regprocedure::text from pg_proc p
        where p.pronamespace = 'orchestrator'::regnamespace and obj_description(p.oid, 'pg_proc') is null"""
    )
    assert missing == []


def test_every_function_compiles(client: Client) -> None:
    """Migrations do not look into the bodies, since they create functions before what these use."""
    checked = client.rows(
        """select p.oid::regprocedure, case l.lanname when 'plpgsql' then plpgsql_validator(p.oid)::text
          when 'sql' then fmgr_sql_validator(p.oid)::text else 'unexpected' end
        from pg_proc p join pg_language l on l.oid = p.prolang where p.pronamespace = 'orchestrator'::regnamespace"""
    )
    assert len(checked) > 20
    assert [name for name, answer in checked if answer == "unexpected"] == []
