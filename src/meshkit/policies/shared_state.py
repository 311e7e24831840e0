"""Let others see the circuit breakers of this process, and let an operator switch them in a whole fleet at once.

Each process decides by itself, always. What it knows is written to a store in the background, where dashboards and
services on stock pybreaker read it; and one thing is read there: whether an operator has forced a breaker open. A store
that is down, slow or empty therefore changes no call: what was switched stays switched, everything else is decided as
without a store.

       every process                            the store                               operator
    its breakers' states ──── written ──▶  <breaker>         four values of pybreaker
    isolate, force open ◀──── read ──────  <breaker>:switch  one value of ours  ◀── meshkit breaker force-open

What others write into `<breaker>` is never read: one bad node would shut off all. And nobody but an operator writes into
`<breaker>:switch`, so that a process that says "closed" cannot undo a switch.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import inspect
import json
import logging
import math
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypeVar, cast
from weakref import WeakKeyDictionary

from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.core.lifecycle import Check
from meshkit.errors import ConfigurationError, MeshkitError
from meshkit.policies.circuit_breaker import CircuitBreaker, breakers, watch
from meshkit.policies.keyed import CircuitBreakers, families

T = TypeVar("T")
_log = logging.getLogger("meshkit")

SWITCH: Final = ":switch"
# A store that has not answered for so long counts as away. Nobody waits for it meanwhile.
_PATIENCE: Final = 5.0
# A start waits so long for the first word of the store: a process should not call what was switched off before it came.
_FIRST_WORD: Final = 1.0
# After so many errors one after the other the store is left alone until the next round.
_ENOUGH: Final = 3
# So often a storage whose keys expire is told that they are in use.
_TOUCH_EVERY: Final = 60.0
# pybreaker's storages can only count upwards, one step a round trip.
_MOST_STEPS: Final = 100
# A switch that ends sooner than this is not asserted again: the breaker is about to probe.
_NEARLY_OVER: Final = 1.0
# So many breakers are asked in one go.
_AT_ONCE: Final = 50
# What a storage has, at the least.
_ASKED: Final = ("state", "counter", "increment_counter", "reset_counter", "opened_at")
# What pybreaker's storages say where nothing, or nothing of ours, was written.
_STOCK: Final = {"closed", "open", "half-open"}


class Storage(Protocol):
    """What is used of a `pybreaker.CircuitBreakerStorage`. Its calls may block: they are made in a thread."""

    @property
    def state(self) -> str: ...

    @state.setter
    def state(self, state: str, /) -> None: ...

    @property
    def counter(self) -> int: ...

    def increment_counter(self) -> None: ...

    def reset_counter(self) -> None: ...

    @property
    def opened_at(self) -> datetime | None: ...

    @opened_at.setter
    def opened_at(self, when: datetime, /) -> None: ...


StorageOf = Callable[[str], "Storage | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """An operator's word on one breaker. The store holds one at a time, and what it holds is what is meant.

    Attributes:
        on: whether calls are to be rejected. A word that takes this back is written too, and not only erased: a store
            that has lost its keys must not be taken for an operator.
        until: when it ends by itself, seconds since the epoch; `None` for never.
        at: when it was said, seconds since the epoch.
        version: differs from that of any other word, so that a process notices one that was changed between two looks.
        reason: for whoever asks why.
        by: who has said it.
    """

    on: bool
    until: float | None = None
    at: float
    version: str
    reason: str = ""
    by: str = ""

    def left(self, now: float) -> float:
        """Seconds from `now` (since the epoch) for which calls are rejected; 0 where they are not."""
        if not self.on:
            return 0.0
        return math.inf if self.until is None else max(0.0, self.until - now)

    def text(self) -> str:
        """As it stands in the store."""
        said = {"switch": "open" if self.on else "released", "until": self.until, "at": self.at}
        return json.dumps({**said, "version": self.version, "reason": self.reason, "by": self.by})

    @classmethod
    def parse(cls, text: str) -> Switch | None:
        """What the store says; `None` where no operator has said anything.

        Raises:
            ValueError: the text is no switch.
        """
        if text in _STOCK:
            return None
        try:
            said = json.loads(text)
            until, word = said["until"], said["switch"]
            if word not in ("open", "released"):
                raise ValueError(word)
            end, at = None if until is None else float(until), float(said["at"])
            if not math.isfinite(at) or (end is not None and not math.isfinite(end)):
                # No time, and no JSON either, though Python reads it.
                raise ValueError(until)
            return cls(
                on=word == "open",
                until=end,
                at=at,
                version=str(said["version"]),
                reason=str(said.get("reason", "")),
                by=str(said.get("by", "")),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{text!r:.100} is no switch") from error


_StockState = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One breaker as a stock pybreaker would show it; `ago` is how long it has been open."""

    state: _StockState
    failures: int
    ago: float


