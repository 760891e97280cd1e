"""Where settings come from: the file, the environment and flags, put into one tree before anybody looks at types.

From strong to weak: flags; GATEWAY_HOST, GATEWAY_PORT, GATEWAY_WORKERS; GATEWAY__SECTION__KEY; the file (seed 3's keys
are other names of ours there); the seeds' environment names, which only fill what nobody gave.

Rules:
- Text from the environment stays one scalar: it is put in after the YAML has been parsed, and never parsed as YAML.
- Only `true` and `false` are booleans and only decimal digits are numbers, as in YAML 1.2: `threading: off` is text.
- A complaint names paths, variables and known names, never a value: any value may be a secret.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

Path = tuple[str | int, ...]
Tree = dict[str, Any]

PREFIX = "GATEWAY__"
SHORT_NAMES: dict[str, Path] = {
    "GATEWAY_HOST": ("server", "host"),
    "GATEWAY_PORT": ("server", "port"),
    "GATEWAY_WORKERS": ("server", "workers"),
}
SEED_NAMES: dict[str, Path] = {
    "GATEWAY_ADMIN_KEY": ("auth", "admin_key"),
    "DATABASE_URL": ("database", "url"),
    "APP_NAME": ("server", "name"),
    "APP_VERSION": ("server", "version"),
}
S3_NAMES: dict[str, Path] = {
    "S3_ENDPOINT": ("storage", "endpoint"),
    "S3_ACCESS_KEY": ("storage", "access_key"),
    "S3_SECRET_KEY": ("storage", "secret_key"),
}
SEED_KEYS: dict[str, Path] = {
    "model": ("default_model",),
    "rate_limit_per_minute": ("limits", "requests_per_minute"),
    "max_file_size_mb": ("files", "max_mb"),
}
SEED_PRICES = {"input_per_1k": "input", "output_per_1k": "output"}
VENDORS: dict[str, tuple[str, Tree]] = {
    "openai": ("OPENAI_API_KEY", {"type": "openai", "base_url": "https://api.openai.com/v1"}),
    "deepseek": (
        "DEEPSEEK_API_KEY",
        {"type": "openai", "base_url": "https://api.deepseek.com", "on_disconnect": "drain"},
    ),
}
VENDOR_URLS = {"deepseek": "DEEPSEEK_BASE_URL"}

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


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


# What is known: the settings as a schema


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


def nearest_setting(path: Path, schema: type[BaseModel], *, seed_keys: bool = True) -> Path:
    """The known setting that an unknown one was probably meant to be; `seed_keys`: or a key of seed 3."""
    level: Any = schema
    for key in path[:-1]:
        level = bare(inside(level, key))
    if not is_section(level):
        return path[:-1]
    here = [*level.model_fields]
    if level is schema:
        here += [*SEED_KEYS, "pricing"] if seed_keys else []
    name = str(path[-1]).lower()
    if len(path) <= 2 and not difflib.get_close_matches(name, here, n=1):
        sections: dict[str, Any] = {section: field.annotation for section, field in schema.model_fields.items()}
        homes = {key: section for section, kind in sections.items() if is_section(kind) for key in kind.model_fields}
        for key in difflib.get_close_matches(name, homes, n=1):
            return (homes[key], key)
    return (*path[:-1], nearest(name, here))


def nearest(name: str, known: Collection[str]) -> str:
    return (difflib.get_close_matches(name, known, n=1, cutoff=0) or [""])[0]


def dotted(path: Path) -> str:
    """The path as shown in one line. A key that cannot be a name may be a misplaced secret and is not shown."""
    shown = (str(key) if re.fullmatch(r"(?!.*://)[^\s\x00-\x1f\x7f]+", str(key)) else "?" for key in path)
    return ".".join(shown) or "config"


# The file


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


# The environment


def effective_environment(environ: Mapping[str, str], draft: Draft) -> dict[str, str]:
    """DATABASE_ENABLED=false hides DATABASE_URL, also from `${DATABASE_URL}` in the file."""
    hidden = {"DATABASE_URL"} if _switch("DATABASE_ENABLED", ("database", "url"), environ, draft) is False else set()
    return {name: value for name, value in environ.items() if name not in hidden}


def read_environment(environ: Mapping[str, str], draft: Draft, schema: type[BaseModel]) -> None:
    """GATEWAY__SECTION__KEY, then the short names, which are stronger. An empty short name is as good as none."""
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and (path := _named_path(name, draft, schema)):
            draft.put(path, environ[name], name)
    for name, path in SHORT_NAMES.items():
        value = environ.get(name, "").strip()
        if value.startswith("tcp://"):  # Kubernetes makes NAME_PORT for every service, also for one called gateway
            draft.notes.append(f"{name} is ignored: it is the address of a Kubernetes service, not a setting")
        elif value:
            draft.put(path, value, name)


def _named_path(name: str, draft: Draft, schema: type[BaseModel]) -> Path | None:
    """The setting that an environment name means; None and a complaint if there is none."""
    path: Path = ()
    level: Any = schema
    for part in name[len(PREFIX) :].split("__"):
        key = part.lower() if is_section(level) else _entry(part, draft.get(path))
        path = (*path, key)
        level = None if get_origin(level) is tuple else bare(inside(level, key))
        if level is None:
            near = SEED_KEYS.get(key) or nearest_setting(path, schema, seed_keys=False)
            meant = PREFIX + "__".join(str(key).upper() for key in near)
            draft.complain(path, f"unknown setting in the environment, {name}; did you mean {meant}?")
            return None
    if is_section(level) or get_origin(level) is dict:
        draft.complain(path, f"{name} names a whole section; name one of its settings", value_gone=False)
        return None
    return path


def _entry(part: str, existing: Any) -> str:
    """The existing entry meant by `part`, in any case, where a shell's `_` stands for `-`, `.` and the like."""
    names = [str(name) for name in existing] if isinstance(existing, dict) else []
    same = [name for name in names if name.lower() == part.lower()]
    like = same or [name for name in names if re.sub(r"\W", "_", name).lower() == part.lower()]
    return like[0] if len(like) == 1 else part.lower()


