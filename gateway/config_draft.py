"""Settings as written: one tree that all sources fill before anybody looks at types, and what is wrong with it so far.

A complaint names paths, variables and known names, never a value: any value may be a secret.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

Path = tuple[str | int, ...]
Tree = dict[str, Any]


class Draft:
    """Settings as written: a tree, where its values came from, and what is wrong with it so far."""

    def __init__(self) -> None:
        self.tree: Tree = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._origins: dict[Path, str] = {}
        self._reported: set[Path] = set()

    def complain(self, path: Path, text: str, *, value_gone: bool = True) -> None:
        """One line for a path. `value_gone`: the value is left out, so what else is said here would follow from it."""
        if path in self._reported:
            return
        if value_gone:
            self._reported.add(path)
        origin = next((self._origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._origins), None)
        self.problems.append(f"{dotted(path)}: {text}" + (f" (from {origin})" if origin else ""))

    def reported(self, path: Path) -> bool:
        """Whether `path`, something around it or something inside it has been left out as wrong."""
        return any(path[: len(other)] == other or other[: len(path)] == path for other in self._reported)

    def get(self, path: Path) -> Any:
        """What stands at `path`; None if nothing does."""
        node: Any = self.tree
        for key in path:
            if not isinstance(node, dict):
                return None
            node = node.get(key)
        return node

    def names(self, section: str) -> set[str]:
        """The names under `section`, whatever they hold."""
        found = self.tree.get(section)
        return set(found) if isinstance(found, dict) else set()

    def has(self, path: Path) -> bool:
        parent = self.get(path[:-1])
        return isinstance(parent, dict) and path[-1] in parent

    def put(self, path: Path, value: Any, origin: str | None = None) -> None:
        """Set a value, with the sections around it. Where a section should be and is not, nothing: that is reported."""
        node: Any = self.tree
        for key in path[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                return
        node[path[-1]] = value
        self._origins.pop(path, None)
        if origin:
            self._origins[path] = origin

    def fill(self, path: Path, value: Any, origin: str | None = None) -> None:
        """Set a value that nobody gave."""
        if not self.has(path):
            self.put(path, value, origin)

    def drop(self, path: Path) -> bool:
        """Take out the value at `path`, or the nearest thing around it that has a name. False: there is none."""
        node: Any = self.tree
        cut: tuple[Tree, str] | None = None
        for key in path:
            if isinstance(node, dict) and isinstance(key, str) and key in node:
                cut, node = (node, key), node[key]
            elif isinstance(node, list) and isinstance(key, int) and key < len(node):
                node = node[key]
            else:
                break
        if cut is not None:
            del cut[0][cut[1]]
        return cut is not None


def check_file(path: Path, file: str | None, draft: Draft) -> None:
    if file is not None and not os.path.isfile(file):
        draft.complain(path, "no such file; relative paths begin at the working directory")


def bare(annotation: Any) -> Any:
    """The annotation without `| None`."""
    args = get_args(annotation)
    return next(arg for arg in args if arg is not NoneType) if NoneType in args else annotation


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def inside(annotation: Any, key: str | int) -> Any:
    """The annotation of what `key` names within a value of `annotation`; None: nothing can be there."""
    kind = bare(annotation)
    if is_section(kind):
        field = kind.model_fields.get(key)
        return field.annotation if field else None
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def nearest(name: str, known: Collection[str]) -> str:
    return (difflib.get_close_matches(name, known, n=1, cutoff=0) or [""])[0]


def dotted(path: Path) -> str:
    """The path as shown in one line. A key that cannot be a name may be a misplaced secret and is not shown."""
    shown = (str(key) if re.fullmatch(r"(?!.*://)[^\s\x00-\x1f\x7f]+", str(key)) else "?" for key in path)
    return ".".join(shown) or "config"
