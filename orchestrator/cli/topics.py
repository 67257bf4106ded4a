"""``topics``: the Kafka topics of this deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import click

from orchestrator.cli.support import console, exit_with, json_option, print_json, settings

T = TypeVar("T")


@click.group()
def topics() -> None:
    """Create and list the Kafka topics of this deployment."""


@topics.command()
@json_option
def create(as_json: bool) -> None:
    """Create the topics that do not exist yet.

    Each gets KAFKA_PARTITIONS partitions and KAFKA_REPLICATION replicas. Safe to run at any time: existing topics
    stay as they are.
    """
    from orchestrator.kafka.topics import create_topics

    ours = settings()
    made = _run(create_topics(ours))
    if as_json:
        print_json([each._asdict() for each in made])
        return
    from rich.table import Table

    table = Table("topic", "partitions", "", box=None, pad_edge=False)
    for each in made:
        differs = each.partitions != ours.kafka_partitions
        note = f"exists, though KAFKA_PARTITIONS is {ours.kafka_partitions}" if differs else each.outcome
        table.add_row(each.name, str(each.partitions), note)
    console().print(table)


@topics.command("list")
@json_option
def list_topics(as_json: bool) -> None:
    """List the topics and their partitions. Exits with 1 if one does not exist."""
    from orchestrator.kafka.topics import partition_counts

    counts = _run(partition_counts(settings()))
    if as_json:
        print_json([{"name": name, "partitions": count} for name, count in counts.items()])
    else:
        from rich.table import Table

        table = Table("topic", "partitions", box=None, pad_edge=False)
        for name, count in counts.items():
            table.add_row(name, str(count) if count else "does not exist; run: orchestrator topics create")
        console().print(table)
    exit_with(all(counts.values()))


def _run(work: Coroutine[Any, Any, T]) -> T:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # the error raised says it all
    return asyncio.run(work)
