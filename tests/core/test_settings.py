import pytest

from meshkit import ConfigurationError
from meshkit.core.settings import setting


def test_the_argument_comes_first_and_an_empty_variable_is_none(monkeypatch):
    """Argument, then MESHKIT_*, then OTEL_*, then the default."""
    monkeypatch.setenv("MESHKIT_FLUSH_TIMEOUT", " ")
    monkeypatch.setenv("OTEL_FLUSH_TIMEOUT", "3")

    def ask(argument):
        return setting("flush_timeout", argument, parse=float, default=5.0, otel="OTEL_FLUSH_TIMEOUT")

    assert (0.0, 3.0) == (ask(0.0), ask(None))
    monkeypatch.setenv("MESHKIT_FLUSH_TIMEOUT", "2")
    assert 2.0 == ask(None)
    monkeypatch.delenv("MESHKIT_FLUSH_TIMEOUT")
    monkeypatch.delenv("OTEL_FLUSH_TIMEOUT")
    assert 5.0 == ask(None)


def test_a_text_that_is_no_value_is_named_without_its_password(monkeypatch):
    """The error names the variable and what is wrong with it, and no credentials."""

    def refuse(text):
        raise ValueError(f"cannot read {text}")

    monkeypatch.setenv("MESHKIT_AMQP_URL", "amqp://me:s3cret@host/")
    with pytest.raises(ConfigurationError, match="MESHKIT_AMQP_URL") as caught:
        setting("amqp_url", None, parse=refuse, default="")
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_number_that_is_too_large_is_a_wrong_setting(monkeypatch):
    """An overflow in the parser is told like any other value that cannot work."""
    monkeypatch.setenv("MESHKIT_WINDOW", "inf")
    with pytest.raises(ConfigurationError, match="MESHKIT_WINDOW is 'inf'"):
        setting("window", None, parse=lambda text: int(float(text)), default=1)