@dataclass(frozen=True, slots=True)
class _View:
    """What others are to see of the breakers of one name."""

    state: _StockState
    failures: int
    opened_at: int | None


@dataclass(slots=True)
class _Line:
    """The two storages of one name, and what was written last."""

    mirror: Storage | None
    switch: Storage | None
    written: _View | None = None
    touched: float = -math.inf


@dataclass(frozen=True, slots=True)
class _Heard:
    """What one exchange with the store brought: words by breaker name, what went wrong, and whether all names were asked
    about."""

    words: dict[str, Switch | None]
    problem: str
    whole: bool


@dataclass(frozen=True, slots=True)
class _Held:
    """What a breaker was told because of a switch, and whether it was disabled before."""

    version: str
    disabled: bool = False


Target = CircuitBreaker | CircuitBreakers


class SharedState:
    """Mirror the circuit breakers of this process into a store, and follow the operator's switches there.

    Every `every` seconds a thread writes what has changed and reads the switches: no call waits for the store, and no
    call asks it. All breakers that are alive are looked after, those of per-key breakers under their common name.

        shared = SharedState(lambda name: CircuitRedisStorage("closed", client, namespace=f"shop:{name}"))
        shared = SharedState(meshkit.redis.BreakerStore("redis://…", prefix="shop"))
        meshkit.worker.run(bus, shared, service="orders")

    **Outwards** goes, as pybreaker has it: the state, the failures in the window, and when it opened, rounded up to the
    whole second that pybreaker's Redis storage keeps. Only changes are written; the last writer stands there. Several
    breakers of one name are open there only if all are. One in shadow mode, which rejects nothing, is closed there. For
    as long as a breaker rejects, the time of its opening is renewed, so that a stock pybreaker that shares the keys
    stays open too, if its `reset_timeout` is above `every`.

    **Inwards** comes a switch: forced open for a time, after which the breaker probes as usual, or until it is taken
    back, which closes it. It is a level and not an event: whoever starts later finds it, and a breaker that somebody
    resets by hand is switched again. A breaker that was isolated by hand stays so when a switch is taken back, and
    one that was disabled is disabled again. The end of a switch is read from this machine's clock.

    **A breaker that is made later**, while this runs, has the switch before its first call where its name is known: there
    was a breaker of this name before. For a name that is new the store is asked at once, and not only after `every`
    seconds; calls that are made before it has answered are decided without it.

    **Without the store** a process decides locally. A switch stays as last known: one with an end until its end, which
    needs no store; one without until the store says that it was taken back, or the process ends. Nothing but an
    operator's word takes it back: a store that comes back empty says nothing. One warning when the store goes, and one
    line when it is back.

    Args:
        storage: given the name of a breaker, or that and `":switch"`, returns a pybreaker storage with keys of its own,
            or `None` where that one is not shared; or a mapping from such names. It is asked in the thread.
        every: seconds between two exchanges; each is up to a tenth sooner or later, so that a fleet does not come at
            once.
        name: what health answers and logs call it.
        clock: where the time comes from.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    def __init__(
        self,
        storage: StorageOf | Mapping[str, Any],
        *,
        every: float = 5.0,
        name: str = "shared breaker state",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        _check_storage(storage)
        if not _is_length(every):
            raise ConfigurationError(f"every is how many seconds lie between two exchanges, so above 0, not {every!r}.")
        check_clock(clock)
        self.name = name
        self.every = every
        self._storage: StorageOf = storage.get if isinstance(storage, Mapping) else storage
        self._clock = clock
        # Touched by one thread at a time: that of the exchange. A run that is over leaves its own behind.
        self._lines: dict[str, _Line] = {}
        self._read_next = self._write_next = ""
        self._alive_at = 0.0
        self._exchanging: asyncio.Task[_Heard] | None = None
        self._task: asyncio.Task[None] | None = None
        self._away_since: float | None = None
        self._problem = "it has not been asked yet"
        # The two that the thread which makes a breaker reads and writes too, each in one step.
        self._held: WeakKeyDictionary[Target, _Held] = WeakKeyDictionary()
        # What stands, as last known: for what is alive, and where it is on, for what may be made again.
        self._words: dict[str, Switch] = {}
        self._switched = False
        # The names that were asked about, and those to be asked about before the next round.
        self._known: set[str] = set()
        self._unread: set[str] = set()
        self._news: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"SharedState({self.name!r}, every={self.every:g})"

    # -- as a part of the process -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to exchange, having waited a second at most for the store's first word. Cancelled, it leaves nothing."""
        if self._task is not None:
            return
        first = asyncio.get_running_loop().create_future()
        self._news = asyncio.get_running_loop().create_future()
        watch(self)
        running = self._task = asyncio.create_task(self._run(first), name=self.name)
        try:
            await _within(first, _FIRST_WORD, self._clock)
        except BaseException:
            # Nobody closes what has not started: after a failed `__aenter__` there is no `__aexit__`.
            if self._task is running:
                await self.close()
            raise

    def checks(self) -> Sequence[Check]:
        # Not required: a service whose store is away serves as well as without one.
        return [Check(name=self.name, ok=not self._problem, detail=self._problem, required=False)]

    async def drain(self, grace: float) -> None:
        """Nothing to give back; calls go on until `close`, and switches hold for them."""

    async def close(self) -> None:
        """Stop. What the breakers were told stays as it is."""
        running: list[asyncio.Task[Any]] = [task for task in (self._task, self._exchanging) if task is not None]
        self._task = self._exchanging = self._news = None
        # A thread that still hangs in there keeps what it has.
        self._lines = {}
        self._known, self._unread = set(), set()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, first: asyncio.Future[None]) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                _log.exception("%s: an exchange has failed; the next one follows", self.name)
            if not first.done():
                first.set_result(None)
            await self._rest()

    async def _rest(self) -> None:
        """Wait for the next round. What is new meanwhile is asked about at once."""
        until = self._clock.now() + self.every * (0.9 + 0.2 * self._clock.random())
        while (left := until - self._clock.now()) > 0 and self._news is not None:
            if not await _within(self._news, left, self._clock):
                return
            self._news = asyncio.get_running_loop().create_future()
            # Somebody may have begun a round by hand, which does not know of it.
            while self._unread and await self._once(whole=False):
                pass

    # -- as one who watches what is made ------------------------------------------------------------------------------

    def made(self, breaker: Target, /) -> None:
        """Do with a new breaker what the last word on its name says. Called in the thread that makes it, which may be any."""
        news = self._news
        if news is None:
            return
        word: Switch | None = None
        # Once more where another word has come meanwhile: whoever brought it may not have seen this breaker.
        while (latest := self._words.get(breaker.name)) is not None and latest != word:
            word = latest
            try:
                self._obey(breaker, word)
            except Exception:
                _log.exception(
                    "%s: circuit %r could not be switched; the next round tries again", self.name, breaker.name
                )
        if breaker.name not in self._known:
            with contextlib.suppress(RuntimeError):
                # Else its loop has closed.
                news.get_loop().call_soon_threadsafe(self._wanted, breaker.name)

    def _wanted(self, name: str) -> None:
        if self._news is None or name in self._known:
            return
        self._unread.add(name)
        if not self._news.done():
            self._news.set_result(None)

    # -- by hand ------------------------------------------------------------------------------------------------------

    async def refresh(self) -> bool:
        """Exchange with the store now.

        Returns:
            whether the store answered, and within five seconds. One that has not is not asked again until it does.
        """
        answered = await self._once()
        if answered and self._switched:
            # Others are to see at once what has just been switched here.
            answered = await self._once()
        return answered

    async def _once(self, *, whole: bool = True) -> bool:
        self._switched = False
        exchange = self._exchanging
        if exchange is None:
            self._alive_at = self._clock.now()
            only, self._unread = None if whole else self._unread, set()
            work = self._round(self._lines, only)
            exchange = self._exchanging = asyncio.create_task(work, name=f"{self.name}: exchange")
            exchange.add_done_callback(self._exchanged)
        while not await _within(exchange, _PATIENCE, self._clock):
            if self._clock.now() - self._alive_at < _PATIENCE:
                # Many breakers and a long way to the store: slow, but it answers.
                continue
            if exchange is self._exchanging:
                self._noted(f"no answer for {_PATIENCE:g} s")
            return False
        return not self._problem and not exchange.cancelled()

    async def force_open(self, breaker: str, *, seconds: float | None = None, reason: str = "", by: str = "") -> Switch:
        """Switch a breaker in every process that follows this store: reject its calls for `seconds`, then probe as
        usual; until `release` where left out.

        Returns:
            the word that stands in the store: this one, or that of somebody who was faster.

        Raises:
            ConfigurationError: `seconds` is no length of time, or this breaker has no switch.
            MeshkitError: the store does not answer, or does not keep what it is given.
        """
        if seconds is not None and not _is_length(seconds):
            raise ConfigurationError(f"seconds is how long calls are rejected, so above 0, not {seconds!r}.")
        until = None if seconds is None else self._clock.time() + seconds
        return await self._say(breaker, on=True, until=until, reason=reason, by=by)

    async def release(self, breaker: str, *, reason: str = "", by: str = "") -> Switch:
        """Take a switch back: the breakers of that name close, in every process. Said also where no switch is known, for
        a process that still holds one which the store has lost.

        Raises:
            as `force_open`.
        """
        return await self._say(breaker, on=False, until=None, reason=reason, by=by)

    async def switch(self, breaker: str) -> Switch | None:
        """What the store says of one breaker; `None` where no operator has said anything.

        Raises:
            as `force_open`.
        """
        return await self._asked(functools.partial(self._read, breaker))

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _exchange(self, lines: dict[str, _Line], views: dict[str, _View], whole: bool) -> _Heard:
        now, today = self._clock.now(), self._clock.time()
        words: dict[str, Switch | None] = {}
        if whole:
            for gone in lines.keys() - views.keys():
                del lines[gone]

        def read(name: str) -> None:
            line = lines.get(name)
            if line is None:
                line = lines[name] = _Line(self._storage(name), self._storage(name + SWITCH))
            words[name] = _read_switch(line)

        def write(name: str) -> None:
            word, view = words[name], views[name]
            if word is not None and word.left(today) > 0:
                # It is about to be: nobody is to read "closed" in between.
                view = _View("open", view.failures, _second_after(today))
            line = lines[name]
            written, line.written = line.written, None
            line.written = _written(line.mirror, written, view)
            _touch(line, now)

        # All is read before anything is written: a store that takes no more must not hide an operator's word.
        unread, self._read_next = self._each(sorted(views), self._read_next, read)
        unwritten, self._write_next = self._each(sorted(words), self._write_next, write)
        return _Heard(words, unread or unwritten, whole)

    def _each(self, names: list[str], first: str, act: Callable[[str], None]) -> tuple[str, str]:
        """Act on each name, from `first` on; what went wrong, and where to begin the next time: no broken key keeps the
        others from being reached."""
        at = bisect.bisect_left(names, first)
        problem, in_a_row = "", 0
        for name in (*names[at:], *names[:at]):
            try:
                act(name)
                in_a_row = 0
            except BaseException as error:
                # Of whatever kind: nobody cancels or ends this thread, so it is the storage that has failed.
                problem = problem or f"{type(error).__name__}: {error}"
                in_a_row += 1
                if in_a_row == _ENOUGH:
                    return problem, name + "\0"
            self._alive_at = self._clock.now()
        return problem, ""

    def _read(self, breaker: str) -> Switch | None:
        return Switch.parse(self._switch_of(breaker).state)

    def _write(self, breaker: str, word: Switch) -> Switch:
        switch, mirror = self._switch_of(breaker), self._storage(breaker)
        try:
            before = Switch.parse(switch.state)
        except ValueError:
            before = None
        switch.state = word.text()
        # pybreaker's Redis storage keeps its errors to itself.
        kept = Switch.parse(switch.state)
        if kept is None:
            raise _NotKept
        if mirror is not None and kept == word:
            # For stock pybreakers, at once. Ours write it anew when they have heard.
            if word.on:
                mirror.opened_at = _whole_second(word.at)
                mirror.state = "open"
            elif before is not None and before.on:
                mirror.state = "closed"
        return kept

    def _switch_of(self, breaker: str) -> Storage:
        switch = self._storage(breaker + SWITCH)
        if switch is None:
            raise ConfigurationError(f"there is no storage {breaker + SWITCH!r}, so {breaker!r} cannot be switched.")
        return switch

    # -- in the event loop --------------------------------------------------------------------------------------------

    async def _round(self, lines: dict[str, _Line], only: set[str] | None) -> _Heard:
        views = await self._views(only)
        # No breaker is held here while the store is waited for.
        return await _in_thread(functools.partial(self._exchange, lines, views, only is None), self.name)

    async def _views(self, only: set[str] | None) -> dict[str, _View]:
        # Breakers are asked here and not in the thread: one that was moved by hand tells its listeners when it is asked.
        seen: dict[str, list[_Seen]] = {}
        for family in families():
            if only is None or family.name in only:
                seen[family.name] = []
        for number, breaker in enumerate(breakers()):
            if only is None or breaker.name in only:
                seen.setdefault(breaker.name, []).append(_look(breaker))
            if number % _AT_ONCE == _AT_ONCE - 1:
                # There may be thousands, and calls go on meanwhile.
                await asyncio.sleep(0)
        now = self._clock.time()
        return {name: _view(each, now) for name, each in seen.items()}

    async def _say(self, breaker: str, *, on: bool, until: float | None, reason: str, by: str) -> Switch:
        at = self._clock.time()
        word = Switch(on=on, until=until, at=at, version=uuid.uuid4().hex, reason=reason, by=by)
        kept = await self._asked(functools.partial(self._write, breaker, word))
        if self._task is not None:
            self._heed({breaker: kept})
        return kept

    async def _asked(self, work: Callable[[], T]) -> T:
        answer = _in_thread(work, self.name)
        try:
            came = await _within(answer, _PATIENCE, self._clock)
        finally:
            # Does nothing to one that has come. Of any other nobody asks any more, be it late or the caller cancelled.
            answer.cancel()
        if not came:
            raise _unreachable(f"no answer for {_PATIENCE:g} s")
        try:
            return answer.result()
        except MeshkitError:
            raise
        except Exception as error:
            raise _unreachable(f"{type(error).__name__}: {error}") from error

    def _exchanged(self, exchange: asyncio.Task[_Heard]) -> None:
        error = None if exchange.cancelled() else exchange.exception()
        if exchange is not self._exchanging:
            # It was closed meanwhile.
            return
        self._exchanging = None
        if exchange.cancelled():
            # As a loop does with all that runs when it ends. It says nothing of the store.
            return
        if error is not None:
            self._noted(f"{type(error).__name__}: {error}")
            return
        heard = exchange.result()
        if heard.whole or heard.problem:
            # That a few names could be read says nothing of the others.
            self._noted(heard.problem)
        self._known.update(heard.words)
        self._heed({name: word for name, word in heard.words.items() if word is not None})
        if heard.whole:
            self._forget()

    def _noted(self, problem: str) -> None:
        now = self._clock.now()
        if problem and self._away_since is None:
            self._away_since = now
            _log.warning(
                "%s: the store does not answer as it should (%s); breakers decide locally, switches stay as last known",
                self.name,
                problem,
            )
        elif not problem and self._away_since is not None:
            _log.warning("%s: the store answers again, after %.0f s", self.name, now - self._away_since)
            self._away_since = None
        self._problem = problem

    def _heed(self, words: Mapping[str, Switch]) -> None:
        """Do what operators say. Done anew in each round, which costs nothing where nothing has changed."""
        new = {name for name, word in words.items() if (before := self._words.get(name)) is None or before != word}
        # Before the breakers are looked for: one that is made from now on is told by `made`.
        self._words.update(words)
        targets = _targets()
        now = self._clock.time()
        for name, word in words.items():
            left = word.left(now)
            said = False
            for target in targets.get(name, ()):
                if self._obey(target, word):
                    # One that is only switched again is no news.
                    said = name in new or left <= 0
            self._switched = self._switched or said
            if said and left > 0:
                until = "until it is released" if left == math.inf else f"for {left:.0f} s"
                _log.warning("circuit %r is forced open %s (%s)", name, until, _who(word))
            elif said:
                _log.warning("circuit %r is released (%s)", name, _who(word))

    def _forget(self) -> None:
        """Let go of what stands for names that nothing here has any more, but for switches that are on."""
        targets, now = _targets(), self._clock.time()
        self._known.intersection_update(targets)
        for name, word in list(self._words.items()):
            if name not in targets and word.left(now) <= 0:
                del self._words[name]

    def _obey(self, target: Target, word: Switch) -> bool:
        """Do with one breaker what an operator says. Returns whether there was anything to do."""
        left = word.left(self._clock.time())
        held = self._held.get(target)
        if left > 0:
            if held is None or held.version != word.version or (left > _NEARLY_OVER and not _rejects(target)):
                self._switch_on(target, word, left, held)
                return True
            return False
        if held is None:
            return False
        self._held.pop(target, None)
        if held.version != word.version:
            target.reset()
        # Else its time is over, and it probes by itself.
        if held.disabled:
            target.disable()
        return held.version != word.version

    def _switch_on(self, target: Target, word: Switch, left: float, held: _Held | None) -> None:
        disabled = held is not None and held.disabled
        if isinstance(target, CircuitBreaker) and held is None:
            before = target.state
            if before == "isolated":
                # By hand, or by the order that its siblings have: either rejects, and neither is for us to take back.
                return
            disabled = before == "disabled"
            if target.shadow:
                _log.warning("circuit %r is in shadow mode: forced open, it still rejects nothing", target.name)
        self._held[target] = _Held(word.version, disabled)
        if left == math.inf:
            target.isolate()
        else:
            target.force_open(left)


