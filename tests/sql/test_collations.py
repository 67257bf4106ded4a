"""Case is folded alike whatever locale the database has: in a Turkish one lower('I') is no i."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from orchestrator.database.migrate import migrate
from orchestrator.events.destination_name import destination_name
from tests.support.databases import Databases, sibling
from tests.support.sql_client import Client

_FOLDS = re.compile(r"(?:\b(?:lower|upper|initcap|casefold)\s*(?=\()|~~?\*|\bilike\b)", re.IGNORECASE)


def _argument(text: str) -> str:
    """The parenthesis that a text begins with."""
    depth = 0
    for end, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:end]
    return text


def test_no_function_folds_case_by_the_locale_of_the_database(client: Client) -> None:
    definitions = client.rows(
        """select proname::text, pg_get_functiondef(oid) from pg_proc
        where pronamespace = 'orchestrator'::regnamespace and prokind = 'f'"""
    )
    folds = [
        (name, fold.group(), _argument(text[fold.end() :]))
        for name, definition in definitions
        for text in [re.sub(r"--.*", "", definition)]
        for fold in _FOLDS.finditer(text)
    ]
    assert {"destination_name", "as_destination", "list_dead_letters"} <= {name for name, _, _ in folds}
    assert [each for each in folds if "collate" not in each[2].lower()] == []


@pytest.fixture
def turkish(databases: Databases) -> Iterator[Client]:
    with databases.empty() as url, psycopg.connect(url, autocommit=True) as connection:
        name = f"{connection.info.dbname}_tr"
        create = "create database {} locale_provider libc locale 'tr_TR.UTF-8' template template0"
        try:
            connection.execute(sql.SQL(create).format(sql.Identifier(name)))
        except psycopg.errors.WrongObjectType:
            pytest.skip("the server's system lacks the locale tr_TR.UTF-8")
        try:
            migrate(sibling(url, name))
            with Client(sibling(url, name)) as client:
                yield client
        finally:
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def test_a_turkish_database_knows_the_same_destinations(turkish: Client) -> None:
    assert turkish.value("select lower('I')") == "ı"
    url = "https://HOOKS.IO:443/Hit"
    assert turkish.value("select orchestrator.destination_name('HTTP', %s)", url) == "hooks.io"
    assert destination_name("HTTP", url) == "hooks.io"
    for name in ("HOOKS.IO", "HTTPS://HOOKS.IO/HIT"):
        assert turkish.value("select name from orchestrator.configure_destination(%s, 5)", name) == "hooks.io"
    assert turkish.value("select name from orchestrator.configure_destination('KAFKA:ITEMS', 5)") == "kafka:ITEMS"
    turkish.rows("""select orchestrator.configure_destination('hooks.io', p_secret_headers => '{"X-ID": "key-1"}')""")
    named = "select secret_headers from orchestrator.destination where name = 'hooks.io'"
    assert turkish.value(named) == {"x-id": "key-1"}


@pytest.mark.parametrize(("reason", "wanted"), [("TIMED OUT", "timed out"), ("Überlastet", "ÜBER")])
def test_dead_letters_are_found_by_their_reason_in_any_case(client: Client, reason: str, wanted: str) -> None:
    [event] = client.schedule_many(1)
    client.rows(
        """insert into orchestrator.dead_letter (event_id, scheduled_at, died_at, attempts, reason)
        select id, scheduled_at, orchestrator.now(), 1, %s from orchestrator.event where id = %s""",
        reason,
        event,
    )
    found = client.column("select orchestrator.list_dead_letters(p_reason => %s) ->> 'id'", wanted)
    assert found == [str(event)]
