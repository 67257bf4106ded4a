"""The part of the OpenAPI document that is about dead letters."""

from __future__ import annotations

from typing import Any

from orchestrator.api.openapi.operations import BODY_PROBLEMS, NEXT, READ_PROBLEMS, answer, operation, page_parameters
from orchestrator.api.openapi.parts import COUNT, TIME, UUID, Schema, closed, nullable, ref
from orchestrator.api.requests.filters import DEAD_LETTERS, PURGE, REDRIVE, body_schema, parameters, swept_schema
from orchestrator.api.requests.queries import CURSOR_PATTERN

_TAG = "dead letters"


def dead_letter_paths() -> dict[str, Any]:
    return {
        "/api/v1/dead-letters": {
            "get": operation(
                "deadLetters",
                "List events that ran out of attempts or failed for good; those that died last come first",
                {"200": answer("A page of dead letters, which may be empty.", "DeadLetterPage")},
                (*READ_PROBLEMS, 400, 409, 422),
                parameters=(*parameters(DEAD_LETTERS), *page_parameters("dead letters", CURSOR_PATTERN)),
                needs="read",
                tag=_TAG,
            )
        },
        "/api/v1/dead-letters/redrive": {
            "post": operation(
                "redriveDeadLetters",
                "Try dead letters again: all, or those that a filter names. A call is bounded; repeat it with `after` "
                "and `start_at` until there is no next",
                {"200": answer("What this call did.", "Redriven")},
                (*BODY_PROBLEMS, 409),
                body="Redrive",
                needs="admin",
                tag=_TAG,
            )
        },
        "/api/v1/dead-letters/purge": {
            "post": operation(
                "purgeDeadLetters",
                "Delete the dead letters that a filter names; the events stay, and stay dead. A call is bounded; "
                "repeat it with `after` until there is no next",
                {"200": answer("What this call did.", "Purged")},
                (*BODY_PROBLEMS, 409),
                body="Purge",
                needs="admin",
                tag=_TAG,
            )
        },
    }


def dead_letter_schemas() -> dict[str, Schema]:
    return {
        "DeadLetter": _DEAD_LETTER,
        "DeadLetterPage": {
            "description": "Dead letters that a filter names.",
            **closed(
                {
                    "dead_letters": {
                        "type": "array",
                        "items": ref("DeadLetter"),
                        "description": "Those that died last first.",
                    },
                    "next": NEXT,
                }
            ),
        },
        "Redrive": body_schema(REDRIVE)
        | {
            "description": "Which dead letters to try again, how fast, and how many to look at in this call.",
            "examples": [{"destination": "example.com", "rate_per_second": 50}, {"reason": "timeout", "dry_run": True}],
        },
        "Redriven": {
            "description": "What one call has redriven.",
            **swept_schema(
                redriven={**COUNT, "description": "Events that this call has made due again; 0 in a dry run."},
                next_start_at={
                    **nullable(TIME),
                    "description": "The `start_at` of the next call, to keep to the rate.",
                },
            ),
        },
        "Purge": body_schema(PURGE, some_of=tuple(DEAD_LETTERS))
        | {
            "description": "Which dead letters to forget, and how many to look at in this call.",
            "examples": [{"until": "2030-01-01T00:00:00Z", "dry_run": True}],
        },
        "Purged": {
            "description": "What one call has purged.",
            **swept_schema(purged={**COUNT, "description": "Dead letters that this call has deleted; 0 in a dry run."}),
        },
    }


_DEAD_LETTER: Schema = {
    "description": "An event that ran out of attempts, or failed for good.",
    **closed(
        {
            "id": {**UUID, "description": "The id of the event."},
            "died_at": {**TIME, "description": "When it died."},
            "attempts": {**COUNT, "description": "Attempts that it had."},
            "reason": {"type": "string", "description": "The error of the last attempt."},
            "source": {
                "type": ["string", "null"],
                "description": "Who submitted it; null: the event is no longer kept.",
            },
            "external_job_id": {
                "type": ["string", "null"],
                "description": "The client's own id for it; null: none, or the event is no longer kept.",
            },
            "scheduled_at": {
                **nullable(TIME),
                "description": "When it was to be delivered; null: the event is no longer kept.",
            },
            "delivery_type": {
                "enum": ["HTTP", "KAFKA", None],
                "description": "How it was to be delivered; null: the event is no longer kept.",
            },
            "destination": {
                "type": ["string", "null"],
                "description": "The URL or the topic; null: the installation's topic, or the event is no longer kept.",
            },
            "destination_name": {
                "type": ["string", "null"],
                "description": "Host and port, or `kafka:` and the topic; null: the event is no longer kept.",
            },
        }
    ),
}
