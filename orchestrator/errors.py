"""The errors this product raises on purpose. Every message is written for the person who has to act on it."""

from __future__ import annotations

from collections.abc import Iterable


class OrchestratorError(Exception):
    """Base of them all; its text names the thing, the value and the remedy."""


class SettingsError(OrchestratorError):
    """One or more settings are wrong. `problems` holds one line for each, all found in one pass."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ValidationError(OrchestratorError):
    """A submitted value is unacceptable: `field` says which (``scheduled_at``), `reason` says why."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(field, reason)

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class NotPermitted(OrchestratorError):  # noqa: N818  # a state, as those below
    """The login of DATABASE_URL lacks a right; the text names the remedy."""


class DatabaseUnavailable(OrchestratorError):  # noqa: N818  # a state, not a mistake
    """PostgreSQL cannot be reached just now; the same call may succeed later."""


class Blocked(DatabaseUnavailable):
    """Another session's open transaction holds what a call needs, which has waited for its time; nothing was done."""


class InDoubt(DatabaseUnavailable):  # a state, not a mistake
    """PostgreSQL went away while something was being done: it may have been done all the same."""


class OwnFaultError(OrchestratorError):
    """This machine could not do it, whoever the far end is; `kind` is one of a few words for metrics."""

    def __init__(self, kind: str, what: str, remedy: str) -> None:
        self.kind = kind
        super().__init__(f"{what}; {remedy}")


class UnusableDatabase(OrchestratorError):  # noqa: N818  # a state, not a mistake
    """The database is there, but this product can never work on it as it is made."""


class KafkaUnavailable(OrchestratorError):  # noqa: N818  # a state, not a mistake
    """No broker can be reached just now; the same call may succeed later. `own`: because of this machine."""

    def __init__(self, text: str, own: OwnFaultError | None = None) -> None:
        self.own = own
        super().__init__(text)
