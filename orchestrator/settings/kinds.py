"""What a setting is: its names, its default and the kind of value it takes."""

from __future__ import annotations

import ipaddress
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.events.topics import TOPIC_PATTERN
from orchestrator.settings import jaas
from orchestrator.settings.secret_files import SUFFIX, SecretFileError, read_secret_file
from orchestrator.settings.webhook_secrets import decode_secret

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class BadItemError(ValueError):
    """One item of a comma-separated value is wrong; `position` counts from 1."""

    def __init__(self, position: int, item: str) -> None:
        self.position = position
        self.item = item
        super().__init__(position, item)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value: `expects` completes "expected …"; `parse` raises ValueError for any other value."""

    expects: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. The first of `names` is the one the documentation uses, the others are accepted as well.

    `default` is text as it would be in the environment, or None; `otherwise` then says what holds without a value.
    The values of `secret` settings never appear in messages, and may stand in files. `kinds` holds the names that take
    another kind of value; `agree` says whether the values of two names may both be set.
    """

    names: tuple[str, ...]
    kind: Kind
    about: str
    default: str | None = None
    otherwise: str = ""
    secret: bool = False
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    agree: Callable[[Any, Any], bool] = operator.eq

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def file_names(self) -> tuple[str, ...]:
        """The variables that may name a file which holds the value."""
        return tuple(name + SUFFIX for name in self.names) if self.secret else ()

    def given(self, environ: Mapping[str, str]) -> str | None:
        """The first of its variables that is set. An empty variable is unset: Compose and Helm write such."""
        return next(iter(self._set(environ)), None)

    def _set(self, environ: Mapping[str, str]) -> list[str]:
        return [name for name in (*self.names, *self.file_names) if environ.get(name, "").strip()]

    def read(self, environ: Mapping[str, str]) -> Any:
        """The value in force; the text of ValueError is the line for the user."""
        given, *others = self._set(environ) or [""]
        if not given:
            return None if self.default is None else self.kind.parse(self.default)
        for name in self.names:
            if {name, name + SUFFIX} <= {given, *others}:
                raise ValueError(f"{name} and {name}{SUFFIX}: both are set; keep one of them")
        value = self._parsed(given, environ[given])
        for other in others:
            if not self.agree(value, self._parsed(other, environ[other])):
                raise ValueError(f"{given} and {other}: both are set and differ; keep {self.name}")
        return value

    def _parsed(self, given: str, raw: str) -> Any:
        if given in self.file_names:
            try:
                raw = read_secret_file(raw.strip())
            except SecretFileError as wrong:
                raise type(wrong)(f"{given}: {shown(raw.strip())} {wrong}") from None
        kind = self.kinds.get(given, self.kind)
        try:
            return kind.parse(raw)
        except BadItemError as wrong:
            got = f"item {wrong.position} is not one" if self.secret else f"got {shown(wrong.item)}"
            raise ValueError(f"{given}: expected {kind.expects}; {got}") from None
        except ValueError:
            got = _scheme(raw) if self.secret else shown(raw)
            raise ValueError(f"{given}: expected {kind.expects}{got and f', got {got}'}") from None


def defined(
    *names: str,
    kind: Kind,
    about: str,
    default: str | None = None,
    otherwise: str = "",
    secret: bool = False,
    kinds: Mapping[str, Kind] | None = None,
    agree: Callable[[Any, Any], bool] = operator.eq,
) -> Any:
    """A field of a dataclass of settings that carries its definition; a secret stays out of the repr."""
    definition = Setting(names, kind, about, default, otherwise, secret, kinds or {}, agree)
    return field(repr=not secret, metadata={"setting": definition})


def _scheme(raw: str) -> str:
    match = re.match(r"\s*([A-Za-z][A-Za-z0-9+:]{0,20}://)", raw)
    return repr(f"{match[1]}…") if match else ""


# The text before an @, and any value named like a password, in whichever setting it was put by mistake.
_LOGIN = re.compile(r"[^\s/,;'\"]*@")
_NAMED = re.compile(r"(?i)(\w*(?:password|passwd|secret|token|api_?key)\w*\s*[=:]\s*)(\"[^\"]*\"?|'[^']*'?|[^\s&;,]+)")
_KEYS = re.compile(r"whsec_\S+|orch_[A-Za-z0-9_-]+|-----BEGIN[\s\S]*")


def shown(raw: str) -> str:
    """A value as messages quote it: short, and without any text that looks like a secret."""
    text = _KEYS.sub("***", _NAMED.sub(r"\1***", _LOGIN.sub("***@", raw[:1000])))
    return repr(text if len(text) <= 80 else text[:77] + "...")


def whole(least: int, most: int) -> Kind:
    """A whole number, both bounds included."""

    def parse(raw: str) -> int:
        return int(_bounded(raw, r"[+-]?[0-9]{1,15}", least, most))

    return Kind(f"a whole number from {least} to {most}", parse)


def seconds(least: float, most: float) -> Kind:
    """Seconds, fractions allowed; read as a float of seconds."""

    def parse(raw: str) -> float:
        return _bounded(raw, r"[0-9]{1,9}(\.[0-9]{1,9})?", least, most)

    return Kind(f"seconds from {least:g} to {most:g}", parse, lambda value: f"{value:g}")


def milliseconds(least: int, most: int) -> Kind:
    """Whole milliseconds; read as a float of seconds."""

    def parse(raw: str) -> float:
        return _bounded(raw, r"[0-9]{1,9}", least, most) / 1000

    return Kind(f"whole milliseconds from {least} to {most}", parse, lambda value: str(round(value * 1000)))


