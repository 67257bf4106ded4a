"""Why a TLS connection with a receiver failed, in words that say what to mend and where."""

from __future__ import annotations

import ssl

# By the verify_code of OpenSSL (x509_vfy.h).
_CERTIFICATE = {
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed",
    19: "its chain ends in a self-signed certificate that is not among the trusted ones",
    20: "its issuer is unknown: not among the trusted ones, or an intermediate certificate is missing",
    21: "its issuer is unknown: an intermediate certificate is missing",
    23: "it was revoked",
    62: "it is for another host name",
    64: "it is for another address",
}
_HANDSHAKE = {
    "WRONG_VERSION_NUMBER": "the receiver does not speak TLS on this port",
    "HTTP_REQUEST": "the receiver does not speak TLS on this port",
    "UNSUPPORTED_PROTOCOL": "the receiver speaks only a version of TLS that is too old",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the receiver speaks no version of TLS that is used here (1.2 and 1.3)",
    "TLSV1_UNRECOGNIZED_NAME": "the receiver serves no such host name",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the receiver accepts nothing that was offered; it may want a client certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the receiver wants a client certificate",
    "UNEXPECTED_EOF_WHILE_READING": "the receiver closed the connection",
}


def tls_context() -> ssl.SSLContext:
    """The TLS context of deliveries. Some builds of Python, such as Debian's, accept TLS 1.0 by default."""
    context = ssl.create_default_context()
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    return context


def tls_fault(error: BaseException) -> str | None:
    """The TLS fault behind an error or its causes, in words; None: it is no TLS error."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "certificate_error", None) or getattr(seen, "os_error", None) or seen
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _CERTIFICATE.get(cause.verify_code) or cause.verify_message
        if isinstance(cause, ssl.SSLError):
            reason = cause.reason or type(cause).__name__
            return _HANDSHAKE.get(reason) or reason.lower().replace("_", " ")
        seen = seen.__cause__ or seen.__context__
    return None
