"""Ports of 127.0.0.1 for servers that must be told one before they listen.

The system hands out ports by itself, to every server that asks for any and to every client that connects. A port that
was only looked at is one of them again: so these are from below its range.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from contextlib import suppress

_SHARES = 8
"""Of test processes side by side (pytest-xdist's workers are `gw0`, `gw1`...) each has every eighth port."""

_share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES
_ports = list(range(11_000 + _share, 32_000, _SHARES))
_untried = itertools.cycle(random.SystemRandom().sample(_ports, len(_ports)))


def free_port() -> int:
    """One that nobody has. It is not soon given again, so that it may also stand for a server that is not there."""
    for port in _untried:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a cycle has no end")
