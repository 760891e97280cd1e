"""Nobody reads, changes or counts what is another's: every route of every dialect, tried with foreign ids.

The routes are the application's own (`DIALECTS`), the statements those of the modules that hold them: a route without
an example fails, and so does a statement of which nobody would notice that it no longer asks for the owner.

Ann has one of everything, and `canary` is in all of it. Bob tries her ids, and ids that nobody has: both must look the
same to him and leave every table as it was. Of the attacks in the project's list, A21 (live streams), A22
(`previous_response_id`) and A23 (`Idempotency-Key`) have nothing to attack yet; A30 (many users at once, who leave at
any moment) is tests_standalone/system/test_canaries.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gateway import store
from gateway.app import DIALECTS
from gateway.auth import digest, new_key
from gateway.store import (
    conversation_edits,
    conversation_reads,
    conversations,
    keys,
    sessions,
    stored,
    turn_leases,
)
from gateway.store.database import Database
from gateway.talks import new_id
from tests_standalone.api.conftest import Answer, App
from tests_standalone.conftest import rows, stored_key
from tests_standalone.support.databases import database_urls, postgres, sqlite_url
from tests_standalone.support.owners import OWNER, mutants, patch, statements

__all__ = ["database_urls", "postgres"]

CANARY = "canary"
OTHERS = frozenset({"limit_states", "limit_holds", "limit_settlements", "workers", "chores"})
"""Tables that workers keep for themselves."""
OF_ANN = frozenset({"usage_rows", "turn_leases"})
"""Tables in which a call of bob's may leave something under his own name."""

OWNED, ADMIN, NOBODYS = "owned", "admin", "nobody's"


@dataclass(frozen=True)
class Example:
    """How a route with a parameter is tried: `of` names what of ann's goes into the path; `kind`, what bob must get:
    404, 403, or what anybody gets."""

    kind: str
    of: str = ""
    body: Any = b""
    query: bytes = b""


EXAMPLES: Mapping[tuple[str, str], Example] = {
    ("GET", "/v1/models/{model:path}"): Example(NOBODYS),
    ("GET", "/v1/chat/completions/{id}"): Example(OWNED, "completion"),
    ("POST", "/v1/chat/completions/{id}"): Example(OWNED, "completion", {"metadata": {"of": "bob"}}),
    ("DELETE", "/v1/chat/completions/{id}"): Example(OWNED, "completion"),
    ("GET", "/v1/chat/completions/{id}/messages"): Example(OWNED, "completion"),
    ("GET", "/conversations/{id}"): Example(OWNED, "conversation"),
    ("PATCH", "/conversations/{id}"): Example(OWNED, "conversation", {"title": "bob was here", "tags": ["x"]}),
    ("POST", "/conversations/{id}"): Example(OWNED, "conversation", {"pinned": True, "archived": True}),
    ("DELETE", "/conversations/{id}"): Example(OWNED, "conversation"),
    ("POST", "/conversations/{id}/undelete"): Example(OWNED, "deleted"),
    ("GET", "/conversations/{id}/messages"): Example(OWNED, "conversation"),
    ("GET", "/sessions/{id}"): Example(OWNED, "session"),
    ("POST", "/sessions/{id}/end"): Example(OWNED, "session"),
    ("GET", "/users/{id}/sessions"): Example(OWNED, "user"),
    ("GET", "/users/{id}/stats"): Example(OWNED, "user"),
    ("GET", "/admin/keys/{id}"): Example(ADMIN, "key"),
    ("PATCH", "/admin/keys/{id}"): Example(ADMIN, "key", {"name": "bob's"}),
    ("POST", "/admin/keys/{id}"): Example(ADMIN, "key", {"name": "bob's"}),
    ("POST", "/admin/keys/{id}/rotate"): Example(ADMIN, "key", {}),
    ("DELETE", "/admin/keys/{id}"): Example(ADMIN, "key"),
    ("DELETE", "/admin/users/{id:path}"): Example(ADMIN, "user"),
}

