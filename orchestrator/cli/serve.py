"""``run``, ``api``, ``ingest`` and ``dispatch``: the processes that keep running."""

from __future__ import annotations

import logging

import click

from orchestrator.cli.support import settings
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import Role, serve

_log = logging.getLogger(__name__)


@click.command()
def run() -> None:
    """Run all in one process: API, ingestion from Kafka, delivery, maintenance.

    It uses Kafka if KAFKA_BOOTSTRAP_SERVERS is set. SIGTERM or Ctrl-C stops it in order: it finishes requests and
    deliveries under way within SHUTDOWN_TIMEOUT_SECONDS, and hands claimed events back. A second signal stops it at
    once.
    """
    serve_role("run")


@click.command()
def api() -> None:
    """Serve the HTTP API only.

    Other processes deliver events (`orchestrator dispatch` or `run`) and maintain the database (`run`,
    `orchestrator maintain` or pg_cron). Start as many as you need, behind a load balancer.
    """
    serve_role("api")


@click.command()
def ingest() -> None:
    """Read submissions and commands from Kafka only.

    Start as many as you need; they share the partitions of KAFKA_TOPIC_SUBMISSION, each with
    KAFKA_CONSUMER_CONCURRENCY consumers. With MANAGEMENT_SERVER_PORT it answers health checks and serves
    metrics there.
    """
    serve_role("ingest")


@click.command()
def dispatch() -> None:
    """Deliver due events only.

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
        # One line: where logs go to standard error, the line of the log.
        _log.error("%s", error)
        if ours.log_file is not None:
            raise
    except Exception:
        _log.exception("ended by an unexpected error")
    else:
        return
    click.get_current_context().exit(1)
