"""Cancel a call at every point at which it can be cancelled, and look at what is left of it.

A `World` is an event loop that runs one callback at a time on the time of a ManualClock, so that a call can be stopped
between any two callbacks: at each of its suspensions, in the turn in which a result or a timeout arrives, before it has
begun. `sweep` runs a scenario once to count these points, and once more for each of them.
"""

from __future__ import annotations

import ast
import asyncio
import contextvars
import functools
import importlib
import inspect
import itertools
import sys
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal

import meshkit
from meshkit import Pipeline, Policy, current_attempt, current_scope
from meshkit.core.call import Call, Outcome
from meshkit.core.events import Event, TimedOut, listen
from meshkit.testing.clock import ManualClock

SOURCE = str(Path(meshkit.__file__).parent)
# No scenario takes nearly so many callbacks: what does is a call that never ends.
ENDLESS = 5000


# -- a loop in one hand -----------------------------------------------------------------------------------------------


class _Handle:
    __slots__ = ("args", "callback", "cancelled", "context", "timer", "when")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Any, when: float = 0.0) -> None:
        self.callback, self.args, self.when = callback, args, when
        self.context = contextvars.copy_context() if context is None else context
        self.cancelled = False
        self.timer: Any = None

    def cancel(self) -> None:
        self.cancelled = True
        if self.timer is not None:
            self.timer.cancel()