LISTS = (
    *("/conversations", "/conversations?archived=all", "/conversations?archived=true", "/conversations?pinned=true"),
    *("/conversations?tag=canary", "/conversations?session_id={session}", "/conversations?order=asc"),
    *("/conversations?tag=canary&session_id={session}", "/conversations?archived=all&order=asc"),
    *("/conversations?archived=true&order=asc", "/conversations?pinned=true&order=asc"),
    *("/conversations?tag=canary&order=asc", "/conversations?session_id={session}&order=asc"),
    *("/users/me/sessions", "/users/me/sessions?order=asc", "/users/me/stats", "/users/bob/stats"),
    *("/v1/chat/completions", "/v1/chat/completions?order=desc", "/v1/chat/completions?metadata[canary]=canary"),
    *("/v1/chat/completions?order=desc&metadata[canary]=canary", "/v1/chat/completions?model=echo"),
    *("/conversations/own/messages", "/conversations/forged/messages", "/sessions/{own_session}"),
)
PLAIN: Mapping[str, str] = {
    **dict.fromkeys(("/conversations", "/v1/chat/completions"), OWNED),
    **dict.fromkeys(("/admin/backends", "/admin/keys", "/admin/users", "/metrics"), ADMIN),
    **dict.fromkeys(("/", "/health", "/health/live", "/health/ready", "/v1/models"), NOBODYS),
}
"""What can be read without naming anything."""
LISTED = (
    *("/conversations", "/conversations/own/messages", "/users/me/sessions", "/users/me/stats"),
    *("/v1/chat/completions", "/v1/chat/completions/{own_completion}/messages", "/sessions/{own_session}"),
)
OTHERS_WISHES = (
    *("user=ann", "user_id=ann", "owner=ann", "tenant=ann", "tenant_id=ann", "end_user=ann", "key_id={key}", "all=1"),
    *("sort=user_id", "sort=-created_at", "sort_by=title", "order_by=user_id", "orderBy=1", "sort[user_id]=asc"),
    *("q=canary", "search=canary", "query=canary", "filter=user_id", "where=1=1", "fields=user_id", "include=all"),
)
"""What no list takes: another owner, a column to sort by, a search."""
USUAL_VALUES = (
    *("order=asc", "order=desc", "tag=x", "session_id=x", "pinned=true", "archived=all", "archived=true", "after=x"),
    *("model=x", "metadata[x]=y", "order=desc&model=x"),
)
ODD_VALUES = (
    *("order=user_id", "order=asc,user_id", "order=DESC", "order=desc;DROP TABLE messages", "order=asc--", "order="),
    *("limit=1 OR 1=1", "limit=-1", "limit=101", "limit=1e9", "limit=1;--", "after=' OR '1'='1", "after=%", "after=*"),
    *("tag=' OR '1'='1", "tag=%", "session_id=' OR '1'='1", "session_id=%", "archived=all' OR '1'='1", "pinned=1"),
    *("model=' OR '1'='1", "model=%", "metadata[of]=' OR '1'='1", "metadata[' OR '1'='1]=x", "metadata[%]=%"),
)
CURSORS = (
    *("/conversations?after={conversation}", "/conversations?after={deleted}", "/users/me/sessions?after={session}"),
    *("/v1/chat/completions?order=desc&after={completion}", "/v1/chat/completions?after={completion}"),
    "/conversations/own/messages?after={message}",
)


@dataclass
class World:
    """Ann and bob, who has the same of everything. `ids` are ann's, `known` what bob may not be told."""

    app: App
    ann: dict[str, str]
    bob: dict[str, str]
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> list[str]:
        return [CANARY, *(self.ids[name] for name in ("conversation", "message", "session", "deleted", "completion"))]

    @property
    def database(self) -> Database:
        found: Database = self.app._state["services"].database
        return found

    async def ask(self, who: Mapping[str, str], method: str, path: str, body: Any = b"") -> Answer:
        path, _, query = path.partition("?")
        return await self.app.call(method, path, body, who, query_string=query.encode())


