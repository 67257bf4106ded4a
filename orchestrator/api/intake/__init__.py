"""Where submissions go: to the submission topic when there is Kafka, else to the database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from orchestrator.api.intake.gather import Gatherer, gathering, submit_patiently
from orchestrator.database import Database, Submitted
from orchestrator.errors import KafkaUnavailable
from orchestrator.events.submission import Submission
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.api.intake.kafka_topic import SubmissionTopic


class Intake:
    """Made by `intake`. The results are those of `Database.submit`, and `SubmissionTopic.submit`'s."""

    def __init__(
        self,
        database: Database,
        gatherer: Gatherer,
        topic: SubmissionTopic | None,
        on_aside: Callable[[int], None],
        *,
        fall_back: bool,
    ) -> None:
        self._database = database
        self._on_aside = on_aside
        self._gatherer = gatherer
        self._topic = topic
        self._fall_back = fall_back

    async def submit(self, submission: Submission) -> Submitted:
        queued = await self._queued([submission])
        return queued[0] if queued else await self._gatherer.submit(submission)

    async def submit_all(self, submissions: Sequence[Submission]) -> list[Submitted]:
        queued = await self._queued(submissions)
        return queued or await submit_patiently(self._database, submissions, self._on_aside)

    async def _queued(self, submissions: Sequence[Submission]) -> list[Submitted] | None:
        """None: the database is to take them. Kafka may have them all the same; their ids keep them single."""
        if self._topic is None:
            return None
        try:
            return await self._topic.submit(submissions)
        except KafkaUnavailable:
            if not self._fall_back:
                raise
            return None


@asynccontextmanager
async def intake(
    settings: Settings, database: Database, on_aside: Callable[[int], None] = lambda count: None
) -> AsyncIterator[Intake]:
    """What was submitted before the end is kept, or on its topic, at the end.

    `on_aside` is told how many submissions have to wait for another session's open transaction.
    """
    async with AsyncExitStack() as stack:
        gatherer = await stack.enter_async_context(gathering(database, on_aside))
        topic = None
        if settings.kafka_servers is not None:
            from orchestrator.api.intake.kafka_topic import submission_topic  # brings a client of 10 MiB along

            topic = await stack.enter_async_context(submission_topic(settings))
        yield Intake(database, gatherer, topic, on_aside, fall_back=settings.submit_fallback == "database")
