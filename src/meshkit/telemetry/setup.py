"""What an app calls at its start, so that its spans leave the process: `meshkit.telemetry.setup()`.

Nothing else in meshkit ever sets a global provider. OpenTelemetry's SDK is loaded when `setup` runs, not before.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from urllib.parse import urlsplit

from meshkit.core.settings import setting
from meshkit.errors import ConfigurationError, missing_extra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.sampling import Sampler

_log = logging.getLogger("meshkit")

DEFAULT_ENDPOINT: Final = "http://localhost:4318"
LONGEST_VALUE: Final = 1024
_EXPORTERS: Final = ("otlp", "console", "none")


class Telemetry:
    """What `setup` has put in place.

    Attributes:
        service: the service's name, as traces show it.
        endpoint: where spans go, empty where they are not sent over OTLP.
    """

    def __init__(
        self,
        provider: Any,
        *,
        service: str = "",
        endpoint: str = "",
        deliveries: Sequence[_Delivery] = (),
        own: bool = False,
        flush_timeout: float = 5.0,
    ) -> None:
        self.service = service
        self.endpoint = endpoint
        self._provider = provider
        self._deliveries = tuple(deliveries)
        self._own = own
        self._flush_timeout = flush_timeout
        self._worker = _Worker()
        self._ended = False
        self._late_told = False
        if own:
            # Now, because at the interpreter's exit no thread can be started any more (Python 3.12 and later).
            self._worker.start()
            atexit.register(self.shutdown)

    def flush(self, timeout: float | None = None) -> bool:
        """Deliver the spans that have ended.

        Args:
            timeout: seconds to wait at the most; the `flush_timeout` of `setup` where left out. What is being sent
                then goes on being sent.

        Returns:
            whether all of them were delivered in time.
        """
        if self._ended or not hasattr(self._provider, "force_flush"):
            return True
        return self._delivered(self._provider.force_flush, self._patience(timeout))

    def shutdown(self, timeout: float | None = None) -> bool:
        """Deliver what has ended, and let go of the exporter. A provider that the app has set is only flushed.

        Args:
            timeout: as for `flush`.

        Returns:
            whether all spans were delivered in time. `True` where it was called before.
        """
        if not self._own:
            return self.flush(timeout)
        if self._ended:
            return True
        self._ended = True
        atexit.unregister(self.shutdown)
        # Somebody has waited for a flush that is still under way: waiting again would hold the exit twice as long.
        seconds = 0.0 if self._worker.stuck else self._patience(timeout)
        delivered = self._delivered(self._provider.shutdown, seconds)
        for delivery in self._deliveries:
            delivery.shutdown()
        return delivered

    def _delivered(self, job: Callable[[], object], seconds: float) -> bool:
        lost = self._lost()
        done = self._worker.run(job, seconds) is not False
        if not done and not self._late_told:
            # Once: the flush at the end of the app and the one at the interpreter's exit have the same to say.
            self._late_told = True
            _log.warning("traces could not be delivered within %g s; those not sent by the exit are lost", seconds)
        return done and lost == self._lost()

    def _patience(self, timeout: float | None) -> float:
        return self._flush_timeout if timeout is None else timeout

    def _lost(self) -> int:
        return sum(delivery.lost for delivery in self._deliveries)


class _Worker:
    """A thread that calls what may take longer than anybody wants to wait: the SDK's own flush ignores its timeout."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], object], threading.Event, list[object]]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late: threading.Event | None = None
        if hasattr(os, "register_at_fork"):
            again = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (restart := again()) and restart())

    @property
    def stuck(self) -> bool:
        """Whether a job is under way that somebody has given up waiting for."""
        return self._late is not None and not self._late.is_set()

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(self._jobs,), name="meshkit-telemetry", daemon=True
            )
            self._thread.start()

    def run(self, job: Callable[[], object], seconds: float) -> object:
        """What `job` returned, `False` where it failed or is not done in time."""
        self.start()
        done, results = threading.Event(), list[object]()
        self._jobs.put((job, done, results))
        if not done.wait(seconds):
            self._late = done
            return False
        return results[0]

    @staticmethod
    def _work(jobs: SimpleQueue[tuple[Callable[[], object], threading.Event, list[object]]]) -> None:
        while True:
            job, done, results = jobs.get()
            try:
                results.append(job())
            except Exception:
                _log.warning("telemetry could not be flushed", exc_info=True)
                results.append(False)
            done.set()

    def _after_fork(self) -> None:
        started, self._thread = self._thread is not None, None
        self._jobs, self._late = SimpleQueue(), None
        if started:
            self.start()


