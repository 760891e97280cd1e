"""The direction of imports (docs/architecture.md): who may know whom, as a table, and that the tree keeps to it.

An import counts wherever it stands: at the top, in a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "gateway"

BACKENDS = ("backends.base",)
HTTP = ("backends.base", "backends.http", "backends.floats", "backends.adapt")
DIALECTS = ("api.common", "api.own_body", "api.shapes")
NOUNS = (
    *(
        "store.conversation_edits",
        "store.conversation_reads",
        "store.conversations",
        "store.files",
        "store.keys",
        "store.limits",
        "store.sessions",
        "store.stored",
    ),
    *("store.turn_leases", "store.chores", "store.purge", "store.text", "store.usage", "store.user_deletions"),
)
CORE = (
    *(
        "addresses",
        "admission",
        "allowances",
        "attachments",
        "attempts",
        "auth",
        "call",
        "caller",
        "catalog",
        "conversations",
    ),
    *(
        "current_sessions",
        "drain",
        "estimates",
        "health",
        "ids",
        "key_rules",
        "key_watch",
        "known_keys",
        "late_turns",
        "ledger",
        "limits",
    ),
    *("limits_*", "metering", "metrics", "metrics_*", "operations", "price_table", "pricing", "pulse", "relay"),
    *("rounds", "slices", "tickets", "stored", "tokens", "wrong_keys"),
    *("purge", "talks", "threads", "turn_leases", "turns", "user_deletion", "window"),
)
WEB = ("middleware", "responses")
WIRE = ("wire", "wire.*")

MAY_IMPORT: Mapping[str, Sequence[str]] = {
    "": (),
    "__main__": ("cli",),
    "cli": ("*",),
    "cli.*": ("*",),
    "app": ("*",),
    "compose": ("*",),
    "compose_limits": ("*",),
    "errors": (),
    "logs": WIRE,
    "config": ("errors", "config_*"),
    "config_draft": (),
    "config_file": ("config_draft",),
    "config_values": ("config_draft", "config_file"),
    "config_sources": ("config_draft", "config_values"),
    "config_limits": ("config_values",),
    "config_models": ("config_values",),
    "config_backends": ("config_draft", "config_values", "backends.vendors"),
    "wire": (),
    "wire.*": ("errors", *WIRE),
    "store.database": (),
    "store.postgres": ("errors", "store.database", "store.postgres_*"),
    "store.postgres_turns": ("store.database", *NOUNS),
    "store.postgres_*": ("errors", "store.database"),
    "store.sqlite": ("errors", "store.database", "store.sqlite_*"),
    "store.limits*": (
        *("errors", "ids", "limits", "limits_ahead", "store.database", "store.keys", "store.limits_*"),
        *WIRE,
    ),
    "store.connect": ("store.database", "store.postgres", "store.sqlite"),
    "store.migrate": ("errors", "store.database"),
    "store.user_deletions": ("ids", "store.chores", "store.database", "store.keys", "store.purge"),
    "store.conversations": ("store.database", "store.turn_leases"),
    "store.sessions": ("store.conversation_reads", "store.database"),
    "store.conversation_edits": ("store.conversation_reads", "store.database", "store.sessions"),
    "store.*": ("errors", "store.database", "store.text", *WIRE),
    "backends.base": ("errors", *WIRE),
    "backends.transport": ("errors",),
    "backends.floats": WIRE,
    "backends.vendors": (),
    "backends.adapt": ("errors", *WIRE, "backends.vendors"),
    "backends.client*": ("errors", "outbox", "backends.transport", "backends.client*"),
    "backends.http": ("errors", *WIRE, "backends.base", "backends.transport"),
    "backends.azure": ("errors", *WIRE, *HTTP, "backends.openai"),
    "backends.ollama*": ("errors", *WIRE, *HTTP, "backends.ollama_*", "backends.transport"),
    "backends.*": ("errors", *WIRE, *HTTP),
    "blobs.*": ("errors",),
    "extract.*": ("errors", "extract.*"),
    "server": (),
    "outbox": (),
    "server_protocol": ("server_cycle", "server_deadlines", "server_flow", "server_head"),
    "server_cycle": ("server_flow", "server_head"),
    "server_flow": ("outbox",),
    "server_*": (),
    "supervisor": ("server",),
    "gunicorn_worker": ("errors", "server", "serving"),
    "gunicorn_config": ("*",),
    "serving": ("errors", "server", "server_protocol", "supervisor"),
    "middleware": ("addresses", "logs", "errors", "ids", "responses", *WIRE),
    "responses": ("errors", *WIRE, *CORE),
    "api.*": ("", "errors", "config", *WIRE, *CORE, *WEB, *NOUNS, "store.database", *BACKENDS, *DIALECTS),
    "store": (),
    "backends": (),
    "blobs": (),
    "extract": (),
    "api": (),
    "*": ("errors", *WIRE, *CORE, *NOUNS, "store.database", *BACKENDS),
}
"""A module of the package, and the modules that it may import; the first row that fits counts. The last is the core."""


def modules(folder: Path) -> dict[str, str]:
    """The sources of a package, by name without the package's own: `wire.sse`; the package itself is ``."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


