"""The embedded server's own tests, beside the contract that it shares with RabbitMQ."""

import sys
from pathlib import Path

# The frame-by-frame client of the contract tests breaks the protocol here too.
sys.path.append(str(Path(__file__).resolve().parents[1] / "contract"))
