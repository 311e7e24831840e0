import asyncio

from meshkit.core.scope import Handling, Scope, current_scope, scope_open


def test_a_narrowed_scope_never_has_more_time():
    """Narrowing takes the earlier deadline."""
    assert 5.0 == Scope(deadline=10.0).narrowed(5.0).deadline
    assert 5.0 == Scope(deadline=5.0).narrowed(10.0).deadline
    assert 5.0 == Scope().narrowed(5.0).deadline


def test_what_a_narrowed_scope_learns_belongs_to_the_request():
    """Marks made inside are seen outside, each once."""
    outer = Scope()
    inner = outer.narrowed(1.0).narrowed(0.5)
    inner.mark_degraded("cache")
    inner.mark_degraded("cache")
    inner.mark_exhausted()
    inner.note_opened(3.0)
    outer.note_opened(2.0)
    assert (("cache",), True, 3.0) == (outer.degraded, outer.exhausted, outer.opened)


async def test_child_tasks_share_the_scope_and_siblings_do_not_see_a_narrowing():
    """A task started inside sees the same object; a deadline narrowed in one task stays there."""

    async def narrows():
        with scope_open(current_scope().narrowed(1.0)):
            await asyncio.sleep(0)
            current_scope().mark_degraded("child")

    async def looks():
        await asyncio.sleep(0)
        return current_scope().deadline

    with scope_open(Scope(deadline=9.0)) as scope:
        _, seen = await asyncio.gather(narrows(), looks())
    assert 9.0 == seen
    assert ("child",) == scope.degraded
    assert current_scope() is None


def test_the_ordinals_of_a_delivery_repeat():
    """A redelivery that publishes the same in the same order counts the same."""
    first, again = (Handling(message_id="m", queue="q") for _ in range(2))
    for handling in (first, again):
        assert [0, 1, 0] == [handling.ordinal(kind) for kind in ("a", "a", "b")]