def read_flags(flags: Mapping[str, Any], draft: Draft) -> None:
    """Dotted keys; None is a flag that was not given."""
    for key, value in flags.items():
        if value is not None:
            draft.put(tuple(key.split(".")), value)


def _switch(name: str, path: Path, environ: Mapping[str, str], draft: Draft) -> bool | None:
    """The environment variable as yes, no or not given."""
    text = environ.get(name, "").strip().lower()
    if text and text not in _YES + _NO:
        draft.complain(path, f"{name} must be true or false", value_gone=False)
    return text in _YES if text in _YES + _NO else None


# The seeds


def adopt_seed_keys(draft: Draft) -> None:
    """Move seed 3's keys in the file to the places of ours."""
    for old, path in SEED_KEYS.items():
        if old in draft.tree:
            value = draft.tree.pop(old)
            if draft.has(path):
                text = f"given twice, as {old} and as {dotted(path)}; keep {dotted(path)}"
                draft.complain(path, text, value_gone=False)
            else:
                draft.put(path, value, old)


def adopt_pricing(pricing: Any, model: Any, draft: Draft) -> dict[str, dict[str, Decimal]]:
    """Seed 3's `pricing`, put into the entry of the model; returned by name where the model has no entry."""
    price = dict(_seed_prices(pricing, draft))
    if not price:
        return {}
    if not isinstance(model, str) or not model:
        draft.complain(("pricing",), "is the price of `model`, which is not given; add model: NAME")
        return {}
    models = draft.get(("models",))
    entries = {name: entry or {} for name, entry in models.items()} if isinstance(models, dict) else {}
    name = next((n for n, e in entries.items() if isinstance(e, dict) and model in _texts(e.get("aliases"))), model)
    path = ("models", name, "price")
    if name not in entries:
        return {name: price}
    if draft.get(path) is not None:
        draft.complain(path, f"given twice, as pricing and as {dotted(path)}; keep {dotted(path)}", value_gone=False)
    else:
        draft.put(path, price, "pricing")
    return {}


def _seed_prices(pricing: Any, draft: Draft) -> Iterator[tuple[str, Decimal]]:
    if not isinstance(pricing, dict | None):
        draft.complain(("pricing",), "must be a mapping of input_per_1k and output_per_1k")
        return
    for key, value in (pricing or {}).items():
        path = ("pricing", key)
        if key not in SEED_PRICES:
            draft.complain(path, f"unknown setting; did you mean pricing.{nearest(key, SEED_PRICES)}?")
        elif value not in (None, ""):
            try:
                yield SEED_PRICES[key], dollars(value, times=1000)
            except ValueError as error:
                draft.complain(path, str(error))


def fill_from_seeds(environ: Mapping[str, str], draft: Draft) -> None:
    """The environment names of the seeds, for what nobody gave."""
    for name, path in SEED_NAMES.items():
        if environ.get(name):
            draft.fill(path, environ[name], name)
    enabled = _switch("S3_ENABLED", ("storage", "url"), environ, draft)
    if enabled is False:
        return
    url: Path = ("storage", "url")
    bucket = environ.get("S3_BUCKET", "").strip().removeprefix("s3://")
    if bucket:
        draft.fill(url, f"s3://{bucket}", "S3_BUCKET")
    elif enabled and not draft.has(url):
        draft.complain(url, "S3_ENABLED is true but S3_BUCKET is empty; name the bucket or set S3_ENABLED=false")
    if str(draft.get(url)).startswith("s3://"):
        for name, path in S3_NAMES.items():
            if environ.get(name):
                draft.fill(path, environ[name], name)


def fill_vendors(environ: Mapping[str, str], draft: Draft) -> None:
    """For a file without backends: every vendor whose key is in the environment, or that the environment names."""
    named = draft.names("backends")
    if not named <= set(VENDORS):
        return
    for name, (variable, preset) in VENDORS.items():
        if environ.get(variable, "").strip() or name in named:
            draft.fill(("backends", name, "api_key"), environ.get(variable, ""), variable)
            url = VENDOR_URLS.get(name, "")
            if environ.get(url):
                draft.fill(("backends", name, "base_url"), environ[url], url)
            for key, value in preset.items():
                draft.fill(("backends", name, key), value)


# Texts as values


def items(text: str) -> list[Any]:
    """A list given as one text: `[a, b]` as in YAML and JSON, or `a, b`."""
    if not text.strip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    draft = Draft()
    try:
        value = parse(text, draft, None)
    except (yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, list) or draft.problems:
        raise ValueError("must be a list: [a, b] or a, b")
    return value


def _texts(value: Any) -> list[Any]:
    """A list of names in either spelling; empty where it is neither."""
    if isinstance(value, str):
        try:
            return items(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def dollars(value: Any, times: int = 1) -> Decimal:
    """USD per million tokens, exactly as written: a float counts as its shortest decimal form."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number of USD")
    try:
        amount = Decimal(
            value.strip() if isinstance(value, str) else repr(value) if isinstance(value, float) else value
        )
    except InvalidOperation:
        raise ValueError("must be a number of USD") from None
    if not amount.is_finite() or not 0 <= amount * times <= 10**6:
        raise ValueError("must be from 0 to 1000000 USD per million tokens")
    amount *= times
    exponent = amount.normalize().as_tuple().exponent
    if isinstance(exponent, int) and exponent < -9:
        raise ValueError("must have at most 9 decimals")
    return amount