async def settled(world: World, user: str, who: Mapping[str, str], mark: str) -> dict[str, str]:
    """One of everything, with the mark in it."""

    async def ask(method: str, path: str, body: Any = b"") -> Any:
        answer = await world.ask(who, method, path, body)
        assert answer.status == 200, (method, path, answer.body)
        return answer.json

    session = await ask("POST", "/sessions", {"title": mark, "metadata": {mark: mark}})
    about = {"title": mark, "tags": [mark], "metadata": {mark: mark}, "session_id": session["id"]}
    gone = await ask("POST", "/conversations", about)
    said = {"model": "echo", "messages": [{"role": "user", "content": mark}]}
    await ask("POST", "/v1/chat/completions", said | {"conversation_id": gone["id"]})
    await ask("DELETE", f"/conversations/{gone['id']}")
    for change in ({"pinned": True}, {"archived": True}, {"pinned": True, "archived": True}):
        made = await ask("POST", "/conversations", about)
        await ask("PATCH", f"/conversations/{made['id']}", change)
    made = await ask("POST", "/conversations", about)
    said |= {"conversation_id": made["id"], "store": True, "metadata": {mark: mark}}
    completion = await ask("POST", "/v1/chat/completions", said)
    messages = await ask("GET", f"/conversations/{made['id']}/messages")
    ((key,),) = await rows(world.database, "SELECT id FROM api_keys WHERE user_id = $1", user)
    ((pk, number),) = await rows(world.database, "SELECT pk, number FROM conversations WHERE id = $1", made["id"])
    ((completion_pk,),) = await rows(world.database, "SELECT pk FROM stored_completions WHERE user_id = $1", user)
    ((label,), *_) = await rows(world.database, "SELECT label FROM stored_labels WHERE user_id = $1", user)
    answer = "SELECT chain FROM messages WHERE conversation_pk = $1 AND role = 'assistant'"
    ((chain,),) = await rows(world.database, answer, pk)
    ((branch_pk,),) = await rows(world.database, "SELECT pk FROM conversations WHERE id = $1", gone["id"])
    return {
        "conversation": made["id"], "deleted": gone["id"], "session": session["id"], "user": user, "key": key, "pk": pk,
        "number": str(number), "completion": completion["id"], "message": messages["data"][0]["id"],
        "completion_pk": completion_pk, "label": label, "chain": chain, "branch_pk": branch_pk,
    }  # fmt: skip


async def keyed(app: App, user: str) -> dict[str, str]:
    secret = new_key()
    await keys.add(app._state["services"].database, stored_key(digest=digest(secret), user_id=user))
    return {"authorization": f"Bearer {secret}"}


@asynccontextmanager
async def application(folder: Path, url: str) -> AsyncIterator[App]:
    config = {
        "backends": {"echo": {"type": "scripted"}},
        "database": {"url": url},
        "limits": {"store": "memory"},
    }
    async with App(folder, config) as app:
        yield app


async def peopled(app: App) -> World:
    """Bob's `forged` says that ann's conversation is its parent, which no route could bring about. What ann has deleted
    was a branch of it; and a turn of hers runs, under the name `busy`."""
    world = World(app, await keyed(app, "ann"), await keyed(app, "bob"))
    world.ids = await settled(world, "ann", world.ann, CANARY)
    own = await settled(world, "bob", world.bob, "bobs")
    world.ids |= {"own_session": own["session"], "own_completion": own["completion"]}
    for name in ("own", "forged"):
        made = await world.ask(world.bob, "POST", "/conversations", {"id": name, "title": "bobs"})
        assert made.status == 200, made.body
    said = {"model": "echo", "messages": [{"role": "user", "content": "bobs"}], "conversation_id": "own"}
    assert (await world.ask(world.bob, "POST", "/v1/chat/completions", said)).status == 200
    forge = "UPDATE conversations SET parent_pk = $1, parent_seq = 2, message_count = 2 WHERE id = 'forged'"
    await world.database.write([(forge, [(world.ids["pk"],)])])
    branch = "UPDATE conversations SET parent_pk = $1, parent_seq = 2 WHERE pk = $2"
    lease = "INSERT INTO turn_leases (user_id, conversation_id, holder, until) VALUES ('ann', 'busy', 'h', $1)"
    await world.database.write([(branch, [(world.ids["pk"], world.ids["branch_pk"])]), (lease, [(2**62,)])])
    ((world.ids["forged_pk"],),) = await rows(world.database, "SELECT pk FROM conversations WHERE id = 'forged'")
    newest = await world.ask(world.ann, "POST", "/sessions", {"title": CANARY})
    assert newest.status == 200
    return world


