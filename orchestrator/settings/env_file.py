"""Reads a file of variables, as Docker, Compose, systemd and a shell take it, so that it can be checked beforehand.

The form is what these have in common. What they take differently is refused: variables in values, values of several
lines, names that are set twice.
"""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.errors import SettingsError

MAX_BYTES = 1 << 20

_LINE = re.compile(r"(?:export[ \t]+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>.*)")
_SINGLE = re.compile(r"'(?P<text>[^']*)'[ \t]*(?:#.*)?")
_DOUBLE = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"[ \t]*(?:#.*)?')
_COMMENT = re.compile(r"(?:^|[ \t])#.*")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}
_VARIABLE = re.compile(r"(?<!\\)(?:\\\\)*\$[A-Za-z_{(]")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables that a file sets. Raises SettingsError with each wrong line; no message repeats a value."""
    variables: dict[str, str] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name, value = _variable(line.strip())
            if name in lines:
                raise ValueError(f"{name} is set in line {lines[name]} already; keep one of them")
        except ValueError as wrong:
            problems.append(f"{path}, line {number}: {wrong}")
        else:
            variables[name] = value
            lines[name] = number
    if problems:
        raise SettingsError(problems)
    return variables


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise SettingsError(f"{path}: holds more than {MAX_BYTES} bytes; expected a file of variables")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise SettingsError(f"{path}, line {number}: is not text in UTF-8; write the file again as UTF-8") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def _variable(line: str) -> tuple[str, str]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError("expected NAME=value, without blanks around the equals sign")
    name, raw = found["name"], found["value"]
    if not all(character.isprintable() or character == "\t" for character in raw):
        raise ValueError(f"{name}: holds a control character; remove it")
    if raw.startswith("'"):
        quoted = _SINGLE.fullmatch(raw)
    elif raw.startswith('"'):
        quoted = _DOUBLE.fullmatch(raw)
    else:
        value = _COMMENT.sub("", raw).strip()
        _refuse_variables(name, value)
        return name, value
    if quoted is None:
        raise ValueError(f"{name}: expected one closing quote, and nothing but a comment after it")
    if raw.startswith("'"):
        return name, quoted["text"]
    _refuse_variables(name, quoted["text"])
    return name, _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[1]), quoted["text"])


def _refuse_variables(name: str, text: str) -> None:
    if _VARIABLE.search(text):
        raise ValueError(f"{name}: not every program replaces variables in a value; write it out, or quote it by '")
