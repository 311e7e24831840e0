"""`meshkit …` as a person or a script runs it: a process of its own, on each broker."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from meshkit.embedded import AmqpServer
from meshkit.messaging import headers as h
from meshkit.rabbitmq.topology import dead_letter_arguments, queue_arguments
from meshkit.testing import servers

QUEUE = "course-service.user-created"
DLQ = f"{QUEUE}.dlq"


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: str
    err: str


async def start(*words: str, **environment: str) -> asyncio.subprocess.Process:
    """The installed command, with nothing in its environment but what is given, and no terminal."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from meshkit.cli import main; main()", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


async def meshkit(*words: str, **environment: str) -> Ran:
    process = await start(*words, **environment)
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.real("rabbitmq"))])
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    if request.param == "embedded":
        async with AmqpServer() as server:
            yield server.url
    else:
        yield request.getfixturevalue("rabbitmq_url")


@pytest.fixture
async def channel(broker: str) -> AsyncIterator[AbstractChannel]:
    connection = await aio_pika.connect(broker)
    channel = await connection.channel(on_return_raises=True)
    await channel.declare_queue(QUEUE, durable=True, arguments=queue_arguments(QUEUE))
    await channel.declare_queue(DLQ, durable=True, arguments=dead_letter_arguments())
    yield channel
    await connection.close()


async def dead(channel: AbstractChannel, *ids: str, error: str = "no such course", replays: int = 0) -> None:
    for message_id in ids:
        headers = {
            h.QUEUE: QUEUE,
            h.EXCHANGE: "user-events",
            h.ROUTING_KEY: "user.created",
            h.REASON: "retries_exhausted",
            h.ERROR_TYPE: "ValueError",
            h.ERROR_MESSAGE: error,
            h.ERROR_STACK: f"Traceback…\nValueError: {error}",
            h.ERROR_FINGERPRINT: error.partition(" ")[0],
            h.REPLAY_COUNT: str(replays),
        }
        message = aio_pika.Message(b'{"who": "ana"}', message_id=message_id, headers=headers, delivery_mode=2)
        await channel.default_exchange.publish(message, DLQ)


async def depth(channel: AbstractChannel, queue: str) -> int:
    return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0


# -- dead letters -----------------------------------------------------------------------------------------------------


async def test_lists_by_cause(broker: str, channel: AbstractChannel):
    """`list` tells how many dead letters there are and from what causes, and ends with 3 where there are any."""
    assert 0 == (await meshkit("dlq", "list", QUEUE, "--url", broker)).code
    await dead(channel, "m1", "m2")
    await dead(channel, "m3", error="other")

    plain = await meshkit("dlq", "list", QUEUE, "--url", broker)
    machine = await meshkit("dlq", "list", DLQ, "--json", MESHKIT_AMQP_URL=broker)

    assert (3, 3, "", "") == (plain.code, machine.code, plain.err, machine.err)
    assert "ValueError: no such course" in plain.out
    (row,) = json.loads(machine.out)
    assert (DLQ, 3, [2, 1]) == (row["queue"], row["depth"], [group["count"] for group in row["groups"]])


async def test_shows_one_without_its_body(broker: str, channel: AbstractChannel):
    """`show` tells why one failed, and its body only when asked; what it brought along does not steer the terminal."""
    await dead(channel, "abc-1", error="\x1b[2Jgone")

    plain = await meshkit("dlq", "show", QUEUE, "abc", "--url", broker)
    with_body = await meshkit("dlq", "show", QUEUE, "--json", "--body", "--url", broker)

    assert (0, "") == (plain.code, plain.err)
    assert "message   abc-1" in plain.out
    assert "ana" not in plain.out
    assert "\x1b" not in plain.out
    assert '{"who": "ana"}' == json.loads(with_body.out)["body"]


async def test_replays_what_the_plan_says(broker: str, channel: AbstractChannel):
    """`replay` prints the plan, sends back, and says what it did; data on stdout, the rest on stderr."""
    await dead(channel, "m1", "m2")

    dry = await meshkit("dlq", "replay", QUEUE, "--dry-run", "--json", "--url", broker)
    assert (0, 2, []) == (dry.code, json.loads(dry.out)["planned"], json.loads(dry.out)["replayed"])
    done = await meshkit("dlq", "replay", QUEUE, "--yes", "--json", "--url", broker)

    assert (0, ["m1", "m2"], 0) == (done.code, json.loads(done.out)["replayed"], json.loads(done.out)["left"])
    assert "plan: 2 of 2 messages" in done.err
    assert (2, 0) == (await depth(channel, QUEUE), await depth(channel, DLQ))


async def test_does_not_replay_without_being_told(broker: str, channel: AbstractChannel):
    """Without a terminal to ask on, `replay` needs --yes, and nothing moves."""
    await dead(channel, "m1")

    ran = await meshkit("dlq", "replay", QUEUE, "--url", broker)

    assert (2, "") == (ran.code, ran.out)
    assert "Say --yes" in ran.err
    assert 0 == await depth(channel, QUEUE)


