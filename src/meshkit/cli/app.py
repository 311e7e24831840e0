"""What the `meshkit` command understands, and how it answers: data on stdout, everything else on stderr.

Exit codes: 0 done, 1 a defect of meshkit, 2 usage, settings or an unreachable server, 3 done in part or findings,
4 stopped by a guard, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshkit._version import __version__
from meshkit.cli.breaker import breaker as breaker_commands
from meshkit.cli.terminal import Stopped, run_to_end, say, show, show_json
from meshkit.errors import ConfigurationError, MeshkitError, TopologyError

if TYPE_CHECKING:
    from meshkit.rabbitmq.dead_letters import DeadLetterRecord, Found, Group, Receipt

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
app.add_typer(breaker_commands, name="breaker")


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. Never a traceback for what a user can cause."""
    try:
        code = app(arguments, standalone_mode=False)
    except Stopped as stopped:
        return stopped.code
    except ModuleNotFoundError as error:
        say(f"meshkit: {error.name} is not installed. Install meshkit-py again, with the extras that you use.")
        return 2
    except MeshkitError as error:
        say(f"meshkit: {error}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
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
    if code == 130:
        # Newer typers make Ctrl-C an exit code of their own.
        say("meshkit: interrupted")
    return code if isinstance(code, int) else 0


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

    run_to_end(serve())


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

Url = Annotated[str, typer.Option("--url", envvar="MESHKIT_AMQP_URL", help="The broker, with user and password.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Foreign = Annotated[
    bool, typer.Option("--foreign", help="Read a queue that meshkit did not declare; looking may cost deliveries.")
]
DEFAULT_URL = "amqp://localhost"


@dlq.command("list")
def dlq_list(
    queues: Annotated[
        list[str] | None, typer.Argument(help="Queues, with or without .dlq; found by --management where left out.")
    ] = None,
    url: Url = DEFAULT_URL,
    management: Annotated[
        str,
        typer.Option("--management", envvar="MESHKIT_MANAGEMENT_URL", help="http://user:password@host:15672"),
    ] = "",
    as_json: Json = False,
    foreign: Foreign = False,
) -> None:
    """Show dead-letter queues: how many dead letters, and from what causes. Exit code 3 where there are any."""
    from meshkit.rabbitmq import dead_letters as dl

    names = [_dead_letter_queue(name, foreign) for name in queues or ()]
    if not names and not management:
        raise ConfigurationError(
            "AMQP cannot list queues.", "Name them (meshkit dlq list QUEUE …), or give --management URL."
        )

    async def collect() -> list[tuple[Found, list[Group], str]]:
        rows: list[tuple[Found, list[Group], str]] = []
        async with dl.DeadLetters(url) as letters:
            found = await letters.depths(names or await asyncio.to_thread(dl.names_from_management, management))
            missing = sorted(set(names) - {row.queue for row in found})
            if missing:
                raise TopologyError(f"no such queue on this broker: {', '.join(missing)}.")
            for row in found:
                groups: list[Group] = []
                note = ""
                if row.depth:
                    try:
                        records, total = await letters.read(row.queue, foreign=foreign)
                    except TopologyError as error:
                        note = error.cause
                    else:
                        groups = dl.groups_of(records)
                        note = f"causes of the oldest {len(records)}" if total > len(records) else ""
                rows.append((row, groups, note))
        return rows

    rows = run_to_end(collect())
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
            show(f"{row.queue:<{width}}  {row.depth:>6}  {len(groups) if groups or not note else '?'}  {note}".rstrip())
            for group in groups:
                cause = group.reason if not group.error_type else _line(group.error_type, group.error_message)
                show(f"{'':<{width}}  {group.count:>6}  {group.fingerprint or '-':<16}  {cause}")
    if any(row.depth for row, _, _ in rows):
        raise Stopped(3)


@dlq.command("show")
def dlq_show(
    queue: Annotated[str, typer.Argument(help="The queue, with or without .dlq.")],
    message: Annotated[str, typer.Argument(help="Message id or its beginning; the oldest where left out.")] = "",
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    body: Annotated[bool, typer.Option("--body", help="Print the body too; it may hold personal data.")] = False,
    foreign: Foreign = False,
) -> None:
    """Show one dead letter: what failed, where, why, and in which trace."""
    from meshkit.rabbitmq import dead_letters as dl

    queue = _dead_letter_queue(queue, foreign)

    async def find() -> DeadLetterRecord:
        async with dl.DeadLetters(url) as letters:
            records, total = await letters.read(queue, limit=10_000 if message else 1, foreign=foreign)
        for record in records:
            if record.message_id.startswith(message):
                return record
        if not total:
            raise MeshkitError(f"{queue} is empty.", code="MK601")
        seen = f"the oldest {len(records)} of {total}" if total > len(records) else f"the {total}"
        raise MeshkitError(f"none of {seen} dead letters in {queue} has an id like {message!r}.", code="MK601")

    record = run_to_end(find())
    if as_json:
        show_json(record.as_json(body=body))
        return
    failed = f"at attempt {record.attempt}, first {record.first_failed_at or '?'}, last {record.last_failed_at or '?'}"
    replayed = f"replayed {record.replay_count} times" + (
        f", last by {record.replayed_by}" if record.replayed_by else ""
    )
    service = " ".join(filter(None, (record.service, record.version))) or "?"
    show(f"message   {record.message_id}   {record.type}   {len(record.body)} bytes   {record.content_type}")
    show(f"failed    {failed}   {replayed}")
    show(f"where     queue {record.queue or '?'}, {service} on {record.host or '?'}")
    show(f"from      exchange {record.exchange or '(default)'}, key {record.routing_key}")
    show(
        f"cause     {record.reason}   {record.fingerprint}   {_line(record.error_type, record.error_message)}".rstrip()
    )
    for line in record.stack.rstrip().splitlines():
        show(f"          {line}")
    show(f"trace     {record.trace_id or '(none)'}")
    if body:
        show(f"body      {'(no text)' if record.text is None else record.text}")


@dlq.command("replay")
def dlq_replay(
    queue: Annotated[str, typer.Argument(help="The queue, with or without .dlq.")],
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

    queue = _dead_letter_queue(queue, foreign)
    observed = telemetry.setup(service="meshkit-dlq")
    so_far: Receipt | None = None

    def progress(receipt: Receipt) -> None:
        nonlocal so_far
        so_far = receipt
        if len(receipt.replayed) % 100 == 0:
            say(f"  {len(receipt.replayed)} replayed")

    async def replay(*, plan: Receipt | None) -> Receipt:
        async with dl.DeadLetters(url) as letters:
            return await letters.replay(
                queue,
                ids=ids or None,
                fingerprint=group,
                limit=limit,
                # What has come since the plan was made is not part of it.
                newest=plan.depth if plan is not None else None,
                dry_run=plan is None,
                foreign=foreign,
                progress=progress,
            )

    # Two connections: nobody answers the broker's heartbeats while a person thinks about the plan.
    receipt = run_to_end(replay(plan=None))
    if ids and not receipt.planned:
        raise MeshkitError(f"no dead letter in {queue} has an id like {' or '.join(ids)}.", code="MK601")
    going = receipt.planned - len(receipt.guarded)
    say(f"plan: {going} of {receipt.depth} messages in {queue}, each back to the queue it failed in and no other")
    say("      a message leaves the dead-letter queue only when the broker has confirmed its copy")
    if receipt.guarded:
        say(f"      {len(receipt.guarded)} left alone: replayed {dl.MOST_REPLAYS} times already and back again")
    if going and not dry_run:
        if not yes:
            _confirm(going)
        try:
            receipt = run_to_end(replay(plan=receipt))
        except KeyboardInterrupt:
            say(f"  {len(so_far.replayed) if so_far is not None else 0} replayed; the others are where they were")
            raise
        finally:
            observed.shutdown()
    receipt.dry_run = dry_run  # where there was nothing to send back, the plan is all there is
    if as_json:
        failed = [{"message_id": message_id, "why": why} for message_id, why in receipt.failed]
        show_json({**dataclasses.asdict(receipt), "failed": failed})
    elif not dry_run:
        show(
            f"{len(receipt.replayed)} replayed, {len(receipt.failed)} failed, {len(receipt.guarded)} left by the replay "
            f"guard; {receipt.left} left in {queue}"
        )
        if receipt.trace_id:
            show(f"trace {receipt.trace_id}")
    for message_id, why in receipt.failed:
        say(f"  {message_id} stays: {why}")
    if receipt.stopped:
        say(f"meshkit: stopped: {receipt.stopped}")
    if receipt.failed or receipt.stopped:
        raise Stopped(3)
    if receipt.guarded:
        raise Stopped(4)


def _dead_letter_queue(name: str, foreign: bool) -> str:
    """People name the queue they know; a foreign one has its name and no other."""
    from meshkit.rabbitmq.topology import DEAD_LETTER_SUFFIX, dead_letter_queue

    return name if foreign or name.endswith(DEAD_LETTER_SUFFIX) else dead_letter_queue(name)


def _confirm(count: int) -> None:
    if not sys.stdin.isatty():
        raise ConfigurationError("there is no terminal to ask on.", "Say --yes to replay, or --dry-run to look.")
    if not typer.confirm(f"Replay {count} messages?", err=True):
        raise Stopped(4)


def _line(error_type: str, message: str) -> str:
    first = message.strip().splitlines()[0] if message.strip() else ""
    text = f"{error_type}: {first}" if error_type and first else error_type or first
    return text if len(text) <= 100 else f"{text[:99]}…"
