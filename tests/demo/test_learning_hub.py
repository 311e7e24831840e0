"""The learning hub without the demo around it: its queues, its partner, its books."""

from __future__ import annotations

import io
import sqlite3
import urllib.parse
import uuid
from collections import Counter
from pathlib import Path

import httpx
import pytest

from learning_hub.demo import books
from learning_hub.demo.broker import DEAD_LETTER_QUEUES, EXCHANGES, QUEUES, CannotStart
from learning_hub.demo.broker import broker as demo_broker
from learning_hub.demo.driver import Told
from learning_hub.demo.show import stage
from learning_hub.settings import PORTS, variable
from meshkit.testing import servers

EXPECTED = {
    "user-service.notification-sent": ("notification-events", "notification.sent"),
    "course-service.user-created": ("user-events", "user.created"),
    "course-service.content-granted": ("content-events", "content.granted"),
    "enrollment-service.payment-completed": ("payment-events", "payment.completed"),
    "enrollment-service.payment-refused": ("payment-events", "payment.refused"),
    "payment-service.enrollment-requested": ("enrollment-events", "enrollment.requested"),
    "notification-content-worker.course-created": ("course-events", "course.created"),
    "notification-content-worker.enrollment-requested": ("enrollment-events", "enrollment.requested"),
    "notification-content-worker.payment-completed": ("payment-events", "payment.completed"),
    "notification-content-worker.payment-refused": ("payment-events", "payment.refused"),
}


@pytest.mark.once
async def test_the_services_declare_their_queues_and_nothing_stays(
    rabbitmq_server: servers.RabbitMQ, rabbitmq_url: str, tmp_path: Path
):
    """On a RabbitMQ that is there already: all exchanges and queues `<service>.<event>`, bound, each with its dead-letter
    queue; a second demo refuses to share them; afterwards all of them are gone."""
    vhost = urllib.parse.quote(rabbitmq_url.rpartition("/")[2], safe="")

    def names(what: str) -> set[str]:
        return {found["name"] for found in rabbitmq_server.api(f"/api/{what}/{vhost}")}

    async with stage(rabbitmq_url, tale=io.StringIO(), keep=tmp_path / "hub"):
        assert set(EXPECTED) == set(QUEUES)
        queues = names("queues")
        assert set(QUEUES) | set(DEAD_LETTER_QUEUES) == {
            name for name in queues if not name.startswith("meshkit.delay.")
        }
        assert set(EXCHANGES) <= names("exchanges")
        bound = {
            found["destination"]: (found["source"], found["routing_key"])
            for found in rabbitmq_server.api(f"/api/bindings/{vhost}")
            if found["source"] in EXCHANGES
        }
        assert bound == EXPECTED
        with pytest.raises(CannotStart, match="a virtual host of its own"):
            async with demo_broker(rabbitmq_url):
                pass
    assert not [name for name in names("queues") if not name.startswith("meshkit.delay.")]
    assert not names("exchanges") & set(EXCHANGES)