async def dump(database: Database) -> dict[str, list[str]]:
    """Every row of every table that counts."""
    named = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'",
        "postgres": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
    }[database.dialect]
    tables = [name for (name,) in await rows(database, named) if name not in OTHERS]
    which = {name: " WHERE user_id = 'ann'" if name in OF_ANN else "" for name in tables}
    return {name: sorted(map(str, await rows(database, f"SELECT * FROM {name}{which[name]}"))) for name in tables}


def guessed(identity: str) -> str:
    """One of the same form that nobody has."""
    if identity.startswith("conv_"):
        return new_id()
    return re.sub("[0-9a-f]{8}$", "00000000", identity) if re.search("[0-9a-f]{8}$", identity) else "carl"


async def violations(world: World) -> list[str]:
    """What bob gets or does that he may not."""
    found = await _through_routes(world)
    found += await _through_lists(world)
    found += await _through_bodies(world)
    return found + await _past_the_routes(world)


async def _through_routes(world: World) -> list[str]:
    found = []
    before = await dump(world.database)
    for (method, path), example in EXAMPLES.items():
        if example.kind == NOBODYS:
            continue
        theirs, answers = world.ids[example.of], []
        for identity in (theirs, guessed(theirs)):
            answer = await world.ask(world.bob, method, re.sub(r"{\w+(:path)?}", identity, path), example.body)
            shape = answer.body.decode().replace(identity, "<id>")
            answers.append((answer.status, shape, answer.headers.keys()))
        if answers[0] != answers[1]:
            found.append(f"{method} {path}: {answers[0]} for what is ann's, {answers[1]} for what nobody has")
        if answers[0][0] != (403 if example.kind == ADMIN else 404):
            found.append(f"{method} {path}: {answers[0]}")
    found += _changes(before, await dump(world.database), "a route with a foreign id")
    return found


async def _through_lists(world: World) -> list[str]:
    found = []
    before = await dump(world.database)
    for path in LISTS:
        answer = await world.ask(world.bob, "GET", path.format_map(world.ids))
        found += [f"{path} tells {known}" for known in world.known if known in answer.body.decode()]
        if answer.status != 200:
            found.append(f"{path}: {answer.status}")
    for path in CURSORS:
        answers = []
        for ids in (world.ids, {name: guessed(identity) for name, identity in world.ids.items()}):
            answer = await world.ask(world.bob, "GET", path.format_map(ids))
            answers.append((answer.status, re.sub("[0-9a-f]{16,}", "<id>", answer.body.decode())))
        if answers[0] != answers[1]:
            found.append(f"{path}: {answers}")
    stats = (await world.ask(world.bob, "GET", "/users/me/stats")).json
    counts = stats["conversation_count"], stats["session_count"], stats["total_tokens_input"]
    if counts != (7, 1, await _tokens(world)):
        found.append(f"statistics: {stats}")
    return found + _changes(before, await dump(world.database), "a list")


async def _tokens(world: World) -> int:
    sql = "SELECT SUM(input_tokens) FROM usage_rows WHERE user_id = 'bob'"
    return int((await rows(world.database, sql))[0][0])


