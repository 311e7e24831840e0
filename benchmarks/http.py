"""A GET with 35 bytes of JSON on a keep-alive connection, the server in another process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from benchmarks import Row, Sample
from benchmarks._worker import worker

ROWS = (
    Row(what="meshkit on httpx as installed", against="httpx as installed", target=1.20),
    Row(what="meshkit on httpx with sniffio", against="httpx with sniffio", target=1.40),
    Row(what="meshkit on httpx2", against="httpx2", target=1.40),
    Row(what="httpx with sniffio", against="httpx as installed", target=None),
    Row(what="httpx2", against="httpx as installed", target=None),
    Row(what="httpx with OpenTelemetry's hooks by hand", against="httpx as installed", target=None),
)

if TYPE_CHECKING:
    import httpx
    import httpx2

# httpcore looks for sniffio at each request. Where it is not installed, which is what `pip install httpx` gives, the search fails each time
# and costs what the search path costs: so the name is changed to one that is nowhere, and the search itself is done.
_WITHOUT_SNIFFIO = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return super().find_spec("sniffio_not_installed" if name == "sniffio" else name, path, target)

sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


@contextlib.asynccontextmanager
async def work(contender: str, url: str) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """One contender's client, in a worker."""
    client = _client(contender, url)
    async with client:

        async def run(count: int) -> None:
            for _ in range(count):
                (await client.get("/users/1")).raise_for_status()

        yield run


def _client(contender: str, url: str) -> httpx.AsyncClient | httpx2.AsyncClient:
    # Imported by the one that uses it: what a worker does not need must not weigh on it.
    if contender.startswith("meshkit"):
        import meshkit.httpx
        from benchmarks import _telemetry

        _telemetry.everything_on()
        if contender == "meshkit on httpx2":
            return meshkit.httpx.client("users", library="httpx2", base_url=url)
        return meshkit.httpx.client("users", base_url=url)
    if contender == "httpx2":
        import httpx2

        return httpx2.AsyncClient(base_url=url)
    import httpx

    return httpx.AsyncClient(base_url=url, event_hooks=_hooks() if contender.endswith("by hand") else {})


def _hooks() -> dict[str, list[Callable[..., Awaitable[None]]]]:
    """The least that traces a request: a recorded CLIENT span with its attributes, and its context in the headers."""
    from opentelemetry import propagate, trace

    from benchmarks import _telemetry

    tracer = _telemetry.provider().get_tracer("bench")

    async def begin(request: httpx.Request) -> None:
        span = tracer.start_span(
            request.method,
            kind=trace.SpanKind.CLIENT,
            attributes={
                "http.request.method": request.method,
                "url.full": str(request.url),
                "server.address": request.url.host,
            },
        )
        propagate.inject(request.headers, trace.set_span_in_context(span))
        request.extensions["span"] = span

    async def end(response: httpx.Response) -> None:
        span = response.request.extensions["span"]
        span.set_attribute("http.response.status_code", response.status_code)
        span.end()

    return {"request": [begin], "response": [end]}


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    server = subprocess.Popen([sys.executable, "-m", "benchmarks._http_server"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(worker("http", name, url, prelude=_WITHOUT_SNIFFIO if bare else ""))
                for name, bare in (
                    ("httpx as installed", True),
                    ("httpx with sniffio", False),
                    ("httpx2", False),
                    ("meshkit on httpx as installed", True),
                    ("meshkit on httpx with sniffio", False),
                    ("meshkit on httpx2", False),
                    ("httpx with OpenTelemetry's hooks by hand", True),
                )
            }
    finally:
        server.terminate()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
