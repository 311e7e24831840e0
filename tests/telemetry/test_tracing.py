"""Spans of OpenTelemetry behind the core's Tracer, and trace headers that anyone may have written."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled, is_instrumentation_enabled
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler

from meshkit._version import __version__
from meshkit.core.events import InvalidContext, listen
from meshkit.core.trace import NO_SPAN, TraceContext, tracer, use_tracer
from meshkit.telemetry import tracing
from meshkit.telemetry.tracing import OtelTracer, scrub

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
INCOMING = TraceContext(TRACE, SPAN, 1)


@pytest.fixture(autouse=True)
def former_tracer() -> Iterator[None]:
    """Each test leaves the process's tracer as it was."""
    former = tracer()
    yield
    use_tracer(former)


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exported: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    return provider


@pytest.fixture
def spans(provider: TracerProvider) -> OtelTracer:
    return tracing.install(provider=provider)


@pytest.fixture
def without_provider() -> OtelTracer:
    return tracing.install(provider=trace.NoOpTracerProvider())


@pytest.fixture
def dropped() -> Iterator[list[tuple[str, str]]]:
    told: list[tuple[str, str]] = []
    stop = listen(lambda event: told.append((event.source, event.reason)), kind=InvalidContext)
    yield told
    stop()


def ids(exported: InMemorySpanExporter) -> dict[str, tuple[str, str | None]]:
    """Trace id and parent's span id of each exported span, by name."""
    return {
        span.name: (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}" if span.parent else None)
        for span in exported.get_finished_spans()
    }


# --- parents and links -----------------------------------------------------------------------------------------------------------


def test_a_span_is_a_child_of_what_is_current(spans, exported):
    """Without a parent given, the span that is active here is the parent."""
    outer = spans.start("outer")
    with outer.active():
        spans.start("inner").end()
    outer.end()
    assert (outer.context.trace_id, outer.context.span_id) == ids(exported)["inner"]


def test_a_given_span_is_the_parent_whatever_is_current(spans, exported):
    """A span given as parent wins over the ambient one."""
    logical = spans.start("logical")
    with spans.start("other").active():
        spans.start("attempt", parent=logical).end()
    assert (logical.context.trace_id, logical.context.span_id) == ids(exported)["attempt"]


def test_a_context_that_came_in_is_the_parent_whatever_is_current(spans, exported):
    """A delivery's span hangs below its creation context, never below what happens to be ambient."""
    with spans.start("a dead request").active():
        spans.start("process", parent=INCOMING).end()
    assert (TRACE, SPAN) == ids(exported)["process"]


def test_none_as_parent_makes_a_new_trace(spans, exported):
    """With `parent=None` nothing ambient is taken up: neither by the span nor by what runs and is sent inside it."""
    with spans.start("ambient").active():
        replay = spans.start("replay", parent=None)
        headers: dict[str, str] = {}
        with replay.active():
            spans.start("inner").end()
            spans.inject(headers)
        replay.end()
    assert (replay.context.trace_id, None) == ids(exported)["replay"]
    assert (replay.context.trace_id, replay.context.span_id) == ids(exported)["inner"]
    assert replay.context.traceparent == headers["traceparent"]


def test_links_kind_and_attributes_are_there_when_the_sampler_decides(exported):
    """What sampling may depend on is given at creation, not afterwards."""
    seen = []

    class Watching(Sampler):
        def should_sample(self, parent_context, trace_id, name, kind=None, attributes=None, links=None, *rest, **more):
            seen.append((kind, dict(attributes or {}), [link.context.span_id for link in links or ()]))
            return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, attributes, links)

        def get_description(self) -> str:
            return "watching"

    spans = OtelTracer(provider=TracerProvider(sampler=Watching(), shutdown_on_exit=False))
    spans.start("process", kind="consumer", parent=None, links=[INCOMING], attributes={"meshkit.sampling.keep": True})
    assert [(trace.SpanKind.CONSUMER, {"meshkit.sampling.keep": True}, [int(SPAN, 16)])] == seen


