import asyncio
import copy
import functools
import gc
import inspect
import socket
import weakref
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

import httpx
import pytest
import redis
import redis.asyncio

from meshkit import CircuitBreaker, CircuitOpenError, ConfigurationError, Pipeline, Retry, Timeout
from meshkit.core.wrap import wrap


class Base:
    async def inherited(self):
        """Comes from the base class."""
        return await self._answer("inherited")


class Client(Base):
    """What a service client looks like."""

    kind = "prices"

    def __init__(self, failures=0):
        self.failures, self.calls, self.entered, self.items = failures, [], [], {"a": 1}
        self.attribute = self._attribute
        self.partial = functools.partial(self._answer, "partial")

    async def _answer(self, name):
        self.calls.append(name)
        if self.failures:
            self.failures -= 1
            raise ConnectionError(name)
        return name

    async def quote(self, isbn="x"):
        """The price of a book."""
        return await self._answer("quote")

    async def both(self):
        return await self.quote()

    async def stream(self):
        for name in ("one", "two"):
            yield await self._answer(name)

    def plain(self):
        self.calls.append("plain")
        if self.failures:
            self.failures -= 1
            raise ConnectionError
        return "plain"

    def promised(self):
        """Returns something to await."""
        return asyncio.ensure_future(self._answer("promised"))

    @asynccontextmanager
    async def session(self):
        yield self

    @property
    def made(self):
        return self._attribute

    @property
    def explosive(self):
        raise RuntimeError("nobody is to ask")

    async def _attribute(self):
        return await self._answer("attribute")

    @classmethod
    async def of_the_class(cls):
        return cls.__name__

    @staticmethod
    async def of_nobody():
        return "static"

    async def aclose(self):
        self.calls.append("aclose")

    def __getattr__(self, name):
        if name == "conjured":

            async def conjured():
                return await self._answer("conjured")

            return conjured
        raise AttributeError(name)

    async def __aenter__(self):
        self.entered.append("in")
        return self

    async def __aexit__(self, *exc):
        self.entered.append("out")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.items[key]

    def __setitem__(self, key, value):
        self.items[key] = value

    def __contains__(self, key):
        return key in self.items

    def __iter__(self):
        return iter(self.items)

    def __add__(self, other):
        return len(self) + other

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return self

    async def __call__(self):
        return await self._answer("call")


def twice(clock, **options):
    return Pipeline("prices", Retry(attempts=2, clock=clock, **options))


@pytest.mark.parametrize(
    "name", ["quote", "inherited", "made", "conjured", "attribute", "partial", "of_the_class", "of_nobody"]
)
async def test_however_a_method_came_to_be_it_goes_through_the_pipeline(clock, name):
    """Own, inherited, property-made, conjured by `__getattr__`, attributes that can be called, class and static ones."""
    seen = []

    class Watch:
        def describe(self):
            return {"kind": "watch"}

        async def run(self, call, call_next):
            seen.append(call.name)
            return await call_next(call)

    guarded = wrap(Client(), Pipeline("prices", Watch()), methods=[name])
    first = await getattr(guarded, name)()
    assert ["prices"] == seen
    assert first == await getattr(guarded, name)()
    assert ["prices", "prices"] == seen


async def test_a_failure_is_tried_again(clock):
    """The policies are around the method."""
    client = Client(failures=1)
    assert "quote" == await wrap(client, twice(clock), methods=["quote"]).quote(isbn="1")
    assert ["quote", "quote"] == client.calls


async def test_the_client_itself_is_not_patched(clock):
    """Whoever holds the client calls it without the pipeline, and so does the client itself."""
    client = Client(failures=1)
    guarded = wrap(client, twice(clock), methods=["quote"])
    with pytest.raises(ConnectionError):
        await client.quote()
    client.failures = 1
    with pytest.raises(ConnectionError):
        await guarded.both()
    assert "quote" not in vars(client)
    assert Client is type(client)


async def test_without_names_all_public_coroutine_methods_are_guarded(clock):
    """Those and no others; what ends the client is left alone, and no property is asked."""
    client = Client()
    guarded = wrap(client, twice(clock))
    for name in ("quote", "inherited", "both", "attribute", "partial", "of_the_class", "of_nobody"):
        assert getattr(guarded, name) is getattr(guarded, name), name
        assert inspect.iscoroutinefunction(getattr(guarded, name)), name
        assert getattr(guarded, name) != getattr(client, name), name
    for name in ("aclose", "plain", "stream", "session", "promised"):
        assert getattr(client, name) == getattr(guarded, name), name


async def test_methods_share_one_breaker(clock):
    """What one method finds out holds for the others."""
    breaker = CircuitBreaker("prices", min_calls=2, clock=clock)
    guarded = wrap(Client(failures=2), Pipeline("prices", breaker), methods=["quote", "inherited"])
    for method in (guarded.quote, guarded.inherited):
        with pytest.raises(ConnectionError):
            await method()
    with pytest.raises(CircuitOpenError):
        await guarded.quote()


