"""The real servers, each started as an instance of one's own: for tests, benches, proofs and the demo.

A server gets a temporary folder, free loopback ports and, where it has one, a node name of its own, so that any number of them live side
by side and beside what the machine runs as services. A context manager starts it, waits until it answers, and takes everything away::

    with rabbitmq() as server:
        connection = await aio_pika.connect(server.url)
        server.kill()       # SIGKILL: the crash
        server.start()      # the same data, the same ports

Each is ended by its process id. Should this process die first, even by SIGKILL, a guard (a shell that waits for the end of a pipe) ends
the server and removes the folder. ``./run servers`` installs what is missing; ``available()`` tells what is there. Only the standard
library is imported here, so that benches and the demo's launcher can use it before anything else is installed.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import json
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "Alertmanager",
    "Collector",
    "Jaeger",
    "MariaDB",
    "NotInstalledError",
    "NotReadyError",
    "PostgreSQL",
    "Prometheus",
    "RabbitMQ",
    "Redis",
    "Server",
    "alertmanager",
    "available",
    "collector",
    "free_ports",
    "jaeger",
    "mariadb",
    "postgresql",
    "prometheus",
    "rabbitmq",
    "redis",
]

HOST = "127.0.0.1"


class NotInstalledError(RuntimeError):
    """A server that was asked for is not on this machine."""

    def __init__(self, server: str) -> None:
        super().__init__(f"{server} is not installed; ./run servers installs it")
        self.server = server


class NotReadyError(RuntimeError):
    """A server was started and did not come to answer; the end of its log is in the message."""


# --- where they are --------------------------------------------------------------------------------------------------------------

# The daemons stand in sbin, which is not on a user's PATH; RabbitMQ's wrapper on the PATH changes to the system's own user and drops
# the environment, so the script behind it is what is looked for.
_FOLDERS: dict[str, tuple[str, ...]] = {
    "rabbitmq": ("/usr/lib/rabbitmq/bin", "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin"),
    "postgresql": ("/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql*/bin"),
}
_PROGRAMS: dict[str, tuple[str, ...]] = {
    "rabbitmq": ("rabbitmq-server",),
    "prometheus": ("prometheus",),
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
    "redis": ("redis-server",),
    "postgresql": ("postgres",),
    "mariadb": ("mariadbd",),
    "jaeger": ("jaeger-all-in-one", "all-in-one"),
    "collector": ("otelcol-meshkit",),
}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshkit" / "servers" / "bin"


def _found_in(folder: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        path = folder / name
        if path.is_file() and os.access(path, os.X_OK):
            return path
    return None


def _program(server: str) -> Path | None:
    names = _PROGRAMS[server]
    known = [
        folder
        for pattern in _FOLDERS.get(server, ())
        for folder in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
    ]
    on_path = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    sbin = [Path("/usr/local/sbin"), Path("/usr/sbin")]
    ours = [_cache(), Path.home() / "go" / "bin"]
    order = [*known, *on_path, *sbin, *ours] if server == "rabbitmq" else [*on_path, *known, *sbin, *ours]
    for folder in order:
        found = _found_in(folder, names)
        if found is not None:
            return found
    return None


def available() -> dict[str, Path | None]:
    """Each real server by name, with the program that would be started, or None where it is not installed."""
    return {server: _program(server) for server in _PROGRAMS}


def _beside(program: Path, *names: str) -> Path:
    """A tool that comes with a server: in the folder of the server's program, or wherever the system keeps it."""
    folders = [program.parent, program.resolve().parent]
    folders += [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    folders += [Path("/usr/local/sbin"), Path("/usr/sbin")]
    for folder in folders:
        found = _found_in(folder, names)
        if found is not None:
            return found
    raise NotInstalledError(names[0])


# --- ports -----------------------------------------------------------------------------------------------------------------------


def _below_ephemeral() -> tuple[int, int]:
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32768
    return (10_000, lowest - 1) if lowest > 12_000 else (20_000, 60_000)


def free_ports(count: int) -> list[int]:
    """``count`` different loopback ports that nothing listens on.

    They lie below the range that the system hands out for outgoing connections: while a server is down between ``kill()`` and
    ``start()``, a client that keeps trying could otherwise be given the server's own port and connect to itself.
    """
    low, high = _below_ephemeral()
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((HOST, random.randint(low, high)))
                ports.append(probe.getsockname()[1])
        return ports


# --- one server ------------------------------------------------------------------------------------------------------------------

# Reads lines until the pipe ends. Each line names the process groups that live now; an empty last line means all was taken away.
_GUARD = """
folder=$1; gentle=$2; groups=
while read -r line; do groups=$line; done
if [ -n "$groups" ]; then
    for group in $groups; do kill -s "$gentle" -- "-$group"; done
    for wait in 1 2 3 4 5 6 7 8 9 10; do
        left=
        for group in $groups; do kill -s 0 -- "-$group" && left=1; done
        [ -z "$left" ] && break
        sleep 0.2
    done
    for group in $groups; do kill -s KILL -- "-$group"; done
fi
rm -rf "$folder" || { sleep 1; rm -rf "$folder"; }
"""


def _run_as(user: str | None, command: Sequence[str | Path]) -> list[str]:
    words = [str(word) for word in command]
    if user is None:
        return words
    account = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", "--", *words]


class Server(abc.ABC):
    """What all of them share: a folder, ports, processes of their own, and the way to start, stop, crash and remove them."""

    name = "server"
    refuses_root = False
    # What ends it soonest without harm to the machine; RabbitMQ's orderly end takes six seconds.
    quick_end = signal.SIGTERM
    orderly_end = signal.SIGTERM
    ready_within = 30.0

    def __init__(self) -> None:
        program = _program(self.name)
        if program is None:
            raise NotInstalledError(self.name)
        self.program = program
        self.user = "nobody" if self.refuses_root and os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix=f"meshkit-{self.name}-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, f"meshkit-guard-{self.name}", str(self.folder), self.quick_end.name[3:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        if self.user is not None:
            account = pwd.getpwnam(self.user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)

    # What a subclass says.

    def _prepare(self) -> None:  # noqa: B027 - a server that reads nothing has nothing to write
        """Write what the server reads; runs once, before the first start."""

    @abc.abstractmethod
    def _command(self) -> list[str | Path]:
        """The line that starts it."""

    def _environment(self) -> dict[str, str]:
        return {}

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Whether it is ready, found out by asking it."""

    # What a user does.

    @property
    def pid(self) -> int:
        """The process id of the server itself."""
        return self._processes[-1].pid

    @property
    def running(self) -> bool:
        return bool(self._processes) and self._processes[-1].poll() is None

    def start(self) -> None:
        """Start it, or start it again in the same folder and on the same ports; returns when it answers."""
        if self.running:
            return
        if not (self.folder / ".prepared").exists():
            self._prepare()
            (self.folder / ".prepared").touch()
        self._forget_ended()
        self._launch(self._command())
        self._wait_until_it_answers()

    def stop(self) -> None:
        """End it in order, as an operator would; its data stay for the next ``start()``."""
        if self.running:
            self._end(self._processes[-1], self.orderly_end)
        self._forget_ended()

    def kill(self) -> None:
        """End it with SIGKILL, which is the crash; its data stay for the next ``start()``."""
        if self.running:
            self._end(self._processes[-1], signal.SIGKILL)
        self._forget_ended()

    def restart(self) -> None:
        """Stop it in order where it runs, and start it."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End everything that was started, at once, and remove the folder; may be called twice."""
        for process in reversed(self._processes):
            self._end(process, self.quick_end)
        self._forget_ended()
        shutil.rmtree(self.folder, ignore_errors=True)
        pipe = self._guard.stdin
        if pipe is not None and not pipe.closed:
            pipe.close()
        self._guard.wait()

    def log(self) -> str:
        """What the server has printed so far."""
        path = self.folder / "output.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # How it is done.

    def _launch(self, command: Sequence[str | Path]) -> None:
        environment = {**os.environ, **self._environment()}
        # Under coverage or a debugger, a server that happens to be a script of Python must not inherit either.
        environment.pop("PYTHONPATH", None)
        with open(self.folder / "output.log", "ab") as output:
            process = subprocess.Popen(
                _run_as(self.user, command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self._processes.append(process)
        self._tell_guard()

    def _run(self, command: Sequence[str | Path], *, timeout: float = 120.0) -> str:
        """Run a tool to its end, as the server's own user; its output, or NotReadyError with it."""
        done = subprocess.run(
            _run_as(self.user, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self._environment()},
            cwd=self.folder,
            timeout=timeout,
            check=False,
        )
        text = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            words = " ".join(shlex.quote(str(word)) for word in command)
            raise NotReadyError(f"{self.name}: `{words}` ended with exit code {done.returncode}:\n{text}")
        return text

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self.ready_within
        while True:
            if not self.running:
                code = self._processes[-1].returncode
                raise NotReadyError(f"{self.name} ended with exit code {code} before it was ready:\n{self._log_end()}")
            try:
                if self._answers():
                    return
            except (OSError, ValueError):
                pass  # Not yet: refused, cut off, or half an answer.
            if time.monotonic() > deadline:
                raise NotReadyError(f"{self.name} was not ready within {self.ready_within:g} s:\n{self._log_end()}")
            time.sleep(0.05)

    def _log_end(self) -> str:
        return "\n".join(self.log().splitlines()[-25:])

    @staticmethod
    def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
        # Signals go out only before the leader is waited for: until then no other process can have been given its id.
        if process.poll() is not None:
            return
        if how != signal.SIGKILL:
            os.kill(process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
                return
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _forget_ended(self) -> None:
        self._processes = [process for process in self._processes if process.poll() is None]
        self._tell_guard()

    def _tell_guard(self) -> None:
        pipe = self._guard.stdin
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):
                pipe.write((" ".join(str(process.pid) for process in self._processes) + "\n").encode())
                pipe.flush()

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


S = TypeVar("S", bound=Server)


@contextmanager
def _running(make: Callable[[], S]) -> Iterator[S]:
    server = make()
    try:
        server.start()
        yield server
    finally:
        server.close()


# Proxies of the environment never stand between a test and its own server.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _http(
    url: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 10.0,
) -> bytes:
    request = urllib.request.Request(url, data=body, method=method, headers=dict(headers or {}))
    with _DIRECT.open(request, timeout=timeout) as response:
        answer: bytes = response.read()
        return answer


def _listens(port: int) -> bool:
    with socket.create_connection((HOST, port), timeout=1.0):
        return True


# --- RabbitMQ --------------------------------------------------------------------------------------------------------------------


class RabbitMQ(Server):
    """A RabbitMQ node with the management and Prometheus plugins; user and password are ``guest``."""

    name = "rabbitmq"
    refuses_root = True
    quick_end = signal.SIGKILL
    ready_within = 120.0

    def __init__(self, *, config: str = "", plugins: Sequence[str] = ()) -> None:
        super().__init__()
        self.port, self.management_port, self.prometheus_port, self._dist_port, self._epmd_port = free_ports(5)
        self.url = f"amqp://guest:guest@{HOST}:{self.port}/"
        self.management_url = f"http://{HOST}:{self.management_port}"
        self.prometheus_url = f"http://{HOST}:{self.prometheus_port}"
        self.node = f"meshkit{self.port}@localhost"
        self._config = config
        self._plugins = ("rabbitmq_management", "rabbitmq_prometheus", *plugins)

    def _prepare(self) -> None:
        lines = [
            f"listeners.tcp.1 = {HOST}:{self.port}",
            f"management.tcp.ip = {HOST}",
            f"management.tcp.port = {self.management_port}",
            f"prometheus.tcp.ip = {HOST}",
            f"prometheus.tcp.port = {self.prometheus_port}",
            # A nearly full disk or small memory of the test machine must not block publishers.
            "disk_free_limit.absolute = 50MB",
            self._config,
        ]
        self._write("rabbitmq.conf", "\n".join(lines) + "\n")
        self._write("enabled_plugins", f"[{','.join(self._plugins)}].\n")
        for name in ("home", "mnesia", "log"):
            (self.folder / name).mkdir()
        if self.user is not None:
            account = pwd.getpwnam(self.user)
            for path in self.folder.iterdir():
                os.chown(path, account.pw_uid, account.pw_gid)

    def start(self) -> None:
        """Start epmd where it does not run yet, then the node; returns when AMQP, management and metrics answer."""
        # The node would start epmd itself, as a daemon that outlives it; as a process of ours it can be ended by its id.
        if not self._processes:
            self._launch([_beside(self.program, "epmd"), "-port", str(self._epmd_port), "-address", HOST])
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    if _listens(self._epmd_port):
                        break
                time.sleep(0.02)
        super().start()

    @property
    def running(self) -> bool:
        # The first process is epmd.
        return len(self._processes) > 1 and self._processes[-1].poll() is None

    def _command(self) -> list[str | Path]:
        return [self.program]

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.folder / "home"),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            # The machine's own settings are another node's.
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "no-env.conf"),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(self._epmd_port),
            # The start script then becomes the node instead of staying as its parent, so that a signal reaches the node itself.
            "RUNNING_UNDER_SYSTEMD": "true",
            # Idle schedulers sleep instead of spinning: they share the processor with what is measured.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def _answers(self) -> bool:
        _http(f"{self.prometheus_url}/metrics")
        self.api("/api/overview")
        return _listens(self.port)

    def api(self, path: str, *, method: str = "GET", body: Any = None) -> Any:
        """Ask the management API: the decoded JSON of the answer, or None where it is empty. ``%2F`` is the default vhost."""
        credentials = base64.b64encode(b"guest:guest").decode()
        answer = _http(
            self.management_url + path,
            method=method,
            body=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Basic {credentials}", "Content-Type": "application/json"},
        )
        return json.loads(answer) if answer else None

    def ctl(self, *words: str) -> str:
        """Run ``rabbitmqctl`` against this node; its output."""
        return self._run([_beside(self.program, "rabbitmqctl"), "-q", "-n", self.node, *words])


