"""How a transport is put together: settings, hosts, proxies, and what goes to whom."""

from __future__ import annotations

import logging
import urllib.parse
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import tenacity

import meshkit.httpx
from meshkit import (
    CircuitBreaker,
    CircuitOpenError,
    ConfigurationError,
    Fallback,
    LastGood,
    Pipeline,
    Retry,
    Timeout,
)
from meshkit.httpx import MOST_HOSTS, redacted
from meshkit.policies.circuit_breaker import breakers
from meshkit.testing.clock import ManualClock
from tests.http.fault_host import FaultHost, answer

Make = Callable[..., Any]


async def test_a_client_of_the_asked_library_is_made(client: Make, library: Any, host: FaultHost) -> None:
    """`client` gives the library's own AsyncClient, with its own settings."""
    made = client(headers={"x-team": "a"})
    assert isinstance(made, library.AsyncClient)
    await made.get("/")
    assert "a" == host.asked[0].headers["x-team"]


async def test_a_transport_goes_into_a_client_that_exists(library: Any, host: FaultHost) -> None:
    """The other way in: a client of the user's own, with meshkit as its transport."""
    host.script = [answer(503), answer()]
    transport = meshkit.httpx.transport("prices", library=library.__name__, clock=ManualClock())
    async with library.AsyncClient(transport=transport, base_url=host.url) as own:
        assert 200 == (await own.get("/")).status_code


async def test_the_library_is_that_of_the_inner_transport(library: Any) -> None:
    """With `inner=` nobody has to say which library it is."""
    inner = library.MockTransport(lambda request: library.Response(204))
    async with library.AsyncClient(transport=meshkit.httpx.transport("prices", inner=inner)) as own:
        assert 204 == (await own.get("http://prices/")).status_code


async def test_closing_the_client_closes_the_inner_transport(library: Any) -> None:
    """Whoever is inside is entered and closed with the client."""
    told: list[str] = []

    class Inner(library.AsyncBaseTransport):  # type: ignore[name-defined, misc]
        async def __aenter__(self) -> Any:
            told.append("entered")
            return self

        async def __aexit__(self, *error: object) -> None:
            told.append("left")

        async def aclose(self) -> None:
            told.append("closed")

    async with library.AsyncClient(transport=meshkit.httpx.transport("prices", inner=Inner())):
        pass
    await library.AsyncClient(transport=meshkit.httpx.transport("prices", inner=Inner())).aclose()
    assert ["entered", "left", "closed"] == told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"retries": 3}, "retry=Retry"),
        ({"verfiy": False}, "verfiy"),
        ({"timeout": 0}, "above 0"),
        ({"attempt_timeout": -1}, "above 0"),
        ({"pipeline": Pipeline("p"), "retry": None}, "takes the place"),
        ({"pipeline": Timeout(1)}, "pipeline is a Pipeline"),
        ({"fallback": Fallback(last_good=LastGood(key=None))}, "Put the Fallback around the function that reads it"),
        ({"pipeline": Pipeline("p", Fallback(last_good=LastGood(key=None)))}, "a response can be read once"),
        ({"library": "requests"}, "httpx2"),
    ],
)
def test_a_setting_that_cannot_work_is_named(options: dict[str, Any], says: str) -> None:
    """Each mistake is one ConfigurationError that says what would be right."""
    with pytest.raises(ConfigurationError, match=says):
        meshkit.httpx.transport("prices", **options)


def test_settings_do_not_go_astray(library: Any) -> None:
    """Connection settings beside an inner transport would reach nobody; two transports of ours would multiply."""
    inner = library.MockTransport(lambda request: library.Response(204))
    with pytest.raises(ConfigurationError, match="would not reach"):
        meshkit.httpx.transport("prices", inner=inner, verify=False)
    with pytest.raises(ConfigurationError, match="multiply"):
        meshkit.httpx.transport("prices", inner=meshkit.httpx.transport("prices", inner=inner))


