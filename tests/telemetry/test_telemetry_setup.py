"""`telemetry.setup()`: where spans go, who decides, and that a dead collector holds nobody up.

A process has one global provider, so most of these run an app of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from meshkit import telemetry
from meshkit.embedded.otlp import OtlpReceiver
from meshkit.errors import ConfigurationError

pytestmark = pytest.mark.once

APP = """
import logging, os, sys, time
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
import meshkit
from meshkit.core.trace import tracer
"""


def run(code: str, *, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an app with only these OTEL_* and MESHKIT_* variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MESHKIT_"))}
    return subprocess.run(
        [sys.executable, "-c", APP + code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**kept, **environment},
    )


def said(code: str, **environment: str) -> str:
    """What an app that must end well prints."""
    done = run(code, **environment)
    assert 0 == done.returncode, done.stderr
    return done.stdout.strip()


async def collected(code: str, **environment: str) -> tuple[OtlpReceiver, str]:
    """Run an app while a collector listens, whose address is `{url}` in the environment's values."""
    async with OtlpReceiver() as receiver:
        filled = {name: value.replace("{url}", receiver.url) for name, value in environment.items()}
        output = await asyncio.to_thread(lambda: said(code.replace("{url}", receiver.url), **filled))
    return receiver, output


@pytest.fixture
def refusing() -> str:
    """The address of a collector that is down."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a collector that takes connections and never answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


# --- where spans go --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "environment"),
    [
        ("meshkit.telemetry.setup('a', endpoint='{url}')", {}),
        ("meshkit.telemetry.setup()", {"MESHKIT_SERVICE": "a", "MESHKIT_OTLP_ENDPOINT": "{url}"}),
        ("meshkit.telemetry.setup()", {"OTEL_SERVICE_NAME": "a", "OTEL_EXPORTER_OTLP_ENDPOINT": "{url}/"}),
        (
            "meshkit.telemetry.setup()",
            {
                "OTEL_RESOURCE_ATTRIBUTES": "service.name=a",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "{url}/v1/traces",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            },
        ),
        (
            "meshkit.telemetry.setup('a', endpoint='{url}', exporter='otlp')",
            {
                "MESHKIT_SERVICE": "b",
                "OTEL_SERVICE_NAME": "c",
                "MESHKIT_OTLP_ENDPOINT": "http://127.0.0.1:9",
                "OTEL_TRACES_EXPORTER": "none",
            },
        ),
    ],
    ids=["arguments", "MESHKIT", "OTEL", "OTEL, traces only", "arguments over variables"],
)
async def test_spans_arrive_at_the_exit_of_the_app(call, environment):
    """Whoever names service and collector, argument, MESHKIT_* or OTEL_* in this order, the spans of an app that just
    ends are delivered under that name."""
    receiver, _ = await collected(f"{call}\ntracer().start('work').end()", **environment)
    assert [("a", "work")] == [(span.service, span.name) for span in receiver.spans()]


async def test_flush_delivers_now():
    """After `flush` has returned `True` the collector has the spans, and the app goes on."""
    receiver, output = await collected(
        "t = meshkit.telemetry.setup('a', endpoint='{url}')\n"
        "tracer().start('one').end()\n"
        "print(t.flush(), meshkit.telemetry.flush(5.0), t.service, t.endpoint, flush=True)\n"
        "os._exit(0)"
    )
    assert ["one"] == [span.name for span in receiver.spans()]
    assert f"True True a {receiver.url}/v1/traces" == output


async def test_a_forked_child_delivers_its_own_spans():
    """After a fork parent and child both deliver, each its own."""
    receiver, _ = await collected(
        "meshkit.telemetry.setup('a', endpoint='{url}')\n"
        "if os.fork() == 0:\n"
        "    tracer().start('child').end()\n"
        "    os._exit(0 if meshkit.telemetry.flush() else 1)\n"
        "tracer().start('parent').end()\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert ["child", "parent"] == sorted(span.name for span in receiver.spans())


async def test_version_and_attributes_are_on_the_resource():
    """What is said about the service beside its name arrives too, next to what the environment says."""
    output = said(
        "meshkit.telemetry.setup('a', version='1.2', attributes={'deployment.environment.name': 'test'})\n"
        "from opentelemetry import trace\n"
        "r = trace.get_tracer_provider().resource.attributes\n"
        "print(r['service.name'], r['service.version'], r['deployment.environment.name'], r['team'])",
        OTEL_RESOURCE_ATTRIBUTES="team=x,service.name=b",
    )
    assert "a 1.2 test x" == output


def test_without_an_endpoint_spans_have_ids_and_stay():
    """Nothing is sent where nobody said where to; logs and headers have trace ids all the same."""
    code = (
        "t = meshkit.telemetry.setup('a')\n"
        "from opentelemetry import trace\n"
        "s = tracer().start('x'); s.end()\n"
        "print(s.context is not None, repr(t.endpoint), t.flush(),"
        " len(trace.get_tracer_provider()._active_span_processor._span_processors))"
    )
    assert "True '' True 0" == said(code)
    assert "True '' True 0" == said(code, OTEL_TRACES_EXPORTER="none", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")


def test_the_console_can_be_asked_for():
    """OTEL_TRACES_EXPORTER=console prints spans as they end."""
    assert '"name": "work"' in said(
        "meshkit.telemetry.setup('a'); tracer().start('work').end()", OTEL_TRACES_EXPORTER="console"
    )


def test_an_exporter_can_be_given():
    """An app's own exporter gets the spans, and no other is made."""
    output = said(
        "from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter\n"
        "e = InMemorySpanExporter()\n"
        "t = meshkit.telemetry.setup('a', exporter=e)\n"
        "tracer().start('x').end()\n"
        "print(t.flush(), [s.name for s in e.get_finished_spans()], repr(t.endpoint))",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
    )
    assert "True ['x'] ''" == output