def test_the_scope_names_library_version_and_schema(spans, exported):
    """Each span says that meshkit made it, which version, and by which conventions its attributes are named."""
    spans.start("x").end()
    scope = exported.get_finished_spans()[0].instrumentation_scope
    assert ("meshkit", __version__, "https://opentelemetry.io/schemas/1.44.0") == (
        scope.name,
        scope.version,
        scope.schema_url,
    )


# --- what a span says ------------------------------------------------------------------------------------------------------------


def test_a_failed_span_has_a_type_and_no_exception_event(spans, exported):
    """`fail` sets the status and `error.type`; there is no exception event, whose text could hold anything."""
    span = spans.start("charge")
    span.fail("builtins.OSError", "connection refused")
    span.end()
    ended = exported.get_finished_spans()[0]
    assert trace.StatusCode.ERROR is ended.status.status_code
    assert "connection refused" == ended.status.description
    assert {"error.type": "builtins.OSError"} == dict(ended.attributes)
    assert () == ended.events


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("connect to amqp://guest:hunter2@rabbit:5672/x", "connect to amqp://***@rabbit:5672/x"),
        ("GET https://api/x?token=s3cret&page=2", "GET https://api/x?token=***&page=2"),
        ("GET https://api/x?sig=s3cret&page=2", "GET https://api/x?sig=***&page=2"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        ("Proxy said basic dXNlcjpwdw== no", "Proxy said basic *** no"),
        ('{"password": "hunter2", "name": "x"}', '{"password": "***", "name": "x"}'),
        ("api_key=abc, access-key: def", "api_key=***, access-key: ***"),
        ("user 7 not found", "user 7 not found"),
    ],
)
def test_credentials_are_taken_out_of_an_error(text, shown):
    """Passwords in URLs, tokens in queries and authorization values do not leave the process in a span."""
    assert shown == scrub(text)


def test_an_error_text_is_cut():
    """A status holds at most 256 characters, however long the text was."""
    assert "x" * 255 + "…" == scrub("x" * 1_000_000)


@given(st.text(max_size=2000))
def test_scrubbing_takes_any_text(text):
    """Whatever an exception says, scrubbing ends, and stays within its limit."""
    assert len(scrub(text)) <= 256


def test_names_attributes_and_events_arrive(spans, exported):
    """A span can be renamed, and what is set on it is exported."""
    span = spans.start("GET")
    span.rename("GET /users/{id}")
    span.set({"http.route": "/users/{id}"})
    span.event("meshkit.retry", {"meshkit.attempt": 2})
    span.end()
    ended = exported.get_finished_spans()[0]
    assert ("GET /users/{id}", {"http.route": "/users/{id}"}) == (ended.name, dict(ended.attributes))
    assert [("meshkit.retry", {"meshkit.attempt": 2})] == [(e.name, dict(e.attributes)) for e in ended.events]


def test_nothing_is_logged_about_a_span_that_has_ended(spans, exported, caplog):
    """Late calls on an ended span do nothing: no second end, no warning."""
    span = spans.start("x")
    span.end()
    span.end()
    span.set({"a": 1})
    span.event("e")
    span.rename("y")
    span.fail("E")
    assert [] == caplog.records
    assert ["x"] == [ended.name for ended in exported.get_finished_spans()]


def test_a_span_processor_that_raises_does_not_reach_the_work(spans, provider, caplog):
    """An app's broken span processor costs a log line, never the call."""

    class Broken(SpanProcessor):
        def on_end(self, span):
            raise RuntimeError("broken")

    provider.add_span_processor(Broken())
    spans.start("x").end()
    assert ["a span processor failed; the call goes on"] == [record.message for record in caplog.records]


def test_a_sampler_that_raises_does_not_reach_the_work(caplog):
    """An app's broken sampler leaves the work without a span."""

    class Broken(Sampler):
        def should_sample(self, *args, **kwargs):
            raise RuntimeError("broken")

        def get_description(self) -> str:
            return "broken"

    spans = OtelTracer(provider=TracerProvider(sampler=Broken(), shutdown_on_exit=False))
    assert NO_SPAN is spans.start("x")