async def _through_bodies(world: World) -> list[str]:
    """Foreign ids that are not in a path."""
    found = []
    before = await dump(world.database)
    said = {"model": "echo", "messages": [{"role": "user", "content": "bobs"}]}
    continued = said | {"conversation_id": world.ids["conversation"]}
    of_session, header = {"session_id": world.ids["session"]}, {"x-conversation-id": world.ids["conversation"]}
    for path, body, headers in (
        ("/v1/chat/completions", continued, {}),
        ("/v1/chat/completions", said, header),
        ("/conversations", of_session, {}),
    ):
        answer = await world.ask({**world.bob, **headers}, "POST", path, body)
        if answer.status != 404:
            found.append(f"POST {path}: {answer.status} {answer.body!r}")
    found += _changes(before, await dump(world.database), "a body or a header with a foreign id")
    made = await world.ask(world.bob, "POST", "/conversations", {})
    if made.status != 200 or made.json["session_id"] == world.ids["session"]:
        found.append(f"a conversation of one's own: {made.body!r}")
    return found


def _changes(before: Mapping[str, list[str]], after: Mapping[str, list[str]], by: str) -> list[str]:
    return [f"{by} changed {table}" for table in before if before[table] != after[table]]


def inner(world: World) -> dict[str, tuple[tuple[Any, ...], list[tuple[Any, ...]]]]:
    """Statements that routes reach only with what another one has found: asked as bob for what is ann's, and what that
    may tell."""
    ids, number, engine = world.ids, int(world.ids["number"]), world.database.dialect
    message = ("forged", -1, "user", '"bobs"', None, None, 0, None, None, None, 0)
    return {
        "conversations._SHARED": ((ids["branch_pk"], "bob"), []),
        "conversations._PLACES": ((ids["chain"], ids["chain"], "bob"), []),
        "conversations.INSERT_BY_OWNER": ((*message, "bob", ids["conversation"]), []),
        f"turn_leases._RENEW[{engine}]": (("bob", "busy", "h"), []),
        "turn_leases.RELEASE": (("bob", "busy", "h"), []),
        "conversation_reads.LINE": (("bob", "forged"), [(ids["forged_pk"], 2, 2)]),
        "conversation_reads.MESSAGES[asc]": (("bob", ids["pk"], 0, 100, 10), []),
        "conversation_reads.MESSAGES[desc]": (("bob", ids["pk"], 0, 100, 10), []),
        "conversation_reads.MESSAGE_PLACE": (("bob", ids["message"]), []),
        "conversation_edits.FORGET_TAGS": (("bob", number), []),
        "sessions.MESSAGES": (("bob", ids["session"], 100, 100), []),
        "stored._PLACE": (("bob", ids["completion"]), []),
        "stored.REACH[asc]": (("bob", "", 100, ids["label"], "s_g"), [(0, None)]),
        "stored.REACH[desc]": (("bob", "s_g", 100, ids["label"], ""), [(0, None)]),
        "stored._SET_METADATA": (("bob", ids["completion"], "{}"), []),
        "stored._DROP_LABEL": (("bob", ids["completion_pk"], ids["label"]), []),
        "stored._DROP_LABELS": (("bob", ids["completion_pk"]), []),
    }


async def _past_the_routes(world: World) -> list[str]:
    found = []
    before, known = await dump(world.database), statements(MODULES)
    for name, (values, right) in inner(world).items():
        async with world.database.transaction() as transaction:
            told = [tuple(row) for row in await transaction.fetch(known[name], *values)]
        if told != right:
            found.append(f"{name}: {told}")
    return found + _changes(before, await dump(world.database), "a statement")


# The statements