def test_the_sampler_of_the_environment_decides():
    """OTEL_TRACES_SAMPLER is obeyed."""
    output = said(
        "meshkit.telemetry.setup('a'); print(tracer().start('x').recording)", OTEL_TRACES_SAMPLER="always_off"
    )
    assert "False" == output


def test_long_values_are_cut():
    """An attribute holds at most 1024 characters, unless the environment says otherwise."""
    code = (
        "meshkit.telemetry.setup('a')\n"
        "from opentelemetry import trace\n"
        "s = trace.get_tracer('x').start_span('x', attributes={'a': 'x' * 5000})\n"
        "print(len(s.attributes['a']))"
    )
    assert "1024" == said(code)
    assert "3000" == said(code, OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT="3000")


def test_a_disabled_sdk_makes_no_spans_and_passes_contexts_on():
    """OTEL_SDK_DISABLED=true means no spans; the story of others goes on through this service."""
    output = said(
        "t = meshkit.telemetry.setup('a', endpoint='http://127.0.0.1:9')\n"
        "came = tracer().extract({'traceparent': '00-' + 'a' * 32 + '-' + 'b' * 16 + '-01'}, carrier='http')\n"
        "s = tracer().start('x', parent=came)\n"
        "h = {}; tracer().inject(h, span=s)\n"
        "print(s.recording, h['traceparent'][3:35] == 'a' * 32, t.flush(), t.shutdown())",
        OTEL_SDK_DISABLED="true",
    )
    assert "False True True True" == output


def test_a_provider_of_the_app_is_used_and_never_replaced():
    """Where the app has a provider, its spans and ours go where it says; our shutdown leaves it running."""
    output = said(
        "from opentelemetry import trace\n"
        "from opentelemetry.sdk.resources import Resource\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "from opentelemetry.sdk.trace.export import BatchSpanProcessor\n"
        "from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter\n"
        "e = InMemorySpanExporter(); p = TracerProvider(resource=Resource.create({'service.name': 'theirs'}))\n"
        "p.add_span_processor(BatchSpanProcessor(e)); trace.set_tracer_provider(p)\n"
        "t = meshkit.telemetry.setup()\n"
        "tracer().start('ours').end(); print(t.shutdown(), [s.name for s in e.get_finished_spans()])\n"
        "tracer().start('later').end(); print(t.flush(), len(e.get_finished_spans()))\n"
        "print(t.service, trace.get_tracer_provider() is p)"
    )
    assert "True ['ours']\nTrue 2\ntheirs True" == output


def test_setting_up_twice_is_harmless():
    """The second call returns what the first one made, and so does one after the end."""
    output = said(
        "t = meshkit.telemetry.setup('a'); print(t is meshkit.telemetry.setup('b'), t.service, t.shutdown(), t.shutdown())\n"
        "print(t is meshkit.telemetry.setup('c'))"
    )
    assert "True a True True\nTrue" == output


def test_the_name_is_the_function():
    """`meshkit.telemetry.setup` is the function, also after its module was imported by name."""
    import importlib

    importlib.import_module("meshkit.telemetry.setup")
    assert callable(telemetry.setup)


def test_the_sdk_is_loaded_by_setup_only():
    """Importing `meshkit.telemetry` loads nothing of OpenTelemetry."""
    assert "False" == said("meshkit.telemetry; print(any(n.startswith('opentelemetry') for n in sys.modules))")


def test_logs_can_be_json():
    """`logs="json"` makes each line an object with the trace it belongs to."""
    done = run(
        "meshkit.telemetry.setup('a', logs='json')\n"
        "with tracer().start('x').active(): logging.getLogger('app').warning('hello')"
    )
    line = json.loads(done.stderr.strip().splitlines()[-1])
    assert ("hello", "a", True) == (line["message"], line["service"], line["trace_sampled"])