# --- being current ---------------------------------------------------------------------------------------------------------------


async def test_tasks_that_are_started_inside_are_children(spans, exported):
    """A span is current in tasks that are started in its block, and no longer after it."""

    async def work() -> None:
        spans.start("child").end()

    outer = spans.start("outer")
    with outer.active():
        task = asyncio.create_task(work())
    await task
    assert outer.context.span_id == ids(exported)["child"][1]
    assert NO_SPAN is spans.current()


def test_a_block_left_in_another_context_is_silent(spans, caplog):
    """A generator that is closed by somebody else neither raises nor logs an error, and the other's span stays."""
    caplog.set_level(logging.INFO)

    def rows() -> Iterator[int]:
        with spans.start("rows").active():
            yield 1
            yield 2

    other = spans.start("other")
    generator = rows()
    contextvars.copy_context().run(next, generator)
    with other.active():
        generator.close()
        assert other.context == spans.current().context
    assert [] == caplog.records


def test_the_users_own_spans_and_ours_nest(spans, provider, exported):
    """A span that the user makes with OpenTelemetry is our parent and our child where it stands so."""
    own = provider.get_tracer("app")
    with own.start_as_current_span("theirs"):
        ours = spans.start("ours")
        with ours.active(), own.start_as_current_span("below"):
            pass
        ours.end()
    by_name = {span.name: span for span in exported.get_finished_spans()}
    assert by_name["theirs"].context.span_id == by_name["ours"].parent.span_id
    assert by_name["ours"].context.span_id == by_name["below"].parent.span_id


# --- the wire --------------------------------------------------------------------------------------------------------------------


def test_what_is_injected_is_extracted(spans):
    """A context survives the way over the wire, vendor list included."""
    span = spans.start("publish", parent=TraceContext(TRACE, SPAN, 1, "rojo=00f067aa0ba902b7,t@congo=t61rcWkgMzE"))
    headers: dict[str, str] = {}
    spans.inject(headers, span=span)
    assert TRACE == span.context.trace_id
    assert "rojo=00f067aa0ba902b7,t@congo=t61rcWkgMzE" == headers["tracestate"]
    assert span.context == spans.extract(headers, carrier="amqp")


def test_the_tracestate_of_another_traceparent_goes(spans):
    """Where our traceparent replaces one, the vendor list that belonged to that one goes with it."""
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=1"}
    span = spans.start("x", parent=None)
    spans.inject(headers, span=span)
    assert {"traceparent": span.context.traceparent} == headers


def test_nothing_is_injected_where_nothing_is_traced(spans):
    """Without a span the headers stay as they are."""
    headers = {"a": "b"}
    spans.inject(headers)
    spans.inject(headers, span=NO_SPAN)
    assert {"a": "b"} == headers


def test_not_sampled_travels_too():
    """A span that is not recorded passes its trace on with the flag that says so."""
    spans = OtelTracer(provider=TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False))
    span = spans.start("x", parent=None)
    headers: dict[str, str] = {}
    spans.inject(headers, span=span)
    assert not span.recording
    assert not span.context.sampled
    assert span.context == spans.extract(headers, carrier="http")


def test_without_a_provider_a_context_is_passed_on(without_provider):
    """A service without telemetry set up does not break the trace of those around it."""
    incoming = without_provider.extract({"traceparent": TRACEPARENT, "tracestate": "a=1"}, carrier="http")
    server = without_provider.start("GET", kind="server", parent=incoming)
    headers: dict[str, str] = {}
    with server.active():
        inner = without_provider.start("meshkit.call users")
        with inner.active():
            without_provider.inject(headers)
    assert not inner.recording
    assert {"traceparent": TRACEPARENT, "tracestate": "a=1"} == headers