MODULES: tuple[ModuleType, ...] = (
    *(conversation_reads, conversation_edits, conversations, sessions, stored, turn_leases),
)
WITHOUT_OWNER = {
    "sessions.ADD": "the ledger's: of the sessions that it has found for its turns",
    "sessions.COUNT_NAMED": "the ledger's: as above",
    "sessions.REVISION": "a number for all",
    "sessions.TOUCH": "a number for all",
    "conversations._SHARED_OF": "of the conversations that `_SHARED` names",
    "conversations._LENGTHS": "the ledger's: of the conversations that its turns have found",
    "conversations.ADD_TO": "the ledger's: of the conversation that its turn has found",
    "conversations.INSERT_BY_PK": "the ledger's: as above",
    "conversations.INSERT_AT": "the ledger's: as above",
    "conversations._NAME": "the ledger's: as above",
    "conversations._OMITTED": "the ledger's: of a message that it has just written",
    **{f"turn_leases.{name}[{engine}]": why for engine in ("sqlite", "postgres") for name, why in {
        "_TAKE": "by its key, of which the user is a part: test_a19_who_runs_a_turn_is_nobody_elses_concern",
        "_SWEEP": "what has run out, whosever it was",
    }.items()},
}  # fmt: skip
ASKING = re.compile(r"user_id(?: \|\| ''|, ''\))? = (?:\$\d|\w+\.user_id)")
ELSEWHERE = {
    "keys": "for administrators: tests_standalone/test_user_deletion_isolation.py",
    "limits": "the sum that a budget begins with: tests_standalone/store/test_limits.py",
    "postgres_turns": "the ledger's steps once more: tests_standalone/store/test_postgres_turns_isolation.py",
    "purge": "a chore over all users: tests_standalone/store/test_purge.py",
    "usage": "for who has the machine: tests_standalone/store/test_usage.py",
    "user_deletions": "whose rows go: tests_standalone/test_user_deletion_isolation.py",
}
"""Modules that ask for a user who is not the caller, and where that is tried."""


@pytest.fixture
async def world(tmp_path: Path, tables: str) -> AsyncIterator[World]:
    async with application(tmp_path, tables) as app:
        yield await peopled(app)


@pytest.fixture(params=["sqlite", "postgres"])
def tables(request: pytest.FixtureRequest, database_urls: dict[str, str]) -> str:
    return database_urls[request.param]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World]:
    """A file with the world in it, to be copied for each mutant."""
    folder = tmp_path_factory.mktemp("world")

    async def make() -> World:
        async with application(folder, sqlite_url(folder)) as app:
            return await peopled(app)

    with ThreadPoolExecutor(1) as thread:
        return folder / "gateway.db", thread.submit(asyncio.run, make()).result()


def test_every_route_with_a_parameter_has_an_example() -> None:
    routes = {(method, path) for dialect in DIALECTS for method, path, *_ in dialect.ENDPOINTS if "{" in path}
    assert routes == set(EXAMPLES)


def test_every_statement_asks_for_the_owner_or_says_why_not() -> None:
    without = {name for name, sql in statements(MODULES).items() if OWNER.search(sql) is None}
    assert without == set(WITHOUT_OWNER)


def test_every_module_that_asks_for_a_user_is_tried() -> None:
    sources = Path(store.__file__).parent.glob("*.py")
    asking = {source.stem for source in sources if ASKING.search(source.read_text())}
    assert asking == {module.__name__.rpartition(".")[2] for module in MODULES} | set(ELSEWHERE)


async def test_a19_nothing_foreign_is_read_changed_or_counted(world: World) -> None:
    assert await violations(world) == []


def test_a25_every_list_is_tried() -> None:
    """A route that comes without a parameter, and so without an example, says here whose things it tells."""
    paths = {path for dialect in DIALECTS for method, path, *_ in dialect.ENDPOINTS if method == "GET"}
    assert {path for path in paths if "{" not in path} == set(PLAIN)
    assert {path for path, kind in PLAIN.items() if kind == OWNED} <= set(LISTS) & set(LISTED)


async def test_a25_what_needs_no_id_tells_nothing_of_others(world: World) -> None:
    for path, kind in PLAIN.items():
        answer = await world.ask(world.bob, "GET", path)
        assert answer.status == (403 if kind == ADMIN else 200), path
        assert not [known for known in (*world.known, "ann") if known in answer.body.decode()], path


