"""What the `meshkit` command understands, and how it answers: data on stdout, everything else on stderr.

Exit codes: 0 done, 1 a defect of meshkit, 2 usage, settings or an unreachable server, 3 done in part or findings,
4 stopped by a guard, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from meshkit._version import __version__
from meshkit.errors import ConfigurationError, MeshkitError

if TYPE_CHECKING:
    from meshkit.rabbitmq.dead_letters import DeadLetterRecord, Found, Receipt

T = TypeVar("T")

# The base of all usage errors. By its child, because newer typers carry a click of their own beside the public one.
_UsageError = typer.BadParameter.__mro__[1]

# Plain help and plain errors: an error is one line that can be read and grepped.
app = typer.Typer(
    name="meshkit",
    help="Resilience and observability for asyncio services.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
dlq = typer.Typer(help="Look at dead letters and send them back.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(dlq, name="dlq")


class Stopped(Exception):
    """Ends a command with an exit code after it has said what there is to say."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. Never a traceback for what a user can cause."""
    # What libraries log about a connection that failed is said again by our own one line.
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    try:
        code = app(arguments, standalone_mode=False)
    except Stopped as stopped:
        return stopped.code
    except typer.Abort:
        return 130
    except ModuleNotFoundError as error:
        say(f"meshkit: {error.name} is not installed. Install meshkit-py again, with the extras that you use.")
        return 2
    except MeshkitError as error:
        say(f"meshkit: {error}")
        return 2
    except KeyboardInterrupt:
        say("meshkit: interrupted")
        return 130
    except BrokenPipeError:
        # The reader has gone (`| head`); Python must not complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, _UsageError):
            message = error.format_message()  # type: ignore[attr-defined]
            say(message if "\n" in message else f"meshkit: {message} See meshkit --help.")
            return 2
        traceback.print_exc()
        say("meshkit: this is a defect of meshkit; please report the lines above")
        return 1
    return code if isinstance(code, int) else 0


def say(line: str) -> None:
    """To the person, not into the data."""
    print(line, file=sys.stderr, flush=True)


def show(line: str = "") -> None:
    """Into the data."""
    print(line, flush=True)


