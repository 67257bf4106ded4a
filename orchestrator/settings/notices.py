"""Doubtful variables that are no error: likely typos, and variables without effect."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches

# Variables of deployments of earlier systems, which must start unchanged.
_WITHOUT_EFFECT = {
    r"REDIS_\w+": "locks, limits and caches are in PostgreSQL",
    r"SPRING_(DATA_)?REDIS_\w+": "locks, limits and caches are in PostgreSQL",
    r"KAFKA_STREAMS_APP(LICATION)?_ID|SPRING_KAFKA_STREAMS_\w+": "KAFKA_CONSUMER_GROUP names the group that reads "
    "submissions",
    r"(SPRING_KAFKA_|KAFKA_)(PROPERTIES_)?SSL_(TRUST|KEY)_?STORE_\w+": "certificates are PEM files here: "
    "KAFKA_SSL_CA_FILE, KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE",
    r"SERVER_SSL_((KEY|TRUST)_?STORE|KEY_?(ALIAS|PASSWORD)|BUNDLE)\w*": "certificates are PEM files here: "
    "SERVER_SSL_CERT_FILE and SERVER_SSL_KEY_FILE",
    r"SERVER_SSL_(CLIENT_?AUTH|TRUST_?CERTIFICATE)\w*": "SERVER_SSL_CLIENT_CA_FILE demands certificates of clients",
    r"SERVER_SSL_ENABLED": "the API speaks TLS when SERVER_SSL_CERT_FILE is set, and only then",
    r"SPRING_APPLICATION_NAME": "DEPLOYMENT_NAME is the name of the deployment",
    r"SPRING_(JPA|FLYWAY|LIQUIBASE)_\w+": "orchestrator migrate creates and upgrades the schema",
    r"WORKFLOW_\w+": "max_retries, retry policies and the timeouts of destinations replace it",
    r"(SPRING|MANAGEMENT|LOGGING)_\w+": "it is a setting of Spring that has no counterpart here",
    r"JAVA_OPTS|JAVA_TOOL_OPTIONS|JDK_JAVA_OPTIONS|JVM_OPTS": "there is no JVM here",
}
_OURS = ("SCHEDULER_", "SERVER_SSL_", "HTTP_MAX_", "API_MAX_", "DB_", "KAFKA_", "OUTBOX_")
# Kubernetes and Docker set these for every neighbouring service, also for one that is called "db".
_SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?|ENV_\w+)")


def notices(
    environ: Mapping[str, str], known: Collection[str], superseded: Collection[str], dropped: Collection[str]
) -> tuple[str, ...]:
    """One line for each doubtful variable.

    `known` are the names of all settings, `superseded` those that DATABASE_URL replaces, `dropped` the
    parameters in DATABASE_URL that mean something to a Java driver only.
    """
    found = (_notice(name, known, superseded) for name in sorted(environ) if environ[name].strip())
    return (
        *(notice for notice in found if notice),
        *(f"DATABASE_URL: {name} is a parameter of the Java driver and has no effect here" for name in dropped),
    )


def _notice(name: str, known: Collection[str], superseded: Collection[str]) -> str | None:
    if name in superseded:
        return f"{name}: no effect, because DATABASE_URL replaces it"
    if name in known:
        return None
    for pattern, reason in _WITHOUT_EFFECT.items():
        if re.fullmatch(pattern, name):
            return f"{name}: no effect; {reason}"
    if _SERVICE_LINK.fullmatch(name):
        return None
    ours = name.startswith(_OURS)
    near = get_close_matches(name, known, n=1, cutoff=0.6 if ours else 0.85)
    if near:
        return f"{name}: not a setting; did you mean {near[0]}?"
    return f"{name}: not a setting" if ours else None