# -- delivery ---------------------------------------------------------------------------------------------------------


class _Inside(threading.local):
    """What the exporter logged during the export that runs in this thread, `None` outside one."""

    said: list[str] | None = None


_inside = _Inside()


class _Hush(logging.Filter):
    """Keeps the exporter's own log lines, several a batch while a collector is down, for our one."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _inside.said is None:
            return True
        _inside.said.append(record.getMessage())
        return False


_HUSH: Final = _Hush()


class _Delivery:
    """An exporter that says once that it cannot deliver, and once that it can again.

    Attributes:
        lost: spans that could not be delivered.
    """

    def __init__(self, exporter: SpanExporter, where: str) -> None:
        self._exporter = exporter
        self._where = where
        self._lost_before = 0
        self._failing = False
        self._closed = False
        self.lost = 0
        logging.getLogger(type(exporter).__module__).addFilter(_HUSH)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        from opentelemetry.sdk.trace.export import SpanExportResult

        said: list[str] = []
        _inside.said = said
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
            result = SpanExportResult.FAILURE
        finally:
            _inside.said = None
        if result is SpanExportResult.SUCCESS:
            if self._failing:
                self._failing = False
                _log.warning("traces reach %s again; %d spans were lost", self._where, self.lost - self._lost_before)
                self._lost_before = self.lost
        else:
            self.lost += len(spans)
            if not self._failing:
                self._failing = True
                why = said[-1] if said else "the exporter gave no reason"
                _log.warning("traces do not reach %s and are dropped until they do: %s", self._where, why)
        return result

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


# -- setting up -------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_current: Telemetry | None = None


def setup(
    service: str | None = None,
    *,
    version: str | None = None,
    exporter: SpanExporter | str | None = None,
    endpoint: str | None = None,
    attributes: Mapping[str, str] | None = None,
    sampler: Sampler | None = None,
    flush_timeout: float | None = None,
    logs: Literal["json"] | None = None,
) -> Telemetry:
    """Have the spans of this process delivered. For an app to call at its start; calling it again returns the same.

    What is not given here comes from `MESHKIT_*`, then from the standard `OTEL_*` variables (`OTEL_SERVICE_NAME`,
    `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_EXPORTER_OTLP_*`, `OTEL_TRACES_EXPORTER`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`).
    Where the app has set a tracer provider already, that one is used as it is. With `OTEL_SDK_DISABLED=true` there are
    no spans, and trace contexts are still passed on.

    Args:
        service: name of the service; `MESHKIT_SERVICE`.
        version: its version; `MESHKIT_SERVICE_VERSION`.
        exporter: where spans go: an exporter of OpenTelemetry, or `"otlp"`, `"console"`, `"none"`, also several
            separated by commas; `MESHKIT_TRACES_EXPORTER`. By default `"otlp"` where an endpoint is known, and nothing
            where none is: then spans have ids, for logs and headers, and stay in the process.
        endpoint: base of an OTLP/HTTP address, to which `/v1/traces` is added; `MESHKIT_OTLP_ENDPOINT`.
        attributes: more about the service (`deployment.environment.name`, …).
        sampler: which traces are recorded.
        flush_timeout: seconds that the end of the process waits for delivery, 5 by default; `MESHKIT_FLUSH_TIMEOUT`.
        logs: `"json"` writes what reaches the root logger as JSON lines with trace ids.

    Raises:
        ConfigurationError: a value that cannot work, or the `otlp` extra is not installed and an endpoint is known.
    """
    global _current
    patience = setting("flush_timeout", flush_timeout, parse=float, default=5.0)
    if not 0 <= patience < float("inf"):
        raise ConfigurationError(f"flush_timeout is how many seconds the end may take, so 0 or above, not {patience}.")
    with _lock:
        if _current is None:
            _current = _set_up(
                setting("service", service, parse=str, default=""),
                setting("service_version", version, parse=str, default=""),
                exporter,
                endpoint,
                dict(attributes or {}),
                sampler,
                patience,
            )
        made = _current
    if logs is not None:
        from meshkit.telemetry.logs import install

        install(service=made.service)
    return made


def flush(timeout: float | None = None) -> bool:
    """Deliver the spans that have ended, whoever has set the provider: what the end of a process calls last.

    Args:
        timeout: seconds to wait at the most; what `setup` was told, or 5, where left out.

    Returns:
        whether all of them were delivered in time; `True` where nothing is recorded.
    """
    if _current is not None:
        return _current.flush(timeout)
    from opentelemetry import trace

    return Telemetry(trace.get_tracer_provider()).flush(timeout)


def _set_up(
    service: str,
    version: str,
    exporter: SpanExporter | str | None,
    endpoint: str | None,
    attributes: dict[str, str],
    sampler: Sampler | None,
    flush_timeout: float,
) -> Telemetry:
    from opentelemetry import trace

    from meshkit.telemetry import tracing

    tracing.install()
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Telemetry(None, service=service, flush_timeout=flush_timeout)
    present = trace.get_tracer_provider()
    if not isinstance(present, trace.ProxyTracerProvider):
        if exporter is not None or endpoint is not None or sampler is not None:
            _log.warning("the app has set a tracer provider; it is used as it is, with the exporter and sampler it has")
        return Telemetry(present, service=service or _service_of(present), flush_timeout=flush_timeout)

    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    if service:
        attributes[SERVICE_NAME] = service
    if version:
        attributes[SERVICE_VERSION] = version
    limited = any(
        os.environ.get(name) for name in ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT")
    )
    url = _traces_url(endpoint)
    names = setting(
        "traces_exporter",
        _given(exporter),
        parse=_exporters,
        default=("otlp",) if url else (),
        otel="OTEL_TRACES_EXPORTER",
    )
    deliveries: list[_Delivery] = []
    try:
        provider = TracerProvider(
            sampler=sampler,
            resource=Resource.create(dict(attributes)),
            # Ours waits no longer than it was told to.
            shutdown_on_exit=False,
            span_limits=SpanLimits() if limited else SpanLimits(max_attribute_length=LONGEST_VALUE),
        )
        if exporter is not None and not isinstance(exporter, str):
            provider.add_span_processor(BatchSpanProcessor(exporter))
        if "console" in names:
            provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
        if "otlp" in names:
            url = url or f"{DEFAULT_ENDPOINT}/v1/traces"
            deliveries.append(_Delivery(_otlp(url), _shown(url)))
            provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", deliveries[0])))
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"telemetry cannot be set up: {error}.", code="MK401") from error
    trace.set_tracer_provider(provider)
    service = _service_of(provider)
    if deliveries:
        _log.info("traces of %s go to %s", service, _shown(url))
    return Telemetry(
        provider,
        service=service,
        endpoint=_shown(url) if deliveries else "",
        deliveries=deliveries,
        own=True,
        flush_timeout=flush_timeout,
    )


def _otlp(url: str) -> SpanExporter:
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or ""
    ).strip()
    if protocol not in ("", "http/protobuf"):
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL asks for {protocol}, and meshkit sends http/protobuf.",
            "Give the collector's HTTP address (its port is 4318 as a rule) and leave the protocol out, or pass an "
            "exporter to setup().",
            code="MK401",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise missing_extra("otlp", "opentelemetry-exporter-otlp-proto-http") from error
    return OTLPSpanExporter(endpoint=url)


def _traces_url(endpoint: str | None) -> str:
    base = setting("otlp_endpoint", endpoint, parse=str, default="")
    url = f"{base.rstrip('/')}/v1/traces" if base else os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
    if not url and (base := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()):
        url = f"{base.rstrip('/')}/v1/traces"
    if url and not (urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname):
        raise ConfigurationError(
            f"the OTLP endpoint is {_shown(url)!r}, which is no HTTP address.",
            f"An address looks like {DEFAULT_ENDPOINT}.",
            code="MK401",
        )
    return url


def _shown(url: str) -> str:
    """The address without the password that may stand in it."""
    before, at, after = url.rpartition("@")
    return f"{before.partition('://')[0]}://***@{after}" if at else url


def _given(exporter: SpanExporter | str | None) -> tuple[str, ...] | None:
    """The exporters that `setup`'s argument names: none where it is one."""
    if exporter is None:
        return None
    if not isinstance(exporter, str):
        return ()
    try:
        return _exporters(exporter)
    except ValueError as error:
        raise ConfigurationError(f"exporter is {exporter!r}: {error}.") from error


def _exporters(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := set(names) - set(_EXPORTERS):
        raise ValueError(f"{', '.join(sorted(unknown))} is not among {', '.join(_EXPORTERS)}")
    return names


def _service_of(provider: object) -> str:
    resource = getattr(provider, "resource", None)
    return str(getattr(resource, "attributes", {}).get("service.name", ""))
