"""Stands in for the module of aio-pika's tests that starts a broker in Docker: the broker runs already, on a port given.

Copied into a copy of that suite by the proof beside it, in place of `tests/docker_client.py`.
"""

import os
from dataclasses import dataclass, field


class DockerNotAvailableError(Exception):
    """Never raised here; the suite imports it."""


class DockerHostInfo:
    """Nothing to know: there is no Docker."""


def check_docker_available() -> DockerHostInfo:
    """What the suite asks before anything else."""
    return DockerHostInfo()


@dataclass
class ContainerInfo:
    """The "container": a broker on a loopback port."""

    id: str = "broker"
    host: str = "127.0.0.1"
    ports: dict[str, int] = field(default_factory=dict)


class DockerClient:
    """Starts and ends nothing."""

    def __init__(self, info: DockerHostInfo | None = None) -> None:
        pass

    def run(self, image: str, ports: list[str], environment: dict[str, str] | None = None) -> ContainerInfo:
        """The broker whose port is in MESHKIT_PEERS_PORT."""
        return ContainerInfo(ports={"5672/tcp": int(os.environ["MESHKIT_PEERS_PORT"])})

    def kill(self, container_id: str) -> None:
        """The broker is not the suite's to end."""

    def remove(self, container_id: str) -> None:
        """Nothing was made."""