async def test_an_async_generator_method_is_guarded(clock):
    """Up to its first item it is tried again, and its items come through."""
    client = Client(failures=1)
    assert ["one", "two"] == [item async for item in wrap(client, twice(clock), methods=["stream"]).stream()]
    assert ["one", "one", "two"] == client.calls


def test_a_plain_method_is_guarded_where_all_policies_can(clock):
    """A Retry can guard a plain function."""
    client = Client(failures=1)
    assert "plain" == wrap(client, twice(clock), methods=["plain"]).plain()
    assert ["plain", "plain"] == client.calls


def test_a_plain_method_is_refused_where_a_policy_cannot():
    """The error names the method and says what there is for those that return something to await."""
    with pytest.raises(ConfigurationError, match=r"'plain' of Client is a plain function.*awaitable="):
        wrap(Client(), Pipeline("prices", Timeout(1)), methods=["plain"])


async def test_a_plain_function_that_returns_something_to_await_is_named_so(clock):
    """As redis-py's commands and gRPC's stubs are."""
    client = Client(failures=1)
    guarded = wrap(
        client, Pipeline("prices", Retry(attempts=2, clock=clock), Timeout(5, clock=clock)), awaitable=["promised"]
    )
    assert "promised" == await guarded.promised()
    assert ["promised", "promised"] == client.calls
    assert "Returns something to await." == guarded.promised.__doc__


def test_a_method_that_returns_a_context_manager_is_refused(clock):
    """Its call has hardly begun when it returns, so there is nothing to judge."""
    with pytest.raises(ConfigurationError, match="context manager"):
        wrap(Client(), twice(clock), methods=["session"])


def test_the_proxy_passes_for_the_client(clock):
    """isinstance, attributes, names, docstrings, dir, protocols."""

    @runtime_checkable
    class Quotes(Protocol):
        async def quote(self, isbn: str = "x") -> object: ...

    client = Client()
    guarded = wrap(client, twice(clock), methods=["quote"])
    assert isinstance(guarded, Client)
    assert isinstance(guarded, Base)
    assert isinstance(guarded, Quotes)
    assert Client is guarded.__class__
    assert "prices" == guarded.kind
    assert "What a service client looks like." == guarded.__doc__
    assert ("quote", "The price of a book.") == (guarded.quote.__name__, guarded.quote.__doc__)
    assert inspect.signature(client.quote) == inspect.signature(guarded.quote)
    assert "partial" == wrap(client, twice(clock)).partial.__name__
    assert dir(client) == dir(guarded)
    assert vars(client) is vars(guarded)
    assert client == guarded
    assert guarded == client
    assert Client() != guarded
    assert {client: 1}[guarded] == 1
    assert f"<{client!r} through pipeline 'prices'>" == repr(guarded)


async def test_attributes_are_the_clients(clock):
    """Set, replaced and deleted ones; a method that is replaced is guarded as well."""
    client = Client()
    guarded = wrap(client, twice(clock), methods=["quote"])
    guarded.failures = 1
    assert 1 == client.failures

    async def other():
        return await client._answer("other")

    guarded.quote = other
    assert client.quote is other
    assert "other" == await guarded.quote()
    assert ["other", "other"] == client.calls
    del guarded.quote
    assert "quote" == await guarded.quote()


async def test_special_methods_are_the_clients(clock):
    """Length, items, iteration, operators, truth."""
    guarded = wrap(Client(), twice(clock), methods=["quote"])
    guarded["b"] = 2
    assert (2, 2, ["a", "b"], 5) == (len(guarded), guarded["b"], list(guarded), guarded + 3)
    assert "b" in guarded
    with pytest.raises(TypeError):
        guarded < 3  # noqa: B015
    empty = wrap(Client(), twice(clock), methods=["quote"])
    empty.items.clear()
    assert not empty


async def test_what_async_with_gives_is_guarded(clock):
    """`async with` and `await` of the client, which answer the client, answer the proxy."""
    client = Client(failures=1)
    guarded = wrap(client, twice(clock), methods=["quote"])
    async with guarded as entered:
        assert entered is guarded
        assert "quote" == await entered.quote()
    assert ["in", "out"] == client.entered
    assert guarded is await guarded
    assert guarded is await guarded.__aenter__()


async def test_a_client_that_is_called_is_guarded_by_name(clock):
    """`__call__` can be named, and otherwise passes through."""
    client = Client(failures=1)
    assert "call" == await wrap(client, twice(clock), methods=["__call__"])()
    client.failures = 1
    with pytest.raises(ConnectionError):
        await wrap(client, twice(clock), methods=["quote"])()


async def test_pipelines_for_different_methods_go_around_each_other(clock):
    """A proxy can be wrapped again, for other methods."""
    client = Client(failures=1)
    guarded = wrap(wrap(client, twice(clock), methods=["quote"]), Pipeline("all", Timeout(3)), methods=["inherited"])
    assert "quote" == await guarded.quote()
    assert "inherited" == await guarded.inherited()
    assert isinstance(guarded, Client)
    assert len(guarded) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ["qoute"]}, "no method 'qoute'. Did you mean quote?"),
        ({"methods": ["kind"]}, "'kind' of Client is no method"),
        ({"methods": "quote"}, "methods is a list of names"),
        ({"methods": [1]}, "methods is a list of names"),
        ({"awaitable": "quote"}, "awaitable is a list of names"),
        ({"methods": []}, "no public coroutine method"),
    ],
)
def test_what_cannot_be_guarded_is_said_when_it_is_wrapped(options, says):
    """A misspelt name is answered with the near ones."""
    with pytest.raises(ConfigurationError) as caught:
        wrap(Client(), Pipeline("prices"), **options)
    assert says in str(caught.value)