def imported(module: str, source: str, known: Mapping[str, str]) -> Iterator[str]:
    """The modules of the package that a module imports. `from gateway.store import keys` is `store.keys`."""
    is_package = any(name.startswith(f"{module}.") for name in known) or not module
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (_own(alias.name) for alias in node.names if _is_own(alias.name))
        elif isinstance(node, ast.ImportFrom):
            above = _absolute(module, is_package, node)
            for alias in node.names if _is_own(above) else ():
                inside = _own(f"{above}.{alias.name}")
                yield inside if inside in known else _own(above)


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def _is_own(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _own(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".")


def rule(module: str) -> Sequence[str]:
    return next(allowed for pattern, allowed in MAY_IMPORT.items() if fnmatchcase(module, pattern))


def wrong(module: str, names: Iterable[str]) -> list[str]:
    """Those imports of a module that the table does not allow."""
    return [name for name in names if name != module and not any(fnmatchcase(name, ok) for ok in rule(module))]


SOURCES = modules(ROOT / PACKAGE)
IMPORTS = {module: set(imported(module, source, SOURCES)) - {module} for module, source in SOURCES.items()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_in_one_direction(module: str) -> None:
    assert wrong(module, IMPORTS[module]) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert set(TopologicalSorter(IMPORTS).static_order()) == set(SOURCES)


def test_only_compose_app_and_the_command_line_know_vendors_drivers_and_app() -> None:
    def known_to(name: str) -> set[str]:
        return {module for module, names in IMPORTS.items() if name in names}

    vendors = {"backends.openai", "backends.azure", "backends.ollama", "backends.scripted"}
    assert {module for name in vendors for module in known_to(name)} == {"compose", "backends.azure"}
    assert known_to("store.postgres") == known_to("store.sqlite") == {"store.connect"}
    assert {module.partition(".")[0] for module in known_to("compose")} == {"app", "cli", "gunicorn_config"}
    assert {module.partition(".")[0] for module in known_to("app")} == {"cli"}


class TestTheChecker:
    """It can fail: made-up sources in place of ours."""

    @pytest.mark.parametrize(
        ("module", "source", "name"),
        [
            ("wire.sse", "import gateway.relay", "relay"),
            ("wire.sse", "import os, gateway.relay as r", "relay"),
            ("wire.sse", "from gateway.relay import Relay", "relay"),
            ("wire.sse", "from gateway import relay", "relay"),
            ("wire.sse", "from .. import relay", "relay"),
            ("wire.sse", "from ..relay import Relay", "relay"),
            ("wire.sse", "def f():\n    from gateway.relay import Relay", "relay"),
            ("wire.sse", "if TYPE_CHECKING:\n    from gateway.relay import Relay", "relay"),
            ("wire.sse", "try:\n    import gateway.relay\nexcept ImportError:\n    pass", "relay"),
            ("wire", "from . import sse", "wire.sse"),
            ("wire", "from ..relay import Relay", "relay"),
            ("errors", "from gateway.wire import sse", "wire.sse"),
            ("errors", "from gateway import __version__", ""),
            ("relay", "from gateway.backends.openai import OpenAITranslator", "backends.openai"),
            ("relay", "from gateway.app import create_app", "app"),
            ("relay", "from gateway.api import openai", "api.openai"),
            ("relay", "from gateway.responses import Send", "responses"),
            ("relay", "from gateway.store.sqlite import SqliteDatabase", "store.sqlite"),
            ("api.openai", "from gateway.api import ops", "api.ops"),
            ("api.openai", "from gateway.cli.common import table", "cli.common"),
            ("store.keys", "from gateway.auth import Auth", "auth"),
            ("store.keys", "from . import usage", "store.usage"),
            ("backends.openai", "from gateway.backends.scripted import ECHO", "backends.scripted"),
            ("a_module_of_tomorrow", "from gateway.config import Settings", "config"),
        ],
    )
    def test_an_import_against_the_table(self, module: str, source: str, name: str) -> None:
        assert wrong(module, imported(module, source, SOURCES)) == [name]

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("wire.sse", "from gateway.errors import BadRequest\nfrom . import WireError\nimport os, asyncio"),
            ("wire.sse", "import gateway_of_somebody_else"),
            ("wire.sse", "'import gateway.relay'"),
            ("cli.chat", "from gateway.app import create_app\nfrom gateway.store.sqlite import SqliteDatabase"),
            ("api.a_dialect_of_tomorrow", "from gateway.api.common import Services\nfrom gateway.store import keys"),
            ("backends.a_vendor_of_tomorrow", "from .http import HTTPRequest"),
        ],
    )
    def test_an_import_along_the_table(self, module: str, source: str) -> None:
        assert wrong(module, imported(module, source, SOURCES)) == []
