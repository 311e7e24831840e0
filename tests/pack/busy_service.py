"""A process that tells the recorder all that a service of users may tell it, over and over, and serves its metrics.

    python busy_service.py PORT

Every kind of event that moves a metric is among them, so a row of the catalogue that stays empty here is one that
nothing records.
"""

import itertools
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from meshkit.core import events
from meshkit.core.events import Event
from meshkit.policies.bulkhead import Bulkhead
from meshkit.policies.circuit_breaker import CircuitBreaker
from meshkit.policies.rate_limiter import RateLimiter
from meshkit.policies.retry_budget import RetryBudget
from meshkit.telemetry.recorder import install

# Sampled, so the recorder makes exemplars of it.
STORY = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
QUEUE = "orders"
PROVIDER = "payment-provider"


def starting() -> Iterator[Event]:
    """What is said once: a consumer and its connections."""
    yield events.ConsumerStarted(source=QUEUE, handler="charge")
    for connection in ("publish", "consume"):
        yield events.BrokerConnectionChanged(source=connection, connected=True)


def one_round(number: int) -> Iterator[Event]:
    """A request, a call that is retried and one that falls back, and every way in which a message may end."""
    yield events.ServerRequestStarted(source="payments", method="POST")
    for attempt, error in ((1, "httpx.ConnectError"), (2, "")):
        yield events.ClientAttemptEnded(
            source=PROVIDER, status=0 if error else 201, error_type=error, seconds=0.04, traceparent=STORY
        )
        if error:
            yield events.RetryScheduled(source=PROVIDER, attempt=attempt, delay=0.1, error_type=error)
    yield events.ClientCallEnded(
        source=PROVIDER, operation="charge", outcome="success", attempts=2, seconds=0.2, traceparent=STORY
    )
    yield events.FallbackUsed(source=PROVIDER, reason="breaker_open", result="success", error_type="CircuitOpenError")
    yield events.RetryBudgetExhausted(source=PROVIDER, kind="retry")
    yield events.HedgeStarted(source=PROVIDER, attempt=2, delay=0.1)
    yield events.HedgeEnded(source=PROVIDER, attempts=2, winner=2)
    yield events.BulkheadRejected(source=PROVIDER, reason="full")
    yield events.RateLimited(source=PROVIDER, retry_after=0.5)
    yield events.CircuitChanged(source=PROVIDER, old="closed", new="open", retry_after=1.0)
    yield events.CircuitChanged(source=PROVIDER, old="open", new="closed")
    yield events.ServerRequestEnded(
        source="payments", method="POST", route="/payments/{id}", status=201, seconds=0.12, traceparent=STORY
    )
    for outcome in ("confirmed", "returned", "timeout"):
        yield events.MessagePublished(source="payment-events", outcome=outcome, seconds=0.01, traceparent=STORY)
    for outcome in ("ack", "retry", "dead_letter", "requeue", "discard"):
        yield events.MessageReceived(source=QUEUE, redelivered=outcome == "requeue")
        yield events.MessageSettled(
            source=QUEUE,
            handler="charge",
            outcome=outcome,
            seconds=0.12,
            attempt=1,
            error_type="" if outcome == "ack" else "builtins.ValueError",
            age=3.0,
            traceparent=STORY,
        )
    yield events.MessageRetried(source=QUEUE, attempt=2, delay=10.0, traceparent=STORY)
    yield events.MessageDeadLettered(
        source=QUEUE,
        reason="retries_exhausted",
        error_type="builtins.ValueError",
        message_id=str(number),
        traceparent=STORY,
    )
    yield events.DeadLetterReplayed(source=QUEUE, result="republished")
    yield events.DuplicateSkipped(source=QUEUE, message_id=str(number))
    yield events.OutboxMeasured(source="outbox", pending=number % 3, oldest=None)
    yield events.BrokerBlocked(source="publish", blocked=False)
    yield events.BrokerConnectionChanged(source="consume", connected=True, reconnect=True)
    yield events.InvalidContext(source="http", reason="malformed")


def policies() -> tuple[object, ...]:
    """What a scrape asks for its state."""
    return (
        CircuitBreaker(PROVIDER),
        Bulkhead(PROVIDER, limit=10),
        RateLimiter(PROVIDER, permits=10),
        RetryBudget(PROVIDER),
    )


def main() -> None:
    recorder = install()
    there = policies()

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content_type, body = recorder.render(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the test's output to what fails."""

    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"ready, with {there}", flush=True)
    for event in starting():
        events.emit(event)
    for number in itertools.count():
        for event in one_round(number):
            events.emit(event)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