def test_without_a_provider_a_new_trace_does_not_take_up_the_ambient_one(without_provider):
    """`parent=None` cuts the story off also where no span is recorded."""
    headers: dict[str, str] = {}
    request, replay = (without_provider.start(name, parent=parent) for name, parent in (("GET", INCOMING), ("x", None)))
    with request.active(), replay.active():
        without_provider.inject(headers)
    assert {} == headers


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": TRACEPARENT},
        {"traceparent": TRACEPARENT.encode()},
        {"traceparent": bytearray(TRACEPARENT.encode())},
        {"traceparent": f"cc-{TRACE}-{SPAN}-01-what-the-future-brings"},
        {"traceparent": TRACEPARENT, "tracestate": ""},
        {"x-other": 7, "traceparent": TRACEPARENT},
    ],
)
@pytest.mark.parametrize("carrier", ["http", "amqp"])
def test_valid_headers_are_read(spans, dropped, headers, carrier):
    """Text and bytes are read alike, and a later version of the header too."""
    assert spans.extract(headers, carrier=carrier) == INCOMING
    assert [] == dropped


@pytest.mark.parametrize("name", ["Traceparent", "TRACEPARENT", "TraceParent"])
def test_http_header_names_have_no_case(spans, name):
    """Over HTTP a header is found however its name is written."""
    assert INCOMING == spans.extract({"accept": "*/*", name: TRACEPARENT}, carrier="http")
    assert spans.extract({name: TRACEPARENT}, carrier="amqp") is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "malformed"),
        ("garbage", "malformed"),
        (b"\xff\xfe", "malformed"),
        (f"00-{'0' * 32}-{SPAN}-01", "malformed"),
        (f"00-{TRACE}-{'0' * 16}-01", "malformed"),
        (f"ff-{TRACE}-{SPAN}-01", "malformed"),
        (f"00-{TRACE.upper()}-{SPAN}-01", "malformed"),
        (TRACEPARENT + "-" + "x" * 600, "oversize"),
        (b"x" * 600, "oversize"),
        (7, "type"),
        (1.5, "type"),
        (True, "type"),
        ({"nested": TRACEPARENT}, "type"),
        ([TRACEPARENT], "type"),
    ],
)
@pytest.mark.parametrize("carrier", ["http", "amqp"])
def test_a_traceparent_that_is_none_is_dropped_and_told(spans, dropped, caplog, value, reason, carrier):
    """Whatever a stranger writes into the header, it costs one event: no error, no log line."""
    assert spans.extract({"traceparent": value}, carrier=carrier) is None
    assert [(carrier, reason)] == dropped
    assert [] == caplog.records


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no equals sign", "malformed"),
        ("a=1,a=2", "malformed"),
        ("A=1", "malformed"),
        (",".join(f"k{n}=1" for n in range(33)), "malformed"),
        ("a=" + "x" * 600, "oversize"),
        (7, "type"),
    ],
)
def test_a_bad_tracestate_goes_and_the_trace_stays(spans, dropped, caplog, value, reason):
    """A vendor list that holds none is dropped and told; the trace itself goes on."""
    assert INCOMING == spans.extract({"traceparent": TRACEPARENT, "tracestate": value}, carrier="amqp")
    assert [("amqp", reason)] == dropped
    assert [] == caplog.records


def test_a_bad_tracestate_from_elsewhere_is_not_logged(spans, caplog):
    """A context that was stored with a vendor list of any kind can still be a parent."""
    span = spans.start("x", parent=TraceContext(TRACE, SPAN, 1, "no equals sign"))
    assert (TRACE, "") == (span.context.trace_id, span.context.tracestate)
    assert [] == caplog.records


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.text()),
    st.just(TRACEPARENT),
)


@given(traceparent=anything, tracestate=anything, sent_baggage=anything)
def test_extract_takes_anything(traceparent, tracestate, sent_baggage):
    """No value of any type in any of the three headers makes `extract` or a span below it fail."""
    spans = OtelTracer(provider=trace.NoOpTracerProvider(), baggage_keys=["tenant"])
    headers = {"traceparent": traceparent, "tracestate": tracestate, "baggage": sent_baggage}
    context = spans.extract(headers, carrier="amqp")
    assert (traceparent == TRACEPARENT) == (context is not None)
    spans.start("x", parent=context).end()


