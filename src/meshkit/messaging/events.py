"""Typed events: a model, the name it goes by on the wire, and the exchange it is published to.

    @event("user.created", exchange="user-events")
    class UserCreated(BaseModel):
        user_id: UUID
        email: str

Models are pydantic's; only `model_dump_json` and `model_validate_json` are used, so nothing of it is imported. The
envelope is CloudEvents 1.0 in binary mode: the body is the model as JSON, what it is stands in `ce-` headers.
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/amqp-protocol-binding.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from meshkit.core.clock import Clock
from meshkit.core.scope import Scope
from meshkit.errors import ConfigurationError, ContractError, EnvelopeError
from meshkit.messaging import headers as h
from meshkit.messaging.message import Message, derived_id, new_id

M = TypeVar("M", bound=type)

_ATTRIBUTE = "__meshkit_event__"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventType:
    """What a model is called on the wire.

    Attributes:
        name: the event's type, `"user.created"`, and the routing key it is published with.
        exchange: the topic exchange it is published to, `"user-events"`.
        version: of its schema, from 1.
        model: the class.
    """

    name: str
    exchange: str
    version: int
    model: type

    @property
    def dataschema(self) -> str:
        """The schema as a URI, since that is what CloudEvents asks for."""
        return f"meshkit:{self.name}/{self.version}"


def event(name: str, *, exchange: str, version: int = 1) -> Callable[[M], M]:
    """Declare that a model is an event.

    Args:
        name: its type on the wire and its routing key: lower-case words with dots between, `"user.created"`.
        exchange: the topic exchange it is published to.
        version: of its schema, from 1.

    Raises:
        ConfigurationError: a value that cannot work, or a class that is no model.
    """
    if not name or len(name.encode()) > 255 or any(letter in name for letter in "*# \n"):
        raise ConfigurationError(
            f"an event's type is also its routing key, and {name!r} cannot be one.",
            'Take lower-case words with dots between, "user.created".',
        )
    if not exchange or len(exchange.encode()) > 255:
        raise ConfigurationError(f"{name!r} is published to an exchange, and {exchange!r} is no name for one.")
    if version < 1:
        raise ConfigurationError(f"version counts the schemas of {name!r} from 1, so it is not {version}.")

    def declare(model: M) -> M:
        if not (hasattr(model, "model_dump_json") and hasattr(model, "model_validate_json")):
            raise ConfigurationError(
                f"{model.__qualname__} cannot be written as JSON and read again.",
                "Make it a pydantic model: class … (pydantic.BaseModel).",
            )
        setattr(model, _ATTRIBUTE, EventType(name=name, exchange=exchange, version=version, model=model))
        return model

    return declare


def event_type(model: object) -> EventType:
    """What an event, or its class, is called on the wire.

    Raises:
        ConfigurationError: it has not been declared with `@event`.
    """
    cls = model if isinstance(model, type) else type(model)
    # From the class itself: a model that inherits from an event is another event, and has to say which.
    found = vars(cls).get(_ATTRIBUTE)
    if not isinstance(found, EventType):
        raise ConfigurationError(
            f"{cls.__qualname__} is not declared as an event.", 'Put @event("…", exchange="…") above the class.'
        )
    return found


# -- out --------------------------------------------------------------------------------------------------------------


def envelope(
    model: Any,
    *,
    source: str,
    clock: Clock,
    scope: Scope | None,
    message_id: str | None = None,
    deadline: datetime | None = None,
) -> tuple[Message, EventType]:
    """Make the message of an event, but for the trace headers.

    Args:
        source: the service that publishes it.
        scope: where it is published: inside a delivery the id is derived from the message that is handled.
        message_id: the id to use instead.
        deadline: after this point nobody wants it handled any more; with a time zone.

    Raises:
        ConfigurationError: the class is no event, or the deadline has no time zone.
    """
    kind = event_type(model)
    if message_id is None:
        handling = scope.handling if scope is not None else None
        # Without an id of its own the handled message gives nothing to derive from.
        message_id = derived_id(handling, kind.name) if handling is not None and handling.message_id else new_id(clock)
    now = clock.time()
    published = h.rfc3339(now)
    headers = {
        h.CE_SPECVERSION: "1.0",
        h.CE_ID: message_id,
        h.CE_SOURCE: source,
        h.CE_TYPE: kind.name,
        h.CE_TIME: published,
        h.CE_DATASCHEMA: kind.dataschema,
        h.FIRST_PUBLISHED_AT: published,
    }
    if deadline is not None:
        if deadline.tzinfo is None:
            raise ConfigurationError("a deadline is a point in time for other machines too, so it needs a time zone.")
        headers[h.DEADLINE] = h.rfc3339(deadline.timestamp())
    if scope is not None and scope.degraded:
        headers[h.DEGRADED] = h.cut(", ".join(scope.degraded), h.MOST_MESSAGE)
    message = Message(
        body=model.model_dump_json().encode(),
        message_id=message_id,
        type=kind.name,
        headers=headers,
        content_type="application/json",
        content_encoding="utf-8",
        timestamp=datetime.fromtimestamp(int(now), UTC),
        app_id=source,
    )
    return message, kind


# -- in ---------------------------------------------------------------------------------------------------------------


def decode(message: Message, kind: EventType) -> Any:
    """The event that a message holds.

    Raises:
        EnvelopeError: the message says that it is something else.
        ContractError: the body does not fit the model.
    """
    name = h.text(message.headers, h.CE_TYPE) or message.type or ""
    # A message without a type came from a producer that does not know of any; what is in it decides.
    if name and name != kind.name:
        raise EnvelopeError(f"a message of type {h.cut(name, 128)!r} arrived where {kind.name!r} is expected.")
    spoken = (message.content_type or "application/json").partition(";")[0].strip().lower()
    if spoken != "application/json" and not spoken.endswith("+json"):
        raise EnvelopeError(f"the body of {kind.name!r} is said to be {h.cut(spoken, 128)!r}, and JSON is expected.")
    try:
        return kind.model.model_validate_json(message.body)  # type: ignore[attr-defined]
    except ValueError as error:
        raise ContractError(f"the body does not fit {kind.name!r}, version {kind.version}: {_why(error)}") from error


def _why(error: ValueError) -> str:
    """What did not fit, without the values: they are in the body, and have no place in a log."""
    tell: Any = getattr(error, "errors", None)
    if not callable(tell):
        return type(error).__name__
    found: Any = tell(include_url=False, include_context=False, include_input=False)
    lines = [f"{'.'.join(map(str, one.get('loc', ()))) or 'body'}: {one.get('msg', '')}" for one in found[:3]]
    return "; ".join(lines) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
