"""Every service of the demo is killed with SIGKILL at ten random moments, on a real RabbitMQ: nothing is lost, nothing takes effect twice.

    ./run proof kill [--kills 10] [--seed 1] [--broker local|embedded|URL]

The acts run while services die, and while people go on enrolling all the time: each act has its share of the kills, in an order and at
moments that chance chooses. Dead letters that the kills have cost are replayed, as an operator would. Then the books are held against each
other, as in the demo: what the driver was told over HTTP, the services' tables, the provider's lists of requests and charges.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from learning_hub.demo import books
from learning_hub.demo.broker import DEAD_LETTER_QUEUES, CannotStart
from learning_hub.demo.platform import MODULES, until
from learning_hub.demo.show import BREAKS_OFF, Show, broken_off, stage
from meshkit.rabbitmq.dead_letters import DeadLetters


async def kill(play: Show, victims: list[str], chance: random.Random, done: Counter[str]) -> None:
    """Kill these, one after the other, each at a moment that chance chooses, and count in `done` which were."""
    for name in victims:
        await asyncio.sleep(chance.uniform(0.05, 1.2))
        while True:
            # A process that is still starting holds nothing that a kill could lose.
            await until(partial(play.platform.is_ready, name), within=60)
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            if play.platform.kill(name):
                done[name] += 1
                break


async def trickle(play: Show) -> None:
    """Somebody enrolls all the time, whatever act it is."""
    await until(lambda: len(play.driver.told.users) >= 8, within=60)
    while True:
        await play.driver.enroll(4, every=0.4)


async def replay_everything(play: Show) -> int:
    """Send all dead letters back, whatever put them there; how many it were."""
    replayed = 0
    async with DeadLetters(play.amqp_url) as letters:
        for found in await letters.depths(DEAD_LETTER_QUEUES):
            if found.depth:
                replayed += len((await letters.replay(found.queue)).replayed)
    return replayed


async def run(broker: str, kills: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    async with stage(broker, tale=sys.stdout, seed=seed) as play:
        play.patience = 5.0
        victims = [name for name in play.platform.processes for _ in range(kills)]
        chance.shuffle(victims)
        killed: Counter[str] = Counter()
        acts = (play.normal_traffic, play.outage, play.defect, play.replay)
        people = asyncio.create_task(trickle(play))
        try:
            for number, act in enumerate(acts):
                try:
                    async with asyncio.TaskGroup() as both:
                        both.create_task(act())
                        both.create_task(kill(play, victims[number :: len(acts)], chance, killed))
                except ExceptionGroup as group:
                    raise group.exceptions[0] from None
            await play.all_ended()
        finally:
            people.cancel()
            (ended,) = await asyncio.gather(people, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended
        await play.platform.until_ready()
        now = await play.settled(within=10)
        replayed = 0
        for _ in range(3):
            if not await play.dead_letters():
                break
            replayed += await replay_everything(play)
            now = await play.settled(within=10)
        told = play.driver.told
        missing, twice = books.lost(told, now), books.doubled(told, now)
        for id_, what in [*missing.items(), *twice.items()][:20]:
            play.say(f"WRONG: {id_}: {', '.join(what)}")
        states = list(now.states.values())
        return {
            "proof": "kill",
            "broker": play.broker,
            "seed": seed,
            "kills_planned": len(victims),
            "kills": dict(sorted(killed.items())),
            "enrollments_accepted": len(told.enrollments),
            "enrollments_completed": states.count("completed"),
            "enrollments_compensated": states.count("compensated"),
            "lost": len(missing),
            "double_effects": len(twice),
            # Messages that came again after a kill and were known: without the inbox, so many double effects at least.
            "duplicates_skipped": int(sum(process["duplicates"] for process in play.counted.values())),
            # The same at the provider: it was asked again under a key it knew, and must have charged once.
            "requests_repeated": now.repeated,
            "dead_letters_replayed": play.replayed + replayed,
            "left_in_dlq": await play.dead_letters(),
        }


def shown(summary: dict[str, Any], kills: int) -> bool:
    """Whether this proves it: every service was killed as often as asked for, and the books agree."""
    wrong = summary["lost"] + summary["double_effects"] + summary["left_in_dlq"]
    return bool(kills >= 1 and summary["kills"] == dict.fromkeys(MODULES, kills) and not wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="how often each service is killed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broker", default="local")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills is 1 or more: without a kill there is nothing to prove")
    try:
        summary = asyncio.run(run(options.broker, options.kills, options.seed))
    except CannotStart as error:
        print(f"kill: {error}", file=sys.stderr)
        return 2
    except BREAKS_OFF as error:
        print(f"kill: {broken_off(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(summary))
    return 0 if shown(summary, options.kills) else 1


if __name__ == "__main__":
    sys.exit(main())