def _bounded(raw: str, form: str, least: float, most: float) -> float:
    # int() and float() alone would also accept 1_000, nan and digits of other scripts.
    if not re.fullmatch(form, raw.strip()) or not least <= (value := float(raw)) <= most:
        raise ValueError
    return value


def text(longest: int = 255) -> Kind:
    """Printable text on one line, blanks around it removed."""

    def parse(raw: str) -> str:
        value = raw.strip()
        if not value.isprintable() or len(value) > longest:
            raise ValueError
        return value

    return Kind(f"text of at most {longest} characters", parse)


def _host(raw: str) -> str:
    value = raw.strip()
    if ":" in value:
        ipaddress.IPv6Address(value)
    elif not re.fullmatch(r"[^\s@?#,]{1,255}", value):
        raise ValueError
    return value


host = Kind("a host name, an address without a port, or the directory of a socket", _host)


class _Profiles(str):
    """The one of Spring's active profiles that says the stage: the first that means production, else the first."""

    __slots__ = ("names",)
    names: tuple[str, ...]


def _active_profiles(raw: str) -> str:
    names = tuple(name for item in raw.split(",") if (name := text().parse(item)))
    if not names:
        raise ValueError
    stage = _Profiles(next(filter(is_production, names), names[0]))
    stage.names = names
    return stage


active_profiles = Kind("a comma-separated list of profiles", _active_profiles)


def is_production(stage: str) -> bool:
    return stage.lower().startswith("prod")


def stages_agree(stage: str, profiles: str) -> bool:
    """Whether a stage and Spring's profiles may both be set: never if only one of them means production."""
    names = getattr(profiles, "names", (profiles,))
    if is_production(stage) or is_production(profiles):
        return is_production(stage) and is_production(profiles)
    return stage.lower() in (name.lower() for name in names)


jaas_config = Kind(
    'a JAAS entry such as org.apache.kafka.common.security.plain.PlainLoginModule required username="…" password="…";',
    jaas.parse,
    lambda _: "***",
)


def _directory(raw: str) -> str:
    value = raw.strip()
    if not Path(value).is_dir():
        raise ValueError
    return value


directory = Kind("a directory that exists", _directory)


def _pem_file(raw: str) -> str:
    value: str = text(4096).parse(raw).removeprefix("file:")  # as Spring writes it
    if not value or value.startswith(("classpath:", "-----")):
        raise ValueError
    return value


pem_file = Kind("the path of a PEM file", _pem_file)


def _writable_directory(raw: str) -> str:
    value = _directory(raw)
    # Found out without writing: a disk that is full for the moment must not stop the start.
    if not os.access(value, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError
    return value


writable_directory = Kind("a directory that exists and can be written to", _writable_directory)


def one_of(choices: Mapping[str, str], expects: str) -> Kind:
    """One of the keys of `choices`, in any case; read as what it maps to."""

    def parse(raw: str) -> str:
        value = choices.get(raw.strip().lower())
        if value is None:
            raise ValueError
        return value

    return Kind(expects, parse)


def _boolean(raw: str) -> bool:
    word = raw.strip().lower()
    if word not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        raise ValueError
    return word in ("true", "1", "yes", "on")


boolean = Kind("true or false", _boolean, lambda value: str(value).lower())

# A password may begin or end with blanks, but the line end of the file it was read from is never part of it.
password = Kind("a password", lambda raw: raw.rstrip("\r\n"), lambda _: "***")


def _items(raw: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
    values = []
    for position, item in enumerate((item.strip() for item in raw.split(",")), start=1):
        if item:
            try:
                values.append(parse(item))
            except ValueError:
                raise BadItemError(position, item) from None
    return tuple(values)


def _webhook_secret(item: str) -> str:
    decode_secret(item)
    return item


networks = Kind(
    "a comma-separated list of networks such as 10.1.0.0/16 or addresses",
    lambda raw: _items(raw, ipaddress.ip_network),
    lambda value: ",".join(map(str, value)),
)

webhook_secrets = Kind(
    "a comma-separated list of whsec_ followed by the base64 of 24 to 64 random bytes",
    lambda raw: _items(raw, _webhook_secret),
    lambda value: ",".join("whsec_***" for _ in value),
)

_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,255}):([1-9][0-9]{0,4})")


def _bootstrap_server(item: str) -> str:
    found = _SERVER.fullmatch(item)
    if found is None or int(found[2]) > 65535:
        raise ValueError
    return item


def _bootstrap_servers(raw: str) -> str:
    servers = _items(raw, _bootstrap_server)
    if not servers:
        raise ValueError
    return ",".join(servers)


bootstrap_servers = Kind("a comma-separated list of host:port", _bootstrap_servers)


def _topic(raw: str) -> str:
    name = raw.strip()
    if not re.match(TOPIC_PATTERN, name):
        raise ValueError
    return name


topic = Kind("the name of a topic: 1 to 249 letters, digits, dots, underscores and hyphens", _topic)


def _topic_pattern(item: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9._*-]{1,249}", item):
        raise ValueError
    return item


topic_patterns = Kind(
    "a comma-separated list of topics, in which * stands for any characters",
    lambda raw: _items(raw, _topic_pattern),
    lambda value: ",".join(value),
)

OUTBOX_KINDS = ("scheduled", "timestamp", "dlq")


def _outbox_kind(item: str) -> str:
    return OUTBOX_KINDS[OUTBOX_KINDS.index(item.lower())]


outbox_kinds = Kind(
    "a comma-separated list of scheduled, timestamp and dlq, or none",
    lambda raw: () if raw.strip().lower() == "none" else _items(raw, _outbox_kind),
    lambda value: ",".join(value) or "none",
)
