"""The name that a destination's limits, circuit breaker and fair share go by: the twin of SQL's destination_name().

The SQL function is in sql/functions/11_destination_names.sql.
"""

from __future__ import annotations

import re

_AUTHORITY_END = re.compile("[/?#]")


def destination_name(delivery_type: str, destination: str | None) -> str:
    """Host and port of a URL in lower case, without the scheme's default port; ``kafka:`` and the topic of a record.

    The destination is one that the rules of submissions accept.
    """
    if delivery_type == "KAFKA" or destination is None:
        return f"kafka:{destination or ''}"
    scheme, _, rest = destination.partition("://")
    authority = _AUTHORITY_END.split(rest, maxsplit=1)[0].lower()
    name = authority.removesuffix(":443" if scheme == "https" else ":80")
    return f"kafka.:{name[6:]}" if name.startswith("kafka:") else name
