"""Reads the addresses of databases as libpq and as Java deployments write them, and writes libpq's form.

Java's form is that of pgjdbc (https://jdbc.postgresql.org/documentation/use/): login and TLS are query
parameters with pgjdbc's names, and parameters of the driver itself mean nothing to libpq.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, quote, unquote, urlencode

import psycopg
from psycopg.conninfo import conninfo_to_dict

_URL = re.compile(
    r"postgres(?:ql)?://(?:(?P<login>[^/?]*)@)?(?P<hosts>[^/?@]*)(?:/(?P<name>[^?]*))?(?:\?(?P<query>.*))?",
    re.IGNORECASE,
)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\[\]:\s]*)(?::(?P<port>[0-9]{1,5}))?")

_FROM_JDBC = {
    "ApplicationName": "application_name",
    "connectTimeout": "connect_timeout",
    "sslmode": "sslmode",
    "sslrootcert": "sslrootcert",
    "sslcert": "sslcert",
    "sslkey": "sslkey",
    "sslpassword": "sslpassword",
    "options": "options",
}
_TARGETS = {"any": "any", "primary": "primary", "secondary": "standby", "preferSecondary": "prefer-standby"}
_KNOWN_TO_JDBC = {*_FROM_JDBC, "ssl", "targetServerType"}
TARGET = "target_session_attrs"
_SECRET = re.compile("password|secret|scram_.*_key")


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """A parsed address. `hosts` is libpq's ``host:port,host:port``, percent-encoded; all else is plain text.

    `dropped` names the parameters of a Java driver that have no counterpart here.
    """

    hosts: str
    name: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    dropped: tuple[str, ...] = field(default=(), compare=False)

    def with_login(self, user: str | None, password: str | None) -> DatabaseUrl:
        """The same address, with `user` and `password` where it has none."""
        return replace(self, user=self.user or user, password=self.password or password)

    def for_writing(self) -> DatabaseUrl:
        """The same address; of several hosts, here or in libpq's environment, it asks for the one that takes writes."""
        hosts = self.hosts or self.parameters.get("host") or os.environ.get("PGHOST", "")
        addresses = self.parameters.get("hostaddr") or os.environ.get("PGHOSTADDR", "")
        several = "," in hosts or "," in addresses
        if not several or TARGET in self.parameters:
            return self
        return replace(self, parameters={**self.parameters, TARGET: "read-write"})

    def for_reading(self) -> DatabaseUrl:
        """The same address; of several hosts, it asks for a replica first."""
        return replace(self, parameters={TARGET: "prefer-standby", **self.parameters}) if "," in self.hosts else self

    def __str__(self) -> str:
        return self._written(self.password, self.parameters)

    def masked(self) -> str:
        """The same address with every password as ``***``, for people and logs."""
        parameters = {key: "***" if _SECRET.search(key) else value for key, value in self.parameters.items()}
        return self._written(self.password and "***", parameters)

    def _written(self, password: str | None, parameters: Mapping[str, str]) -> str:
        login = ""
        if self.user is not None or password:
            login = quote(self.user or "", safe="") + (f":{quote(password, safe='*')}" if password else "") + "@"
        query = "?" + urlencode(parameters, quote_via=quote, safe="*/") if parameters else ""
        return f"postgresql://{login}{self.hosts}/{quote(self.name, safe='')}{query}"


def from_parts(host: str, port: int, name: str) -> DatabaseUrl:
    """The address of one server; `host` may be an IPv6 address or the directory of a Unix socket."""
    written = f"[{host}]" if ":" in host else quote(host, safe="")
    return DatabaseUrl(hosts=f"{written}:{port}", name=name)


def parse(raw: str) -> DatabaseUrl:
    """Reads ``postgresql://``, ``postgres://`` and ``jdbc:postgresql://``; raises ValueError for any other text."""
    written = raw.strip()
    java = written[:5].lower() == "jdbc:"
    match = _URL.fullmatch(written[5:] if java else written)
    if match is None or ";" in (match["name"] or ""):  # parameters as other drivers write them, a password among them
        raise ValueError
    for host in match["hosts"].split(","):
        shape = _HOST.fullmatch(host)
        if shape is None or (shape["port"] and not 1 <= int(shape["port"]) <= 65535):
            raise ValueError
    # Java decodes + as a blank; libpq does not.
    query = match["query"] or ""
    pairs = dict(parse_qsl(query if java else query.replace("+", "%2B"), keep_blank_values=True))
    user, _, password = (match["login"] or "").partition(":")
    url = DatabaseUrl(
        hosts=match["hosts"],
        name=unquote(match["name"] or ""),
        user=pairs.pop("user", None) or unquote(user) or None,  # libpq, too, prefers the parameter
        password=pairs.pop("password", None) or unquote(password) or None,
        parameters=_translated(pairs) if java else pairs,
        dropped=tuple(sorted(set(pairs) - _KNOWN_TO_JDBC)) if java else (),
    )
    try:
        conninfo_to_dict(str(url))  # libpq has the last word on its parameters
    except psycopg.Error:
        raise ValueError from None
    return url


def masked(url: str) -> str:
    """`url` with every password as ``***``."""
    return parse(url).masked()


def address(url: str) -> str:
    """Of `url`, the hosts and the name of the database alone."""
    parsed = parse(url)
    return f"{parsed.hosts}/{parsed.name}"


def _translated(pairs: Mapping[str, str]) -> dict[str, str]:
    parameters = {_FROM_JDBC[key]: value for key, value in pairs.items() if key in _FROM_JDBC}
    if pairs.get("targetServerType") in _TARGETS:
        parameters[TARGET] = _TARGETS[pairs["targetServerType"]]
    if "sslmode" not in pairs and pairs.get("ssl", "false").lower() in ("true", ""):
        parameters["sslmode"] = "verify-full"  # what pgjdbc does for ssl=true
    return parameters
