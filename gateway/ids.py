"""Random parts of ids: 128 bits each, asked of the system for many at once."""

from __future__ import annotations

import os

_AT_ONCE = 64
_ready: list[str] = []


def random_hex() -> str:
    """32 hexadecimal digits that nobody can foretell."""
    try:
        return _ready.pop()
    except IndexError:
        digits = os.urandom(16 * _AT_ONCE).hex()
        _ready.extend(digits[at : at + 32] for at in range(32, len(digits), 32))
        return digits[:32]


os.register_at_fork(after_in_child=_ready.clear)
