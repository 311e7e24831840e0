import asyncio

import pytest

from meshkit.core.lifecycle import Check, Lifecycle
from meshkit.testing.clock import ManualClock


class Noted:
    """A part that notes what is done with it, and does of it what a test gives."""

    def __init__(self, name, notes, **does):
        self.name, self.notes, self.does = name, notes, does

    def checks(self):
        return [Check(name=self.name, ok=True)]

    async def _do(self, what):
        self.notes.append(f"{what} {self.name}")
        if what in self.does:
            await self.does[what]()
            self.notes.append(f"{what} {self.name} is over")

    async def start(self):
        await self._do("start")

    async def drain(self, grace):
        await self._do("drain")

    async def close(self):
        await self._do("close")


class Connected(Noted):
    async def connect(self):
        await self._do("connect")


async def fails():
    raise OSError("no")


async def hangs():
    await asyncio.Event().wait()


def lifecycle(*parts, clock=None):
    made = Lifecycle(clock=ManualClock() if clock is None else clock)
    made.add(*parts)
    return made


async def test_a_start_that_fails_half_way_closes_what_runs():
    """The part that failed and those before it are closed, in reverse; those after it were never started."""
    notes = []
    life = lifecycle(Noted("bus", notes), Noted("relay", notes, start=fails), Noted("later", notes))
    with pytest.raises(OSError, match="no"):
        await life.start()
    assert ["start bus", "start relay", "close relay", "close bus"] == notes
    assert "stopped" == life.state


async def test_two_stops_at_the_same_time_are_one():
    """Each part is drained and closed once, in order, the last flush runs once, and both stops end after it."""
    notes = []

    async def slowly():
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    life = lifecycle(Noted("bus", notes), Noted("relay", notes, close=slowly))
    life.at_last(lambda: notes.append("flush"))
    await life.start()
    notes.clear()
    await asyncio.gather(life.stop(), life.stop())
    assert ["drain bus", "drain relay", "close relay", "close relay is over", "close bus", "flush"] == notes


async def test_a_stop_during_the_start_leaves_nothing_running():
    """Parts that have not started by then never do, and those that have are closed."""
    notes, going = [], asyncio.Event()
    life = lifecycle(Noted("bus", notes, start=going.wait), Noted("relay", notes))
    starting = asyncio.create_task(life.start())
    await asyncio.sleep(0)
    stopping = asyncio.create_task(life.stop())
    await asyncio.sleep(0)
    assert not life.ready
    going.set()
    await asyncio.gather(starting, stopping)
    assert ["start bus", "start bus is over", "drain bus", "close bus"] == notes
    assert "stopped" == life.state


async def test_who_is_told_to_drain_between_the_two_steps_of_a_start_takes_no_work():
    """A part that is connected and not started yet stays so."""
    notes = []
    life = lifecycle(Connected("bus", notes))
    await life.open()
    await life.drain()
    await life.begin()
    assert ["connect bus", "drain bus"] == notes
    assert not life.ready
    await life.close()


async def test_parts_added_while_it_runs_are_started_beside_the_others():
    """A second start runs what is new, starts nothing twice, and readiness does not go red meanwhile."""
    notes = []
    life = lifecycle(Connected("bus", notes))
    await life.start()
    life.add(Noted("relay", notes))
    await life.open()
    assert life.ready
    await life.begin()
    assert ["connect bus", "start bus", "start relay"] == notes
    await life.stop()


@pytest.mark.parametrize("what", ["drain", "close"])
async def test_a_part_that_fails_to_stop_keeps_no_other_from_it(what, caplog):
    """Its error is in the log, and all parts close."""
    notes = []
    life = lifecycle(Noted("bus", notes), Noted("relay", notes, **{what: fails}))
    await life.start()
    await life.stop()
    assert ["close relay", "close bus"] == notes[-2:]
    assert f"relay failed to {what}" in caplog.text


@pytest.mark.parametrize("what", ["drain", "close"])
@pytest.mark.parametrize("stubborn", [False, True], ids=["heeds cancellation", "swallows it"])
async def test_a_part_that_hangs_is_left_behind(what, stubborn, caplog):
    """After its time it is cancelled, and where it does not heed that, it is given up on."""
    clock, notes, release = ManualClock(hold=True), [], asyncio.Event()

    async def holds():
        try:
            await release.wait()
        except asyncio.CancelledError:
            if not stubborn:
                raise
            await release.wait()

    life = lifecycle(Noted("bus", notes), Noted("relay", notes, **{what: holds}), clock=clock)
    await life.start()
    stopping = asyncio.create_task(life.stop(grace=5.0))
    for _ in range(40):
        await clock.advance(0.5)
    await stopping
    assert ["close relay", "close bus"] == [note for note in notes if note.startswith("close") and "over" not in note]
    assert f"to {what}" in caplog.text
    release.set()
    await asyncio.sleep(0)


async def test_closing_ends_a_drain_that_is_under_way():
    """Who closes does not wait for the grace: what drains is cancelled first, then parts close."""
    notes = []
    life = lifecycle(Noted("bus", notes, drain=hangs))
    await life.start()
    draining = asyncio.create_task(life.drain())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await life.close()
    assert ["start bus", "drain bus", "close bus"] == notes
    with pytest.raises(asyncio.CancelledError):
        await draining


async def test_what_has_stopped_can_start_again():
    """Stop and start give a process that is ready."""
    notes = []
    life = lifecycle(Connected("bus", notes))
    for _ in range(2):
        await life.start()
        assert life.ready
        await life.stop()
    assert ["connect bus", "start bus", "drain bus", "close bus"] * 2 == notes
