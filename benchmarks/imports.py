"""What meshkit adds to the start of a service that uses FastAPI, httpx and aio-pika."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

from benchmarks import Row, Sample

ROWS = (
    Row(what="service with import meshkit", against="service", target=1.04),
    Row(what="service with everything on, no exporter", against="service", target=1.14),
    Row(what="import meshkit alone", against="empty interpreter", target=None),
)

_SERVICE = "import fastapi, httpx, aio_pika"
_EVERYTHING = """
import meshkit
meshkit.telemetry.setup(service="bench", exporter="none")
app = fastapi.FastAPI()
bus = meshkit.rabbitmq.RabbitBus("amqp://guest:guest@127.0.0.1/", service="bench")
client = meshkit.httpx.client("users", base_url="http://127.0.0.1")
meshkit.fastapi.install(app, service="bench", parts=[bus])
"""
# What the service would make without meshkit.
_BARE = """
app = fastapi.FastAPI()
client = httpx.AsyncClient(base_url="http://127.0.0.1")
"""


def _start(code: str) -> Sample:
    """One fresh interpreter a round; its own processor time is what the parent is told when it has ended."""

    def sample() -> float:
        process = subprocess.Popen([sys.executable, "-c", code])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{code!r} failed")
        return used.ru_utime + used.ru_stime

    return sample


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    yield {
        "empty interpreter": _start("pass"),
        "import meshkit alone": _start("import meshkit"),
        "service": _start(_SERVICE + _BARE),
        "service with everything on, no exporter": _start(_SERVICE + _EVERYTHING),
        "service with import meshkit": _start(f"{_SERVICE}, meshkit{_BARE}"),
    }
