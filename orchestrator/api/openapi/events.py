"""The schemas of the OpenAPI document, with the same bounds that the code checks."""

from __future__ import annotations

from orchestrator.api.openapi.dead_letters import dead_letter_schemas
from orchestrator.api.openapi.destinations import destination_schemas
from orchestrator.api.openapi.operations import NEXT
from orchestrator.api.openapi.parts import COUNT, NAME, STATUSES, TIME, UUID, Schema, closed, nullable, ref
from orchestrator.api.openapi.submission import submission_schemas
from orchestrator.api.problems import KINDS, TYPE_PREFIX
from orchestrator.api.requests.filters import CANCEL, NARROWING, RESCHEDULE, body_schema, swept_schema
from orchestrator.api.routes.events import MAX_COUNTS
from orchestrator.settings import Settings

_SUBMITTED_STATUS: Schema = {
    "type": "string",
    "enum": ["scheduled", "duplicate", "accepted"],
    "description": "`scheduled`: it is kept. `duplicate`: it was kept before; nothing has changed. `accepted`: Kafka "
    "has it; it is kept within moments, unless it was before or the database refuses it.",
}
_EVENT_STATUS: Schema = {
    "type": ["string", "null"],
    "enum": [*STATUSES, None],
    "description": "The state that the event is in now, such as `cancelled` for a duplicate of one that was; null: "
    "Kafka has it, and what has become of it is not known yet.",
}
_ID: Schema = {**UUID, "description": "The id of the event."}
_STATUS: Schema = {"type": "string", "enum": STATUSES, "description": "The state of the event."}
_DUPLICATE: Schema = {"type": "boolean", "description": "Whether the event was kept before; then nothing has changed."}
_INDEX: Schema = {**COUNT, "description": "The place of the event in the batch, from 0."}


def schemas(settings: Settings) -> dict[str, Schema]:
    return {
        **submission_schemas(settings),
        **destination_schemas(),
        **dead_letter_schemas(),
        "Batch": {
            "description": "Many events to submit in one request.",
            **closed(
                {
                    "events": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": settings.max_batch_events,
                        "items": {"anyOf": [ref("Submission"), {}]},
                        "description": "Submissions. One that breaks a rule is reported in its result, and does not "
                        "affect the others.",
                    }
                }
            ),
        },
        "Submitted": {
            "description": "What became of a submitted event.",
            **closed(
                {
                    "id": _ID,
                    "external_job_id": {**nullable(NAME), "description": "As submitted; null: none was given."},
                    "scheduled_at": {**TIME, "description": "As submitted, in UTC."},
                    "status": _SUBMITTED_STATUS,
                    "duplicate": _DUPLICATE,
                    "event_status": _EVENT_STATUS,
                }
            ),
        },
        "BatchResult": {
            "description": "What became of each event of a batch.",
            **closed(
                {
                    "accepted": {**COUNT, "description": "Events that are new, or that Kafka has."},
                    "duplicates": {**COUNT, "description": "Events that were kept before."},
                    "rejected": {**COUNT, "description": "Events that break a rule, and are not kept."},
                    "results": {
                        "type": "array",
                        "items": {"oneOf": [ref("ItemSubmitted"), ref("ItemRejected")]},
                        "description": "One for each event, in the order in which they were sent.",
                    },
                }
            ),
        },
        "ItemSubmitted": {
            "description": "An event of a batch that is kept, or that Kafka has.",
            **closed(
                {
                    "index": _INDEX,
                    "id": _ID,
                    "status": _SUBMITTED_STATUS,
                    "duplicate": _DUPLICATE,
                    "event_status": _EVENT_STATUS,
                }
            ),
        },
        "ItemRejected": {
            "description": "An event of a batch that is not kept.",
            **closed({"index": _INDEX, "error": {**ref("Fault"), "description": "The rule that it breaks."}}),
        },
        "Event": {"description": "An event, its state, and what happened to it.", **_EVENT},
        "Outcome": {"description": "One attempt, or another thing that ended or revived the event.", **_OUTCOME},
        "EventPage": {
            "description": "Events of one external id.",
            **closed(
                {
                    "events": {
                        "type": "array",
                        "items": ref("Event"),
                        "description": "The latest `scheduled_at` first.",
                    },
                    "next": NEXT,
                }
            ),
        },
        "Cancelled": _CANCELLED,
        "Reschedule": body_schema(RESCHEDULE, "scheduled_at")
        | {
            "description": "The new time of an event.",
            "examples": [{"scheduled_at": "2030-02-01T09:00:00Z"}],
        },
        "Rescheduled": _RESCHEDULED,
        "CancelFilter": body_schema(CANCEL, some_of=NARROWING)
        | {
            "description": "Which events to cancel, and how many to look at in this call.",
            "examples": [{"source": "orders", "destination": "example.com", "dry_run": True}],
        },
        "ManyCancelled": {
            "description": "What one call has cancelled.",
            **swept_schema(
                cancelled={**COUNT, "description": "Events that this call has cancelled; 0 in a dry run."},
                in_flight={**COUNT, "description": "Events that are being delivered, and go on."},
            ),
        },
        "AllCancelled": {
            "description": "What became of every event of an external id.",
            **closed(
                {
                    "events": {
                        "type": "array",
                        "minItems": 1,
                        "items": ref("Cancelled"),
                        "description": "One for each event.",
                    }
                }
            ),
        },
        "Statistics": _STATISTICS,
        "Counts": _COUNTS,
        "StatisticsOrCounts": {
            "description": "Statistics without any parameter, Counts with one.",
            "anyOf": [ref("Statistics"), ref("Counts")],
        },
        "Health": _HEALTH,
        "Fault": {
            "description": "A field, and the rule that it breaks.",
            **closed(
                {
                    "field": {"type": "string", "description": "Its name; `body` for the request as a whole."},
                    "reason": {"type": "string", "description": "What was expected, and what was given."},
                }
            ),
        },
        "Problem": _PROBLEM,
    }


