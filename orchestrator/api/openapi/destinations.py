"""The part of the OpenAPI document that is about destinations, pauses and the forecast."""

from __future__ import annotations

from typing import Any

from orchestrator.api.openapi.operations import BODY_PROBLEMS, NEXT, READ_PROBLEMS, answer, operation, page_parameters
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
                "List destinations by name: the configured ones, and those that failed and have not recovered",
                {"200": answer("A page of destinations, which may be empty.", "DestinationPage")},
                (*READ_PROBLEMS, 400, 422),
                "read",
                *page_parameters("destinations", CURSOR_PATTERN),
            )
        },
        "/api/v1/destinations/{name}": {
            "get": _operation(
                "destination",
                "A destination's settings, and its present state",
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
                "Delete a destination's settings; its events are still delivered",
                {"200": answer("It is no longer configured.", "DestinationDeleted")},
                (*READ_PROBLEMS, 404, 422),
                "admin",
                _NAME,
            ),
        },
        "/api/v1/destinations/{name}/pause": {
            "post": _operation(
                "pauseDestination",
                "Stop all attempts to a destination until it is resumed; it need not be configured",
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
                "Stop all attempts until resumed; submissions are still accepted",
                {"200": answer("Everything is paused, now or before.", "Paused")},
                READ_PROBLEMS,
                "admin",
            )
        },
        "/api/v1/resume": {
            "post": _operation(
                "resume",
                "End the pause of everything; destinations that were paused by themselves stay paused",
                {"200": answer("Deliveries go on.", "Resumed")},
                READ_PROBLEMS,
                "admin",
            )
        },
        "/api/v1/forecast": {
            "get": _operation(
                "forecast",
                "What will be due when, compared with what each destination can take",
                {"200": answer("The forecast.", "Forecast")},
                (*READ_PROBLEMS, 422),
                "read",
                _seconds(
                    "bucket_seconds",
                    MAX_BUCKET_S,
                    DEFAULT_BUCKET_S,
                    f"Length of a bucket, in seconds. It grows when there would be more than {MAX_BUCKETS} of them.",
                ),
                _seconds("until_seconds", MAX_UNTIL_S, DEFAULT_UNTIL_S, "How far to look ahead, in seconds."),
                {
                    "name": "destination",
                    "in": "query",
                    "description": "Only this destination, or the pattern that it belongs to.",
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
        | {
            "description": "All settings of a destination. One that is absent, or null, is set to its default.",
            "examples": _EXAMPLES,
        },
        "Destination": _DESTINATION,
        "DestinationPage": {
            "description": "Destinations by name.",
            **closed(
                {
                    "destinations": {
                        "type": "array",
                        "items": ref("Destination"),
                        "description": "In the order of their names.",
                    },
                    "next": NEXT,
                }
            ),
        },
        "Configured": {
            "description": "A destination whose settings were set.",
            **closed(
                {
                    "destination": {**ref("Destination"), "description": "Its settings now, and its state."},
                    "waiting": _WAITING,
                    "overlaps": {
                        "type": "array",
                        "items": {"type": "string"},
                        "description": "Other destinations that some of the same names match, and which goes first.",
                    },
                    "note": _NOTE,
                }
            ),
        },
        "DestinationDeleted": {
            "description": "A destination whose settings were taken away.",
            **closed({"name": _NAME_OF, "waiting": _WAITING, "note": _NOTE}),
        },
        "DestinationPaused": {
            "description": "A destination that is paused.",
            **closed(
                {
                    "name": _NAME_OF,
                    "paused_at": {**TIME, "description": "Since when it is paused."},
                    "in_flight": _IN_FLIGHT,
                    "waiting": _WAITING,
                    "note": _NOTE,
                }
            ),
        },
        "DestinationResumed": {
            "description": "A destination that is not paused.",
            **closed(
                {
                    "name": _NAME_OF,
                    "paused_at": {"type": "null", "description": "Null: it is not paused."},
                    "resumed": {"type": "boolean", "description": "Whether it was paused."},
                    "waiting": _WAITING,
                    "note": _NOTE,
                }
            ),
        },
        "Paused": {
            "description": "Everything is paused.",
            **closed(
                {
                    "paused_at": {**TIME, "description": "Since when everything is paused."},
                    "in_flight": {**COUNT, "description": "Events that dispatchers hold."},
                    "note": _NOTE,
                }
            ),
        },
        "Resumed": {
            "description": "The pause of everything has ended.",
            **closed(
                {
                    "paused_at": {"type": "null", "description": "Null: it is not paused."},
                    "resumed": {"type": "boolean", "description": "Whether everything was paused."},
                    "destinations_paused": {
                        **COUNT,
                        "description": "Destinations that are still paused by themselves.",
                    },
                    "breakers_open": {**COUNT, "description": "Destinations whose circuit breaker is not closed."},
                    "note": _NOTE,
                }
            ),
        },
        "Forecast": _FORECAST,
        "ForecastDestination": _FORECAST_DESTINATION,
    }


_NOTE: Schema = {"type": "string", "description": "What else there is to know, for people."}
_NAME_OF: Schema = {
    "type": "string",
    "description": "Host and port, or `kafka:` and the topic; with `*`, a pattern.",
}
_WAITING: Schema = {**COUNT, "description": "Events that wait for it, due or not, and that no dispatcher holds."}
_IN_FLIGHT: Schema = {**COUNT, "description": "Events that dispatchers hold for it."}
_EXAMPLES = [
    {"rate_per_second": 50, "burst": 10, "timeout_seconds": 5},
    {"max_parallel": 20, "adaptive": True, "breaker_failures": 5},
]
_STATE: Schema = {
    "type": "string",
    "enum": ["ok", "paused", "breaker_open", "breaker_half_open", "held_by_rate", "held_by_parallel"],
    "description": "What holds its events back; `ok`: nothing.",
}
_RATE: Schema = {
    "type": ["number", "null"],
    "description": "Attempts a second, by all dispatchers together; null: no limit.",
}
_NUMBER: Schema = {"type": "number"}
_OPTIONAL_NUMBER: Schema = {"type": ["number", "null"]}
_BUCKET_AT: Schema = {**TIME, "description": "When the bucket begins."}
_BUCKET_DUE: Schema = {**COUNT, "description": "Events that fall due in it; in the first, also the overdue ones."}
_BUCKET_STARTS: Schema = {**COUNT, "description": "Attempts that begin in it."}

_DESTINATION: Schema = {
    "description": "A destination: its settings, and its present state.",
    **closed(
        {
            "name": _NAME_OF,
            "configured": {
                "type": "boolean",
                "description": "False: it is listed because an attempt failed, until it has recovered.",
            },
            "state": _STATE,
            "rate_per_second": _RATE,
            "burst": {**COUNT, "description": "Attempts that may start at once after a pause, under the rate."},
            "max_parallel": {
                **nullable(COUNT),
                "description": "Attempts under way at once, by all dispatchers; null: `CUSTOMER_MAX_PARALLEL`.",
            },
            "adaptive": {
                "type": "boolean",
                "description": "Whether 429, 503 and time-outs lower the bound of attempts under way.",
            },
            "timeout_seconds": {
                **_OPTIONAL_NUMBER,
                "description": "Longest that an attempt may take, in seconds; null: `HTTP_TIMEOUT_SECONDS`.",
            },
            "retry_policy": {
                "type": ["string", "null"],
                "description": "The retry policy of events that name none; null: `default`.",
            },
            "signing_secret": {
                "type": ["string", "null"],
                "description": "The name of the secret that signs deliveries to it; null: `WEBHOOK_SECRETS`.",
            },
            "secret_headers": {
                "type": ["object", "null"],
                "additionalProperties": {"type": "string"},
                "description": "Headers to send, and the names of the secrets that are their values; null: none.",
            },
            "spread_seconds": {
                **_OPTIONAL_NUMBER,
                "description": "Seconds over which its events are spread, if they do not say; null: they are not.",
            },
            "breaker_failures": {
                **COUNT,
                "description": "Its circuit breaker opens after this many failures in a row; 0: not by that.",
            },
            "breaker_ratio": {
                **_NUMBER,
                "description": "Its circuit breaker opens when this share of attempts in its window failed, 0 to 1; 0: "
                "not by that.",
            },
            "breaker_minimum": {**COUNT, "description": "Attempts in the window before the ratio counts."},
            "breaker_window_seconds": {**_NUMBER, "description": "The window of the ratio, in seconds."},
            "breaker_cooldown_seconds": {
                **_NUMBER,
                "description": "How long the circuit breaker stays open at first, in seconds; doubles with each failed "
                "try.",
            },
            "breaker_max_cooldown_seconds": {**_NUMBER, "description": "Longest that it stays open, in seconds."},
            "paused_at": {**nullable(TIME), "description": "Since when it is paused by itself; null: it is not."},
            "breaker": {
                "type": "string",
                "enum": ["closed", "open", "half_open"],
                "description": "The circuit breaker. `closed`: attempts go through. `half_open`: one event is tried.",
            },
            "opened_at": {**nullable(TIME), "description": "Since when its breaker is open; null: it is closed."},
            "next_try_at": {
                **nullable(TIME),
                "description": "When the open breaker lets an event through, to try; null: it is closed, or the try is "
                "under way.",
            },
            "failures": {**COUNT, "description": "Failures in a row."},
            "held_by": {
                "enum": ["rate", "parallel", None],
                "description": "The limit that held back events at the last claim; null: none.",
            },
            "parallel_now": {
                **_OPTIONAL_NUMBER,
                "description": "The adaptive bound at present; null: max_parallel.",
            },
            "in_flight": _IN_FLIGHT,
            "due": {**COUNT, "description": "Events due and not claimed, counted up to 10,000."},
            "changed_at": {**TIME, "description": "When its settings last changed."},
        }
    ),
}
_FORECAST_DESTINATION: Schema = {
    "description": "What will be due for one destination, and what it can take.",
    **closed(
        {
            "name": _NAME_OF,
            "rate_per_second": _RATE,
            "max_parallel": {
                **nullable(COUNT),
                "description": "Its bound of attempts under way; null: none of its own. The forecast leaves it out, as "
                "it does not know how long attempts take.",
            },
            "state": _STATE,
            "due": {**COUNT, "description": "Events that fall due in the time looked at, and overdue ones."},
            "late": {
                **COUNT,
                "description": "Events that will not have begun by the end of the bucket they are due in.",
            },
            "late_from": {
                **nullable(TIME),
                "description": "When the first bucket with a late event begins; null: none is late.",
            },
            "late_until": {
                **nullable(TIME),
                "description": "When the last bucket with a late event ends; null: none is late.",
            },
            "latest_seconds": {
                **_OPTIONAL_NUMBER,
                "description": "How many seconds late the latest will be; null: none is late, or unknown.",
            },
            "peak_at": {**TIME, "description": "When the bucket begins in which most events fall due."},
            "peak_due": {**COUNT, "description": "Events that fall due in that bucket."},
            "peak_backlog": {**COUNT, "description": "Most events that will be due and not begun."},
            "left_over": {**COUNT, "description": "Events that will be due and not begun at the end."},
            "drained_at": {
                **nullable(TIME),
                "description": "When all will have begun; null: none is late, or never.",
            },
            "buckets": {
                "type": "array",
                "items": closed(
                    {
                        "at": _BUCKET_AT,
                        "due": _BUCKET_DUE,
                        "starts": _BUCKET_STARTS,
                        "capacity": {
                            **_OPTIONAL_NUMBER,
                            "description": "Attempts that the rate allows in it; null: no rate.",
                        },
                        "backlog": {**COUNT, "description": "Events due and not begun at its end."},
                        "late": {**COUNT, "description": "Events due in it that have not begun at its end."},
                        "drained_at": {
                            **nullable(TIME),
                            "description": "When its backlog will have begun; null: there is none, or never.",
                        },
                    }
                ),
                "description": "Those in which events fall due or begin.",
            },
        }
    ),
}
_FORECAST: Schema = {
    "description": "What will be due when, and which destinations will be late.",
    **closed(
        {
            "at": {**TIME, "description": "When the forecast was made."},
            "bucket_seconds": {**_NUMBER, "description": "How long a bucket is, in seconds."},
            "until": {**TIME, "description": "How far it looks."},
            "paused_at": {**nullable(TIME), "description": "Since when everything is paused; null: it is not."},
            "due": {**COUNT, "description": "Events that fall due until then, and overdue ones."},
            "late": {
                **COUNT,
                "description": "Events that will not have begun by the end of the bucket they are due in.",
            },
            "peak_at": {
                **nullable(TIME),
                "description": "When the bucket begins in which most events fall due; null: nothing is due.",
            },
            "peak_due": {**COUNT, "description": "Events that fall due in that bucket."},
            "buckets": {
                "type": "array",
                "items": closed({"at": _BUCKET_AT, "due": _BUCKET_DUE, "starts": _BUCKET_STARTS}),
                "description": "All destinations together. Buckets in which nothing is due or begins are left out.",
            },
            "destinations": {
                "type": "array",
                "maxItems": 100,
                "items": ref("ForecastDestination"),
                "description": "Those with most late events first.",
            },
            "others": {**COUNT, "description": "How many more destinations there are."},
        }
    ),
}
