"""`orchestrator dev`: a database whose data is kept between runs, a broker, and settings to develop with."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from orchestrator.database.connection import connect_blocking
from orchestrator.database.ingestion import Ingestion
from orchestrator.database.migrate import migrate
from orchestrator.dev import kafka_wheel
from orchestrator.dev.environment import LOOPBACK, is_free, kept_webhook_secret, state_directory, with_defaults
from orchestrator.dev.kafka_wheel import WheelBroker
from orchestrator.dev.operating_system import until
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import DatabaseUnavailable, OrchestratorError
from orchestrator.ingest import ingest
from orchestrator.kafka.topics import create_topics, log_bounds, partition_counts
from orchestrator.metrics import Metrics
from orchestrator.settings import DATABASE_PARTS, Settings

POSTGRES_PORT = 15432
KAFKA_PORT = 19092
_OTHER_STARTS_S = 60.0
_SESSION_MS = "2000"
_DATABASE = "orchestrator"
_LAST_S = 30.0
_LOOK_EVERY_S = 0.1

_log = logging.getLogger(__name__)

Server = TypeVar("Server")


@dataclass(frozen=True)
class Stack:
    """What `dev` serves with; `data_dir` is None when the database is the user's own."""

    settings: Settings
    data_dir: Path | None
    kafka_in_memory: bool
    """Whether Kafka is a broker that ends with this program, or with the first that serves the database."""

    @property
    def api(self) -> str:
        """The API's address for this machine, ``http://127.0.0.1:8080``."""
        host = self.settings.server_host
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not listened on
        return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{self.settings.server_port}"

    @property
    def management(self) -> str:
        """The address of health and metrics."""
        port = self.settings.management_port
        return self.api if port is None else f"{self.api.rpartition(':')[0]}:{port}"


@contextmanager
def prepared(environ: Mapping[str, str]) -> Iterator[Stack]:
    """A migrated database, a broker with topics, and settings for development where the environment has none.

    The database is the one of DATABASE_URL or DB_HOST, else an embedded server that stops at the end. The broker is
    the one of KAFKA_BOOTSTRAP_SERVERS, else one in memory if its wheel is installed. Raises OrchestratorError if a
    port is taken, or if the database or the broker cannot be started or reached.
    """
    home = state_directory(environ)
    defaults = {
        # Nobody else on the network must reach a service that needs no key and delivers to this machine.
        "SERVER_HOST": "127.0.0.1",
        "HTTP_ALLOW_NETWORKS": LOOPBACK,
        "LOG_FORMAT": "console",
    }
    if not environ.get("WEBHOOK_SECRETS", "").strip():
        defaults["WEBHOOK_SECRETS"] = kept_webhook_secret(home)
    environ = with_defaults(environ, defaults)
    settings = Settings.from_env(environ)
    if settings.environment.lower().startswith("prod"):
        raise OrchestratorError("ENVIRONMENT: dev is not for production; use orchestrator migrate and orchestrator run")
    _require_free("SERVER_PORT", settings.server_host, settings.server_port)
    if settings.management_port is not None:
        _require_free("MANAGEMENT_SERVER_PORT", settings.server_host, settings.management_port)
    with ExitStack() as stack:
        database, data_dir = stack.enter_context(_database(environ, settings, home))
        settings = Settings.from_env(database)
        in_memory = settings.kafka_servers is None and kafka_wheel.unavailable() is None
        if in_memory:
            kafka = stack.enter_context(_broker(settings, home))
            # It gives a group its partitions only after such a time.
            defaults = {"KAFKA_SESSION_TIMEOUT_MS": _SESSION_MS}
            settings = Settings.from_env(with_defaults({**database, **kafka}, defaults))
        if settings.kafka_servers is not None:
            asyncio.run(create_topics(settings))
        yield Stack(settings, data_dir, in_memory)