@pytest.mark.once
@pytest.mark.real("postgresql")
async def test_the_services_work_on_postgresql(
    postgresql_server: servers.PostgreSQL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """With their databases on PostgreSQL, by URL, normal traffic comes to its end and the books agree."""
    for name in PORTS:
        if name != "payment-provider":
            url = postgresql_server.url_of(postgresql_server.new_database(), driver="asyncpg")
            monkeypatch.setenv(variable(name, "DATABASE_URL"), url)
    async with stage(tale=io.StringIO(), keep=tmp_path / "hub") as play:
        await play.normal_traffic(users=3, enrollments=8)
        now = await play.settled()
        told = play.driver.told
        assert ({}, {}) == (books.lost(told, now), books.doubled(told, now))
        assert {"completed": 7, "compensated": 1} == dict(Counter(now.states.values()))
        assert not list((tmp_path / "hub").glob("*-service.db"))


# -- the partner ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The payment provider, in the process, with books of its own."""
    monkeypatch.setenv("PAYMENT_PROVIDER_BOOKS", ":memory:")
    import learning_hub.provider as module

    with module.books:
        for table in ("mode", "requests", "charges"):
            module.books.execute(f"DELETE FROM {table}")
    transport = httpx.ASGITransport(app=module.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://provider") as client:
        yield client


CHARGE = {"reference": "order", "amount": 100, "card": "4242"}


async def test_a_repeated_key_is_the_same_charge(provider: httpx.AsyncClient):
    """Two requests with one key make one charge; the books hold both requests."""
    answers = [await provider.post("/charges", json=CHARGE, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [201, 201] == [answer.status_code for answer in answers]
    assert answers[0].json() == answers[1].json()
    assert ["k", "k"] == [request["key"] for request in (await provider.get("/requests")).json()]
    assert ["k"] == [charge["key"] for charge in (await provider.get("/charges")).json()]


@pytest.mark.parametrize(("behaviour", "status"), [("fail", 503), ("busy", 429), ("refuse", 402), ("slow", 201)])
async def test_it_behaves_as_it_is_told(provider: httpx.AsyncClient, behaviour: str, status: int):
    """Each mood has its answer, 429 with a Retry-After, and only a good one makes a charge."""
    await provider.put("/mode", json={"behaviour": behaviour, "seconds": 0})
    answer = await provider.post("/charges", json=CHARGE, headers={"Idempotency-Key": "k"})
    assert status == answer.status_code
    assert ("retry-after" in answer.headers) is (status == 429)
    assert (status == 201) is bool((await provider.get("/charges")).json())


async def test_what_was_charged_is_not_refused_later(provider: httpx.AsyncClient):
    """A key that was charged gets its charge again, whatever the mood is by then."""
    first = await provider.post("/charges", json=CHARGE, headers={"Idempotency-Key": "k"})
    await provider.put("/mode", json={"behaviour": "refuse"})
    again = await provider.post("/charges", json=CHARGE, headers={"Idempotency-Key": "k"})
    assert (201, first.json()) == (again.status_code, again.json())


# -- the books --------------------------------------------------------------------------------------------------------


def all_well() -> tuple[Told, books.Books]:
    """One of each: a user, a course, an enrollment that was completed, one that was compensated."""
    user, course, done, refused = (str(uuid.uuid4()) for _ in range(4))
    told = Told(users=[user], courses=[course], enrollments=[done, refused])
    kept = books.Books(states={done: "completed", refused: "compensated"})
    kept.effects.update([("known to course-service", user), ("prepared as content", course)])
    for id_, ending in ((done, books.WHEN_COMPLETED), (refused, books.WHEN_COMPENSATED)):
        kept.effects.update((what, id_) for what in (*books.ALWAYS, *ending))
    return told, kept


def test_books_that_agree_find_nothing():
    """Where everything happened once, nothing is lost and nothing doubled."""
    assert ({}, {}) == (books.lost(*all_well()), books.doubled(*all_well()))


def test_any_effect_that_is_missing_is_found():
    """Whichever single effect is taken away, exactly what was accepted for it counts as lost."""
    told, kept = all_well()
    for effect in list(kept.effects):
        del kept.effects[effect]
        assert {effect[1]: [f"not {effect[0]}"]} == books.lost(told, kept)
        kept.effects[effect] = 1


def test_any_effect_that_happened_twice_is_found():
    """Whichever single effect happened twice, it is found."""
    told, kept = all_well()
    for effect in list(kept.effects):
        kept.effects[effect] = 2
        assert {effect[1]: [f"{effect[0]} 2 times"]} == books.doubled(told, kept)
        kept.effects[effect] = 1


def test_an_enrollment_that_ended_both_ways_is_found():
    """Charged and compensated is a double effect, though each happened once."""
    told, kept = all_well()
    kept.effects["charged", told.enrollments[1]] = 1
    assert {told.enrollments[1]: ["completed and compensated"]} == books.doubled(told, kept)


def charged(kept: books.Books, told: Told, *charges: tuple[str, int], paid: int = 4900) -> str:
    """Plant the provider's charges, each asked for once, for the enrollment that was completed."""
    (done, _) = told.enrollments
    told.prices[done] = 4900
    kept.charges[done] = [books.Asked(*charge) for charge in charges]
    kept.requests[done] = list(kept.charges[done])
    kept.paid[done] = [paid]
    kept.effects["charged", done] = len(charges)
    return done


def test_a_repeated_request_is_no_double_effect():
    """Asked three times under one key and charged once: nothing is wrong, and the books know of the repeats."""
    told, kept = all_well()
    done = charged(kept, told, ("k", 4900))
    kept.requests[done] *= 3
    assert ({}, 2) == (books.doubled(told, kept), kept.repeated)


def test_a_charge_under_a_second_key_is_found():
    """Which key it was charged under does not matter: the money was taken twice."""
    told, kept = all_well()
    done = charged(kept, told, ("k", 4900), ("another", 4900))
    wrong = ["charged 2 times", "charged under 2 keys", "charged 9800, owed 4900", "charged 9800, noted as paid 4900"]
    assert {done: wrong} == books.doubled(told, kept)
    assert 0 == kept.repeated


def test_more_money_than_owed_is_found():
    """One charge, of more than the price, is a double effect; so is one of less where there is no coupon."""
    told, kept = all_well()
    done = charged(kept, told, ("k", 9800), paid=9800)
    assert {done: ["charged 9800, owed 4900"]} == books.doubled(told, kept)
    charged(kept, told, ("k", 4410), paid=4410)
    assert {done: ["charged 4410, owed 4900"]} == books.doubled(told, kept)
    told.coupons[done] = "WELCOME10"
    assert {} == books.doubled(told, kept)


def test_a_charge_that_payment_service_notes_otherwise_is_found():
    """What was taken and what was noted as paid are the same money."""
    told, kept = all_well()
    done = charged(kept, told, ("k", 4900), paid=2900)
    assert {done: ["charged 4900, noted as paid 2900"]} == books.doubled(told, kept)


def test_a_charge_that_nobody_asked_for_is_found():
    """The provider's two lists belong together: each charge has its request, of the same key and amount."""
    told, kept = all_well()
    done = charged(kept, told, ("k", 4900))
    kept.requests[done] = [books.Asked("k", 2900)]
    assert {done: ["charged what nobody asked for"]} == books.doubled(told, kept)


async def test_the_providers_lists_are_read_by_what_was_paid_for(provider: httpx.AsyncClient, tmp_path: Path):
    """The real provider, asked twice under one key and once under another: two charges of one enrollment, one repeat."""
    import learning_hub.provider as module

    told, kept = all_well()
    for key in ("k", "k", "another"):
        order = {**CHARGE, "reference": told.enrollments[0]}
        await provider.post("/charges", json=order, headers={"Idempotency-Key": key})
    await provider.post("/charges", json=CHARGE, headers={"Idempotency-Key": "of somebody else"})
    copy = sqlite3.connect(tmp_path / "copy.db")
    module.books.backup(copy)
    copy.close()
    kept.requests.clear()
    del kept.effects["charged", told.enrollments[0]]
    await books.read_provider(tmp_path / "copy.db", set(told.enrollments), kept)
    assert {told.enrollments[0]: [("k", 100), ("another", 100)]} == kept.charges
    assert (3, 1) == (len(kept.requests[told.enrollments[0]]), kept.repeated)
    assert ["charged 2 times", "charged under 2 keys"] == books.doubled(told, kept)[told.enrollments[0]]


def test_a_pending_enrollment_is_lost_until_it_ends():
    """What was accepted and has not ended counts as lost, and so does what nobody knows of."""
    told, kept = all_well()
    kept.states = {told.enrollments[0]: "pending"}
    assert {told.enrollments[0]: ["pending"], told.enrollments[1]: ["unknown to enrollment-service"]} == books.lost(
        told, kept
    )


async def test_the_embedded_broker_is_there_for_as_long_as_it_is_wanted():
    """The default broker is meshkit's own, and gone afterwards."""
    async with demo_broker("embedded") as (name, url):
        assert "embedded" == name
        assert url.startswith("amqp://")
