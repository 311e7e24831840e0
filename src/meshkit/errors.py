"""Every error that meshkit raises, what it means and what to do about it.

    MeshkitError                                  code, one sentence of cause, one of remedy
    ├── RejectedError(policy, retry_after)        never started: safe to repeat
    │   ├── CircuitOpenError                      in policies/circuit_breaker.py: also a pybreaker.CircuitBreakerError
    │   ├── BulkheadFullError · RateLimitedError
    │   └── DeadlineTooCloseError
    ├── TimeoutExceededError (also TimeoutError)  started, outcome unknown
    │   └── AttemptTimeoutError · DeadlineExceededError
    ├── MessagingError
    │   ├── PublishError → UnroutableError · PublishTimeoutError · PublishNackedError
    │   ├── EnvelopeError · ContractError         what arrived does not hold what it promises
    │   └── TopologyError                         the broker's queue differs: says which argument
    └── ConfigurationError (also ValueError)
    HandlerVerdict (not a MeshkitError): RetryLater · DeadLetter · Discard

Codes: MK1xx configuration, MK2xx messaging, MK3xx topology and doctor, MK4xx telemetry, MK5xx policies and HTTP,
MK6xx dead letters. `CODES` is the one list of them; docs/errors.md is read against it by a test.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

CODES: Final[dict[str, str]] = {
    "MK100": "a setting or an argument has a value that cannot work",
    "MK101": "a library that this part of meshkit plugs into is not installed",
    "MK102": "a server that is needed cannot be reached, or refused the login",
    "MK200": "something went wrong between this process and the broker",
    "MK201": "a message could not be published",
    "MK202": "no queue is bound for the message: the broker returned it",
    "MK203": "the broker did not confirm the message in time",
    "MK204": "the broker refused the message",
    "MK205": "a message arrived whose envelope does not hold what it promises",
    "MK206": "a message arrived whose body does not fit the event's contract",
    "MK301": "a queue or exchange exists on the broker with other properties",
    "MK401": "telemetry cannot be set up as asked",
    "MK500": "a policy refused to start the call",
    "MK501": "the circuit breaker is open",
    "MK502": "the bulkhead is full",
    "MK503": "the rate limiter has no permit left",
    "MK504": "too little time is left to start the call",
    "MK510": "the call took longer than it may",
    "MK511": "one attempt took longer than it may",
    "MK512": "the deadline of the whole call has passed",
    "MK600": "a dead letter could not be read or moved",
    "MK601": "no dead letter with that id",
}


def _copied(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An error as it is before its attributes are set. Copies (and pickles: an error crosses from a worker process) are
    made without `__init__`, whose arguments are keywords, while Python knows only of `args`."""
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class MeshkitError(Exception):
    """What all errors of meshkit have: a code, one sentence of cause, one of remedy.

    Args:
        cause: what happened, one sentence.
        remedy: what to do about it, one sentence; empty where nothing general can be said.
        code: one of `CODES`; the class's own where left out.
    """

    code: str = "MK200"

    def __init__(self, cause: str = "", remedy: str = "", *, code: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        text = f"{self.code}  {self.cause}"
        return f"{text} {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (type(self), self.args), self.__dict__


# -- never started ----------------------------------------------------------------------------------------------------


class RejectedError(MeshkitError):
    """A policy refused to start the call, so nothing happened and it is safe to repeat.

    Args:
        cause: what happened, one sentence.
        policy: name of the policy that refused (a breaker's name, say).
        retry_after: seconds until a call may be let through, `None` where that is not known.
    """

    code = "MK500"

    def __init__(
        self, cause: str = "", remedy: str = "", *, policy: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(cause, remedy)
        self.policy = policy
        self.retry_after = retry_after


class BulkheadFullError(RejectedError):
    """All places of a bulkhead are taken, and so is its queue."""

    code = "MK502"


class RateLimitedError(RejectedError):
    """A rate limiter has no permit left within the time the caller would wait."""

    code = "MK503"


class DeadlineTooCloseError(RejectedError):
    """Too little time is left for the call to be worth starting."""

    code = "MK504"


# -- started, outcome unknown -----------------------------------------------------------------------------------------


class TimeoutExceededError(MeshkitError, TimeoutError):
    """A call was started and took longer than it may: whether it took effect is not known.

    Args:
        seconds: the limit that was exceeded.
    """

    code = "MK510"

    def __init__(self, cause: str = "", remedy: str = "", *, seconds: float | None = None) -> None:
        super().__init__(cause, remedy)
        self.seconds = seconds


class AttemptTimeoutError(TimeoutExceededError):
    """One attempt took longer than an attempt may."""

    code = "MK511"


class DeadlineExceededError(TimeoutExceededError):
    """The time for the whole call, all attempts and waits included, is over."""

    code = "MK512"


# -- messaging --------------------------------------------------------------------------------------------------------


class MessagingError(MeshkitError):
    """Something went wrong between this process and the broker."""

    code = "MK200"


class PublishError(MessagingError):
    """A message was not confirmed by the broker: it may or may not be stored, and is safe to publish again
    under the same `message_id`."""

    code = "MK201"


class UnroutableError(PublishError):
    """No queue is bound to the exchange for this routing key: the broker returned the message and stored nothing."""

    code = "MK202"


class PublishTimeoutError(PublishError):
    """The broker did not confirm in time: whether the message is stored is not known."""

    code = "MK203"


class PublishNackedError(PublishError):
    """The broker refused the message (a full queue with `x-overflow: reject-publish`, say)."""

    code = "MK204"


class EnvelopeError(MessagingError):
    """A message arrived whose properties or headers do not hold what they promise."""

    code = "MK205"


class ContractError(MessagingError):
    """A message arrived whose body does not fit the event it claims to be."""

    code = "MK206"


class TopologyError(MessagingError):
    """A queue or exchange exists on the broker with other properties than asked for; the text says which."""

    code = "MK301"


# -- configuration ----------------------------------------------------------------------------------------------------


class ConfigurationError(MeshkitError, ValueError):
    """A setting or an argument has a value that cannot work; the text says what would be right."""

    code = "MK100"


def missing_extra(extra: str, package: str) -> ConfigurationError:
    """The error for a library that is not installed, with the line that installs it.

    Args:
        extra: name of meshkit's extra that brings the library, `"fastapi"`.
        package: the library that could not be imported, `"fastapi"`.
    """
    return ConfigurationError(
        f"{package} is not installed, and this part of meshkit plugs into it.",
        # Quoted, because zsh takes the brackets for a pattern.
        f'Install it with: pip install "meshkit-py[{extra}]"',
        code="MK101",
    )


# -- a handler's own words --------------------------------------------------------------------------------------------


class HandlerVerdict(BaseException):
    """What a message handler decides by raising. Not an error: no policy retries, counts or replaces it.

    It is a `BaseException`, so that a handler's own `except Exception` does not swallow the decision.
    """

    outcome: ClassVar[str]

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (type(self), self.args), self.__dict__


class RetryLater(HandlerVerdict):
    """Try this message again later, as the next attempt of its schedule.

    Args:
        after: seconds to wait at least; the schedule's own wait where left out.
        reason: one line for the log and the span.
    """

    outcome = "retry"

    def __init__(self, *, after: float | None = None, reason: str = "") -> None:
        if after is not None and after < 0:
            raise ConfigurationError(f"after is how many seconds to wait, so 0 or above, not {after}.")
        super().__init__(reason)
        self.after = after
        self.reason = reason


class DeadLetter(HandlerVerdict):
    """Put this message into the dead-letter queue now, without further attempts.

    Args:
        reason: one line that a person will read beside the dead letter.
    """

    outcome = "dead_letter"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Discard(HandlerVerdict):
    """Take this message off the queue without having handled it.

    Args:
        reason: one line for the log and the span.
    """

    outcome = "discard"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