def show_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def _asyncio(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end; Ctrl-C and SIGTERM cancel it, so that what it holds is given back."""

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            return await coroutine
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _version(wanted: bool) -> None:
    if wanted:
        show(f"meshkit {__version__}")
        raise Stopped(0)


@app.callback()
def _meshkit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- broker -----------------------------------------------------------------------------------------------------------


@app.command()
def broker(
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 5672,
) -> None:
    """Run the embedded AMQP broker alone (development only: nothing survives)."""
    from meshkit.embedded import AmqpServer

    async def serve() -> None:
        try:
            server = AmqpServer(host=host, port=port)
            await server.start()
        except ValueError as error:
            raise ConfigurationError(f"{error}.") from error
        except OSError as error:
            raise MeshkitError(
                f"{host}:{port} cannot be listened on: {error.strerror or error}.",
                "Is another broker running there? Choose another one with --port, or --port 0 for a free one.",
                code="MK102",
            ) from error
        try:
            show(f"embedded broker on {server.url} (not RabbitMQ; nothing survives; Ctrl-C stops it)")
            await asyncio.Event().wait()
        finally:
            await server.stop()

    _asyncio(serve())


# -- export -----------------------------------------------------------------------------------------------------------


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where to write to; made if missing.")],
    time_scale: Annotated[
        float, typer.Option(min=0.001, max=1000.0, help="Factor on all durations in the rules: 0.01 for a rehearsal.")
    ] = 1.0,
) -> None:
    """Write the Grafana dashboards, Prometheus rules and server configurations."""
    from meshkit import pack

    try:
        pack.export(folder, time_scale=time_scale)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror or error}.") from error
    show(f"written to {folder}")


# -- dead letters -----------------------------------------------------------------------------------------------------

Url = Annotated[
    str,
    typer.Option("--url", envvar="MESHKIT_AMQP_URL", help="The broker.", show_default=True, show_envvar=True),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Foreign = Annotated[
    bool, typer.Option("--foreign", help="Read a queue that meshkit did not declare; looking may cost deliveries.")
]
DEFAULT_URL = "amqp://guest:guest@localhost/"


@dlq.command("list")
def dlq_list(
    queues: Annotated[
        list[str] | None, typer.Argument(help="Dead-letter queues; found by the management API where left out.")
    ] = None,
    url: Url = DEFAULT_URL,
    management: Annotated[
        str,
        typer.Option("--management", envvar="MESHKIT_MANAGEMENT_URL", help="http://user:password@host:15672"),
    ] = "",
    as_json: Json = False,
    foreign: Foreign = False,
) -> None:
    """Show dead-letter queues: how many dead letters, and from what causes."""
    from meshkit.rabbitmq import dead_letters as dl

    async def collect() -> list[tuple[Found, list[dl.Group], str]]:
        rows: list[tuple[Found, list[dl.Group], str]] = []
        async with dl.DeadLetters(url) as letters:
            names = [name if name.endswith(".dlq") else f"{name}.dlq" for name in queues or ()]
            if management and not names:
                found = await asyncio.to_thread(dl.found_by_management, management)
            elif names:
                found = await letters.depths(names)
                missing = sorted(set(names) - {row.queue for row in found})
                if missing:
                    say(f"meshkit: no such queue on this broker: {', '.join(missing)}")
            else:
                raise ConfigurationError(
                    "AMQP cannot list queues.", "Name them (meshkit dlq list QUEUE …), or give --management URL."
                )
            for row in found:
                note = ""
                groups: list[dl.Group] = []
                if row.depth:
                    try:
                        records, total = await letters.read(row.queue, foreign=foreign)
                        groups = dl.groups_of(records)
                        if total > len(records):
                            note = f"causes of the oldest {len(records)} of {total}"
                    except MeshkitError as error:
                        note = error.cause
                rows.append((row, groups, note))
        return rows

    rows = _asyncio(collect())
    if as_json:
        show_json(
            [
                {**dataclasses.asdict(row), "groups": [dataclasses.asdict(group) for group in groups], "note": note}
                for row, groups, note in rows
            ]
        )
    else:
        width = max([len(row.queue) for row, _, _ in rows], default=5)
        show(f"{'queue':<{width}}  {'dead':>6}  causes")
        for row, groups, note in rows:
            show(f"{row.queue:<{width}}  {row.depth:>6}  {len(groups) if not note or groups else '?'}  {note}".rstrip())
            for group in groups:
                show(
                    f"{'':<{width}}  {group.count:>6}  {group.fingerprint}  {_line(group.error_type, group.error_message)}"
                )
    # Findings are no failure of the command, but a script wants to know.
    raise Stopped(3 if any(row.depth for row, _, _ in rows) else 0)


@dlq.command("show")
def dlq_show(
    queue: Annotated[str, typer.Argument(help="The dead-letter queue.")],
    message: Annotated[str, typer.Argument(help="Message id or its beginning; the oldest where left out.")] = "",
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    body: Annotated[bool, typer.Option("--body", help="Print the body too; it may hold personal data.")] = False,
    foreign: Foreign = False,
) -> None:
    """Show one dead letter: what failed, where, why, and in which trace."""
    from meshkit.rabbitmq import dead_letters as dl

    queue = queue if queue.endswith(".dlq") else f"{queue}.dlq"

    async def find() -> DeadLetterRecord:
        async with dl.DeadLetters(url) as letters:
            records, total = await letters.read(queue, foreign=foreign)
        for record in records:
            if record.message_id.startswith(message):
                return record
        seen = f"the oldest {len(records)} of {total}" if total > len(records) else f"{total}"
        raise MeshkitError(f"none of {seen} dead letters in {queue} has an id like {message!r}.", code="MK601")

    record = _asyncio(find())
    if as_json:
        show_json(record.as_json(body=body))
        return
    size = f"{len(record.body)} bytes"
    show(f"message   {record.message_id}   {record.type}   {size}   {record.content_type}")
    show(
        f"failed    at attempt {record.attempt}, first {record.first_failed_at or '?'}, last {record.last_failed_at or '?'}"
        f"   replayed {record.replay_count} times" + (f", last by {record.replayed_by}" if record.replayed_by else "")
    )
    show(f"where     queue {record.queue}, {' '.join(filter(None, (record.service, record.version)))} on {record.host}")
    show(f"from      exchange {record.exchange or '(default)'}, key {record.routing_key}")
    show(f"cause     {record.reason}   {record.fingerprint}   {_line(record.error_type, record.error_message)}")
    for line in record.stack.rstrip().splitlines():
        show(f"          {line}")
    show(f"trace     {record.trace_id or '(none)'}")
    if body:
        show(f"body      {record.as_json()['body']}")


@dlq.command("replay")
def dlq_replay(
    queue: Annotated[str, typer.Argument(help="The dead-letter queue.")],
    ids: Annotated[list[str] | None, typer.Option("--id", help="Message id or its beginning; repeatable.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Only this cause (as `list` names it).")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="So many at the most, oldest first.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    foreign: Foreign = False,
) -> None:
    """Send dead letters back to the queue they failed in, and to no other."""
    from meshkit import telemetry
    from meshkit.rabbitmq import dead_letters as dl

    queue = queue if queue.endswith(".dlq") else f"{queue}.dlq"
    observed = telemetry.setup(service="meshkit-dlq")

    async def replay() -> Receipt:
        async with dl.DeadLetters(url) as letters:
            plan = await letters.replay(
                queue, ids=ids or None, fingerprint=group, limit=limit, dry_run=True, foreign=foreign
            )
            if ids and not plan.planned:
                raise MeshkitError(f"no dead letter in {queue} has an id like {', '.join(ids)}.", code="MK601")
            going = plan.planned - len(plan.guarded)
            say(f"plan: {going} of {plan.left} messages in {queue}, each back to the queue it failed in and no other")
            say("      a message leaves the dead-letter queue only when the broker has confirmed its copy")
            if plan.guarded:
                say(f"      {len(plan.guarded)} left alone: replayed {dl.MOST_REPLAYS} times already and back again")
            if dry_run or not going:
                return plan
            if not yes:
                _confirm(going)
            return await letters.replay(
                queue,
                ids=ids or None,
                fingerprint=group,
                limit=limit,
                foreign=foreign,
                progress=lambda so_far: (
                    say(f"  {len(so_far.replayed)} replayed") if len(so_far.replayed) % 100 == 0 else None
                ),
            )

    try:
        receipt = _asyncio(replay())
    finally:
        observed.shutdown()
    if as_json:
        show_json(dataclasses.asdict(receipt))
    elif not dry_run:
        show(
            f"{len(receipt.replayed)} replayed, {len(receipt.failed)} failed, {len(receipt.guarded)} left by the replay "
            f"guard; {receipt.left} now in {queue}"
        )
        for message_id, why in receipt.failed.items():
            say(f"  {message_id} stays: {why}")
        if receipt.trace_id:
            show(f"trace {receipt.trace_id}")
    if receipt.failed:
        raise Stopped(3)
    if receipt.guarded:
        raise Stopped(4)


def _confirm(count: int) -> None:
    if not sys.stdin.isatty():
        raise ConfigurationError("there is no terminal to ask on.", "Say --yes to replay, or --dry-run to look.")
    if not typer.confirm(f"Replay {count} messages?", err=True):
        raise Stopped(4)


def _line(error_type: str, message: str) -> str:
    first = message.strip().splitlines()[0] if message.strip() else ""
    text = f"{error_type}: {first}" if first else error_type
    return text if len(text) <= 100 else f"{text[:99]}…"
