"""The habits that tests/conftest.py holds every test to."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project of one file that has our conftest."""
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    return pytester


def test_a_leaked_task_fails_the_test(project: pytest.Pytester) -> None:
    """A test that leaves a task running is an error that names the task; one that ends its tasks passes."""
    project.makepyfile(
        """
        import asyncio

        async def test_leaks():
            global kept
            kept = asyncio.create_task(asyncio.sleep(60), name="the-forgotten-one")

        async def test_ends_what_it_starts():
            task = asyncio.create_task(asyncio.sleep(60))
            task.cancel()
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the-forgotten-one*"])


def test_what_is_left_out_is_named(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server its tests are skipped and counted at the end; with MESHKIT_REQUIRE_REAL=1 they fail."""
    monkeypatch.setattr("meshkit.testing.servers.available", lambda: {"redis": None, "jaeger": None})
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("n", [1, 2])
        def test_fixture(redis_server, n): ...

        @pytest.mark.real("jaeger")
        def test_marker(): ...
        """
    )
    monkeypatch.setenv("MESHKIT_REQUIRE_REAL", "0")
    result = project.runpytest_inprocess()
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(
        [
            "left out: jaeger (not installed; ./run servers) – 1 test",
            "left out: redis (not installed; ./run servers) – 2 tests",
        ]
    )
    monkeypatch.setenv("MESHKIT_REQUIRE_REAL", "1")
    result = project.runpytest_inprocess()
    assert 0 == result.parseoutcomes().get("skipped", 0)
    assert 3 == sum(result.parseoutcomes().get(word, 0) for word in ("errors", "failed"))


def test_nothing_is_said_where_all_ran(project: pytest.Pytester) -> None:
    """A run that left nothing out has no such section."""
    project.makepyfile("def test_runs(): ...")
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*left out*")