class SteppedLoop(asyncio.AbstractEventLoop):
    """An event loop of which a test runs one callback at a time. Its time is the clock's.

    Attributes:
        tasks: all that were ever made, as far as they are alive.
        complaints: what it was told by `call_exception_handler`.
    """

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.complaints: list[str] = []
        self._ready: deque[_Handle] = deque()
        self._closed = False

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True

    def time(self) -> float:
        return self.clock.now()

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        handle = _Handle(callback, args, context, when)
        handle.timer = self.clock.call_at(when, lambda: self._ready.append(handle))
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, **options)
        self.tasks.add(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    def step(self) -> bool:
        """Run the callback whose turn it is; `False`: there is none."""
        while self._ready:
            handle = self._ready.popleft()
            if not handle.cancelled:
                with self._running():
                    handle.context.run(handle.callback, *handle.args)
                return True
        return False

    def pass_time(self) -> bool:
        """Move the clock to what falls due next; `False`: nothing does."""
        with self._running():
            return self.clock._run_next(float("inf"))

    def settle(self) -> None:
        """Run what is ready, and let no time pass."""
        for _ in range(ENDLESS):
            if not self.step():
                return
        raise AssertionError("it goes on for ever")

    def _running(self) -> _Running:
        return _Running(self)

    def _forget(self, agen: Any) -> None:
        if not self._closed:
            self.call_soon(lambda: self.create_task(agen.aclose()))


class _Running:
    """As the loop itself does it: known as the running one, and told of generators that are dropped."""

    def __init__(self, loop: SteppedLoop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        self._before = asyncio._get_running_loop(), sys.get_asyncgen_hooks()
        asyncio._set_running_loop(self._loop)
        sys.set_asyncgen_hooks(firstiter=None, finalizer=self._loop._forget)

    def __exit__(self, *_: object) -> None:
        loop, hooks = self._before
        asyncio._set_running_loop(loop)
        sys.set_asyncgen_hooks(*hooks)


# -- what is called ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Answer:
    """A result that holds something until it is disposed of.

    Attributes:
        disposed: how often it was.
    """

    attempt: int
    disposed: int = 0


class Work:
    """A function that waits twice, for a turn and for some time, and then comes to what its script says.

    Args:
        world: where it runs.
        script: what each further run comes to: an exception is raised, `HANG` never ends, all else is returned. Once
            it is used up, `"ok"`.
        needs: seconds that a run takes; `None`: it ends without having waited at all.

    Attributes:
        began, returned, failed, cancelled: runs. Nothing else can become of a run.
        answers: all that was returned.
    """

    def __init__(self, world: World, *script: object, needs: float | None = 0.01) -> None:
        self._world = world
        self._script = list(script)
        self._needs = needs
        self.began = self.returned = self.failed = self.cancelled = 0
        self.answers: list[Answer] = []

    async def __call__(self) -> object:
        self.began += 1
        end = self._script.pop(0) if self._script else "ok"
        try:
            if end is HANG:
                await self._world.loop.create_future()
            if self._needs is not None:
                await asyncio.sleep(0)
                await self._world.clock.sleep(self._needs)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        if isinstance(end, BaseException):
            self.failed += 1
            raise end
        self.returned += 1
        return end

    async def answer(self, _call: object = None) -> Answer:
        """As the innermost step of an edge: returns something that is to be disposed of."""
        await self()
        answer = Answer(self.began)
        self.answers.append(answer)
        return answer

    @property
    def running(self) -> int:
        return self.began - self.returned - self.failed - self.cancelled


HANG = object()


# -- a scenario -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Stage:
    """What a scenario has set up.

    Args:
        call: makes the coroutine that is cancelled.
        work: what is called in it.
        policies: the policies that it goes through, which are then covered.
        check: fails where something leaked or was counted. Called when the call is over, however it ended.
        again: one more call, which has to work: what was held is free. `None`: there is nothing to be free.
        free: lets go of what the scenario itself holds, before that call.
        heeds: whether what is called lets its cancellation out.
        drops: whether what is called ends when its coroutine is closed.
    """

    call: Callable[[], Coroutine[Any, Any, object]]
    work: Work
    policies: tuple[Policy, ...]
    check: Callable[[], None] = lambda: None
    again: Callable[[], Awaitable[object]] | None = None
    free: Callable[[], object] = lambda: None
    heeds: bool = True
    drops: bool = True


class World:
    """One run of a scenario: its clock, its loop, what it hears.

    Attributes:
        events: all of meshkit's, in order.
        points: places in meshkit's source at which a cancellation hit a coroutine that waited.
    """

    def __init__(self) -> None:
        self.clock = ManualClock(hold=True)
        self.loop = SteppedLoop(self.clock)
        self.events: list[Event] = []
        self.points: set[Point] = set()
        self._actors: list[asyncio.Task[Any]] = []
        self._alarms: set[int] = set()
        self._deaf = listen(self.events.append, kind=Event)

    def close(self) -> None:
        self._deaf()
        self.loop.close()

    def work(self, *script: object, needs: float | None = 0.01) -> Work:
        return Work(self, *script, needs=needs)

    def heard(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def actor(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Somebody else who calls, brought to where he waits."""
        task = self.join(coro)
        self.loop.settle()
        return task

    def join(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """As `actor`, while the loop runs."""
        task = self.loop.create_task(coro)
        self._actors.append(task)
        return task

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Have something happen in so many seconds."""
        timer = self.clock.call_at(self.clock.now() + seconds, lambda: self.loop.call_soon(act))
        self._alarms.add(id(timer))
        self._kept = (*getattr(self, "_kept", ()), timer)

    def run(self, coro: Any) -> Any:
        """Run to the end, letting time pass."""

        async def awaited() -> Any:
            return await coro

        task = self.loop.create_task(awaited())
        for _ in range(ENDLESS):
            if task.done():
                return task.result()
            if not (self.loop.step() or self.loop.pass_time()):
                break
        task.cancel()
        self.loop.settle()
        raise AssertionError("it waits for what never comes")

    def advance(self, seconds: float) -> None:
        """Let so much time pass with nothing of the call under way."""
        target = self.clock.now() + seconds
        self.after(seconds, lambda: None)
        while self.clock.now() < target:
            self.loop.settle()
            self.loop.pass_time()
        self.loop.settle()

    def left(self) -> list[str]:
        """Tasks that run and timers that wait, but for those of the scenario itself."""
        tasks = [repr(task) for task in self.loop.tasks if not task.done() and task not in self._actors]
        timers = [
            repr(timer.callback)
            for _, _, timer in self.clock._timers
            if not timer.cancelled and id(timer) not in self._alarms
        ]
        return tasks + timers

    def end_actors(self) -> None:
        for task in self._actors:
            task.cancel()
        self.loop.settle()


@dataclass
class Sweep:
    """What a sweep has found.

    Attributes:
        points: places in meshkit's source at which a waiting coroutine was cancelled.
        steps: at so many points of time it was.
        faults: what was wrong, each with its step.
        complaints: what was told to the loop's exception handler, up to the collection of all objects.
        policies: classes that the scenario covers.
    """

    points: set[Point] = field(default_factory=set)
    steps: int = 0
    faults: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    policies: set[type] = field(default_factory=set)


Scenario = Callable[[World], Stage]
How = Literal["cancel", "twice", "again", "close"]
SCENARIOS: dict[str, Scenario] = {}


def scenario(make: Scenario) -> Scenario:
    """Have a scenario swept, under the name of its function."""
    assert make.__name__ not in SCENARIOS
    SCENARIOS[make.__name__] = make
    return make


@functools.cache
def swept(name: str, how: How = "cancel") -> Sweep:
    """The sweep of a scenario; made once a run."""
    return sweep(SCENARIOS[name], how=how)


def sweep(make: Scenario, *, how: How = "cancel", only: int | None = None) -> Sweep:
    """Run a scenario to its end, and then again and again, stopped at each further step.

    Args:
        make: sets the scenario up in a new world.
        how: `"cancel"`: once. `"twice"`: twice in the same turn. `"again"`: again some turns later, when it deals with
            the first one. `"close"`: not cancelled, but closed, in another context, as the collector closes a coroutine
            that was dropped.
        only: stop at this step alone (modulo their number).
    """
    found = Sweep()
    found.steps = _run(make, None, "cancel", found)
    for step in range(found.steps) if only is None else [only % found.steps]:
        for later in range(1, 4) if how == "again" else [0]:
            _run(make, step, how, found, later)
    return found


def _run(make: Scenario, stop: int | None, how: How, found: Sweep, later: int = 0) -> int:
    world = World()
    world.loop.complaints = found.complaints
    try:
        stage = make(world)
        found.policies |= {type(policy) for policy in _flat(stage.policies)}
        return _Run(world, stage, stop, how, found, later).steps
    finally:
        world.end_actors()
        world.close()


class _Run:
    def __init__(self, world: World, stage: Stage, stop: int | None, how: How, found: Sweep, later: int) -> None:
        self.world, self.stage, self.stop, self.found = world, stage, stop, found
        self._later = later
        loop = world.loop
        main = loop.create_task(self._main())
        self.steps = 0
        while not main.done() and self.steps != stop:
            if not (loop.step() or loop.pass_time()):
                # It waits for ever, which is a scenario too: the last chance to stop it.
                break
            self.steps += 1
            if self.steps > ENDLESS:
                raise AssertionError("this call never ends")
        self._closed = False
        if not main.done():
            self._note()
            if how == "close" and stage.drops:
                self._close(main)
            else:
                main.cancel()
                if how == "twice":
                    main.cancel()
                for _ in range(later):
                    loop.step()
                if later and not main.done():
                    self._note()
                    main.cancel()
        loop.settle()
        self._judge(main)
        # The last point is the one before the end.
        if stop is None and main.cancelled():
            self.steps += 1

    def _note(self) -> None:
        """Where all of them wait."""
        for task in self.world.loop.tasks:
            if not task.done() and task not in self.world._actors:
                self.found.points |= {*_waiting(task.get_coro())}

    def _close(self, main: asyncio.Task[object]) -> None:
        """Drop the call in the middle."""
        main._log_destroy_pending = False  # type: ignore[attr-defined]
        coro: Any = main.get_coro()
        if inspect.getcoroutinestate(coro) == inspect.CORO_CREATED:
            # Not even begun: Python itself has nothing to close.
            main.cancel()
            return
        self._closed = True
        with self.world.loop._running():
            contextvars.Context().run(coro.close)

    async def _main(self) -> object:
        before = current_scope(), current_attempt()
        coro = self.stage.call()
        try:
            return await coro
        except BaseException as error:
            self.found.points |= {*_passed(error.__traceback__)}
            raise
        finally:
            if (current_scope(), current_attempt()) != before:
                self._fault("a context variable is not as it was")

    def _fault(self, text: str) -> None:
        later = f" and {self._later} later" if self._later else ""
        self.found.faults.append(f"step {'none' if self.stop is None else self.stop}{later}: {text}")

    def _judge(self, main: asyncio.Task[object]) -> None:
        world, stage, work = self.world, self.stage, self.stage.work
        if not (self._closed or main.done()):
            self._fault("the call goes on")
            return
        given: object = None
        if main.done() and not main.cancelled():
            given = main.exception() or main.result()
            if self.stop is not None and stage.heeds and not self._closed:
                self._fault(f"no cancellation came out, but {given!r}")
        for left in world.left():
            if not (self._closed and repr(main) == left):
                self._fault(f"left behind: {left}")
        if work.running:
            self._fault(f"{work.running} runs of the function have not heard of it")
        for answer in work.answers:
            # Who is closed cannot wait for anything, so not for a disposal either.
            if answer.disposed != (answer is not given) and not self._closed:
                self._fault(f"the answer of run {answer.attempt} was disposed of {answer.disposed} times")
        try:
            stage.check()
            if stage.again is not None:
                stage.free()
                world.loop.settle()
                world.run(stage.again())
                world.loop.settle()
                stage.check()
        except Exception as error:
            self._fault(f"{type(error).__name__}: {error} {_where(error)}")
        for left in world.left():
            if not (self._closed and repr(main) == left):
                self._fault(f"left behind in the end: {left}")


def _where(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else f"({Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno})"


def _flat(policies: tuple[Policy, ...]) -> Iterator[Policy]:
    for policy in policies:
        yield policy
        if isinstance(policy, Pipeline):
            yield from _flat(policy.policies)


# -- an edge ----------------------------------------------------------------------------------------------------------


async def at_an_edge(work: Work, *policies: Policy, late: bool = True, judge: Any = None) -> object:
    """Lead a call as an edge does: with results that are to be disposed of, and an end of its own."""

    async def dispose(answer: Any) -> None:
        if isinstance(answer, Answer):
            answer.disposed += 1
            await asyncio.sleep(0)

    call = Call("edge", judge=judge, discard=dispose, late=late)
    try:
        result = await Pipeline("edge", *policies).run(call, work.answer)
    except BaseException as error:
        call.end(Outcome(error=error))
        raise
    call.end(Outcome(result))
    return result


# -- where coroutines wait --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A place in the source at which a coroutine can be suspended."""

    module: str
    function: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.function}: {self.text}"


def _place(code: CodeType, last: int) -> Iterator[Point]:
    if code.co_filename.startswith(SOURCE) and last >= 0:
        position = next(itertools.islice(code.co_positions(), last // 2, None))
        point = _point_at(code.co_filename, *position)
        if point is not None:
            yield point


def _waiting(coro: Any) -> Iterator[Point]:
    """Where a suspended coroutine waits, from the outermost one in."""
    while coro is not None:
        for prefix in ("cr", "gi", "ag"):
            frame: FrameType | None = getattr(coro, f"{prefix}_frame", None)
            if frame is not None:
                yield from _place(frame.f_code, frame.f_lasti)
        for name in ("cr_await", "gi_yieldfrom", "ag_await"):
            if hasattr(coro, name):
                coro = getattr(coro, name)
                break
        else:
            return


def _passed(traceback: TracebackType | None) -> Iterator[Point]:
    """Where an exception has gone through."""
    while traceback is not None:
        yield from _place(traceback.tb_frame.f_code, traceback.tb_lasti)
        traceback = traceback.tb_next


@functools.cache
def _point_at(
    filename: str, line: int | None, end: int | None, column: int | None, end_column: int | None
) -> Point | None:
    if line is None or end is None or column is None or end_column is None:
        return None
    inside = [
        (spot, point)
        for spot, point in _points_of(filename)
        if spot[0] <= (line, column) and (end, end_column) <= spot[1]
    ]
    # The innermost: the one that begins last.
    return max(inside, key=lambda entry: entry[0][0])[1] if inside else None


@functools.cache
def _points_of(filename: str) -> list[tuple[tuple[tuple[int, int], tuple[int, int]], Point]]:
    module = Path(filename).relative_to(SOURCE).as_posix()
    found: list[tuple[tuple[tuple[int, int], tuple[int, int]], Point]] = []

    def visit(node: ast.AST, names: tuple[str, ...], stepping: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = (*names, node.name)
            stepping = any(ast.unparse(each).split(".")[-1] == "coroutine" for each in node.decorator_list)
        spots: list[ast.expr] = []
        if isinstance(node, ast.Await) or (isinstance(node, ast.Yield | ast.YieldFrom) and stepping):
            spots = [node]
        elif isinstance(node, ast.AsyncFor):
            spots = [node.iter]
        elif isinstance(node, ast.AsyncWith):
            spots = [item.context_expr for item in node.items]
        for spot in spots:
            assert spot.end_lineno is not None
            assert spot.end_col_offset is not None
            point = Point(module, ".".join(names), ast.unparse(spot), spot.lineno)
            found.append((((spot.lineno, spot.col_offset), (spot.end_lineno, spot.end_col_offset)), point))
        for child in ast.iter_child_nodes(node):
            visit(child, names, stepping)

    visit(ast.parse(Path(filename).read_text()), (), False)
    return found


def points_of(module: str) -> set[Point]:
    """All places of a module, given as a path below `meshkit`, at which something may wait."""
    return {point for _, point in _points_of(f"{SOURCE}/{module}")}


# -- what there is to cover -------------------------------------------------------------------------------------------


def policies() -> dict[str, type]:
    """The classes that meshkit offers as policies: public, with `run` and `describe`."""
    found: dict[str, type] = {}
    # Modules are no policies, and plug into libraries that need not be here.
    for name in meshkit.__all__:
        if name in meshkit._MODULES:
            continue
        value = getattr(meshkit, name)
        if not inspect.isclass(value) or getattr(value, "_is_protocol", False):
            continue
        if callable(getattr(value, "run", None)) and callable(getattr(value, "describe", None)):
            found[name] = value
    return found


def module_of(kind: type) -> str:
    """The file that a policy stands in, as a path below `meshkit`."""
    file = importlib.import_module(kind.__module__).__file__
    assert file is not None
    return Path(file).relative_to(SOURCE).as_posix()


async def drained(items: AsyncIterator[Any]) -> list[Any]:
    """All items of a stream."""
    return [item async for item in items]


def timeouts(world: World) -> int:
    """How often a time was over."""
    return world.heard(TimedOut)
