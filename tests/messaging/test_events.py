"""Typed events: declared, written, read."""

import json
from datetime import UTC, datetime
from uuid import UUID

import pytest
from pydantic import BaseModel

from meshkit.core.scope import Handling, Scope
from meshkit.errors import ConfigurationError, ContractError, EnvelopeError
from meshkit.messaging import headers as h
from meshkit.messaging.events import decode, envelope, event, event_type
from meshkit.messaging.message import Message
from meshkit.testing.clock import ManualClock


@event("user.created", exchange="user-events", version=2)
class UserCreated(BaseModel):
    user_id: UUID
    email: str


USER = UserCreated(user_id=UUID(int=1), email="a@example.org")


def test_an_event_is_a_cloudevent_in_binary_mode():
    """The body is the model as JSON, what it is stands in headers, all of them text."""
    message, kind = envelope(USER, source="user-service", clock=ManualClock(epoch=0.5), scope=None)
    assert {"user_id": str(UUID(int=1)), "email": "a@example.org"} == json.loads(message.body)
    assert {
        "ce-specversion": "1.0",
        "ce-id": message.message_id,
        "ce-source": "user-service",
        "ce-type": "user.created",
        "ce-time": "1970-01-01T00:00:00.500Z",
        "ce-dataschema": "meshkit:user.created/2",
        "meshkit-first-published-at": "1970-01-01T00:00:00.500Z",
    } == message.headers
    assert ("application/json", "user.created", "user-service") == (message.content_type, message.type, message.app_id)
    assert ("user.created", "user-events") == (kind.name, kind.exchange)


def test_what_was_written_can_be_read():
    """An event survives the way over the broker."""
    message, kind = envelope(USER, source="s", clock=ManualClock(), scope=None)
    assert USER == decode(message, kind)


def test_inside_a_delivery_the_id_follows_from_the_message():
    """The same message handled again publishes the same ids."""

    def published():
        scope = Scope(handling=Handling(message_id="1", queue="q"))
        return [envelope(USER, source="s", clock=ManualClock(), scope=scope)[0].message_id for _ in range(2)]

    first, second = published(), published()
    assert first == second
    assert first[0] != first[1]


def test_says_what_was_degraded_and_until_when_it_is_wanted():
    """Fallbacks that were used on the way travel along, and a command's deadline does."""
    scope = Scope()
    scope.mark_degraded("prices")
    until = datetime(2026, 11, 21, 13, 0, tzinfo=UTC)
    message, _ = envelope(USER, source="s", clock=ManualClock(), scope=scope, deadline=until)
    assert ("prices", "2026-11-21T13:00:00.000Z") == (message.headers[h.DEGRADED], message.headers[h.DEADLINE])


def test_a_deadline_needs_a_time_zone():
    """It is read on another machine."""
    with pytest.raises(ConfigurationError, match="time zone"):
        envelope(USER, source="s", clock=ManualClock(), scope=None, deadline=datetime(2026, 1, 1))


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"body": b"{"}, ContractError, "JSON"),
        ({"body": b"\xff"}, ContractError, "user.created"),
        ({"body": b'{"user_id": "x", "email": "secret@example.org"}'}, ContractError, "user_id"),
        ({"type": "user.deleted"}, EnvelopeError, "user.deleted"),
        ({"headers": {"ce-type": "user.deleted"}}, EnvelopeError, "user.deleted"),
        ({"content_type": "text/xml"}, EnvelopeError, "text/xml"),
    ],
)
def test_what_does_not_fit_is_refused_without_telling_the_values(fields, error, told):
    """The error says what is wrong, and not what stands in the body."""
    message = Message(**{"body": USER.model_dump_json().encode(), "message_id": "1", **fields})
    with pytest.raises(error) as caught:
        decode(message, event_type(UserCreated))
    assert told in str(caught.value)
    assert "secret@" not in str(caught.value)


def test_a_message_without_a_type_is_judged_by_its_body():
    """A producer that knows no events may publish to the same exchange."""
    assert USER == decode(Message(body=USER.model_dump_json().encode()), event_type(UserCreated))


def test_a_model_that_inherits_from_an_event_is_none_itself():
    """It would go out under the name of another."""

    class VipCreated(UserCreated):
        pass

    with pytest.raises(ConfigurationError, match="VipCreated"):
        event_type(VipCreated)


@pytest.mark.parametrize("declared", [{"name": ""}, {"name": "user.*"}, {"exchange": ""}, {"version": 0}])
def test_refuses_names_that_cannot_work(declared):
    """A type is a routing key, so it has no wildcards; an exchange has a name; versions count from 1."""
    with pytest.raises(ConfigurationError):
        event(**{"name": "a", "exchange": "e", **declared})


def test_refuses_a_class_that_is_no_model():
    """It could not be written as JSON."""
    with pytest.raises(ConfigurationError, match="pydantic"):
        event("a", exchange="e")(object)
