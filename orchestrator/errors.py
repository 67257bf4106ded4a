"""The errors that this product raises on purpose. Every message is for the person who must act on it."""

from __future__ import annotations

from collections.abc import Iterable


class OrchestratorError(Exception):
    """The base of all others. Its text names the thing, the value and the remedy."""


class SettingsError(OrchestratorError):
    """One or more settings are wrong. `problems` holds one line for each, all found in one pass."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ValidationError(OrchestratorError):
    """A submitted value is refused: `field` names it (``scheduled_at``), `reason` says why."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(field, reason)

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class NotPermitted(OrchestratorError):  # noqa: N818  # a state, as those below
    """The login of DATABASE_URL lacks a right; the text names the remedy."""


class DatabaseUnavailable(OrchestratorError):  # noqa: N818  # a state, not a mistake
    """PostgreSQL cannot be reached at present; the same call may succeed later."""


class Blocked(DatabaseUnavailable):
    """The open transaction of another session holds a lock that the call needs. The call gave up; nothing was done."""


class InDoubt(DatabaseUnavailable):  # a state, not a mistake
    """The connection to PostgreSQL was lost during a change: the change may have been made."""


class OwnFaultError(OrchestratorError):
    """A fault of this machine, not of the far end; `kind` is one of a few words for metrics."""

    def __init__(self, kind: str, what: str, remedy: str) -> None:
        self.kind = kind
        super().__init__(f"{what}; {remedy}")


class UnusableDatabase(OrchestratorError):  # noqa: N818  # a state, not a mistake
    """The database answers, but the product cannot work on it because of how it was created."""


class KafkaUnavailable(OrchestratorError):  # noqa: N818  # a state, not a mistake
    """No broker can be reached at present; the same call may succeed later. `own`: this machine is the cause."""

    def __init__(self, text: str, own: OwnFaultError | None = None) -> None:
        self.own = own
        super().__init__(text)


def first_line(error: BaseException) -> str:
    """The first line of its text; the name of its class when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