def test_a_class_or_a_bare_policy_is_refused():
    """What is wrapped is an object, and what goes around it a pipeline."""
    with pytest.raises(ConfigurationError, match="is a class"):
        wrap(Client, Pipeline("prices"))
    with pytest.raises(ConfigurationError, match="by a pipeline"):
        wrap(Client(), Retry())
    with pytest.raises(ConfigurationError, match="object has no public coroutine method"):
        wrap(object(), Pipeline("prices"))


async def test_a_property_that_has_nothing_yet_is_asked_again(clock):
    """A client may get its methods when it connects."""

    class Late:
        channel = None

        @property
        def send(self):
            if self.channel is None:
                raise AttributeError("not connected")
            return self.channel

    client = Late()
    guarded = wrap(client, twice(clock), methods=["send"])
    with pytest.raises(AttributeError):
        await guarded.send()
    client.channel = Client(failures=1).quote
    assert "quote" == await guarded.send()


class Copied:
    async def get(self):
        return "got"


def test_a_copy_is_guarded_too(clock):
    """`copy.copy` gives a second proxy around the same client."""
    guarded = wrap(Copied(), twice(clock), methods=["get"])
    again = copy.copy(guarded)
    assert again is not guarded
    assert guarded == again
    assert "get" == again.get.__name__
    assert again.get != Copied().get


def test_a_proxy_and_its_client_can_be_collected(clock):
    """Nothing of meshkit keeps either alive."""
    guarded = wrap(Copied(), twice(clock))
    _ = guarded.get
    client, proxy = weakref.ref(guarded.get.__wrapped__.__self__), weakref.ref(guarded)
    del guarded, _
    gc.collect()
    assert (None, None) == (client(), proxy())


async def test_an_httpx_client_behind_a_pipeline_is_an_httpx_client(clock):
    """`async with`, its properties and its requests; what is not named does not go through."""
    asked = []

    def answer(request):
        asked.append(request.url.path)
        if len(asked) == 1:
            raise httpx.ConnectError("down")
        return httpx.Response(200, text="ok")

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://users")
    async with wrap(client, twice(clock), methods=["get"]) as users:
        assert isinstance(users, httpx.AsyncClient)
        users.headers["x-from"] = "test"
        assert "ok" == (await users.get("/a")).text
        assert ["/a", "/a"] == asked
        asked.clear()
        with pytest.raises(httpx.ConnectError):
            await users.post("/b")
    assert users.is_closed
    assert client.is_closed
    assert "test" == client.headers["x-from"]


async def test_a_redis_command_that_returns_something_to_await_is_guarded(clock):
    """redis-py's commands are plain functions; named as awaitable, they are tried again, and its own wait is left."""
    with socket.socket() as taken:
        # Bound and not listening: whoever connects is refused.
        taken.bind(("127.0.0.1", 0))
        client = redis.asyncio.Redis(port=taken.getsockname()[1], retry=None)
        tried = []

        class Tries:
            def describe(self):
                return {"kind": "tries"}

            async def run(self, call, call_next):
                tried.append(call.attempt)
                return await call_next(call)

        pipeline = Pipeline("redis", Retry(attempts=2, clock=clock), Tries())
        async with wrap(client, pipeline, methods=(), awaitable=["get"]) as guarded:
            assert isinstance(guarded, redis.asyncio.Redis)
            with pytest.raises(redis.ConnectionError):
                await guarded.get("key")
    assert [1, 2] == tried


async def test_a_guarded_client_can_be_guarded_by_another_pipeline(clock):
    """Its methods are found without being named, and a call goes through both pipelines; what cannot be guarded is told
    of the client, not of what stands in front of it."""

    class Prices:
        calls = 0

        async def quote(self):
            self.calls += 1
            raise OSError

        def stream(self):
            return self.quote()

        @property
        def late(self):
            raise AttributeError("not connected")

    client = Prices()
    inner = wrap(client, twice(clock), awaitable=["stream"], methods=["quote"])
    outer = wrap(inner, twice(clock))
    with pytest.raises(OSError):
        await outer.quote()
    assert 4 == client.calls
    with pytest.raises(OSError):
        await outer.stream()
    assert 8 == client.calls
    assert isinstance(outer, Prices)
    assert outer == client
    wrap(inner, twice(clock), methods=["late"])
    with pytest.raises(ConfigurationError, match=r"Prices has no method 'quota'\. Did you mean quote"):
        wrap(inner, twice(clock), methods=["quota"])
    with pytest.raises(ConfigurationError, match="Prices has no public coroutine method"):
        wrap(wrap(type("Prices", (), {"go": lambda self: 1})(), twice(clock), methods=["go"]), twice(clock))
