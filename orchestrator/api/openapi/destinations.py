"""The part of the OpenAPI document that is about destinations, pauses and the forecast."""

from __future__ import annotations

from typing import Any

from orchestrator.api.openapi.operations import BODY_PROBLEMS, READ_PROBLEMS, answer, operation, page_parameters
from orchestrator.api.openapi.parts import COUNT, TIME, Schema, closed, nullable, ref
from orchestrator.api.requests.destination_settings import DESTINATION_SETTINGS, MAX_DESTINATION_CHARS, NAME_PATTERN
from orchestrator.api.routes.destinations import (
    CURSOR_PATTERN,
    DEFAULT_BUCKET_S,
    DEFAULT_UNTIL_S,
    MAX_BUCKET_S,
    MAX_BUCKETS,
    MAX_UNTIL_S,
)

_NAME_SCHEMA: Schema = {"type": "string", "pattern": NAME_PATTERN, "maxLength": MAX_DESTINATION_CHARS}
_NAME: Schema = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "A host as in the URLs of events, with its port unless that is the usual one, or `kafka:` and a "
    "topic. With `*` for any characters all names that match are one destination; one that is configured itself goes "
    "first.",
    "schema": _NAME_SCHEMA,
}


def destination_paths() -> dict[str, Any]:
    return {
        "/api/v1/destinations": {
            "get": _operation(
                "destinations",
                "Destinations that are configured, or watched since an attempt failed, by name",
                {"200": answer("A page of destinations, which may be empty.", "DestinationPage")},
                (*READ_PROBLEMS, 400, 422),
                "read",
                *page_parameters("destinations", CURSOR_PATTERN),
            )
        },
        "/api/v1/destinations/{name}": {
            "get": _operation(
                "destination",
                "A destination's settings, and what it does at present",
                {"200": answer("The destination.", "Destination")},
                (*READ_PROBLEMS, 404, 422),
                "read",
                _NAME,
            ),
            "put": _operation(
                "configureDestination",
                "Set all settings of a destination",
                {"200": answer("They hold from the next claim on.", "Configured")},
                (*BODY_PROBLEMS, 409),
                "admin",
                _NAME,
                body="DestinationSettings",
            ),
            "delete": _operation(
                "deleteDestination",
                "Take a destination's settings away; its events are delivered all the same",
                {"200": answer("It is no longer configured.", "DestinationDeleted")},
                (*READ_PROBLEMS, 404, 422),
                "admin",
                _NAME,
            ),
        },
        "/api/v1/destinations/{name}/pause": {
            "post": _operation(
                "pauseDestination",
                "Have no attempt begin to a destination until it is resumed; it need not be configured",
                {"200": answer("It is paused, now or before.", "DestinationPaused")},
                (*READ_PROBLEMS, 422),
                "admin",
                _NAME,
            )
        },
        "/api/v1/destinations/{name}/resume": {
            "post": _operation(
                "resumeDestination",
                "End the pause of a destination",
                {"200": answer("It is not paused.", "DestinationResumed")},
                (*READ_PROBLEMS, 404, 422),
                "admin",
                _NAME,
            )
        },
        "/api/v1/pause": {
            "post": _operation(
                "pause",
                "Have no attempt begin at all until resumed; submissions are kept all the same",
                {"200": answer("Everything is paused, now or before.", "Paused")},
                READ_PROBLEMS,
                "admin",
            )
        },
        "/api/v1/resume": {
            "post": _operation(
                "resume",
                "End the pause of everything; destinations that were paused by themselves stay so",
                {"200": answer("Everything else goes on.", "Resumed")},
                READ_PROBLEMS,
                "admin",
            )
        },
        "/api/v1/forecast": {
            "get": _operation(
                "forecast",
                "What will be due when, against what each destination takes",
                {"200": answer("The forecast.", "Forecast")},
                (*READ_PROBLEMS, 422),
                "read",
                _seconds(
                    "bucket_seconds",
                    MAX_BUCKET_S,
                    DEFAULT_BUCKET_S,
                    f"How much a bucket is; more, when there would be over {MAX_BUCKETS} of them.",
                ),
                _seconds("until_seconds", MAX_UNTIL_S, DEFAULT_UNTIL_S, "How far to look."),
                {
                    "name": "destination",
                    "in": "query",
                    "description": "This one alone, or the pattern that it belongs to.",
                    "schema": _NAME_SCHEMA,
                },
            )
        },
    }


def _operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    problems: tuple[int, ...],
    needs: str,
    *parameters: Schema,
    body: str | None = None,
) -> dict[str, Any]:
    return operation(
        name, summary, answers, problems, parameters=parameters, body=body, needs=needs, tag="destinations"
    )


def _seconds(name: str, most: int, default: int, about: str) -> Schema:
    bounds = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return {"name": name, "in": "query", "description": about, "schema": bounds}