class _NotKept(Exception):
    """The store answered, and does not hold what it was given."""

    def __str__(self) -> str:
        return "it does not hold what it is given"


def _check_storage(storage: object) -> None:
    remedy = 'lambda name: CircuitRedisStorage("closed", client, namespace=f"shop:{name}")'
    if isinstance(storage, Mapping):
        if not storage:
            raise ConfigurationError("the mapping of storages is empty, so no breaker would be shared.", remedy)
        for name, one in cast("Mapping[object, object]", storage).items():
            # Looked up without asking it: a storage asks its store for its state.
            missing = [each for each in _ASKED if inspect.getattr_static(one, each, None) is None]
            if not isinstance(name, str) or missing:
                raise ConfigurationError(
                    f"a mapping of storages has a pybreaker storage for each name of a breaker, not {one!r} for {name!r}.",
                    remedy,
                )
    elif not callable(storage) or inspect.iscoroutinefunction(storage):
        raise ConfigurationError(
            f"storage is a function that makes the storage of each breaker from its name, not {storage!r}.", remedy
        )


def _is_length(seconds: object) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf


def _targets() -> dict[str, list[Target]]:
    """What is alive in this process, by name: per-key breakers before the breakers of their keys."""
    found: dict[str, list[Target]] = {}
    alive: list[Target] = [*families(), *breakers()]
    for target in alive:
        found.setdefault(target.name, []).append(target)
    return found


