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


async def kills(play: Show, name: str, chance: random.Random) -> None:
    """Kill a service again and again, each time a moment after it has become ready."""
    while True:
        await until(partial(play.platform.is_ready, name), within=30)
        await asyncio.sleep(chance.uniform(0.3, 1.5))
        play.platform.kill(name)


async def traffic(play: Show) -> None:
    """Every other enrollment is one that the release with the defect chokes on, so it goes through all rungs."""
    while True:
        await play.driver.enroll(8, every=0.1, coupons=("", "SPRING5"))


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
        tasks = [
            asyncio.create_task(work) for work in (traffic(play), *(kills(play, name, chance) for name in VICTIMS))
        ]
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await play.platform.roll_out("payment-service", LEARNING_HUB_RELEASE="1.1.1")
        await play.platform.until_ready()
        # Long enough for the longest way through the rungs; what is not there by then will not come. Dead letters are not
        # lost, so they are sent back.
        now = await play.settled(within=20)
        if await play.dead_letters():
            await replay_everything(play)
            now = await play.settled(within=10)
        told = play.driver.told
        result = {
            "enrollments_accepted": len(told.enrollments),
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
