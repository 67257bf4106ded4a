"""The topics of a deployment: their names, whether they exist, and how they are created."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from orchestrator.errors import OrchestratorError
from orchestrator.kafka.client import client_arguments, kafka_errors, start, start_failure
from orchestrator.settings import Settings

_START_TIMEOUT_S = 5.0
_DEADLINE_S = 15.0
_POLL_S = 0.05

_OK = 0
_ALREADY_EXISTS = 36
_REMEDIES = {
    17: "choose another name",
    29: "allow the user of KAFKA_SASL_USERNAME to create it, or have it made by others",
    37: "choose another KAFKA_PARTITIONS",
    38: "choose a KAFKA_REPLICATION that these brokers can keep",
    44: "the brokers' policy forbids it; choose other KAFKA_PARTITIONS or KAFKA_REPLICATION",
}
"""What to do about a broker's error code."""


class Created(NamedTuple):
    """A topic, and what `create_topics` did about it."""

    name: str
    outcome: Literal["created", "exists"]
    partitions: int


def topic_names(settings: Settings) -> list[str]:
    """Every topic that the settings name, in the order of the documentation."""
    named = (
        settings.topic_submission,
        settings.topic_processing,
        settings.topic_answers,
        settings.topic_ready,
        settings.topic_scheduled,
        settings.topic_timestamp,
        settings.topic_dlq,
    )
    return list(dict.fromkeys(named))


async def create_topics(settings: Settings, names: Sequence[str] | None = None) -> list[Created]:
    """Creates the topics (None: all of `topic_names`) that do not exist, and waits until they can be used.

    Topics that exist stay as they are, whatever their number of partitions. Raises KafkaUnavailable, and
    OrchestratorError with every reason when brokers refuse to create some.
    """
    wanted = list(topic_names(settings) if names is None else names)
    replicas = -1 if settings.kafka_replication is None else settings.kafka_replication
    async with _administration(settings) as admin:
        await controller_elected(admin)
        # aiokafka takes -1, the brokers' own number, only with an assignment of replicas: the last argument.
        made = [NewTopic(name, settings.kafka_partitions, replicas, {} if replicas == -1 else None) for name in wanted]
        answer = await admin.create_topics(made, timeout_ms=int(_DEADLINE_S * 1000))
        codes = {topic: (code, message) for topic, code, message in answer.topic_errors}
        refused: dict[tuple[int, str], list[str]] = {}
        for name, reason in codes.items():
            if reason[0] not in (_OK, _ALREADY_EXISTS):
                refused.setdefault(reason, []).append(name)
        if refused:
            raise OrchestratorError("\n".join(_refusal(names, *reason) for reason, names in refused.items()))
        counts = await _usable(admin, wanted)
    return [
        Created(name, "created" if codes.get(name, (_OK, ""))[0] == _OK else "exists", counts[name]) for name in wanted
    ]


async def partition_counts(settings: Settings, names: Sequence[str] | None = None) -> dict[str, int]:
    """How many partitions each of the topics has (None: all of `topic_names`); 0 when it does not exist."""
    wanted = topic_names(settings) if names is None else names
    async with _administration(settings) as admin:
        found = await _found(admin)
        return {name: len(found[name]["partitions"]) if name in found else 0 for name in wanted}


def _refusal(names: Sequence[str], code: int, message: str | None) -> str:
    reason = (message or f"error {code}").rstrip(".")
    return f"the brokers refuse to make {', '.join(names)}: {reason}; {_REMEDIES.get(code, 'see their log')}"


async def log_bounds(settings: Settings, topic: str, partitions: int) -> dict[int, tuple[int, int]]:
    """Partition → offset of the first record that still exists, and of the next one to come.

    Raises KafkaUnavailable.
    """
    numbered = [TopicPartition(topic, number) for number in range(partitions)]
    consumer = AIOKafkaConsumer(**client_arguments(settings, "topics"), group_id=None)
    try:
        with kafka_errors():
            async with asyncio.timeout(_DEADLINE_S):
                await start(consumer)
                begins, ends = await consumer.beginning_offsets(numbered), await consumer.end_offsets(numbered)
    finally:
        await consumer.stop()
    return {each.partition: (begins[each], ends[each]) for each in numbered}


async def controller_elected(admin: Any) -> None:
    """Waits until the brokers name a controller. Brokers that have just started name none, and aiokafka's admin client
    then fails with an AttributeError."""
    while admin._client.cluster.controller is None:
        await admin._client.force_metadata_update()
        await asyncio.sleep(_POLL_S)


async def _usable(admin: Any, names: Sequence[str]) -> dict[str, int]:
    """Waits until each partition has a leader; name → partitions."""
    while True:
        found = await _found(admin)
        if all(name in found and _has_leaders(found[name]) for name in names):
            return {name: len(found[name]["partitions"]) for name in names}
        await asyncio.sleep(_POLL_S)


async def _found(admin: Any) -> dict[str, Any]:
    # Asks for all topics: brokers may be set up to create one that is asked for by name.
    return {topic["topic"]: topic for topic in await admin.describe_topics(None)}


def _has_leaders(topic: dict[str, Any]) -> bool:
    partitions = topic["partitions"]
    return bool(partitions) and all(each["error_code"] == _OK and each["leader"] >= 0 for each in partitions)


@asynccontextmanager
async def _administration(settings: Settings) -> AsyncIterator[Any]:
    """An admin client, for work of 15 seconds at most."""
    admin = AIOKafkaAdminClient(**client_arguments(settings, "topics"))
    try:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await start(admin)
        except (KafkaError, OSError) as error:  # TimeoutError is one
            raise await start_failure(settings, "topics", error) from error
        with kafka_errors():
            async with asyncio.timeout(_DEADLINE_S):
                yield admin
    finally:
        await admin.close()