# --- baggage ---------------------------------------------------------------------------------------------------------------------


def test_baggage_of_strangers_is_not_taken_in(spans):
    """By default no baggage comes in, and none goes out."""
    incoming = spans.extract({"traceparent": TRACEPARENT, "baggage": "role=admin"}, carrier="http")
    headers: dict[str, str] = {}
    with spans.start("GET", parent=incoming).active():
        assert {} == dict(baggage.get_all())
        spans.inject(headers)
    assert "baggage" not in headers


def test_allowed_baggage_goes_through(provider):
    """Keys on the list come in, are seen by the app, and go out again; all others do neither."""
    spans = OtelTracer(provider=provider, baggage_keys=["tenant", "plan"])
    incoming = spans.extract(
        {"traceparent": TRACEPARENT, "baggage": "role=admin, tenant=caf%C3%A9%20one;ttl=3, plan = gold"}, carrier="amqp"
    )
    headers: dict[str, str] = {}
    with spans.start("process", parent=incoming).active():
        assert {"tenant": "café one", "plan": "gold"} == dict(baggage.get_all())
        with spans.start("publish", kind="producer").active():
            spans.inject(headers)
    assert "tenant=caf%C3%A9%20one,plan=gold" == headers["baggage"]


def test_oversize_baggage_is_dropped(provider, dropped):
    """More baggage than the standard allows is dropped as a whole, and told."""
    spans = OtelTracer(provider=provider, baggage_keys=["tenant"])
    headers = {"traceparent": TRACEPARENT, "baggage": "tenant=" + "x" * 9000}
    assert INCOMING == spans.extract(headers, carrier="http")
    assert [("http", "oversize")] == dropped


def test_the_list_of_baggage_can_come_from_the_environment(monkeypatch, provider):
    """MESHKIT_BAGGAGE_KEYS is the list where the code gives none."""
    monkeypatch.setenv("MESHKIT_BAGGAGE_KEYS", "tenant, plan")
    spans = tracing.install(provider=provider)
    incoming = spans.extract({"traceparent": TRACEPARENT, "baggage": "plan=gold,role=admin"}, carrier="http")
    with spans.start("GET", parent=incoming).active():
        assert {"plan": "gold"} == dict(baggage.get_all())


# --- other instrumentation -------------------------------------------------------------------------------------------------------


async def test_other_instrumentation_is_quiet_for_the_block_only(spans):
    """Inside `alone` instrumentation of OpenTelemetry makes no span; after it, and in a fresh context, it does."""
    with spans.alone():
        assert not is_http_instrumentation_enabled()
        assert not is_instrumentation_enabled()

        async def handler() -> bool:
            return is_instrumentation_enabled()

        assert await asyncio.get_running_loop().create_task(handler(), context=contextvars.Context())
    assert is_instrumentation_enabled()


# --- putting it in place ---------------------------------------------------------------------------------------------------------


def test_install_again_changes_nothing(spans):
    """A second `install` without arguments leaves the tracer that is there."""
    assert spans is tracing.install()
    assert spans is tracer()


@pytest.mark.once
def test_a_provider_may_be_set_before_or_after():
    """Spans are recorded from the moment the app sets a provider, whether meshkit was there first or not."""
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from meshkit.core.trace import tracer
from meshkit.telemetry import tracing
tracing.install()
before = tracer().start("x")
trace.set_tracer_provider(TracerProvider())
print(before.recording, before.context, tracer().start("y").recording, tracing.OtelTracer().start("z").recording)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "False None True True" == done.stdout.strip()


@pytest.mark.once
def test_the_sdk_is_not_loaded_by_tracing():
    """Making and passing on spans needs OpenTelemetry's API only: the SDK is the app's."""
    code = (
        "import sys; from meshkit.telemetry import tracing; tracing.install().start('x').end(); "
        "print(any(n.startswith(('opentelemetry.sdk', 'opentelemetry.instrumentation')) for n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "False" == done.stdout.strip()
