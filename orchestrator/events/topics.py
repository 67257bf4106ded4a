"""Which topics events may be delivered to.

Whoever may submit an event could else write commands, dead letters or Kafka's own offsets with the rights of the
dispatcher. Checked at submission, where a client is told, and once more before each delivery. The SQL twin is
`orchestrator.topic_fault`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from orchestrator.events.quoting import shown

# Kafka's own rule, of org.apache.kafka.common.internals.Topic: "." and ".." would be directories.
TOPIC_PATTERN = r"^(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}$"

_OWN = ("submission", "processing", "answers", "scheduled", "timestamp", "dlq")
# What other deployments on the same brokers read by default.
_READ_ELSEWHERE = ("_process-kafka-message", "_event_submissions")
_TOPIC = re.compile(TOPIC_PATTERN)
_LIKE_A_URL = re.compile("[:/@?=]")


class Topics(Protocol):
    """The settings that say which topics there are; `Settings` is one."""

    @property
    def topic_submission(self) -> str: ...
    @property
    def topic_processing(self) -> str: ...
    @property
    def topic_answers(self) -> str: ...
    @property
    def topic_ready(self) -> str: ...
    @property
    def topic_scheduled(self) -> str: ...
    @property
    def topic_timestamp(self) -> str: ...
    @property
    def topic_dlq(self) -> str: ...
    @property
    def kafka_allow_topics(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class TopicRules:
    """Made by `topic_rules`. `allowed` are patterns in which ``*`` stands for any characters; none allows all."""

    ready: str
    own: tuple[str, ...]
    allowed: tuple[str, ...]

    def fault(self, delivery_type: str | None, destination: str | None) -> str | None:
        """Why an event must not go there, or None."""
        if delivery_type != "KAFKA" or destination is None or destination == self.ready:
            return None
        return _fault(destination, self.own, self.allowed)


def topic_rules(settings: Topics) -> TopicRules:
    own = (getattr(settings, f"topic_{name}") for name in _OWN)
    return TopicRules(
        settings.topic_ready,
        tuple(sorted({name for name in own if name != settings.topic_ready})),
        settings.kafka_allow_topics,
    )


@lru_cache(maxsize=8192)
def _fault(topic: str, own: tuple[str, ...], allowed: tuple[str, ...]) -> str | None:
    # To Kafka, names that differ in . and _ alone are one.
    name = alike(topic)
    if name.startswith("__"):
        return f"expected no topic of Kafka itself, whose names begin with __, got {topic!r}"
    if name in map(alike, own):
        return f"expected no topic that this product reads or writes itself, got {topic!r}"
    if not allowed and name.endswith(_READ_ELSEWHERE):
        return f"expected no topic that other deployments read, got {topic!r}; KAFKA_ALLOW_TOPICS can allow it"
    if not allowed and not name.startswith("_"):
        return None
    # As for files whose names begin with a dot, * does not stand for the first _ of _schemas and the like.
    fitting = (pattern for pattern in allowed if name.startswith("_") <= alike(pattern).startswith("_"))
    if any(_matches(topic, pattern) for pattern in fitting):
        return None
    wanted = f"({','.join(allowed)})" if allowed else "(not set)"
    return f"expected a topic that KAFKA_ALLOW_TOPICS {wanted} allows, got {topic!r}; add it there"


@lru_cache(maxsize=8192)
def topic_name_fault(topic: str) -> str | None:
    """Why no topic can have this name, or None."""
    if _TOPIC.match(topic) and topic[-1] != "\n":
        return None
    # What looks like a URL is not quoted: it may hold a password.
    got = "a URL: for HTTP set delivery_type to HTTP" if _LIKE_A_URL.search(topic) else repr(shown(topic))
    return f"expected a topic of 1 to 249 characters from a-z, A-Z, 0-9, ., _ and -, got {got}"


def alike(topic: str) -> str:
    return topic.replace(".", "_")


def _matches(topic: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), topic) is not None
