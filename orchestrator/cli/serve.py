"""``run``, ``api``, ``ingest`` and ``dispatch``: the processes that stay."""

from __future__ import annotations

import logging

import click

from orchestrator.cli.support import settings
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import Role, serve

_log = logging.getLogger(__name__)


@click.command()
def run() -> None:
    """Serve the API, dispatch, and maintain the database, in one process.

    SIGTERM or Ctrl-C stops it in order: requests and deliveries under way are finished within
    SHUTDOWN_TIMEOUT_SECONDS, claimed events are handed back. A second one stops it at once.
    """
    serve_role("run")


@click.command()
def api() -> None:
    """Serve the HTTP API alone.

    Events are delivered by `orchestrator dispatch` or `run` elsewhere, and the database is maintained by `run`,
    `orchestrator maintain` or pg_cron. Start as many as you need, behind a load balancer.
    """
    serve_role("api")


@click.command()
def ingest() -> None:
    """Read submissions and commands from Kafka, and nothing else.

    Start as many as you need; they share the partitions of KAFKA_TOPIC_SUBMISSION, each with
    KAFKA_CONSUMER_CONCURRENCY consumers. With MANAGEMENT_SERVER_PORT it answers health checks and serves
    metrics there.
    """
    serve_role("ingest")


@click.command()
def dispatch() -> None:
    """Deliver due events, and nothing else.

    Start as many as you need; they share the work. With MANAGEMENT_SERVER_PORT it answers health checks
    and serves metrics there.
    """
    serve_role("dispatch")


def serve_role(role: Role) -> None:
    """Serves until a signal, logging; exits with 1 when it fails."""
    from orchestrator import logs

    ours = settings()
    logs.configure(ours, role)
    try:
        serve(ours, role)
    except OrchestratorError as error:
        # One line: where logs go to standard error, the log's own.
        _log.error("%s", error)
        if ours.log_file is not None:
            raise
    except Exception:
        _log.exception("ended by an error that was not foreseen")
    else:
        return
    click.get_current_context().exit(1)
