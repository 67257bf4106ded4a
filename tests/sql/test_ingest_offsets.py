"""How far topics have been read, and what could not be kept."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Client

TOPIC = "tests.submissions"


def advance(
    client: Client, moves: dict[int, tuple[int | None, int]], *, anchors: dict[int, tuple[int, int]] | None = None
) -> list[tuple[int, int | None]]:
    """Moves partitions from the first offset to the second; answers those that stood elsewhere, and where."""
    known = anchors or {}
    rows = client.rows(
        """select * from orchestrator.advance_offsets(%s, %s::integer[], %s::bigint[], %s::bigint[], %s::bigint[],
          %s::bigint[])""",
        TOPIC,
        list(moves),
        [expected for expected, _ in moves.values()],
        [following for _, following in moves.values()],
        [known.get(partition, (None, None))[0] for partition in moves],
        [known.get(partition, (None, None))[1] for partition in moves],
    )
    return [(partition, offset) for partition, offset in rows]


def offsets(client: Client) -> dict[int, int]:
    return dict(client.rows("select partition, next_offset from orchestrator.ingest_offsets(%s)", TOPIC))


def reject(client: Client, *records: tuple[int, int, bytes | None, bytes | None, str, str]) -> None:
    columns: Sequence[Any] = [list(column) for column in zip(*records, strict=True)]
    client.rows(
        """select orchestrator.keep_rejects(%s, %s::integer[], %s::bigint[], %s::bytea[], %s::bytea[], %s::text[],
          %s::text[])""",
        TOPIC,
        *columns,
    )


def test_a_partition_is_begun_once_and_then_moves_from_its_offset(client: Client) -> None:
    assert advance(client, {0: (None, 10), 3: (None, 7)}) == []
    assert advance(client, {0: (10, 25)}) == []
    assert offsets(client) == {0: 25, 3: 7}


@pytest.mark.parametrize("expected", [None, 0, 9, 11, 26])
def test_a_partition_at_another_offset_stays_and_says_where(client: Client, expected: int | None) -> None:
    advance(client, {0: (None, 10)})
    assert advance(client, {0: (expected, 30)}) == [(0, 10)]
    assert offsets(client) == {0: 10}


def test_a_partition_that_was_never_begun_cannot_be_moved_on(client: Client) -> None:
    assert advance(client, {5: (3, 9)}) == [(5, None)]
    assert offsets(client) == {}


def test_a_partition_never_moves_back(client: Client) -> None:
    advance(client, {0: (None, 10)})
    assert advance(client, {0: (10, 9)}) == [(0, 10)]
    assert offsets(client) == {0: 10}


def test_only_partitions_at_another_offset_are_answered(client: Client) -> None:
    advance(client, {0: (None, 1), 1: (None, 1), 2: (None, 1)})
    assert advance(client, {2: (1, 2), 1: (0, 2), 0: (1, 2)}) == [(1, 1)]


def test_offsets_of_one_topic_do_not_touch_another_topic(client: Client) -> None:
    advance(client, {0: (None, 10)})
    assert client.rows("select * from orchestrator.ingest_offsets('tests.other')") == []


def test_the_last_record_read_is_remembered_and_forgotten_when_an_operator_sets_the_offset(client: Client) -> None:
    advance(client, {0: (None, 10)}, anchors={0: (9, -(2**62))})
    query = "select anchor_offset, anchor_hash from orchestrator.ingest_offsets(%s)"
    assert client.rows(query, TOPIC) == [(9, -(2**62))]
    assert client.value("select orchestrator.set_ingest_offset(%s, 0, 3)", TOPIC) == 3
    assert client.rows(query, TOPIC) == [(None, None)]
    assert advance(client, {0: (3, 4)}) == []


def test_an_operator_can_set_the_offset_of_a_partition_that_was_never_begun(client: Client) -> None:
    client.value("select orchestrator.set_ingest_offset(%s, 4, 100)", TOPIC)
    assert offsets(client) == {4: 100}


@pytest.mark.parametrize("first", [None, 10])
def test_of_two_readers_at_once_the_second_waits_and_finds_the_partition_moved(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor, first: int | None
) -> None:
    one, other = connect(), connect()
    if first is not None:
        advance(one, {0: (None, first)})
    with one.transaction():
        assert advance(one, {0: (first, 20)}) == []
        late = threads.submit(advance, other, {0: (first, 15)})
        observer.wait_until_blocked(other)
    assert [partition for partition, _ in late.result()] == [0]
    assert offsets(observer) == {0: 20}


def test_a_reader_that_rolls_back_leaves_the_partition_to_the_next(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    one, other = connect(), connect()
    advance(one, {0: (None, 10)})
    one.rows("begin")
    advance(one, {0: (10, 20)})
    late = threads.submit(advance, other, {0: (10, 15)})
    observer.wait_until_blocked(other)
    one.rows("rollback")
    assert late.result() == []
    assert offsets(observer) == {0: 15}


def test_readers_of_the_same_partitions_in_any_order_do_not_deadlock(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    """Both are held up by a third at partition 1; the one that names it first must not have 2 by then."""
    holder, one, other = connect(), connect(), connect()
    advance(holder, {1: (None, 0), 2: (None, 0)})
    with holder.transaction():
        advance(holder, {1: (0, 1)})
        answers = [
            threads.submit(advance, one, {1: (1, 5), 2: (0, 5)}),
            threads.submit(advance, other, {2: (0, 6), 1: (1, 6)}),
        ]
        observer.wait_until_blocked(one)
        observer.wait_until_blocked(other)
    moved = [answer.result() for answer in answers]
    assert [] in moved
    assert sum(answer != [] for answer in moved) == 1


def test_a_reject_keeps_its_bytes_and_its_reason(client: Client) -> None:
    raw = bytes(range(256))
    reject(client, (3, 17, b"\xff", raw, "body", "expected UTF-8"), (3, 18, None, None, "body", "expected a value"))
    newer, older = client.column("select orchestrator.list_rejects()")
    assert (newer["offset"], newer["bytes"], older["offset"], older["bytes"]) == (18, None, 17, 256)
    [row] = client.rows(
        'select topic, partition, "offset", key, value, field, reason from orchestrator.get_reject(%s)', older["reject"]
    )
    assert row == (TOPIC, 3, 17, b"\xff", raw, "body", "expected UTF-8")
    assert client.totals() == {"rejected": 2}


def test_pages_of_rejects_show_each_once_newest_first(client: Client) -> None:
    reject(client, *[(0, n, None, b"x", "body", "bad") for n in range(7)])
    seen: list[int] = []
    before = None
    while page := client.column("select orchestrator.list_rejects(3, %s::bigint)", before):
        seen += [row["offset"] for row in page]
        before = page[-1]["reject"]
    assert seen == list(range(6, -1, -1))


def test_a_reject_that_was_submitted_again_names_its_event(client: Client) -> None:
    reject(client, (0, 1, None, b"x", "body", "bad"))
    [kept] = client.column("select orchestrator.list_rejects()")
    event_id = client.schedule()
    assert client.value("select orchestrator.resubmitted_reject(%s, %s::uuid)", kept["reject"], event_id)
    [kept] = client.column("select orchestrator.list_rejects()")
    assert kept["event_id"] == event_id
    assert kept["resubmitted_at"] == NOON.isoformat()
    assert not client.value("select orchestrator.resubmitted_reject(%s, %s::uuid)", kept["reject"] + 1, event_id)


@pytest.mark.parametrize(("kinds", "messages"), [([], 0), (["dlq"], 1), (["scheduled", "timestamp"], 0)])
def test_a_reject_is_sent_to_the_dlq_topic_as_it_came_if_that_is_on(
    client: Client, kinds: list[str], messages: int
) -> None:
    client.rows("select orchestrator.set_outbox(%s)", kinds)
    reject(client, (2, 5, b"key", b"\x00raw", "payload", "too deep"))
    rows = client.rows("select kind, headers, key, value from orchestrator.outbox_batch(10)")
    assert len(rows) == messages
    for kind, headers, key, value in rows:
        assert (kind, key, value) == ("dlq", b"key", b"\x00raw")
        assert headers == {
            "orchestrator-kind": "reject",
            "orchestrator-reason": "payload: too deep",
            "orchestrator-topic": TOPIC,
            "orchestrator-partition": "2",
            "orchestrator-offset": "5",
        }


def test_rejects_of_a_transaction_that_rolls_back_are_gone(client: Client) -> None:
    client.rows("begin")
    reject(client, (0, 1, None, b"x", "body", "bad"))
    client.rows("rollback")
    assert client.column("select orchestrator.list_rejects()") == []
