"""The version, in one place: read by the build, the telemetry scope and `meshkit --version`."""

__version__ = "0.1.0"
