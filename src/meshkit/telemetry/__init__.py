"""What meshkit tells the outside: metrics, spans, logs.

An app calls `setup()` once at its start. The rest is put in place by the edges: `recorder.install()` keeps the metrics
of `catalogue.METRICS`, `tracing.install()` makes the spans.
"""

# The function takes the name of its module: `meshkit.telemetry.setup(...)` is what users write.
from meshkit.telemetry.setup import Telemetry as Telemetry
from meshkit.telemetry.setup import flush as flush
from meshkit.telemetry.setup import setup as setup

__all__ = ["Telemetry", "flush", "setup"]
