"""``doctor``: what is wrong with this installation, and how to fix it."""

from __future__ import annotations

import click

from orchestrator.cli.support import console, environ, exit_with, json_option, plain, print_json

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "bold red")}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Find what is wrong with this installation, and how to fix it.

    Checks the settings, this machine, the database, the work in it, and Kafka; changes nothing. Exits with 1 if there
    is a problem, and with 0 if there are only warnings.
    """
    from orchestrator.doctor import diagnose

    findings = diagnose(environ())
    if as_json:
        found = list(findings)
        print_json(
            {
                "problems": sum(finding.level == "problem" for finding in found),
                "warnings": sum(finding.level == "warning" for finding in found),
                "findings": [finding._asdict() for finding in found],
            }
        )
    else:
        from rich.table import Table
        from rich.text import Text

        found = []
        out = console()
        for finding in findings:  # printed as they come: an unreachable database takes its time
            found.append(finding)
            mark, style = _MARKS[finding.level]
            line = Table.grid(padding=(0, 1, 0, 0))
            line.add_column(width=1)
            line.add_column(width=16, style="dim")
            line.add_column(overflow="fold")
            what = Text(plain(finding.what), style="" if finding.level == "ok" else style)
            line.add_row(Text(mark, style=style), finding.check, what)
            if finding.mend:
                line.add_row("", "", Text(f"→ {plain(finding.mend)}"))
            out.print(line)
        counts = {level: sum(finding.level == level for finding in found) for level in ("problem", "warning")}
        told = [f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count]
        out.print(", ".join(told) + "." if told else "All is well.")
    exit_with(all(finding.level != "problem" for finding in found))