def rabbitmq(*, config: str = "", plugins: Sequence[str] = ()) -> AbstractContextManager[RabbitMQ]:
    """A running RabbitMQ; ``config`` is added to its rabbitmq.conf, ``plugins`` to management and Prometheus. Six to nine seconds."""
    return _running(lambda: RabbitMQ(config=config, plugins=plugins))


# --- Prometheus and Alertmanager -------------------------------------------------------------------------------------------------


class Prometheus(Server):
    """A Prometheus server with exemplar storage; ``files`` (rules, targets) are written beside its configuration."""

    name = "prometheus"

    def __init__(
        self, *, config: str | None = None, files: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.url = f"http://{HOST}:{self.port}"
        self._config = "global: {scrape_interval: 1s, evaluation_interval: 1s}\n" if config is None else config
        self._files = dict(files or {})
        self._options = tuple(options)

    def _prepare(self) -> None:
        self._write("prometheus.yml", self._config)
        for name, text in self._files.items():
            self._write(name, text)

    def _command(self) -> list[str | Path]:
        return [
            self.program,
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={HOST}:{self.port}",
            "--enable-feature=exemplar-storage",
            *self._options,
        ]

    def _answers(self) -> bool:
        _http(f"{self.url}/-/ready")
        return True

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query, as the HTTP API gives it; urllib.error.HTTPError for an expression it refuses."""
        answer = json.loads(_http(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def api(self, path: str) -> Any:
        """The ``data`` of an answer, e.g. of ``/api/v1/rules`` or ``/api/v1/targets``."""
        return json.loads(_http(self.url + path))["data"]

    def reload(self, *, config: str | None = None, files: Mapping[str, str] | None = None) -> None:
        """Replace the configuration or files beside it, and have them read; returns before Prometheus is through with it."""
        if config is not None:
            self._write("prometheus.yml", config)
        for name, text in (files or {}).items():
            self._write(name, text)
        os.kill(self.pid, signal.SIGHUP)


def prometheus(
    *, config: str | None = None, files: Mapping[str, str] | None = None, options: Sequence[str] = ()
) -> AbstractContextManager[Prometheus]:
    """A running Prometheus; ``config`` is the text of prometheus.yml and may name ``files`` by their relative path."""
    return _running(lambda: Prometheus(config=config, files=files, options=options))


class Alertmanager(Server):
    """An Alertmanager without a cluster; without ``config`` it routes to a receiver that tells nobody."""

    name = "alertmanager"

    def __init__(self, *, config: str | None = None, files: Mapping[str, str] | None = None) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.url = f"http://{HOST}:{self.port}"
        self._config = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n" if config is None else config
        self._files = dict(files or {})

    def _prepare(self) -> None:
        self._write("alertmanager.yml", self._config)
        for name, text in self._files.items():
            self._write(name, text)

    def _command(self) -> list[str | Path]:
        return [
            self.program,
            f"--config.file={self.folder / 'alertmanager.yml'}",
            f"--storage.path={self.folder / 'data'}",
            f"--web.listen-address={HOST}:{self.port}",
            "--cluster.listen-address=",
        ]

    def _answers(self) -> bool:
        _http(f"{self.url}/-/ready")
        return True

    def api(self, path: str) -> Any:
        """The decoded answer of its API, e.g. of ``/api/v2/alerts``."""
        return json.loads(_http(self.url + path))


def alertmanager(
    *, config: str | None = None, files: Mapping[str, str] | None = None
) -> AbstractContextManager[Alertmanager]:
    """A running Alertmanager; ``config`` is the text of alertmanager.yml."""
    return _running(lambda: Alertmanager(config=config, files=files))


# --- Jaeger and the collector ----------------------------------------------------------------------------------------------------


class Jaeger(Server):
    """Jaeger all-in-one in memory: OTLP in, the query API out."""

    name = "jaeger"
    _OPTIONS = (
        "collector.grpc-server.host-port",
        "collector.http-server.host-port",
        "http-server.host-port",
        "processor.jaeger-binary.server-host-port",
        "processor.jaeger-compact.server-host-port",
        "processor.zipkin-compact.server-host-port",
        "query.grpc-server.host-port",
    )

    def __init__(self, *, max_traces: int = 10_000) -> None:
        super().__init__()
        self.otlp_port, self.otlp_grpc_port, self.query_port, self._admin_port, *self._others = free_ports(
            4 + len(self._OPTIONS)
        )
        self.otlp_url = f"http://{HOST}:{self.otlp_port}"
        self.query_url = f"http://{HOST}:{self.query_port}"
        self._max_traces = max_traces

    def _command(self) -> list[str | Path]:
        return [
            self.program,
            "--collector.otlp.enabled=true",
            f"--collector.otlp.http.host-port={HOST}:{self.otlp_port}",
            f"--collector.otlp.grpc.host-port={HOST}:{self.otlp_grpc_port}",
            f"--query.http-server.host-port={HOST}:{self.query_port}",
            f"--admin.http.host-port={HOST}:{self._admin_port}",
            *(f"--{option}={HOST}:{port}" for option, port in zip(self._OPTIONS, self._others, strict=True)),
            f"--memory.max-traces={self._max_traces}",
        ]

    def _answers(self) -> bool:
        _http(f"http://{HOST}:{self._admin_port}/")
        return True

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """One trace by its 32 hex digits, as the query API gives it; None while Jaeger does not have it."""
        try:
            answer = json.loads(_http(f"{self.query_url}/api/traces/{trace_id}"))
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise
        found: dict[str, Any] | None = answer["data"][0] if answer["data"] else None
        return found

    def api(self, path: str) -> Any:
        """The ``data`` of an answer, e.g. of ``/api/services`` or ``/api/traces?service=…``."""
        return json.loads(_http(self.query_url + path))["data"]


def jaeger(*, max_traces: int = 10_000) -> AbstractContextManager[Jaeger]:
    """A running Jaeger; spans go to ``otlp_url`` + ``/v1/traces``, questions to ``query_url``."""
    return _running(lambda: Jaeger(max_traces=max_traces))


class Collector(Server):
    """The OpenTelemetry Collector with a configuration given; ``ready_port`` is one that it listens on when it works."""

    name = "collector"

    def __init__(self, *, config: str, ready_port: int, environment: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._config = config
        self._ready_port = ready_port
        self._variables = dict(environment or {})

    def _prepare(self) -> None:
        self._write("collector.yaml", self._config)

    def _command(self) -> list[str | Path]:
        return [self.program, "--config", self.folder / "collector.yaml"]

    def _environment(self) -> dict[str, str]:
        return self._variables

    def _answers(self) -> bool:
        return _listens(self._ready_port)


def collector(
    *, config: str, ready_port: int, environment: Mapping[str, str] | None = None
) -> AbstractContextManager[Collector]:
    """A running collector; take the ports that ``config`` names from ``free_ports``, or hand them in as ``environment``."""
    return _running(lambda: Collector(config=config, ready_port=ready_port, environment=environment))


# --- databases -------------------------------------------------------------------------------------------------------------------


class Redis(Server):
    """A Redis that keeps nothing on disk: a restart is empty."""

    name = "redis"

    def __init__(self) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.url = f"redis://{HOST}:{self.port}/0"

    def _command(self) -> list[str | Path]:
        return [self.program, "--port", str(self.port), "--bind", HOST, "--save", "", "--appendonly", "no"]

    def _answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")


def redis() -> AbstractContextManager[Redis]:
    """A running Redis."""
    return _running(Redis)


class PostgreSQL(Server):
    """A PostgreSQL cluster of one's own; the user is ``postgres``, without a password."""

    name = "postgresql"
    refuses_root = True
    # Fast shutdown: it rolls back what is open and gives its shared memory back.
    quick_end = signal.SIGINT
    orderly_end = signal.SIGINT

    def __init__(self) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.url = self.url_of("postgres")
        self._databases = 0

    def url_of(self, database: str, *, driver: str = "") -> str:
        """The address of one database; with ``driver="asyncpg"`` as SQLAlchemy wants it."""
        return f"postgresql{'+' if driver else ''}{driver}://postgres@{HOST}:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database; its name."""
        self._databases += 1
        name = f"meshkit_{self._databases}"
        psql = _beside(self.program, "psql")
        self._run([psql, "-q", "-h", HOST, "-p", str(self.port), "-U", "postgres", "-c", f"CREATE DATABASE {name}"])
        return name

    def close(self) -> None:
        """End it and remove its folder, and after a ``kill()`` the scrap of shared memory that a crash leaves in the system."""
        crashed = self.folder / "data" / "postmaster.pid"
        memory = crashed.read_text().splitlines()[6:7] if crashed.exists() and not self.running else []
        super().close()
        for key_and_id in memory:
            with contextlib.suppress(OSError):
                subprocess.run(["ipcrm", "-m", key_and_id.split()[-1]], stderr=subprocess.DEVNULL, check=False)

    def _prepare(self) -> None:
        self._run(
            [
                _beside(self.program, "initdb"),
                "-D",
                self.folder / "data",
                "-U",
                "postgres",
                "--auth=trust",
                "--no-sync",
                "-E",
                "UTF8",
            ]
        )

    def _command(self) -> list[str | Path]:
        return [self.program, "-D", self.folder / "data", "-h", HOST, "-p", str(self.port), "-k", self.folder]

    def _answers(self) -> bool:
        tool = [str(_beside(self.program, "pg_isready")), "-q", "-h", HOST, "-p", str(self.port)]
        return subprocess.run(tool, stdin=subprocess.DEVNULL, check=False).returncode == 0


def postgresql() -> AbstractContextManager[PostgreSQL]:
    """A running PostgreSQL."""
    return _running(PostgreSQL)


class MariaDB(Server):
    """A MariaDB of one's own; the user is ``root``, without a password."""

    name = "mariadb"
    refuses_root = True

    def __init__(self) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.url = self.url_of("mysql")
        self._databases = 0

    def url_of(self, database: str, *, driver: str = "") -> str:
        """The address of one database; with ``driver="aiomysql"`` as SQLAlchemy wants it."""
        return f"mysql{'+' if driver else ''}{driver}://root@{HOST}:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database; its name."""
        self._databases += 1
        name = f"meshkit_{self._databases}"
        client = _beside(self.program, "mariadb", "mysql")
        self._run(
            [client, "--no-defaults", "-h", HOST, "-P", str(self.port), "-u", "root", "-e", f"CREATE DATABASE {name}"]
        )
        return name

    def _prepare(self) -> None:
        self._run(
            [
                _beside(self.program, "mariadb-install-db", "mysql_install_db"),
                "--no-defaults",
                f"--datadir={self.folder / 'data'}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ]
        )

    def _command(self) -> list[str | Path]:
        return [
            self.program,
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--bind-address={HOST}",
            f"--port={self.port}",
            f"--socket={self.folder / 'socket'}",
        ]

    def _answers(self) -> bool:
        admin = _beside(self.program, "mariadb-admin", "mysqladmin")
        tool = [str(admin), "--no-defaults", "-h", HOST, "-P", str(self.port), "-u", "root", "ping"]
        quiet = subprocess.DEVNULL
        return subprocess.run(tool, stdin=quiet, stdout=quiet, stderr=quiet, check=False).returncode == 0


def mariadb() -> AbstractContextManager[MariaDB]:
    """A running MariaDB."""
    return _running(MariaDB)
