"""What the schemas of the OpenAPI document are made of."""

from __future__ import annotations

from typing import Any

from orchestrator.events.rules import MAX_NAME_CHARS

Schema = dict[str, Any]

NO_NUL_PATTERN = "^[^\\u0000]*$"
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS, "pattern": NO_NUL_PATTERN}
EXTERNAL_ID: Schema = {**NAME, "pattern": "^(?!\\.{1,2}$)[^\\u0000]*$"}
UUID: Schema = {"type": "string", "format": "uuid"}
TIME: Schema = {"type": "string", "format": "date-time"}
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


def nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}