async def test_a_mount_that_goes_around_meshkit_is_reported(
    client: Make, library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that a mount takes away have no policy, and the log says so once."""
    with caplog.at_level(logging.WARNING, "meshkit"):
        client(mounts={"http://other": library.MockTransport(lambda request: library.Response(204))})
    assert ["'http://other' go through a mount"] == [
        record.message.partition("requests to ")[2].partition(" of")[0] for record in caplog.records
    ]


async def test_a_pipeline_of_ones_own_judges_by_the_table(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """Policies without a rule of their own find out from the edge what a failure is."""
    breaker = CircuitBreaker("mine", clock=clock)
    host.script = [answer(503), answer()]
    prices = client(pipeline=Pipeline("mine", Retry(clock=clock), breaker))
    assert 200 == (await prices.get("/")).status_code
    assert {"success": 1, "failure": 1, "ignored": 0, "rejected": 0, "shadowed": 0} == breaker.counts


# -- hosts ------------------------------------------------------------------------------------------------------------


async def test_each_host_has_its_own_breaker(
    client: Make, library: Any, host: FaultHost, clock: ManualClock, nobody: str
) -> None:
    """One host that is down shuts itself off and no other; the home host's breaker has the client's name."""
    name = f"per-host-{library.__name__}"
    prices = client(name=name, retry=Retry(attempts=10, clock=clock), budget=None)
    with pytest.raises(library.ConnectError):
        await prices.get(nobody)
    with pytest.raises(CircuitOpenError):
        await prices.get(nobody)
    assert 200 == (await prices.get("/")).status_code
    states = {breaker.name: breaker.state for breaker in breakers() if breaker.name.split()[0] == name}
    assert {name: "closed", f"{name} 127.0.0.1:{nobody.rpartition(':')[2]}": "open"} == states


async def test_the_number_of_breakers_is_bounded_and_open_ones_stay(library: Any, clock: ManualClock) -> None:
    """Of many hosts the ones used last are remembered, and the one that is down."""

    def reply(request: Any) -> Any:
        return library.Response(500 if request.url.host == "down" else 200)

    transport = meshkit.httpx.transport(f"many-{library.__name__}", inner=library.MockTransport(reply), clock=clock)
    async with library.AsyncClient(transport=transport) as many:
        for _ in range(10):
            await many.get("http://down/")
        for number in range(MOST_HOSTS + 20):
            await many.get(f"http://host{number}/")
        with pytest.raises(CircuitOpenError):
            await many.get("http://down/")
    names = {breaker.name for breaker in breakers() if breaker.name.split()[0] == f"many-{library.__name__}"}
    hosts = {name.split()[1] for name in names}
    assert MOST_HOSTS == len(hosts)
    assert {"down", f"host{MOST_HOSTS + 19}"} <= hosts
    assert "host0" not in hosts


# -- proxies ----------------------------------------------------------------------------------------------------------


async def test_proxies_of_the_environment_are_honoured(
    client: Make, host: FaultHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request goes to the proxy that HTTP_PROXY names, with the whole address in its first line."""
    monkeypatch.setenv("HTTP_PROXY", host.url)
    monkeypatch.setenv("NO_PROXY", "")
    assert 200 == (await client(base_url="http://prices.example").get("/x")).status_code
    assert ["http://prices.example/x"] == [asked.path for asked in host.asked]


async def test_who_trusts_no_environment_uses_no_proxy(
    client: Make, host: FaultHost, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trust_env=False` goes straight there."""
    monkeypatch.setenv("HTTP_PROXY", nobody)
    assert 200 == (await client(trust_env=False).get("/")).status_code
    assert ["/"] == [asked.path for asked in host.asked]


@pytest.mark.parametrize(
    "no_proxy", ["", "*", "prices", "example.com", ".example.com", "10.0.0.1", "localhost", "a:99"]
)
@pytest.mark.parametrize(
    "url",
    [
        "http://prices/",
        "http://example.com/",
        "http://www.example.com/",
        "http://notexample.com/",
        "https://10.0.0.1/",
        "http://localhost:8000/",
        "https://a/",
        "https://a:99/",
    ],
)
async def test_the_proxy_is_the_one_the_client_would_take(
    library: Any, monkeypatch: pytest.MonkeyPatch, no_proxy: str, url: str
) -> None:
    """For each exemption and address the choice is that of a client without meshkit."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy-a:3128")
    monkeypatch.setenv("ALL_PROXY", "http://proxy-b:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    ours: Any = meshkit.httpx.transport("prices", library=library.__name__, verify=False)
    async with library.AsyncClient(verify=False) as plain:
        theirs = plain._transport_for_url(library.URL(url))
        theirs_proxy = getattr(theirs._pool, "_proxy_url", None)
    chosen = ours.inner(library.URL(url))
    assert theirs_proxy == getattr(chosen._pool, "_proxy_url", None)
    await ours.aclose()


# -- redaction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://a/b?c=1", "http://a/b?c=1"),
        ("https://me:pw@a:99/b", "https://REDACTED:REDACTED@a:99/b"),
        ("http://a/?Access_Token=x&b=2&sig", "http://a/?Access_Token=REDACTED&b=2&sig"),
        ("http://a/?X-Amz-Signature=x&page=%20", "http://a/?X-Amz-Signature=REDACTED&page=%20"),
        ("http://a/?to%6ben=x#frag", "http://a/?to%6ben=REDACTED"),
    ],
)
def test_secrets_in_urls_are_not_shown(url: str, shown: str) -> None:
    """User, password and the values of secret parameters are left out; the rest stays as it is."""
    assert shown == redacted(url)
    assert urllib.parse.urlsplit(url).path == urllib.parse.urlsplit(shown).path


@pytest.mark.parametrize(
    ("retry", "found"),
    [
        (Retry(), False),
        (Retry(attempts=1, on=OSError), False),
        (Retry(on=(httpx.ConnectError, httpx.ConnectTimeout)), False),
        (Retry(on=(httpx.ConnectError, httpx.ReadError)), True),
        (Retry(on_result=bool), True),
        (Retry(retry=tenacity.retry_always), True),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_retry_that_repeats_any_post_is_named(
    caplog: pytest.LogCaptureFixture, retry: Retry, found: bool, nested: bool
) -> None:
    """Who says by a rule of his own what is tried again hears once, when the client is made, that a POST is among it."""
    name = f"named-{nested}-{retry.describe()['rule']}-{retry.describe()['on']}"
    options: dict[str, Any] = {"pipeline": Pipeline(name, Pipeline("inner", retry))} if nested else {"retry": retry}
    meshkit.httpx.transport(name, **options)
    meshkit.httpx.transport(name, **options)
    assert int(found) == caplog.text.count("unsafe-method-retried")


def test_a_repeated_post_may_be_wanted(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever gives the reason hears nothing, and finds the reason in what the pipeline says of itself."""
    wanted = Pipeline("keyed", Retry(on=OSError), allow={"unsafe-method-retried": "each POST carries its key"})
    meshkit.httpx.transport("keyed", pipeline=wanted)
    assert "unsafe-method-retried" not in caplog.text
    assert ["each POST carries its key"] == [found.allowed for found in wanted.explain(meshkit.httpx.repeats).findings]
