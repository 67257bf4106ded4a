"""Signatures of deliveries, as Standard Webhooks 1.0 defines them (standardwebhooks.com).

A receiver that knows one of the secrets recomputes the HMAC-SHA256 of ``id.timestamp.body`` and compares.
While a secret is being rotated every delivery carries one signature for each, newest first.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.errors import SettingsError
from orchestrator.settings.webhook_secrets import decode_secret

if TYPE_CHECKING:
    from hashlib import _Hash

_BLOCK_BYTES = 64  # of SHA-256


class Signer:
    """Signs with every secret given, newest first. With none, `signature` is the empty string.

    Raises SettingsError for a malformed secret; it names `source` and the position, not the secret.
    """

    __slots__ = ("_contexts",)

    def __init__(self, secrets: Sequence[str], source: str = "WEBHOOK_SECRETS") -> None:
        contexts = []
        for position, secret in enumerate(secrets, 1):
            try:
                contexts.append(_contexts(decode_secret(secret)))
            except ValueError as error:
                raise SettingsError(f"{source}: secret {position}: {error}") from None
        self._contexts = tuple(contexts)

    def signature(self, event_id: str, timestamp: int, body: bytes) -> str:
        """The value of ``webhook-signature``: ``v1,<base64>`` for each secret, separated by spaces.

        `timestamp` is the attempt's, in whole seconds since 1970, and must equal ``webhook-timestamp``.
        """
        head = f"{event_id}.{timestamp}.".encode()
        signatures = []
        for inner, outer in self._contexts:
            digest = inner.copy()
            digest.update(head)
            digest.update(body)
            mac = outer.copy()
            mac.update(digest.digest())
            signatures.append("v1," + binascii.b2a_base64(mac.digest(), newline=False).decode("ascii"))
        return " ".join(signatures)


def _contexts(key: bytes) -> tuple[_Hash, _Hash]:
    # RFC 2104 with the two padded keys hashed once: copying them costs 0.7 µs a signature,
    # hmac.copy() 1.0 and hmac.digest() 1.5. The keys are never longer than a block.
    padded = key.ljust(_BLOCK_BYTES, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
    outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))
    return inner, outer
