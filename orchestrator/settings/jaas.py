"""Reads the login in a Kafka client's ``sasl.jaas.config``, so that settings of Java deployments stay as they are.

The grammar is that of org.apache.kafka.common.security.JaasConfig: a module, a flag, options, a semicolon; quotes and
escapes are those of java.io.StreamTokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"

_FLAGS = ("required", "requisite", "sufficient", "optional")
_TOKEN = re.compile(
    r"""(?P<blank>\s+|//[^\n]*|/\*.*?\*/)|"(?P<double>(?:[^"\\\n]|\\.)*)"|'(?P<single>(?:[^'\\\n]|\\.)*)'"""
    r"""|(?P<word>[\w.$-]+)|(?P<sign>[=;])""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\([0-3][0-7]{0,2}|[0-7]{1,2}|.)", re.DOTALL)
_ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_MODULE = re.compile(r"(?:[A-Za-z_$][\w$]*\.)+[A-Za-z_$][\w$]*")


@dataclass(frozen=True, slots=True)
class Jaas:
    """One entry: the class of its login module, and the options that matter here."""

    module: str
    username: str | None
    password: str | None = field(repr=False)
    token: bool = False


def parse(raw: str) -> Jaas:
    """Reads one entry; a ValueError quotes nothing of it."""
    tokens = list(_tokens(raw))
    if len(tokens) < 3 or tokens[-1] != (";", True):
        raise ValueError
    (module, _), (flag, _), *options = tokens[:-1]
    if not _MODULE.fullmatch(module) or flag.lower() not in _FLAGS or len(options) % 3:
        raise ValueError
    given = {}
    for n in range(0, len(options), 3):
        (name, named), equals, (value, sign) = options[n : n + 3]
        if named or equals != ("=", True) or sign:
            raise ValueError
        given[name] = value
    return Jaas(module, given.get("username"), given.get("password"), given.get("tokenauth", "").lower() == "true")


def _tokens(raw: str) -> Iterator[tuple[str, bool]]:
    """Each token, and whether it is a sign."""
    position = 0
    while position < len(raw):
        found = _TOKEN.match(raw, position)
        if found is None:
            raise ValueError
        position = found.end()
        if found.lastgroup in ("double", "single"):
            yield _ESCAPE.sub(_unescaped, found[found.lastgroup]), False
        elif found.lastgroup != "blank":
            yield found[0], found.lastgroup == "sign"


def _unescaped(found: re.Match[str]) -> str:
    escaped = found[1]
    return chr(int(escaped, 8)) if escaped[0] in "01234567" else _ESCAPED.get(escaped, escaped)