def _rejects(target: Target) -> bool:
    return target.ordered if isinstance(target, CircuitBreakers) else target.state in ("open", "isolated")


def _look(breaker: CircuitBreaker) -> _Seen:
    snapshot = breaker.snapshot()
    state: _StockState = "half-open" if snapshot.state == "half_open" else "open"
    if snapshot.shadow or snapshot.state in ("closed", "disabled"):
        state = "closed"
    # From what is left, because a stock pybreaker adds its own `reset_timeout`, which is our `open_for`. Never later
    # than now: pybreaker's Redis storage lets this time go forward only, and one to come would outlast a reset.
    ago = 0.0 if snapshot.retry_after is None else max(0.0, breaker.open_for - snapshot.retry_after)
    return _Seen(state, snapshot.failures, ago)


def _view(seen: list[_Seen], now: float) -> _View:
    states = {each.state for each in seen}
    state: _StockState = "closed"
    if seen and "closed" not in states:
        state = "open" if states == {"open"} else "half-open"
    opened = _second_after(now - min(each.ago for each in seen)) if state == "open" else None
    return _View(state, sum(each.failures for each in seen), opened)


def _second_after(when: float) -> int:
    # pybreaker cuts a time to its second, so its probe would come up to a second early.
    return math.ceil(round(when, 3))


