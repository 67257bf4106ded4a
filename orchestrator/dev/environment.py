"""The settings of development tools, and where they keep their data."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.settings import DATABASE_PARTS, SETTINGS
from orchestrator.settings.webhook_secrets import SECRET_PREFIX, decode_secret

LOOPBACK = "127.0.0.0/8,::1/128"

_PACKAGE = Path(__file__).resolve().parents[1]


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where data is kept between runs: ``.orchestrator`` in a checkout, else below the user's state directory."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "sql").is_dir():
        return checkout / ".orchestrator"
    return user_directory(environ, "XDG_STATE_HOME", ".local/state")


def user_directory(environ: Mapping[str, str], variable: str, below_home: str) -> Path:
    """This product's part of a user's directory of the XDG specification. OrchestratorError if it has none."""
    given = environ.get(variable, "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / below_home
    except RuntimeError:
        raise OrchestratorError(f"this user has no home directory; set {variable} to a directory to use") from None
    return base / "scheduled-event-orchestrator"


def new_webhook_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def kept_webhook_secret(directory: Path) -> str:
    """The webhook secret kept in `directory`, made at the first call."""
    path = directory / "webhook-secret"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, new_webhook_secret() + "\n")
        secret = path.read_text().strip()
    except OSError as error:
        raise OrchestratorError(f"{path}: cannot keep the webhook secret here: {error.strerror}") from error
    try:
        decode_secret(secret)
    except ValueError as error:
        raise OrchestratorError(f"{path}: {error}; remove the file, and a new one is made") from None
    return secret


def _write_once(path: Path, text: str) -> None:
    """Creates a file that only its owner may read, whole or not at all, and never replaces an existing one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}-") as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(file.name, path)


def with_defaults(environ: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """`environ`, completed by `defaults`."""
    return {**environ, **{name: value for name, value in defaults.items() if not environ.get(name, "").strip()}}


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without any of this product's settings."""
    ours = {name for setting in (*SETTINGS.values(), *DATABASE_PARTS.values()) for name in setting.names}
    return {name: value for name, value in environ.items() if name not in ours}


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        return False
    return True
