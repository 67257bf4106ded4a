"""Checks of open transactions that block other sessions."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.database.connection import BlockingConnection
from orchestrator.doctor.finding import Finding, counted, guarded, ok, problem, warning

_SHOWN = 5


def open_transaction_findings(connection: BlockingConnection) -> Iterator[Finding]:
    yield from guarded("left open", lambda: _open_transactions(connection))
    yield from guarded("set aside", lambda: _set_aside(connection))


def _open_transactions(connection: BlockingConnection) -> Iterator[Finding]:
    rows = connection.execute(
        "select orchestrator.holder_text(h), orchestrator.holder_remedy(h), h.blocks"
        " from orchestrator.lock_holders('2 s', '10 s') h"
        " where h.blocks > 0 or h.state is distinct from 'active' limit %s",
        (_SHOWN,),
    ).fetchall()
    for text, remedy, blocks in rows:
        level = problem if blocks else warning
        waits = f"; it blocks {counted(blocks, 'session')} now" if blocks else ""
        yield level(
            "left open",
            f"{text}{waits}; other processes leave out what it has locked",
            f"end it there, or: {remedy}",
        )
    if not rows:
        yield ok("left open", "no open transaction blocks other sessions")


def _set_aside(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute(
        "select (select count(*) from (select from orchestrator.submission_aside limit 10000) a)"
        ", (select count(*) from orchestrator.control_note)"
    ).fetchone()
    assert row is not None
    records, notes = row
    if records or notes:
        yield warning(
            "set aside",
            f"{counted(records, 'record')} from Kafka and {counted(notes, 'change')} by operators wait for such a "
            "transaction",
            "they are carried out when it has ended",
        )
    else:
        yield ok("set aside", "no work waits for the transaction of another session")
