"""The command line. A command is loaded only when it is called, so that help and usage errors are answered at once.

Exit codes: 0 done, 1 failed or refused, 2 wrong usage or settings.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import click

from orchestrator.errors import DatabaseUnavailable, OrchestratorError, SettingsError

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Serve": {
        "run": (
            "orchestrator.cli.serve:run",
            "Run all in one process: API, ingestion from Kafka, delivery, maintenance.",
        ),
        "api": ("orchestrator.cli.serve:api", "Serve the HTTP API only."),
        "ingest": ("orchestrator.cli.serve:ingest", "Read submissions and commands from Kafka only."),
        "dispatch": ("orchestrator.cli.serve:dispatch", "Deliver due events only."),
    },
    "Events": {
        "submit": ("orchestrator.cli.submit:submit", "Submit one event, or a file of them."),
        "get": ("orchestrator.cli.events:get", "Show an event and what happened to it."),
        "cancel": (
            "orchestrator.cli.events:cancel",
            "Cancel an event that is not in flight, or all events that match a filter.",
        ),
        "reschedule": ("orchestrator.cli.events:reschedule", "Deliver an event at another time."),
        "stats": (
            "orchestrator.cli.stats:stats",
            "Show events by state, or counts by time, source and destination.",
        ),
        "forecast": (
            "orchestrator.cli.forecast:forecast",
            "Plot upcoming events against each destination's rate limit.",
        ),
        "rejects": (
            "orchestrator.cli.rejects:rejects",
            "List, show and resubmit records from Kafka that did not become events.",
        ),
        "dead-letters": (
            "orchestrator.cli.dead_letters:dead_letters",
            "List, show, redrive and purge events that ran out of attempts.",
        ),
    },
    "Limit": {
        "destinations": (
            "orchestrator.cli.destinations:destinations",
            "Limit, pause and inspect destinations: the hosts and topics that events go to.",
        ),
        "pause": ("orchestrator.cli.destinations:pause", "Pause all deliveries until resume."),
        "resume": (
            "orchestrator.cli.destinations:resume",
            "Resume deliveries after pause; destinations paused by name stay paused.",
        ),
    },
    "Operate": {
        "migrate": ("orchestrator.cli.schema:migrate", "Create the schema of the database, or upgrade it."),
        "maintain": ("orchestrator.cli.schema:maintain", "Maintain the database only."),
        "topics": ("orchestrator.cli.topics:topics", "Create and list the Kafka topics of this deployment."),
        "config": ("orchestrator.cli.config:config", "Check and document the settings."),
        "keys": ("orchestrator.cli.keys:keys", "Manage the keys of the HTTP API."),
        "doctor": ("orchestrator.cli.doctor:doctor", "Find what is wrong with this installation, and how to fix it."),
        "smoke": ("orchestrator.cli.smoke:smoke", "Send an event through a running deployment, and say what fails."),
    },
    "Try": {
        "dev": ("orchestrator.cli.dev:dev", "Run everything on this machine, including a database."),
        "demo": ("orchestrator.cli.demo:demo", "Send events through the whole system and count what arrives."),
        "bench": ("orchestrator.bench.cli:bench", "Measure SCENARIO on this machine, with all the servers it needs."),
    },
}
"""Section of the help → name → where the code of the command is, and the first line of its help."""

_MAX_CHARS = 1000  # of a complaint about the arguments

_TARGETS = {name: target for section in COMMANDS.values() for name, (target, _) in section.items()}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_TARGETS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _TARGETS:
            return None
        module, _, attribute = _TARGETS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _TARGETS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], _TARGETS, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, _TARGETS))
        for section, commands in COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(widest), about) for name, (_, about) in commands.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _told(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        with _told(ctx):
            return super().invoke(ctx)


@contextmanager
def _told(ctx: click.Context) -> Iterator[None]:
    """Prints each error on a line of standard error, and ends with the exit code that fits."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = (error.ctx or ctx).command_path
        said = " ".join(error.format_message().split()).rstrip(".")
        if len(said) > _MAX_CHARS:  # it quotes the arguments
            said = f"{said[: _MAX_CHARS // 2]}…{said[-_MAX_CHARS // 2 :]}"
        click.echo(f"Error: {said}; see {command} --help", err=True)
        ctx.exit(2)
    except SettingsError as error:
        for problem in error.problems:
            click.echo(f"Error: {problem}", err=True)
        ctx.exit(2)
    except DatabaseUnavailable as error:
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)  # libpq's text has several lines
        ctx.exit(1)
    except UnicodeEncodeError as error:  # of an argument whose bytes are not UTF-8
        click.echo(f"Error: expected text in UTF-8, got {error.object[:80]!a}", err=True)
        ctx.exit(2)
    except OrchestratorError as error:
        click.echo(f"Error: {error}", err=True)
        ctx.exit(1)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings are environment variables: orchestrator config check prints those in force.",
)
@click.version_option(package_name="scheduled-event-orchestrator", message="%(version)s")
def main() -> None:
    """Keep events in PostgreSQL until they are due, and deliver each one on time, as a signed webhook or to Kafka."""
    logging.getLogger("aiokafka").setLevel(
        "CRITICAL"
    )  # errors that it logs before logging is configured are raised too
