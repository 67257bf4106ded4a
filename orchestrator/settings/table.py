"""The settings as tables: the values in force for `orchestrator config check`, all of them for docs/reference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from orchestrator.settings import DATABASE_PARTS, SETTINGS, Settings, superseded
from orchestrator.settings.kinds import AbsentError, Setting


class Row(NamedTuple):
    """A setting in force. `value` is text as in the environment, masked if secret, None where there is none.

    `source` is the variable it comes from, or ``default``; `default` says what holds when nothing is set.
    """

    name: str
    value: str | None
    source: str
    default: str
    about: str


def settings_table(environ: Mapping[str, str], *, elsewhere: bool = False) -> list[Row]:
    """One row for each setting, in the order of the reference.

    `elsewhere`, and SettingsError, as `Settings.from_env`.
    """
    settings = Settings.from_env(environ, elsewhere=elsewhere)
    rows = {key: _row(setting, getattr(settings, key), environ) for key, setting in SETTINGS.items()}
    if settings.kafka_sasl_jaas is not None:
        login = SETTINGS["kafka_sasl_jaas"].given(environ) or ""
        for key in ("kafka_sasl_username", "kafka_sasl_password"):
            if rows[key].source == "default":
                rows[key] = rows[key]._replace(source=login)
    url = _here(SETTINGS["database_url"], environ)
    if url is None and rows["database_url"].source != "default":  # the parts do not say what its file does
        rows["database_url"] = rows["database_url"]._replace(value=None)
    replaced = superseded(url)
    parts = [
        _row(setting, _here(setting, environ), environ)
        if key not in replaced
        else Row(setting.name, None, "DATABASE_URL", _default(setting), setting.about)
        for key, setting in DATABASE_PARTS.items()
    ]
    place = list(rows).index("database_url") + 1
    in_order = list(rows.values())
    return in_order[:place] + parts + in_order[place:]


def _here(setting: Setting, environ: Mapping[str, str]) -> Any:
    """The value in force; None if its file is not on this machine."""
    with suppress(AbsentError):
        return setting.read(environ)
    return None


def _row(setting: Setting, value: object, environ: Mapping[str, str]) -> Row:
    shown = None if value is None else setting.kind.show(value)
    return Row(setting.name, shown, setting.given(environ) or "default", _default(setting), setting.about)


def _default(setting: Setting) -> str:
    return setting.otherwise if setting.default is None else setting.default or "none"


def render_markdown_table() -> str:
    """The table of docs/reference/settings.md, one line for each setting."""
    lines = ["| setting | what it is | takes | default |", "|---|---|---|---|"]
    for key, setting in SETTINGS.items():
        lines.append(_line(setting))
        if key == "database_url":
            lines += map(_line, DATABASE_PARTS.values())
    return "\n".join(lines)


def _line(setting: Setting) -> str:
    names = ", ".join(f"`{name}`" for name in setting.names)
    default = f"`{setting.default}`" if setting.default else _default(setting)
    files = " or ".join(f"`{name}`" for name in setting.file_names)
    takes = setting.kind.expects + (f"; {files} names a file that holds it" if files else "")
    return f"| {names} | {setting.about} | {takes} | {default} |"