def _whole_second(when: float) -> datetime:
    return datetime.fromtimestamp(_second_after(when), UTC)


def _read_switch(line: _Line) -> Switch | None:
    switch = line.switch
    if switch is None:
        return None
    if switch.counter == 0:
        # Nobody has been here yet, the keys are lost, or the store is away and the storage does not say so (pybreaker's
        # answers errors with what an empty store would say). A mark that stays tells which.
        switch.increment_counter()
        if switch.counter == 0:
            raise _NotKept
        line.written = None
    return Switch.parse(switch.state)


def _written(storage: Storage | None, written: _View | None, view: _View) -> _View | None:
    """Write what has changed; what stands in the storage then, `None` where that is not known."""
    if storage is None or view == written:
        return view
    if written is None or written.failures != view.failures:
        _count(storage, view.failures)
    if view.opened_at is not None and (written is None or written.opened_at != view.opened_at):
        # Before the state: whoever reads "open" is to find since when.
        storage.opened_at = datetime.fromtimestamp(view.opened_at, UTC)
        storage.state = view.state
    elif written is None or written.state != view.state:
        storage.state = view.state
    # Somebody else may have written meanwhile, or the storage has hidden an error; the next round writes once more.
    return view if storage.state == view.state else None


def _count(storage: Storage, failures: int) -> None:
    at_once = cast("Callable[[int], None] | None", getattr(storage, "set_counter", None))
    if at_once is not None:
        at_once(failures)
        return
    storage.reset_counter()
    for _ in range(min(failures, _MOST_STEPS)):
        storage.increment_counter()


