"""The form of the secrets that sign webhooks, as Standard Webhooks 1.0 defines it (standardwebhooks.com)."""

from __future__ import annotations

import binascii

SECRET_PREFIX = "whsec_"  # noqa: S105 - marks a secret, is none
KEY_BYTES = range(24, 65)  # the lengths the specification allows


def decode_secret(secret: str) -> bytes:
    """The key bytes of a ``whsec_`` secret.

    Raises ValueError, which never repeats the secret, unless it is ``whsec_`` and the base64 of 24 to 64
    bytes.
    """
    if secret.startswith(SECRET_PREFIX):
        encoded = secret[len(SECRET_PREFIX) :]
        try:
            key = binascii.a2b_base64(encoded + "=" * (-len(encoded) % 4), strict_mode=True)
        except ValueError:
            key = b""
        if len(key) in KEY_BYTES:
            return key
    raise ValueError(f"expected {SECRET_PREFIX} followed by the base64 of 24 to 64 bytes")