async def test_says_what_it_left(broker: str, channel: AbstractChannel):
    """A replay that the guard stopped ends with 4, one that could not send all back with 3."""
    await dead(channel, "m1", replays=3)
    guarded = await meshkit("dlq", "replay", QUEUE, "--yes", "--url", broker)
    await channel.queue_delete(QUEUE)
    await dead(channel, "m2")
    failed = await meshkit("dlq", "replay", QUEUE, "--yes", "--json", "--url", broker)

    assert (4, 3) == (guarded.code, failed.code)
    assert "1 left by the replay guard" in guarded.out
    assert ["m2"] == [one["message_id"] for one in json.loads(failed.out)["failed"]]


async def test_interrupted_says_how_far_it_came(broker: str, channel: AbstractChannel):
    """Ctrl-C in the middle of a replay ends it with 130, and each message is in exactly one of the two queues."""
    await dead(channel, *(f"m{n:03d}" for n in range(400)))

    process = await start("dlq", "replay", QUEUE, "--yes", "--url", broker)
    assert process.stderr is not None
    while b"100 replayed" not in await process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()

    assert 130 == process.returncode
    assert b"the others are where they were" in err
    assert b"Traceback" not in err
    for _ in range(500):
        both = await depth(channel, QUEUE) + await depth(channel, DLQ)
        if both == 400:
            break
        await asyncio.sleep(0.01)
    assert 400 == both
    assert 100 <= await depth(channel, QUEUE) < 400


@pytest.mark.real("rabbitmq")
async def test_finds_queues_by_the_management_api(rabbitmq_server: servers.RabbitMQ, rabbitmq_url: str):
    """With the management API's address `list` finds the dead-letter queues of a vhost by itself."""
    connection = await aio_pika.connect(rabbitmq_url)
    channel = await connection.channel()
    for queue in (QUEUE, "mail.sent"):
        await channel.declare_queue(f"{queue}.dlq", durable=True, arguments=dead_letter_arguments())
        await channel.declare_queue(queue, durable=True)
    await dead(channel, "m1")
    await connection.close()
    vhost = rabbitmq_url.rpartition("/")[2]
    address = f"http://guest:guest@127.0.0.1:{rabbitmq_server.management_port}/{vhost}"

    ran = await meshkit("dlq", "list", "--json", "--management", address, "--url", rabbitmq_url)
    refused = await meshkit(
        "dlq", "list", "--management", address.replace(":guest@", ":secret@"), "--url", rabbitmq_url
    )

    assert [(DLQ, 1), ("mail.sent.dlq", 0)] == [(row["queue"], row["depth"]) for row in json.loads(ran.out)]
    assert (2, 1) == (refused.code, refused.err.count("\n"))
    assert "secret" not in refused.err


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--nope",
        "frobnicate",
        "dlq list",
        "dlq replay",
        "dlq replay a --limit 0",
        "dlq replay a --id= --yes",
        "dlq list a --url nonsense",
        "dlq list a --url amqp://u:secret@h:port/",
        "dlq list a --url amqp://u:secret@127.0.0.1:1/",
        "dlq list a --url {wrong_password}",
        "dlq list a --url {wrong_vhost}",
        "dlq list a --url {broker}",
        "dlq show a --url {broker}",
        "dlq replay a --url {broker}",
        "dlq list --management http://u:secret@127.0.0.1:1",
        "dlq list --management file:///dev/null",
        "broker --host 0.0.0.0",
        "broker --port 70000",
        "broker --port {taken}",
        "export /dev/null/nothing",
    ],
)
async def test_bad_input_is_one_line(broker: str, words: str):
    """What a user can get wrong is said in one line without a traceback or a password, and ends with 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = words.format(
            broker=broker,
            wrong_password=broker.replace("guest:guest", "guest:secret"),
            wrong_vhost=broker.rpartition("/")[0] + "/no-such-vhost",
            taken=taken.getsockname()[1],
        )
        ran = await meshkit(*given.split())

    assert (2, "", 1) == (ran.code, ran.out, ran.err.count("\n")), ran.err
    assert ran.err.startswith("meshkit: ")
    assert "secret" not in ran.err
    assert "Traceback" not in ran.err


# -- the rest ---------------------------------------------------------------------------------------------------------


async def test_tells_its_version():
    """`--version` is one line."""
    ran = await meshkit("--version")

    assert (0, "") == (ran.code, ran.err)
    assert ran.out.startswith("meshkit ")


async def test_runs_a_broker_until_ctrl_c():
    """`broker` says where it listens, serves, and ends with 130 at Ctrl-C."""
    process = await start("broker", "--port", "0")
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    url = next(word for word in line.split() if word.startswith("amqp://"))
    connection = await aio_pika.connect(url)
    await connection.close()
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()

    assert (130, b"meshkit: interrupted\n") == (process.returncode, err)


async def test_exports_the_pack(tmp_path: Path):
    """`export` writes dashboards, rules and configurations into a folder."""
    ran = await meshkit("export", str(tmp_path / "out"))

    assert 0 == ran.code
    assert [] != list((tmp_path / "out").rglob("*.json"))