def destination_schemas() -> dict[str, Schema]:
    return {
        "DestinationSettings": closed(
            {name: nullable(each.schema) for name, each in DESTINATION_SETTINGS.items()}, *DESTINATION_SETTINGS
        )
        | {"description": "A setting that is absent, or null, is set to its default.", "examples": _EXAMPLES},
        "Destination": _DESTINATION,
        "DestinationPage": closed(
            {
                "destinations": {"type": "array", "items": ref("Destination")},
                "next": {"type": ["string", "null"], "description": "The `cursor` of the next page; null on the last."},
            }
        ),
        "Configured": closed(
            {
                "destination": ref("Destination"),
                "waiting": {**COUNT, "description": "Events that wait and that it holds for."},
                "overlaps": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "Other destinations that some of the same names match, and which goes first.",
                },
                "note": _NOTE,
            }
        ),
        "DestinationDeleted": closed({"name": _STRING, "waiting": COUNT, "note": _NOTE}),
        "DestinationPaused": closed(
            {"name": _STRING, "paused_at": TIME, "in_flight": COUNT, "waiting": COUNT, "note": _NOTE}
        ),
        "DestinationResumed": closed(
            {
                "name": _STRING,
                "paused_at": {"type": "null"},
                "resumed": {"type": "boolean", "description": "Whether it was paused."},
                "waiting": COUNT,
                "note": _NOTE,
            }
        ),
        "Paused": closed({"paused_at": TIME, "in_flight": COUNT, "note": _NOTE}),
        "Resumed": closed(
            {
                "paused_at": {"type": "null"},
                "resumed": {"type": "boolean", "description": "Whether everything was paused."},
                "destinations_paused": COUNT,
                "breakers_open": COUNT,
                "note": _NOTE,
            }
        ),
        "Forecast": _FORECAST,
        "ForecastDestination": _FORECAST_DESTINATION,
    }


_NOTE: Schema = {"type": "string", "description": "What else there is to know, for people."}
_EXAMPLES = [
    {"rate_per_second": 50, "burst": 10, "timeout_seconds": 5},
    {"max_parallel": 20, "adaptive": True, "breaker_failures": 5},
]
_STATES = ["ok", "paused", "breaker_open", "breaker_half_open", "held_by_rate", "held_by_parallel"]
_STRING: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_OPTIONAL_NUMBER: Schema = {"type": ["number", "null"]}

_DESTINATION = closed(
    {
        "name": {"type": "string"},
        "configured": {"type": "boolean", "description": "False: watched since an attempt failed."},
        "state": {"type": "string", "enum": _STATES},
        "rate_per_second": _OPTIONAL_NUMBER,
        "burst": COUNT,
        "max_parallel": nullable(COUNT),
        "adaptive": {"type": "boolean"},
        "timeout_seconds": _OPTIONAL_NUMBER,
        "retry_policy": {"type": ["string", "null"]},
        "signing_secret": {"type": ["string", "null"]},
        "secret_headers": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
        "spread_seconds": _OPTIONAL_NUMBER,
        "breaker_failures": COUNT,
        "breaker_ratio": _NUMBER,
        "breaker_minimum": COUNT,
        "breaker_window_seconds": _NUMBER,
        "breaker_cooldown_seconds": _NUMBER,
        "breaker_max_cooldown_seconds": _NUMBER,
        "paused_at": {**nullable(TIME), "description": "Since when it is paused by itself."},
        "breaker": {"type": "string", "enum": ["closed", "open", "half_open"]},
        "opened_at": {**nullable(TIME), "description": "Since when its breaker is open."},
        "next_try_at": {**nullable(TIME), "description": "When the open breaker lets an event through, to try."},
        "failures": {**COUNT, "description": "Failures in a row."},
        "held_by": {"enum": ["rate", "parallel", None], "description": "What held back events at the last claim."},
        "parallel_now": {
            **_OPTIONAL_NUMBER,
            "description": "The adaptive bound at present; null: max_parallel.",
        },
        "in_flight": {**COUNT, "description": "Events that dispatchers hold for it."},
        "due": {**COUNT, "description": "Events due and not claimed, counted up to 10,000."},
        "changed_at": TIME,
    }
)
_FORECAST_DESTINATION = closed(
    {
        "name": {"type": "string"},
        "rate_per_second": _OPTIONAL_NUMBER,
        "max_parallel": {**nullable(COUNT), "description": "Not reckoned with: how long attempts take is unknown."},
        "state": {"type": "string", "enum": _STATES},
        "due": COUNT,
        "late": {**COUNT, "description": "Events that will not have begun by the end of the bucket they are due in."},
        "late_from": {**nullable(TIME), "description": "When the first of them is due, by its bucket."},
        "late_until": nullable(TIME),
        "latest_seconds": {**_OPTIONAL_NUMBER, "description": "How late the latest will be; null: none, or unknown."},
        "peak_at": TIME,
        "peak_due": COUNT,
        "peak_backlog": {**COUNT, "description": "Most events that will be due and not begun."},
        "left_over": {**COUNT, "description": "Those at the end."},
        "drained_at": {
            **nullable(TIME),
            "description": "When all will have begun; null: none is late, or never.",
        },
        "buckets": {
            "type": "array",
            "items": closed(
                {
                    "at": TIME,
                    "due": COUNT,
                    "starts": COUNT,
                    "capacity": {**_OPTIONAL_NUMBER, "description": "What the rate allows; null: no rate."},
                    "backlog": COUNT,
                    "late": COUNT,
                    "drained_at": nullable(TIME),
                }
            ),
            "description": "Those in which events fall due or begin.",
        },
    }
)
_FORECAST = closed(
    {
        "at": TIME,
        "bucket_seconds": _NUMBER,
        "until": TIME,
        "paused_at": {**nullable(TIME), "description": "Since when everything is paused."},
        "due": COUNT,
        "late": COUNT,
        "peak_at": nullable(TIME),
        "peak_due": COUNT,
        "buckets": {"type": "array", "items": closed({"at": TIME, "due": COUNT, "starts": COUNT})},
        "destinations": {
            "type": "array",
            "maxItems": 100,
            "items": ref("ForecastDestination"),
            "description": "Those with most late events first.",
        },
        "others": {**COUNT, "description": "How many more destinations there are."},
    }
)
