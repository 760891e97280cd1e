"""Statements without their owner: what a test must notice. They are read from the modules, so none is forgotten."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from types import ModuleType

import pytest

OWNER = re.compile(
    r"(?:\w+\.)?user_id(?: \|\| '')? = (?:\$\d+|l\.user_id)(?: AND user_id = \$1| AND l\.user_id = \$1)?"
    r"|COALESCE\((?:\w+\.)?user_id, ''\) = \$1"
    r"|(?<=\()l\.user_id(?=, l\.label, l\.completion_pk\))"
)
"""How a statement asks for it. The last: as the first of several columns that are compared with so many values."""
VERBS = re.compile(r"\s*(SELECT|UPDATE|DELETE|WITH|INSERT\b.*\bSELECT)\b", re.DOTALL)

TEMPLATE = re.compile(r"(?<!'){")


def statements(modules: Sequence[ModuleType]) -> dict[str, str]:
    """The SQL that they run on rows that are there, as it is now: constants, and the items of mappings of them."""
    found = {}
    for module in modules:
        short = module.__name__.rpartition(".")[2]
        for name, value in vars(module).items():
            if isinstance(value, str) and VERBS.match(value) and not TEMPLATE.search(value):
                found[f"{short}.{name}"] = value
            elif isinstance(value, dict) and name.isupper():
                found |= {f"{short}.{name}[{key}]": sql for key, sql in value.items() if VERBS.match(str(sql))}
    return found


def mutants(modules: Sequence[ModuleType], but: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Each statement that has an owner without it, and those that ask for it in several places without each of them.
    What is said for each engine is said by one text, so once is enough: SQLite's."""
    for name, sql in statements(modules).items():
        if name in but or name.endswith("[postgres]"):
            continue
        places = list(OWNER.finditer(sql))
        if not places:
            continue
        yield name, OWNER.sub(_anybody, sql)
        if len(places) > 1 and not name.startswith("stored."):
            for place in places:
                yield name, sql[: place.start()] + _anybody(place) + sql[place.end() :]


def _anybody(place: re.Match[str]) -> str:
    if "=" not in place[0]:
        return "CAST($1 AS TEXT)"
    value = re.search(r"\$\d+", place[0])
    return f"CAST({value[0]} AS TEXT) = {value[0]}" if value else "1 = 1"


def patch(monkeypatch: pytest.MonkeyPatch, modules: Sequence[ModuleType], name: str, sql: str) -> None:
    """Puts it in the statement's place, also where it is imported by name."""
    module, constant, _, key = re.fullmatch(r"(\w+)\.(\w+)(\[(.*)\])?", name).groups()  # type: ignore[union-attr] # our own
    found = next(one for one in modules if one.__name__.endswith(f".{module}"))
    if key is not None:
        monkeypatch.setitem(getattr(found, constant), key, sql)
        return
    for one in modules:
        if getattr(one, constant, None) == getattr(found, constant) and one is not found:
            monkeypatch.setattr(one, constant, sql)
    monkeypatch.setattr(found, constant, sql)
