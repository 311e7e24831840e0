"""The books can tell: a service that acks before it publishes loses enrollments under kills, one without an inbox doubles them.

    ./run proof unsafe [--seed 1] [--seconds 25] [--broker local|embedded|URL]

Three runs of the learning hub under kills, with a release of payment-service that many messages have to be tried again for: one as it is,
one in which a mistake has been planted into the order of ack and publish, one in which the inbox does not look (`_planted.py`). The first must come out clean,
and each of the others must be found out by the books that the demo and the kill proof rely on.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from learning_hub.demo import books
from learning_hub.demo.broker import CannotStart
from learning_hub.demo.platform import until
from learning_hub.demo.show import Show, stage
from proofs.kill import replay_everything

_PLANTED = Path(__file__).with_name("_planted.py")
VICTIMS = ("payment-service", "notification-content-worker")
LEAST_KILLS = 6


async def kills(play: Show, name: str, chance: random.Random, done: Counter[str]) -> None:
    """Kill a service again and again, each time a moment after it has become ready."""
    while True:
        await until(partial(play.platform.is_ready, name), within=30)
        await asyncio.sleep(chance.uniform(0.3, 1.5))
        done[name] += play.platform.kill(name)


async def traffic(play: Show) -> None:
    """Every other enrollment is one that the release with the defect chokes on, so it goes through all rungs."""
    while True:
        await play.driver.enroll(8, every=0.1, coupons=("", "SPRING5"))


async def still(play: Show) -> bool:
    """Whether all is settled, or nothing has happened for longer than the longest wait in a rung: what is not there by
    then will not come."""
    before = await books.read(play.platform, play.driver.told)
    now = await play.settled(within=8)
    return not books.lost(play.driver.told, now) or before == now


async def run(mistake: str, broker: str, seconds: float, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    print(f"\n--- {mistake}", flush=True)
    async with stage(
        broker,
        tale=sys.stdout,
        seed=seed,
        command=lambda module: (
            [sys.executable, str(_PLANTED), mistake, module]
            if module.endswith(("payment_service", "worker"))
            else [sys.executable, "-m", module]
        ),
    ) as play:
        await play.driver.create(8)
        await play.platform.roll_out("payment-service", LEARNING_HUB_RELEASE="1.1.0")
        done: Counter[str] = Counter()
        tasks = [asyncio.create_task(traffic(play))]
        tasks += [asyncio.create_task(kills(play, name, chance, done)) for name in VICTIMS]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            # On a slow machine a service takes longer to come back, and so few kills would show nothing.
            await until(lambda: all(done[name] >= LEAST_KILLS for name in VICTIMS), within=2 * seconds)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await play.platform.roll_out("payment-service", LEARNING_HUB_RELEASE="1.1.1")
        await play.platform.until_ready()
        await until(lambda: still(play), within=120, every=0.0)
        if await play.dead_letters():
            # They are not lost: an operator sends them back.
            await replay_everything(play)
            await until(lambda: still(play), within=120, every=0.0)
        now = await books.read(play.platform, play.driver.told)
        told = play.driver.told
        result = {
            "enrollments_accepted": len(told.enrollments),
            "kills": done.total(),
            "lost": len(books.lost(told, now)),
            "double_effects": len(books.doubled(told, now)),
        }
    print(json.dumps(result), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=25.0, help="how long services are killed in each run")
    parser.add_argument("--broker", default="local")
    options = parser.parse_args()
    try:
        runs = {
            mistake: asyncio.run(run(mistake, options.broker, options.seconds, options.seed))
            for mistake in ("none", "ack-first", "no-inbox")
        }
    except CannotStart as error:
        print(f"unsafe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    shown = (
        runs["none"]["lost"] == runs["none"]["double_effects"] == 0
        and runs["ack-first"]["lost"] > 0
        and runs["no-inbox"]["double_effects"] > 0
    )
    print(json.dumps({"proof": "unsafe", "seed": options.seed, "seconds": options.seconds, "runs": runs}))
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
