"""What a failed message carries."""

import pytest

from meshkit.messaging import headers as h
from meshkit.messaging.dead_letters import Origin, failure_headers, fingerprint, masked
from meshkit.messaging.message import Delivery, Message

ORIGIN = Origin(service="course-service", version="1.2", host="pod-1")


def failing(text: str) -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def elsewhere(text: str) -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def headers_of(error, *, headers=None, note=""):
    message = Message(body=b"", message_id="1", headers=headers or {})
    delivery = Delivery(message=message, queue="q", exchange="user-events", routing_key="user.created")
    return failure_headers(delivery, error=error, note=note, at=0.0, origin=ORIGIN, failed_in="00-a-b-01")


def test_says_what_failed_where_and_when():
    """Type, message, stack and fingerprint of the error, the queue, where the message came from, and who failed."""
    headers = headers_of(failing("no user 17"))
    assert "ValueError: no user 17" in headers.pop(h.ERROR_STACK)
    assert 16 == len(headers.pop(h.ERROR_FINGERPRINT))
    assert {
        "meshkit-queue": "q",
        "meshkit-exchange": "user-events",
        "meshkit-routing-key": "user.created",
        "meshkit-first-failed-at": "1970-01-01T00:00:00.000Z",
        "meshkit-last-failed-at": "1970-01-01T00:00:00.000Z",
        "meshkit-error-type": "ValueError",
        "meshkit-error-message": "no user 17",
        "meshkit-failed-traceparent": "00-a-b-01",
        "meshkit-service": "course-service",
        "meshkit-version": "1.2",
        "meshkit-host": "pod-1",
    } == headers


def test_the_first_failure_stays_and_the_last_is_replaced():
    """A second failure keeps the time of the first one, and none of its text."""
    earlier = {h.FIRST_FAILED_AT: "2020-01-01T00:00:00.000Z", h.ERROR_STACK: "old", h.ERROR_TYPE: "old"}
    headers = headers_of(None, headers=earlier, note="not ours")
    assert "2020-01-01T00:00:00.000Z" == headers[h.FIRST_FAILED_AT]
    assert ("not ours", False, False) == (headers[h.ERROR_MESSAGE], h.ERROR_STACK in headers, h.ERROR_TYPE in headers)


def test_long_texts_are_cut():
    """A message keeps its beginning, a stack its end, and both fit."""
    headers = headers_of(failing("x" * 20_000))
    assert h.MOST_MESSAGE == len(headers[h.ERROR_MESSAGE])
    assert h.MOST_STACK == len(headers[h.ERROR_STACK])


def test_an_error_whose_text_fails_does_not_stand_in_the_way():
    """A message is settled also where its error cannot be printed."""

    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "has no text" in headers_of(Silent())[h.ERROR_MESSAGE]


def test_one_cause_has_one_fingerprint():
    """Ids, numbers and times do not make a cause; type, place and words do."""
    one = fingerprint(failing("user 17 not found at 2026-11-21T13:00:00Z"))
    assert one == fingerprint(failing("user 4711 not found at 2026-11-22T09:30:00Z"))
    assert one != fingerprint(failing("course 17 not found at 2026-11-21T13:00:00Z"))
    assert one != fingerprint(elsewhere("user 17 not found at 2026-11-21T13:00:00Z"))
    assert one != fingerprint(None, "user 17 not found")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("order 6f2a0c9e-3f0b-5c49-9d0e-8d6f3a1b7c55 is gone", "order <uuid> is gone"),
        ("timeout after 3.5 s", "timeout after <n>.<n> s"),
        ("key deadbeef01 and 0x7f", "key <id> and <n>"),
        ("mail to jo@example.org failed", "mail to <address> failed"),
        ("nothing to mask", "nothing to mask"),
    ],
)
def test_masks_what_differs_from_case_to_case(text, expected):
    """What is left is what a person would call the error."""
    assert expected == masked(text)
