"""docs/reference/api.md, from the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from docs.generate import markdown
from orchestrator.api.openapi.document import document
from orchestrator.api.problems import KINDS, MEDIA_TYPE, TYPE_PREFIX
from orchestrator.settings import Settings

_INTRODUCTION = """\
A running API serves the [OpenAPI](https://spec.openapis.org/oas/v3.1.0) document that this page is made of at
`/openapi.json`. Bounds that are settings stand here with their defaults. A submission is answered with 202 where
submissions travel through Kafka, else with 201 or 200. A key is sent as `Authorization: Bearer …` or `X-API-Key: …`,
and needs the scope that is named; `admin` implies the others."""
_PROBLEMS = f"""\
Errors are problem documents ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)) of type `{MEDIA_TYPE}`: a
[Problem](#problem), whose `type` is `{TYPE_PREFIX}` and one of these kinds."""
# With every way in which a submission may be answered.
_SETTINGS = {"KAFKA_BOOTSTRAP_SERVERS": "broker:9092", "SUBMIT_FALLBACK": "database"}
_LONGEST_PATTERN = 60

Schema = dict[str, Any]


def page() -> str:
    described = document(Settings.from_env(_SETTINGS))
    blocks = []
    for tag in described["tags"]:
        blocks.append(f"## {tag['name'].capitalize()}")
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                if operation["tags"] == [tag["name"]]:
                    blocks += _operation(f"{method.upper()} {path}", operation)
    kinds = [(markdown.code(kind), str(status), f"{title}.") for kind, (status, title) in KINDS.items()]
    blocks += ["## Problems", _PROBLEMS, markdown.table(("kind", "status", "what it says"), kinds), "## Schemas"]
    for name, schema in described["components"]["schemas"].items():
        blocks += _schema(name, schema)
    return markdown.page("HTTP API", _INTRODUCTION, *blocks)


def _operation(title: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {title}"
    body = operation.get("requestBody")
    said = [markdown.sentence(operation["summary"]), operation.get("description", "")]
    if body:
        said.append(f"The body is {_type(body['content']['application/json']['schema'])}.")
    yield " ".join(filter(None, said))
    if "parameters" in operation:
        yield markdown.table(("parameter", "in", "takes", "what it is"), map(_parameter, operation["parameters"]))
    problems = [status for status, answer in operation["responses"].items() if MEDIA_TYPE in answer["content"]]
    answers = [(s, *_answer(answer)) for s, answer in operation["responses"].items() if s not in problems]
    yield markdown.table(("status", "body", "what it says"), sorted(answers))
    yield f"[Problems](#problems): {', '.join(sorted(problems))}."


def _parameter(parameter: dict[str, Any]) -> tuple[str, str, str, str]:
    schema = parameter["schema"]
    about = parameter.get("description") or schema.get("description", "")
    name = markdown.code(parameter["name"])
    return name, parameter["in"], _type(schema), about


def _answer(answer: dict[str, Any]) -> tuple[str, str]:
    [(media_type, content)] = answer["content"].items()
    return (_type(content["schema"]) if media_type == "application/json" else media_type), answer["description"]


def _schema(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}"
    if "description" in schema:
        yield schema["description"]
    if "properties" in schema:
        required = schema.get("required", ())
        rows = [
            (markdown.code(field), _type(inner), "yes" if field in required else "", inner.get("description", ""))
            for field, inner in schema["properties"].items()
        ]
        yield markdown.table(("field", "takes", "required", "what it is"), rows)
    else:
        yield markdown.sentence(f"Takes {_type(schema)}")
    for example in schema.get("examples", ()):
        yield markdown.fenced(json.dumps(example, indent=2, ensure_ascii=False), "json")


def _type(schema: Schema) -> str:
    """What a schema takes, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in schema and "properties" not in schema:
            return ", or ".join(map(_type, schema[alternatives]))
    if "enum" in schema:
        return ", ".join(markdown.code(json.dumps(value)) for value in schema["enum"])
    if "const" in schema:
        return markdown.code(json.dumps(schema["const"]))
    kinds = schema.get("type", "anything")
    words = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    if "items" in schema:
        words += f" of {_type(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        words += f" of {_type(schema['additionalProperties'])}"
    return ", ".join((words, *_bounds(schema)))


def _bounds(schema: Schema) -> Iterator[str]:
    if "format" in schema:
        yield schema["format"]
    yield from _range(schema, "minimum", "maximum", "")
    yield from _range(schema, "minLength", "maxLength", " characters")
    yield from _range(schema, "minItems", "maxItems", " items")
    yield from _range(schema, "minProperties", "maxProperties", " members")
    if len(schema.get("pattern", "")) > _LONGEST_PATTERN:
        yield "in the form that the document's `pattern` gives"
    elif "pattern" in schema:
        yield f"pattern {markdown.code(schema['pattern'])}"
    if "default" in schema:
        yield f"default {markdown.code(json.dumps(schema['default']))}"


def _range(schema: Schema, least: str, most: str, unit: str) -> Iterator[str]:
    if least in schema and most in schema:
        yield f"{_number(schema[least])} to {_number(schema[most])}{unit}"
    elif least in schema:
        yield f"at least {_number(schema[least])}{unit.removesuffix('s') if schema[least] == 1 else unit}"
    elif most in schema:
        yield f"at most {_number(schema[most])}{unit}"


def _number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.10f}".rstrip("0").rstrip(".")