def _touch(line: _Line, now: float) -> None:
    if now - line.touched < _TOUCH_EVERY:
        return
    for storage in (line.mirror, line.switch):
        touch = cast("Callable[[], None] | None", getattr(storage, "touch", None))
        if touch is not None:
            touch()
    line.touched = now


def _who(word: Switch) -> str:
    return ", ".join(filter(None, (word.by, word.reason))) or "nobody said who or why"


def _unreachable(why: str) -> MeshkitError:
    return MeshkitError(
        f"the store of the breakers' state cannot be used: {why.rstrip('.')}.",
        "What was to be written may be there or not; to say it again does no harm.",
        code="MK102",
    )


def _in_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `work` in a thread of its own, which keeps no process from ending.

    Not in the executor of the loop: a store that hangs would keep one of its few threads, and `asyncio.run` waits for
    all of them before it returns.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(cast("T", result))
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            answer.set_exception(error)
        else:
            # A future takes no StopIteration, and what ends a task or a process must not end whoever waits here.
            wrapped = RuntimeError(f"the storage has raised {error!r}")
            wrapped.__cause__ = error
            answer.set_exception(wrapped)

    def run() -> None:
        result: T | None = None
        failed: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            # Of whatever kind: somebody waits for an answer.
            failed = error
        try:
            loop.call_soon_threadsafe(tell, result, failed)
        except RuntimeError:
            # The loop has closed: nobody waits for this any more.
            return

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer


async def _within(answer: asyncio.Future[Any], seconds: float, clock: Clock) -> bool:
    """Wait for `answer`, which goes on where it takes longer; whether it came."""
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    timer = clock.call_at(clock.now() + seconds, over.cancel)
    try:
        await asyncio.wait((answer, over), return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
        over.cancel()
    return answer.done()