@contextmanager
def _database(
    environ: Mapping[str, str], settings: Settings, home: Path
) -> Iterator[tuple[Mapping[str, str], Path | None]]:
    """The environment with a migrated database, and the directory of its data unless the database is the user's own."""
    given = next((name for name in ("DATABASE_URL", "DB_HOST") if environ.get(name, "").strip()), None)
    if given is not None:
        try:
            migrate(settings.database_url, days_ahead=settings.partition_days_ahead)
        except DatabaseUnavailable as error:
            raise DatabaseUnavailable(f"{error}; start it, or unset {given} to have one started here") from error
        yield environ, None
        return
    with ExitStack() as running:
        # When another `dev` runs here already, this uses its server.
        server = _on_port(
            POSTGRES_PORT, lambda port: running.enter_context(EmbeddedPostgres(home / "postgres", port=port))
        )
        url = server.ensure_database(_DATABASE)
        migrate(url, days_ahead=settings.partition_days_ahead)
        replaced = {name for setting in DATABASE_PARTS.values() for name in setting.names}
        kept = {name: value for name, value in environ.items() if name not in replaced}
        yield {**kept, "DATABASE_URL": url}, server.data_dir


def _on_port(wanted: int, start: Callable[[int], Server]) -> Server:
    """Starts a server there, or on any port when another process listens there, or was faster."""
    if is_free("127.0.0.1", wanted):
        try:
            return start(wanted)
        except OrchestratorError:
            if is_free("127.0.0.1", wanted):
                raise
    return start(0)


@contextmanager
def _broker(settings: Settings, home: Path) -> Iterator[dict[str, str]]:
    """The settings of a broker for this database: of another `dev` that serves the same one, else of its own.

    They must share one broker: the database keeps offsets by the name of the topic.
    """
    digest = hashlib.sha256(settings.database_url.encode()).hexdigest()[:12]
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"broker-{digest}"
    for _ in until(_OTHER_STARTS_S):
        file = _locked(path)
        if file is None:
            environ = _environ_of_another(path)
            if environ is None:
                continue
            yield environ
            return
        with file, ExitStack() as running:
            running.callback(path.unlink)
            broker = _on_port(KAFKA_PORT, lambda port: running.enter_context(WheelBroker(port=port)))
            _read_from_the_start(settings)
            file.truncate(0)  # written by an owner who was killed
            file.write(json.dumps(broker.environ))
            file.flush()
            yield broker.environ
            return
    raise OrchestratorError(f"{path}: another orchestrator dev cannot start its broker; stop it")


def _locked(path: Path) -> IO[str] | None:
    """The file, locked; None if another process holds it. A file that its owner has just removed does not count."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _environ_of_another(path: Path) -> dict[str, str] | None:
    """The settings that the owner wrote into the file; None until its broker listens, or if the owner was killed."""
    with suppress(OSError, ValueError):
        environ: dict[str, str] = json.loads(path.read_text())
        host, _, port = environ["KAFKA_BOOTSTRAP_SERVERS"].rpartition(":")
        if not is_free(host, int(port)):
            return environ
    return None


def _read_from_the_start(settings: Settings) -> None:
    """Forgets the offsets of the last run: the broker is new, and its topics begin at 0 again."""
    with connect_blocking(settings.database_url, "dev") as connection:
        connection.execute(
            "select orchestrator.set_ingest_offset(topic, partition, 0) from orchestrator.ingest_offset"
            " where topic = any (%s)",
            ([settings.topic_submission, settings.topic_processing],),
        )


async def take_the_rest(settings: Settings) -> None:
    """Ingests the records that are left in the broker: they were acknowledged and would be lost with it."""
    topics = (settings.topic_submission, settings.topic_processing)
    counts = await partition_counts(settings, topics)

    async def unread() -> int:
        found = 0
        async with Ingestion.open(settings) as database:
            for topic in topics:
                positions = await database.positions(topic)
                for number, (begin, end) in (await log_bounds(settings, topic, counts[topic])).items():
                    found += end - (positions[number].next_offset if number in positions else begin)
        return found

    if not await unread():
        return
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ingest(settings, Metrics(settings), stop))
        try:
            async with asyncio.timeout(_LAST_S):
                while await unread():  # noqa: ASYNC110  # nobody tells when that is so
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            _log.error("events that were accepted are lost with the broker", extra={"events": await unread()})
        finally:
            stop.set()


def _require_free(setting: str, host: str, port: int) -> None:
    if is_free(host, port):
        return
    other = next((other for other in range(port + 1, min(port + 100, 65536)) if is_free(host, other)), None)
    remedy = f"stop it, or choose another port: {setting}={other or '…'} orchestrator dev"
    raise OrchestratorError(f"{setting}: another process listens on {host}:{port}; {remedy}")
