"""Our SQL as SQLite takes it, pure: `?` for `$1` (by name costs a look-up for each value of each row), several rows at
once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter

from gateway.store.database import Value

ROWS_AT_ONCE = 16
"""How many rows one statement inserts. It fails where it is (OR FAIL), for what has failed is rolled back as a whole
anyway; else SQLite would first copy each page that it changes, into a file once they are more than a few. An upsert,
which may change rows that are there, cannot be told to: those go one by one."""

_PLACE = re.compile(r"\$(\d+)")
_INSERT = re.compile(
    r"(?P<into>\s*INSERT INTO (?P<table>\w+) \([\w, \n]+\))\s+"
    r"(VALUES (?P<row>\([?, ]+\))(?P<rest>.*)|(?P<select>SELECT (?!.*\b(?P=table)\b).*))",
    re.DOTALL,
)


def statements(sql: str, rows: Sequence[Sequence[Value]]) -> Iterator[tuple[str, Sequence[Value]]]:
    """A step's statements with their values: up to `ROWS_AT_ONCE` rows each, if the statement can take several."""
    text, placed = positional(sql)
    several = len(rows) > 1 and _of_rows(text, 2) is not None
    for first in range(0, len(rows), ROWS_AT_ONCE if several else 1):
        if not several:
            yield text, placed(rows[first])
            continue
        together = rows[first : first + ROWS_AT_ONCE]
        yield _of_rows(text, len(together)) or text, list(chain.from_iterable(map(placed, together)))


@lru_cache(512)
def _of_rows(text: str, count: int) -> str | None:
    """The statement that inserts so many rows; None if it is no INSERT, reads what it inserts, or is an upsert."""
    found = _INSERT.fullmatch(text)
    if found is None or "DO UPDATE" in text:
        return None
    into = found["into"].replace("INSERT", "INSERT OR FAIL", 1)
    if found["row"] is not None:
        return f"{into} VALUES {', '.join([found['row']] * count)}{found['rest']}"
    return f"{into} {' UNION ALL '.join([found['select']] * count)}"


@lru_cache(512)
def positional(sql: str) -> tuple[str, Callable[[Sequence[Value]], Sequence[Value]]]:
    """The statement with `?` for `$1`, and what brings a row's values into the order in which they are asked for."""
    order = [int(place) - 1 for place in _PLACE.findall(sql)]
    text = _PLACE.sub("?", sql)
    if order == list(range(len(order))):
        return text, tuple
    if len(order) == 1:
        return text, itemgetter(slice(order[0], order[0] + 1))
    return text, itemgetter(*order)