async def test_a25_no_list_takes_another_owner_a_column_or_a_search(world: World) -> None:
    """It is refused, or makes no difference."""
    for path in (path.format_map(world.ids) for path in LISTED):
        usual = (await world.ask(world.bob, "GET", path)).body
        assert b"bob" in usual, path
        for wish in OTHERS_WISHES:
            answer = await world.ask(world.bob, "GET", f"{path}?{wish.format_map(world.ids)}")
            assert answer.status == 400 or (answer.status, answer.body) == (200, usual), (path, wish)


async def test_a25_no_value_reaches_the_sql(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is asked what it is asked for any list, and the answer is bob's own."""
    asked: set[str] = set()
    before, fetch = await dump(world.database), world.database.fetch

    async def heard(sql: str, *values: Any) -> Any:
        if "gateway_state" not in sql:  # which somebody looks at twice a second
            asked.add(sql)
        return await fetch(sql, *values)

    monkeypatch.setattr(world.database, "fetch", heard)
    for path in (path.format_map(world.ids) for path in LISTED):
        asked.clear()
        for usual in USUAL_VALUES:
            await world.ask(world.bob, "GET", f"{path}?{usual}")
        known, own = frozenset(asked), _ids((await world.ask(world.bob, "GET", path)).json)
        for odd in ODD_VALUES:
            answer = await world.ask(world.bob, "GET", f"{path}?{odd}")
            assert answer.status == 400 or (answer.status == 200 and _ids(answer.json) <= own), (path, odd)
            assert not [name for name in world.known if name in answer.body.decode()], (path, odd)
        assert asked == known
        assert known
    monkeypatch.undo()
    assert _changes(before, await dump(world.database), "a list") == []


async def test_a25_a_foreign_cursor_of_a_stored_completions_messages(world: World) -> None:
    path = f"/v1/chat/completions/{world.ids['own_completion']}/messages"
    answers = []
    for completion in (world.ids["completion"], guessed(world.ids["completion"])):
        answer = await world.ask(world.bob, "GET", f"{path}?after={completion}-0")
        answers.append((answer.status, answer.body.replace(completion.encode(), b"<id>")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 400
    assert (await world.ask(world.bob, "GET", f"{path}?after={world.ids['own_completion']}-0")).status == 200


def _ids(found: Any) -> set[str]:
    """Of what a list holds; of anything else all that it says."""
    return {one["id"] for one in found["data"]} if "data" in found else {json.dumps(found)}


async def test_ann_finds_all_of_it_herself(world: World) -> None:
    """So that the test above finds it where it is."""
    for (method, path), example in EXAMPLES.items():
        if example.kind == OWNED and method == "GET":
            answer = await world.ask(world.ann, method, re.sub(r"{\w+(:path)?}", world.ids[example.of], path))
            assert answer.status == 200, path
    for path in (*LISTS, *CURSORS):
        if "own" not in path and "forged" not in path and "bob" not in path:
            answer = await world.ask(world.ann, "GET", path.format_map(world.ids))
            assert answer.status == 200, path
            if "stats" not in path and "after" not in path:
                assert answer.json["data"], path


@pytest.mark.parametrize(("name", "sql"), list(mutants(MODULES)))
async def test_a_statement_without_its_owner_is_noticed(
    name: str, sql: str, template: tuple[Path, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made = template
    shutil.copy(file, tmp_path / "gateway.db")
    patch(monkeypatch, MODULES, name, sql)
    async with application(tmp_path, sqlite_url(tmp_path)) as app:
        assert await violations(World(app, made.ann, made.bob, made.ids)) != []


async def test_a19_a_foreign_name_begins_a_conversation_of_ones_own(world: World) -> None:
    """A name that somebody chose is free for everybody else."""
    said = {"model": "echo", "messages": [{"role": "user", "content": CANARY}], "conversation_id": "chat"}
    await world.ask(world.ann, "POST", "/v1/chat/completions", said)
    before = (await world.ask(world.ann, "GET", "/conversations/chat")).json
    mine = said | {"messages": [{"role": "user", "content": "hello"}]}
    answer = await world.ask(world.bob, "POST", "/v1/chat/completions", mine)
    assert (answer.status, CANARY in answer.body.decode()) == (200, False)
    found = await world.ask(world.bob, "GET", "/conversations/chat/messages")
    assert [message["content"] for message in found.json["data"]] == ["hello", "hello"]
    assert (await world.ask(world.ann, "GET", "/conversations/chat")).json == before


async def test_a19_who_runs_a_turn_is_nobody_elses_concern(world: World) -> None:
    said = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "conversation_id": "busy"}
    answers = [(await world.ask(who, "POST", "/v1/chat/completions", said)).status for who in (world.ann, world.bob)]
    assert answers == [409, 200]


@pytest.mark.parametrize("header", ["x-conversation-id", "x-openwebui-chat-id", "chatui-conversation-id"])
async def test_a19_a_foreign_id_in_a_header(world: World, header: str) -> None:
    before = await dump(world.database)
    said = {"model": "echo", "messages": [{"role": "user", "content": "bobs"}]}
    headers = {**world.bob, header: world.ids["conversation"]}
    answer = await world.app.call("POST", "/v1/chat/completions", said, headers)
    assert answer.status == 404
    assert await dump(world.database) == before


async def test_a26_guessed_ids_are_404(world: World) -> None:
    bodies = set()
    for _ in range(200):
        answer = await world.ask(world.bob, "GET", f"/conversations/{new_id()}")
        bodies.add((answer.status, answer.body))
    assert [status for status, _ in bodies] == [404]
    assert re.fullmatch("conv_[0-9a-f]{32}", new_id()), "128 random bits"


@pytest.mark.parametrize("odd", ["%00", "a\x00b", "\ud800", "' OR '1'='1", "x" * 5000, "..", "conv_*", "%", "_"])
async def test_a26_what_is_no_id_at_all(world: World, odd: str) -> None:
    for path in (f"/conversations/{odd}", f"/conversations/{odd}/messages", f"/sessions/{odd}"):
        scope = {"method": "GET", "path": path}
        headers = {"host": "localhost", **world.bob}
        scope["path"] = path.encode("utf-8", "replace").decode()
        answer = await world.app._exchange(scope, headers, [{"type": "http.request"}])
        assert answer.status == 404, path


async def test_a27_statistics_of_others_are_for_admins(world: World) -> None:
    assert (await world.ask(world.bob, "GET", "/users/ann/stats")).status == 404
    mine = await world.ask(world.ann, "GET", "/users/me/stats")
    assert mine.json["conversation_count"] == 6
    assert (await world.ask(world.ann, "GET", "/users/ann/stats")).json == mine.json
    assert (await world.app.call("GET", "/users/ann/stats")).json == mine.json


async def test_a29_nothing_old_reappears_under_a_name_that_is_used_again(world: World) -> None:
    said = {"model": "echo", "messages": [{"role": "user", "content": CANARY}], "conversation_id": "chat"}
    await world.ask(world.ann, "POST", "/v1/chat/completions", said)
    assert (await world.ask(world.ann, "DELETE", "/conversations/chat")).status == 200
    again = said | {"messages": [{"role": "user", "content": "new"}]}
    answer = await world.ask(world.ann, "POST", "/v1/chat/completions", again)
    assert CANARY not in answer.body.decode()
    found = await world.ask(world.ann, "GET", "/conversations/chat/messages")
    assert [message["content"] for message in found.json["data"]] == ["new", "new"]
    assert (await world.ask(world.ann, "GET", "/conversations/chat")).json["message_count"] == 2


async def test_a31_answers_are_for_one_caller(world: World) -> None:
    for path in ("/conversations", "/users/me/stats", "/v1/models", "/conversations/none"):
        answer = await world.ask(world.bob, "GET", path)
        assert answer.headers["cache-control"] == "no-store", path
        assert answer.headers["vary"] == "authorization, x-api-key, api-key", path
    assert json.loads(answer.body)["detail"] == answer.json["error"]["message"]
