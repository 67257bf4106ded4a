"""What is wrong with an installation, and how to fix it: `orchestrator doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.doctor.database import database_findings
from orchestrator.doctor.finding import Finding, ok, problem, warning
from orchestrator.doctor.kafka import kafka_findings
from orchestrator.doctor.machine import machine_findings
from orchestrator.errors import SettingsError
from orchestrator.settings import Settings

__all__ = ["Finding", "diagnose"]


def diagnose(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Checks the settings, this machine, the database and Kafka; changes nothing. Ends early if a setting is wrong."""
    try:
        settings = Settings.from_env(environ)
    except SettingsError as error:
        for wrong in error.problems:
            yield problem("settings", wrong, "correct the variable; orchestrator config table lists all settings")
        return
    yield ok("settings", "all settings are valid")
    for notice in settings.notices:
        yield warning("settings", notice, "correct the name, or remove the variable")
    yield from machine_findings(settings)
    yield from database_findings(settings)
    yield from kafka_findings(settings)
