"""`orchestrator dev`: a database whose data is kept between runs, and settings to develop with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import DATABASE_PARTS, Settings
from orchestrator.dev.environment import LOOPBACK, is_free, kept_webhook_secret, state_directory, with_defaults
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import OrchestratorError
from orchestrator.migrate import migrate

POSTGRES_PORT = 15432
_DATABASE = "orchestrator"


@dataclass(frozen=True)
class Stack:
    """What `dev` serves with; `data_dir` is None when the database is the user's own."""

    settings: Settings
    data_dir: Path | None

    @property
    def api(self) -> str:
        """The API's address for this machine, ``http://127.0.0.1:8080``."""
        host = self.settings.server_host
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not listened on
        return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{self.settings.server_port}"

    @property
    def management(self) -> str:
        """The address of health and metrics."""
        port = self.settings.management_port
        return self.api if port is None else f"{self.api.rpartition(':')[0]}:{port}"


@contextmanager
def prepared(environ: Mapping[str, str]) -> Iterator[Stack]:
    """A database up to date, and settings for development wherever the environment says nothing else.

    The database is the one of DATABASE_URL or DB_HOST, else an embedded server that stops at the end. Raises
    OrchestratorError when a port is taken or the database cannot be had.
    """
    home = state_directory(environ)
    defaults = {
        # Nobody else on the network should reach a service that needs no key and delivers to this machine.
        "SERVER_HOST": "127.0.0.1",
        "HTTP_ALLOW_NETWORKS": LOOPBACK,
        "LOG_FORMAT": "console",
    }
    if not environ.get("WEBHOOK_SECRETS", "").strip():
        defaults["WEBHOOK_SECRETS"] = kept_webhook_secret(home)
    environ = with_defaults(environ, defaults)
    settings = Settings.from_env(environ)
    if settings.environment.lower().startswith("prod"):
        raise OrchestratorError("ENVIRONMENT: dev is not for production; use orchestrator migrate and orchestrator run")
    _require_free("SERVER_PORT", settings.server_host, settings.server_port)
    if settings.management_port is not None:
        _require_free("MANAGEMENT_SERVER_PORT", settings.server_host, settings.management_port)
    if any(environ.get(name, "").strip() for name in ("DATABASE_URL", "DB_HOST")):
        migrate(settings.database_url, days_ahead=settings.partition_days_ahead)
        yield Stack(settings, None)
        return
    # When another `dev` runs here already, this uses its server.
    port = POSTGRES_PORT if is_free("127.0.0.1", POSTGRES_PORT) else 0
    with EmbeddedPostgres(home / "postgres", port=port) as server:
        url = server.ensure_database(_DATABASE)
        migrate(url, days_ahead=settings.partition_days_ahead)
        replaced = {name for setting in DATABASE_PARTS.values() for name in setting.names}
        environ = {name: value for name, value in environ.items() if name not in replaced}
        yield Stack(Settings.from_env({**environ, "DATABASE_URL": url}), server.data_dir)


def _require_free(setting: str, host: str, port: int) -> None:
    if is_free(host, port):
        return
    other = next((other for other in range(port + 1, min(port + 100, 65536)) if is_free(host, other)), None)
    remedy = f"stop it, or choose another port: {setting}={other or '…'} orchestrator dev"
    raise OrchestratorError(f"{setting}: another process listens on {host}:{port}; {remedy}")
