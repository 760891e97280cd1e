"""The configuration file: YAML into plain values, with a complaint for everything that is not as meant.

Rules:
- Text from the environment stays one scalar: it is put in after the YAML has been parsed, and never parsed as YAML.
- Only `true` and `false` are booleans and only decimal digits are numbers, as in YAML 1.2: `threading: off` is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from gateway.config_draft import Draft, Path, Tree


class _Loader(yaml.SafeLoader):
    """Plain scalars as in YAML 1.2. Long digit strings stay text: they are ids or keys, not amounts."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,18}", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)

_SCALARS: dict[str, Any] = {
    _TAG + "str": str,
    _TAG + "null": lambda _: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": int,
    _TAG + "float": float,
    _TAG + "merge": str,
}
_VARIABLE = re.compile(
    r"\$(?P<escaped>\$\{)"
    r"|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<fallback>:-(?P<default>(?:(?!\$\{)[^}])*))?\}"
    r"|(?P<malformed>\$\{)"
)
_GONE = object()


class _Builder:
    """Turns YAML nodes into plain values, knowing the path of each: puts variables in, finds keys given twice."""

    def __init__(self, draft: Draft, environ: Mapping[str, str] | None) -> None:
        self._draft = draft
        self._environ = environ
        self._open: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: Path = ()) -> Any:
        if node in self._open:
            return self._wrong(path, "holds itself; write it out instead of using an alias")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            return self._wrong(path, "has a YAML tag, which means nothing here; remove it")
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            items = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return [item for item in items if item is not _GONE]
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> Tree:
        merged: Tree = {}
        own: Tree = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                merged |= self._merged(value_node, path)
            elif not isinstance(key, str):
                self._wrong(path, f"has a list or mapping as a key in line {line}; a key is a plain word")
            elif key in lines:
                text = f"given twice, in lines {lines[key]} and {line}; keep one"
                self._draft.complain((*path, key), text, value_gone=False)
            else:
                lines[key] = line
                value = self.build(value_node, (*path, key))
                if value is not _GONE:
                    own[key] = value
        return merged | own

    def _merged(self, node: yaml.Node, path: Path) -> Tree:
        merged: Tree = {}
        for source in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            if isinstance(source, yaml.MappingNode) and isinstance(found := self.build(source, path), dict):
                merged |= found
            else:
                self._wrong(path, "has `<<` with something that is not a mapping")
        return merged

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        try:
            value = _SCALARS[node.tag](node.value)
        except (KeyError, ValueError):
            return self._wrong(path, "has a YAML tag that does not fit; put a value that begins with ! in quotes")
        if not isinstance(value, str) or self._environ is None:
            return value
        return self._with_variables(value, path, self._environ)

    def _with_variables(self, text: str, path: Path, environ: Mapping[str, str]) -> Any:
        parts: list[str] = []
        end = 0
        for match in _VARIABLE.finditer(text):
            parts.append(text[end : match.start()])
            end = match.end()
            name = match["name"]
            if match["malformed"]:
                return self._wrong(path, "`${` begins ${NAME} or ${NAME:-default}; write $${ for the characters alone")
            if match["escaped"]:
                parts.append("${")
            elif match["fallback"] is not None:
                parts.append(environ.get(name) or match["default"])
            elif name in environ:
                parts.append(environ[name])
            else:
                return self._wrong(
                    path, f"the environment variable {name} is not set; set it or write ${{{name}:-default}}"
                )
        return "".join(parts) + text[end:]

    def _wrong(self, path: Path, text: str) -> Any:
        self._draft.complain(path, text)
        return _GONE


def parse(text: str, draft: Draft, environ: Mapping[str, str] | None) -> Any:
    """The value that a YAML text holds; None if it is empty or wrong. Raises yaml.YAMLError, RecursionError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        value = None if node is None else _Builder(draft, environ).build(node)
        return None if value is _GONE else value
    finally:
        loader.dispose()


def read_file(name: str, *, required: bool, environ: Mapping[str, str], draft: Draft) -> None:
    """Put the file's settings into the draft. A missing file is a problem only if it is `required`."""
    try:
        with open(name, encoding="utf-8-sig") as file:
            value = parse(file.read(), draft, environ)
    except FileNotFoundError:
        problem = "no such file; name an existing one with --config or GATEWAY_CONFIG" if required else None
    except OSError as error:
        problem = f"cannot be read: {error.strerror or 'input/output error'}"
    except UnicodeDecodeError:
        problem = "is not UTF-8 text; save it as UTF-8"
    except (yaml.YAMLError, RecursionError) as error:
        problem = _syntax_problem(error)
    else:
        draft.tree = value if isinstance(value, dict) else {}
        problem = None if isinstance(value, dict | None) else "must hold settings as `key: value`, not a list or a text"
    if problem:
        draft.problems.append(f"{' '.join(name.split())}: {problem}")


def _syntax_problem(error: Exception) -> str:
    """Says where. Says what only where YAML's own words cannot quote the text, which may be a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    what = str(getattr(error, "problem", None) or "")
    safe = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError) and "tag handle" not in what
    said = f" ({' '.join(what.split())})" if safe and what else ""
    return f"{where}this is not valid YAML{said}; put values with special characters in quotes"