_WAITS: dict[str, Schema] = {
    name: {"type": "number", "minimum": 0, "description": f"Milliseconds that it waited for {what}."}
    for name, what in (
        ("rate", "the rate limit"),
        ("parallel", "other attempts to end, by `max_parallel`"),
        ("breaker", "the circuit breaker"),
        ("pause", "the end of a pause"),
    )
}
_OUTCOME = closed(
    {
        "attempt": {**COUNT, "description": "Which attempt; 0 when the event ended before any."},
        "result": {
            "type": "string",
            "enum": ["delivered", "retried", "dead", "cancelled", "redriven", "rescheduled", "expired"],
            "description": "What happened. After `retried` and `redriven` another attempt follows; the others end the "
            "event.",
        },
        "status_code": {"type": ["integer", "null"], "description": "The HTTP status; null: there was no answer."},
        "error": {
            "type": ["string", "null"],
            "description": "Why the attempt failed; of a delivered event, what was wrong with the rest of the answer. "
            "Null: nothing was.",
        },
        "response": {
            "type": ["string", "null"],
            "description": "The first 1,024 characters of the answer to a failed attempt; null: none.",
        },
        "due_at": {**nullable(TIME), "description": "When the attempt was due; null: no attempt was made."},
        "claimed_at": {**nullable(TIME), "description": "When a dispatcher took it; it looks ahead a little."},
        "started_at": {**nullable(TIME), "description": "When the attempt began; null: no attempt was made."},
        "finished_at": {**TIME, "description": "When the result was known."},
        "lateness_ms": {
            "type": ["number", "null"],
            "description": "Milliseconds from `due_at` to `started_at`; null: no attempt was made.",
        },
        "waited": {
            **closed(_WAITS, *_WAITS),
            "type": ["object", "null"],
            "description": "Why it was late: milliseconds by what it waited for at its destination; null: nothing.",
        },
        "worker": {"type": ["string", "null"], "description": "The dispatcher that made the attempt; null: none did."},
        "successor": {**nullable(UUID), "description": "Of `rescheduled`: the event that took its place."},
    }
)

_EVENT = closed(
    {
        "id": _ID,
        "source": {"type": "string", "description": "Who submitted it."},
        "external_job_id": {"type": ["string", "null"], "description": "The client's own id for it; null: none."},
        "scheduled_at": {**TIME, "description": "When to deliver it, to the microsecond."},
        "delivery_type": {"type": "string", "enum": ["HTTP", "KAFKA"], "description": "How it is delivered."},
        "destination": {"type": ["string", "null"], "description": "A URL or a topic; null is the ready topic."},
        "payload": {"description": "The JSON to deliver, as it was submitted."},
        "headers": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "string"},
            "description": "Headers to send with the payload; null: none.",
        },
        "max_retries": {**COUNT, "description": "Attempts after the first."},
        "retry_policy": {
            "type": ["string", "null"],
            "description": "The name of its retry policy; null: that of its destination, or `default`.",
        },
        "ordering_key": {
            "type": ["string", "null"],
            "description": "Events of one key are delivered one at a time, in order; null: it waits for no other.",
        },
        "priority": {"type": "integer", "description": "-9 to 9; the highest of those that are due go first."},
        "spread_seconds": {
            "type": ["number", "null"],
            "description": "Seconds after `scheduled_at` over which such events are spread; null: as its destination.",
        },
        "expires_at": {**nullable(TIME), "description": "No attempt begins then or later; null: it never expires."},
        "correlation_id": {"type": ["string", "null"], "description": "What it is followed by; null: none."},
        "traceparent": {
            "type": ["string", "null"],
            "description": "The W3C trace context that it belongs to; null: none.",
        },
        "predecessor": {**nullable(UUID), "description": "The event that was rescheduled to this one; null: none."},
        "successor": {**nullable(UUID), "description": "The event that it was rescheduled to; null: none."},
        "created_at": {**TIME, "description": "When it was kept."},
        "status": _STATUS,
        "attempt": {**COUNT, "description": "Attempts begun so far."},
        "due_at": {**nullable(TIME), "description": "When the next attempt is due; null when there is none."},
        "spread_ms": {
            "type": ["number", "null"],
            "description": "How long after `scheduled_at` it was due at first, by the spread; null: without one.",
        },
        "waits_for": {**nullable(UUID), "description": "The event of its ordering key that it waits for; null: none."},
        "outcomes": {"type": "array", "items": ref("Outcome"), "description": "What happened, oldest first."},
    }
)

