"""The dependency: a process that knows nothing of meshkit, answers as it is told, and counts what reaches it.

    python -m proofs.storm.leaf --fd N --mode MODE --seed N

`/` is what services ask. `PUT /mode/MODE` tells it how to answer from now on: `ok`, `down` (503 at once), `hang` (accepts, and says
nothing) or `flaky` (503 for a tenth of all calls, by chance). `/seen` is how many calls have reached it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from typing import Any

from proofs.storm.process import serve

MODES = ("ok", "down", "hang", "flaky")
FAILING = 0.1


class Leaf:
    """The app, without a framework: the wrong way of retrying sends it thousands of calls a second."""

    def __init__(self, mode: str, seed: int) -> None:
        self.mode = mode
        self.seen = 0
        self._chance = random.Random(seed)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path: str = scope["path"]
        if path == "/seen":
            await _answer(send, 200, str(self.seen))
        elif scope["method"] == "PUT" and path.removeprefix("/mode/") in MODES:
            self.mode = path.removeprefix("/mode/")
            await _answer(send, 200, self.mode)
        else:
            self.seen += 1
            await self._ask(receive, send)

    async def _ask(self, receive: Any, send: Any) -> None:
        if self.mode == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        failing = self.mode == "down" or (self.mode == "flaky" and self._chance.random() < FAILING)
        await (_answer(send, 503, "down") if failing else _answer(send, 200, "fine"))


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    asyncio.run(serve(Leaf(options.mode, options.seed), options.fd))


if __name__ == "__main__":
    main()
