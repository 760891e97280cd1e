"""Ids: random ones that nobody can foretell, and ones in the order of time, which indexes take at their end."""

from __future__ import annotations

import os
import time

_AT_ONCE = 64
_BITS_OF_TIME = 1 << 48
_ready: list[str] = []
_now = (0, "0" * 12)
"""The millisecond of the last one, and its digits: a call makes several at once."""


def random_hex() -> str:
    """32 hexadecimal digits that nobody can foretell: 128 bits, asked of the system for many at once."""
    try:
        return _ready.pop()
    except IndexError:
        made = os.urandom(16 * _AT_ONCE).hex(" ", 16).split()
        mine = made.pop()  # before another thread can take them all
        _ready.extend(made)
        return mine


def ordered_hex() -> str:
    """44 hexadecimal digits for the key of a table: 48 bits of the time in milliseconds (as in RFC 9562, section 5.7),
    then 128 random ones. Rows made together lie together in the index, however large the table has become."""
    global _now
    at, digits = _now
    if at != (now := time.time_ns() // 1_000_000):
        digits = hex(_BITS_OF_TIME | now)[3:]
        _now = now, digits
    try:
        return digits + _ready.pop()
    except IndexError:
        return digits + random_hex()


os.register_at_fork(after_in_child=_ready.clear)
