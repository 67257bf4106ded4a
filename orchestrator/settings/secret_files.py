"""Secrets that stand in files, as Docker, Kubernetes and systemd hand them over."""

from __future__ import annotations

import os
import stat
from pathlib import Path

SUFFIX = "_FILE"
MAX_BYTES = 65_536


class SecretFileError(ValueError):
    """What is wrong with the file, and the remedy; never what is in it."""


class AbsentSecretError(SecretFileError):
    """There is no file of that name."""


def read_secret_file(path: str) -> str:
    """The text of a file without one line end at its end. Raises SecretFileError."""
    try:
        # A pipe without a writer would stop the start for ever; and settings are read more than once.
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "is a directory" if Path(path).is_dir() else "is not a regular file"
            raise SecretFileError(f"{what}; name a file that holds nothing but the secret")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise AbsentSecretError("does not exist; mount the secret there, or correct the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, SecretFileError):
            raise
        why = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        raise SecretFileError(f"cannot be read: {why}; let user id {os.geteuid()} read it") from None
    if len(content) > MAX_BYTES:
        raise SecretFileError(f"holds more than {MAX_BYTES} bytes; name a file that holds nothing but the secret")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise SecretFileError("is not text in UTF-8; write it again as plain text")
    text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise SecretFileError("is empty; write the secret into it, or unset the variable")
    return text