_CANCELLED: Schema = {
    "description": "What became of an event that was to be cancelled.",
    **closed(
        {
            "id": _ID,
            "result": {
                "type": "string",
                "enum": ["cancelled", "already_cancelled", "in_flight", "finished"],
                "description": "`in_flight` and `finished`: it was too late to cancel it.",
            },
            "status": _STATUS,
        }
    ),
}

_RESCHEDULED: Schema = {
    "description": "An event that another one has replaced, at the new time.",
    **closed(
        {
            "id": _ID,
            "successor": {**UUID, "description": "The event that took its place."},
            "result": {
                "type": "string",
                "enum": ["rescheduled", "already_rescheduled"],
                "description": "`already_rescheduled`: a request before did the same; nothing has changed.",
            },
            "status": _STATUS,
        }
    ),
}

_STATISTICS: Schema = {
    "description": "How many events there are, by state, and what stands still.",
    **closed(
        {
            "live": {**COUNT, "description": "Events that have not ended, those in flight included."},
            "scheduled": {**COUNT, "description": "Live events that wait for their first attempt."},
            "retrying": {**COUNT, "description": "Live events that wait for another attempt."},
            "in_flight": {**COUNT, "description": "Events that dispatchers hold."},
            "backlog": {**COUNT, "description": "Events that are due and not claimed."},
            "oldest_due_at": {
                **nullable(TIME),
                "description": "The earliest due time in the backlog; null: it is empty.",
            },
            "next_due_at": {
                **nullable(TIME),
                "description": "When the next event is due that may be claimed; null: there is none.",
            },
            "dead_letters": {**COUNT, "description": "Dead letters that are kept."},
            "totals": {
                "type": "object",
                "additionalProperties": COUNT,
                "description": "Counts since installation, by what happened.",
            },
            "paused_at": {**nullable(TIME), "description": "Since when everything is paused; null: it is not."},
            "destinations_paused": {**COUNT, "description": "Destinations that are paused by themselves."},
            "breakers_open": {**COUNT, "description": "Destinations whose circuit breaker is not closed."},
            "at": {**TIME, "description": "When this was counted."},
        }
    ),
}

_COUNTS: Schema = {
    "description": "What happened in a range of time.",
    **closed(
        {
            "counts": {
                "type": "array",
                "maxItems": MAX_COUNTS,
                "items": closed(
                    {
                        "minute": {**nullable(TIME), "description": "Its minute, or hour or day where it is long ago."},
                        "name": {"type": "string", "description": "What happened, as in the totals of the statistics."},
                        "source": {"type": ["string", "null"], "description": "Empty: not known yet, or not any more."},
                        "destination": {
                            "type": ["string", "null"],
                            "description": "Empty as `source`; `*`: all beyond the first 1,000 pairs of the two.",
                        },
                        "value": {"type": "integer", "description": "How often it happened."},
                    }
                ),
                "description": "One count for each group that `by` names; null where `by` does not name a part. "
                "Maintenance adds the source and the destination of new ones, once a minute. After retention they have "
                "none.",
            }
        }
    ),
}

_UP_OR_DOWN: Schema = {"type": "string", "enum": ["UP", "DOWN"], "description": "Whether it is well."}
_HEALTH: Schema = {
    "description": "Whether the process is well.",
    **closed(
        {
            "status": {**_UP_OR_DOWN, "description": "`UP` when every check is."},
            "checks": {
                "type": "object",
                "additionalProperties": closed(
                    {
                        "status": _UP_OR_DOWN,
                        "reason": {"type": "string", "description": "Why it is down; absent when it is up."},
                    },
                    "reason",
                ),
                "description": "What was checked, by name.",
            },
        }
    ),
}

_PROBLEM: Schema = {
    "description": "A problem document, RFC 9457.",
    **closed(
        {
            "type": {
                "type": "string",
                "enum": [TYPE_PREFIX + kind for kind in KINDS],
                "description": "The kind of problem, for programs.",
            },
            "title": {"type": "string", "description": "What the kind of problem means; the same for all of one kind."},
            "status": {"type": "integer", "minimum": 400, "maximum": 599, "description": "The HTTP status."},
            "detail": {"type": "string", "description": "What is wrong with this request, for people."},
            "instance": {"type": "string", "description": "The path of the request."},
            "errors": {
                "type": "array",
                "minItems": 1,
                "items": ref("Fault"),
                "description": "The rules that the request breaks.",
            },
            "id": {**UUID, "description": "The event that could not be cancelled or rescheduled."},
            "event_status": {**_STATUS, "description": "The state of that event."},
            "events": {
                "type": "array",
                "items": ref("Cancelled"),
                "description": "The events of the external id, none of which could be cancelled.",
            },
        },
        "errors",
        "id",
        "event_status",
        "events",
    ),
}
