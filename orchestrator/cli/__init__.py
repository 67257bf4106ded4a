"""The command line. A command is loaded when it is called, so that help and mistakes are answered at once.

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
        "run": ("orchestrator.cli.serve:run", "Serve the API, dispatch, and maintain the database, in one process."),
        "api": ("orchestrator.cli.serve:api", "Serve the HTTP API alone."),
        "ingest": ("orchestrator.cli.serve:ingest", "Read submissions and commands from Kafka, and nothing else."),
        "dispatch": ("orchestrator.cli.serve:dispatch", "Deliver due events, and nothing else."),
    },
    "Events": {
        "submit": ("orchestrator.cli.submit:submit", "Submit one event, or a file of them."),
        "get": ("orchestrator.cli.events:get", "Show an event and what happened to it."),
        "cancel": (
            "orchestrator.cli.events:cancel",
            "Cancel an event that has not been claimed yet, or all that a filter names.",
        ),
        "reschedule": ("orchestrator.cli.events:reschedule", "Have an event delivered at another time."),
        "stats": (
            "orchestrator.cli.stats:stats",
            "Show how many events are in which state, or what happened when, whence and whither.",
        ),
        "forecast": (
            "orchestrator.cli.forecast:forecast",
            "Draw what will be due when, against what is taken.",
        ),
        "rejects": ("orchestrator.cli.rejects:rejects", "List, show and resubmit what could not become events."),
        "dead-letters": (
            "orchestrator.cli.dead_letters:dead_letters",
            "List, show, redrive and purge events that ran out of attempts.",
        ),
    },
    "Limit": {
        "destinations": (
            "orchestrator.cli.destinations:destinations",
            "Limit, pause and inspect the hosts and topics that events go to.",
        ),
        "pause": ("orchestrator.cli.destinations:pause", "Have no attempt begin at all until resume."),
        "resume": (
            "orchestrator.cli.destinations:resume",
            "End the pause of everything; destinations that were paused by themselves stay so.",
        ),
    },
    "Operate": {
        "migrate": ("orchestrator.cli.schema:migrate", "Bring the database up to this program's schema."),
        "maintain": ("orchestrator.cli.schema:maintain", "Maintain the database, and nothing else."),
        "topics": ("orchestrator.cli.topics:topics", "Make and list the topics of Kafka."),
        "config": ("orchestrator.cli.config:config", "Check and document the settings."),
        "keys": ("orchestrator.cli.keys:keys", "Manage the keys of the HTTP API."),
        "doctor": ("orchestrator.cli.doctor:doctor", "Find what is wrong with this installation, and how to mend it."),
    },
    "Try": {
        "dev": ("orchestrator.cli.dev:dev", "Run everything on this machine, a database included."),
        "demo": ("orchestrator.cli.demo:demo", "Send events through all of it and count what arrives."),
        "bench": ("orchestrator.bench.cli:bench", "Measure SCENARIO on this machine, everything included."),
    },
}
"""Section of the help → name → where the command is, and the first line of its help."""

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
    """Tells errors on standard error, each on a line, and ends with the code that fits."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = (error.ctx or ctx).command_path
        said = " ".join(error.format_message().split()).rstrip(".")
        if len(said) > _MAX_CHARS:  # it quotes what was given
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
    except UnicodeEncodeError as error:  # of an argument, whose bytes are no UTF-8
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
    logging.getLogger("aiokafka").setLevel("CRITICAL")  # what it logs before logging is configured is raised, too
