"""What `./run proof kill` takes for shown; the proof itself is too long for a test."""

from __future__ import annotations

import subprocess
import sys

import pytest
from demo_runs import ROOT

from learning_hub.demo.platform import MODULES
from proofs.kill import shown

PROVEN = {
    "kills": dict.fromkeys(MODULES, 2),
    "lost": 0,
    "double_effects": 0,
    "left_in_dlq": 0,
}


@pytest.mark.parametrize("kills", ["0", "-1"])
def test_no_kills_are_no_proof(kills: str):
    """Where nothing would be killed, that is a mistake in the command line and no success."""
    done = subprocess.run(
        [sys.executable, "-m", "proofs.kill", "--kills", kills], capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    assert (2, "") == (done.returncode, done.stdout)
    assert "--kills is 1 or more" in done.stderr


def test_all_that_was_planned_must_have_been_done():
    """Every process of the hub was killed as often as asked for, and the books agree: only that shows it."""
    assert shown(PROVEN, 2)
    once_less = {**dict.fromkeys(MODULES, 2), "payment-service": 1}
    for wrong in ({"kills": once_less}, {"kills": {}}, {"lost": 1}, {"double_effects": 1}, {"left_in_dlq": 1}):
        assert not shown({**PROVEN, **wrong}, 2)
