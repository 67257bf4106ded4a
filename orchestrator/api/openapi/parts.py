"""What the schemas of the OpenAPI document are made of."""

from __future__ import annotations

from orchestrator.events.fields import NAME, NO_NUL_PATTERN, TIME, Schema, nullable

__all__ = ["COUNT", "NAME", "NO_NUL_PATTERN", "STATUSES", "TIME", "UUID", "Schema", "closed", "nullable", "ref"]

UUID: Schema = {"type": "string", "format": "uuid"}
COUNT: Schema = {"type": "integer", "minimum": 0}
STATUSES = [
    *("scheduled", "in_flight", "retrying"),
    *("delivered", "dead", "cancelled", "rescheduled", "expired", "lost"),
]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def closed(properties: dict[str, Schema], *optional: str) -> Schema:
    """An object with these properties and no others, all of them present unless named as optional."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
