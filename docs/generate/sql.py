"""docs/reference/sql.md, from the catalog of a migrated database; sql/ says only which file an object is in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import namedtuple_row

from docs.generate import markdown

_SQL = Path(__file__).parents[2] / "sql"
_INTRODUCTION = """\
Everything is in the schema `orchestrator`, and psql's `\\d+` and `\\df+` show the same comments. A client connects as a
member of one of five roles: `orchestrator_submit`, `orchestrator_ingest`, `orchestrator_dispatch`,
`orchestrator_read` and `orchestrator_ops`; here they stand without the prefix. What names no role is called by other
functions alone, or by the owner. [sql/README.md](../../sql/README.md) is the map."""
_VIEWS = "A column without an explanation is the table's column of that name."
_COMMENT = re.compile(r"^comment on (?:function|table|view|type) (orchestrator\.\w+(?:\([^)]*\))?)\s+is", re.MULTILINE)
_ROLES = """(select string_agg(substr(r.rolname, length('orchestrator_') + 1), ', ' order by r.rolname)
    from aclexplode({acl}) a join pg_roles r on r.oid = a.grantee
    where r.rolname like 'orchestrator\\_%%' and a.privilege_type = '{privilege}')"""
_RELATIONS = f"""
select c.oid, c.relname as name, c.relkind as kind
  , coalesce(obj_description(c.oid, 'pg_class'), obj_description(c.reltype, 'pg_type')) as about
  , {_ROLES.format(acl="c.relacl", privilege="SELECT")} as roles
from pg_class c
where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p', 'v', 'c') and not c.relispartition
order by c.relname collate "C"
"""  # noqa: S608 - made of constants
_COLUMNS = """
select a.attname as name, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull as required
  , col_description(a.attrelid, a.attnum) as about
from pg_attribute a
where a.attrelid = %s and a.attnum > 0 and not a.attisdropped
order by a.attnum
"""
_FUNCTIONS = f"""
select p.oid, p.proname as name, pg_get_function_arguments(p.oid) as arguments, pg_get_function_result(p.oid) as result
  , obj_description(p.oid, 'pg_proc') as about, {_ROLES.format(acl="p.proacl", privilege="EXECUTE")} as roles
from pg_proc p
where p.pronamespace = 'orchestrator'::regnamespace
"""  # noqa: S608 - made of constants


class _Place(NamedTuple):
    """Where an object is: a file below sql/, and how far down. Places sort as the files are applied."""

    file: str
    offset: int


def page(database_url: str) -> str:
    with psycopg.connect(database_url, row_factory=namedtuple_row) as connection:
        # Types of ours are named without the schema, and defaults look alike whatever the session's settings were.
        connection.execute("set search_path = orchestrator")
        connection.execute("set intervalstyle = postgres")
        connection.execute("set timezone = 'UTC'")
        places = dict(_places(connection))
        relations: list[Any] = connection.execute(_RELATIONS).fetchall()
        blocks: list[str] = []
        for title, kinds in (("Tables", "rp"), ("Views", "v"), ("Row types", "c")):
            if found := [relation for relation in relations if relation.kind in kinds]:
                blocks.append(f"## {title}")
                blocks += [_VIEWS] if kinds == "v" else []
                for relation in found:
                    blocks += _relation(connection, relation, places)
        blocks.append("## Functions")
        functions: list[Any] = connection.execute(_FUNCTIONS).fetchall()
        file = None
        for function in sorted(functions, key=lambda function: places[function.oid]):
            if places[function.oid].file != file:
                file = places[function.oid].file
                blocks += [f"### sql/{file}", _head(file)]
            blocks += _function(function)
    return markdown.page("SQL", _INTRODUCTION, *blocks)


def _places(connection: psycopg.Connection[Any]) -> Iterator[tuple[int, _Place]]:
    for file in sorted(path.relative_to(_SQL).as_posix() for path in _SQL.rglob("*.sql")):
        for comment in _COMMENT.finditer((_SQL / file).read_text(encoding="utf-8")):
            lookup = "select to_regprocedure(%s)::oid" if "(" in comment[1] else "select to_regclass(%s)::oid"
            [oid] = connection.execute(lookup, (comment[1],)).fetchone() or [None]
            if oid is not None:  # an older schema's that is gone has none
                yield oid, _Place(file, comment.start())


def _relation(connection: psycopg.Connection[Any], relation: Any, places: dict[int, _Place]) -> Iterator[str]:
    yield f"### {relation.name}"
    notes = [markdown.sentence(markdown.plain(relation.about or ""))]
    if relation.roles:
        notes.append(f"May be read by: {relation.roles}.")
    if relation.oid in places:
        notes.append(f"In `sql/{places[relation.oid].file}`.")
    yield " ".join(filter(None, notes))
    columns = connection.execute(_COLUMNS, (relation.oid,)).fetchall()
    rows = [
        (
            markdown.code(column.name),
            column.type + ("" if column.required or relation.kind in "vc" else ", or null"),
            markdown.plain(column.about or ""),
        )
        for column in columns
    ]
    yield markdown.table(("column", "type", "what it is"), rows)


def _head(file: str) -> str:
    """What the file says of itself: the comment that it begins with."""
    lines = (_SQL / file).read_text(encoding="utf-8").splitlines()
    return markdown.plain(" ".join(line.removeprefix("--") for line in takewhile(_is_comment, lines)))


def _is_comment(line: str) -> bool:
    return line.startswith("--")


def _function(function: Any) -> Iterator[str]:
    yield f"#### {function.name}"
    arguments = function.arguments.split(", ")
    signature = f"{function.name}({function.arguments}) returns {function.result}"
    if len(signature) > 100:
        inner = "\n  , ".join(arguments)
        signature = f"{function.name}\n  ( {inner} )\nreturns {function.result}"
    yield markdown.fenced(signature, "sql")
    about = markdown.sentence(markdown.plain(function.about))
    yield f"{about} May be called by: {function.roles}." if function.roles else about
