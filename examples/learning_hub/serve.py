"""Runs a service's app as a process."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI

from learning_hub.settings import port_of
from meshkit import telemetry


def serve(app: FastAPI, *, service: str, version: str = "1.0.0") -> None:
    """Serve until SIGTERM; traces go where `OTEL_EXPORTER_OTLP_ENDPOINT` says."""
    telemetry.setup(service=service, version=version)
    uvicorn.run(app, host="127.0.0.1", port=port_of(service), log_level="warning")