# --- a collector that is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collector", ["refusing", "silent"])
@pytest.mark.parametrize("flush", ["", "meshkit.telemetry.flush()"], ids=["exit", "flush and exit"])
def test_a_dead_collector_does_not_hold_the_exit(request, collector, flush):
    """With a collector that is down or hangs the process ends within `flush_timeout`, also where the app has flushed
    before, and says so in one line."""
    url = request.getfixturevalue(collector)
    done = run(
        f"meshkit.telemetry.setup('a', endpoint={url!r}, flush_timeout=1.0)\n"
        "for _ in range(2000): tracer().start('x').end()\n"
        "print(time.time())\n" + flush
    )
    took = time.time() - float(done.stdout)
    assert 0 == done.returncode
    assert took < 2.5
    lines = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    assert 1 == len(lines), done.stderr
    assert lines[0].startswith("meshkit WARNING traces ")
    assert "Traceback" not in done.stderr


def test_a_collector_that_goes_and_comes_is_told_once_each(refusing):
    """However many batches are lost, there is one line when delivery stops, with the reason, and one when it works."""
    done = run(
        f"t = meshkit.telemetry.setup('a', endpoint={refusing!r})\n"
        "for _ in range(3):\n"
        "    tracer().start('x').end(); print(t.flush())\n"
        "from http.server import *\n"
        "import threading\n"
        "class Ok(BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        self.rfile.read(int(self.headers['content-length'])); self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *a): pass\n"
        f"server = HTTPServer(('127.0.0.1', {refusing.rpartition(':')[2]}), Ok)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "for _ in range(2):\n"
        "    tracer().start('x').end(); print(t.flush())\n",
        OTEL_EXPORTER_OTLP_TIMEOUT="0.3",
    )
    assert ["False", "False", "False", "True", "True"] == done.stdout.split()
    lines = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    assert 2 == len(lines), done.stderr
    assert lines[0].startswith(
        f"meshkit WARNING traces do not reach {refusing}/v1/traces and are dropped until they do: "
    )
    assert f"meshkit WARNING traces reach {refusing}/v1/traces again; 3 spans were lost" == lines[1]


# --- what cannot work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "environment", "text"),
    [
        ("setup('a', exporter='zipkin')", {}, "MK100  exporter is 'zipkin': zipkin is not among otlp, console, none."),
        ("setup('a')", {"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin': zipkin is not among"),
        (
            "setup('a', endpoint='collector:4318')",
            {},
            "MK401  the OTLP endpoint is 'collector:4318/v1/traces', which is no",
        ),
        (
            "setup('a')",
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "MK401  OTEL_EXPORTER_OTLP_PROTOCOL asks for grpc, and meshkit sends http/protobuf. Give the collector's",
        ),
        ("setup('a')", {"MESHKIT_FLUSH_TIMEOUT": "soon"}, "MESHKIT_FLUSH_TIMEOUT is 'soon'"),
        (
            "setup('a')",
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318",
                "OTEL_BSP_MAX_QUEUE_SIZE": "10",
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "20",
            },
            "MK401  telemetry cannot be set up: ",
        ),
    ],
)
def test_what_cannot_work_is_said_at_the_start(call, environment, text):
    """A wrong setting is an error with one line of cause, and leaves no provider behind."""
    output = said(
        "from opentelemetry import trace\n"
        "from meshkit.errors import ConfigurationError\n"
        f"try: meshkit.telemetry.{call}\n"
        "except ConfigurationError as error: print(error)\n"
        "print(type(trace.get_tracer_provider()).__name__)",
        **environment,
    )
    assert text in output
    assert output.endswith("\nProxyTracerProvider")


def test_a_missing_extra_names_the_line_that_installs_it():
    """Without the OTLP exporter an endpoint is an error with the quoted install line."""
    output = said(
        "sys.modules['opentelemetry.exporter.otlp.proto.http.trace_exporter'] = None\n"
        "from meshkit.errors import ConfigurationError\n"
        "try: meshkit.telemetry.setup('a', endpoint='http://127.0.0.1:9')\n"
        "except ConfigurationError as error: print(error)"
    )
    assert 'pip install "meshkit-py[otlp]"' in output


def test_a_password_in_the_endpoint_is_not_shown():
    """Log lines and `endpoint` show where spans go without the credentials."""
    done = run("print(meshkit.telemetry.setup('a', endpoint='http://me:hunter2@127.0.0.1:9').endpoint)")
    assert "http://***@127.0.0.1:9/v1/traces" == done.stdout.strip()
    assert "hunter2" not in done.stderr


def test_a_flush_timeout_below_zero_is_refused():
    """A negative wait is a mistake, wherever it comes from."""
    with pytest.raises(ConfigurationError):
        telemetry.setup("a", flush_timeout=-1)
