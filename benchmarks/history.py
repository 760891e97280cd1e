"""Look-ups in a large history: `python -m benchmarks --history`, on SQLite and on a PostgreSQL of its own.

A database is filled (`history_rows`), then everything that is asked of it while a conversation runs or somebody looks
is asked: by the gateway's own functions, with conversations picked by chance. What is written down is how long that
takes, and how the engine finds it (`history_plans`), without statistics and with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kept, machine
from benchmarks.course import say_to_stderr
from benchmarks.history_plans import Plan, Watched, large_tables, plans
from benchmarks.history_rows import BRANCH, DEEP, EACH, KEY, MODEL, RARE, SAME, TAG, USER, Size, fill
from benchmarks.stats import Spread, spread
from benchmarks.tables import milliseconds, table
from gateway.conversations import LAST_CHAINS
from gateway.ids import ordered_hex, random_hex
from gateway.store import conversation_edits, conversation_reads, conversations, purge, sessions, stored, turn_leases
from gateway.store.connect import database_at
from gateway.store.conversation_edits import Edit
from gateway.store.conversation_reads import Order, Wanted
from gateway.store.conversations import ConversationTurn, Parent, StoredMessage
from gateway.store.database import Database
from gateway.store.migrate import migrate
from gateway.store.turn_leases import Lease
from gateway.stored import labels, model_label
from gateway.threads import partial
from tests_standalone.support.postgres import OwnPostgres

MESSAGES = 2_000_000
RUNS = 200
MOST_SECONDS = 8.0
"""For one question; slow ones are asked less often."""
CASES = 50
SETTINGS = {"autovacuum": "off", "max_wal_size": "8GB"}
"""Statistics come when we say so."""


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation of the user's, as it is known outside and inside."""

    id: str
    pk: str
    number: int
    session_id: str
    chain: str
    at: int
    message_of_deep: str
    completion: str


Question = Callable[[Database, Case], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    """How a question went on one engine."""

    times: Spread
    plans: Sequence[Plan]

    @property
    def faults(self) -> list[str]:
        return [fault for plan in self.plans for fault in plan.faults]


def _turn(case: Case, *, is_new: bool) -> ConversationTurn:
    said = [
        StoredMessage(f"msg_{ordered_hex()}", role, '"What was said"', None, random_hex())
        for role in ("user", "assistant")
    ]
    known = (f"c_{ordered_hex()}", f"conv_{random_hex()}") if is_new else (case.pk, case.id)
    title = "What was said" if is_new else None
    now = time.time_ns() // 1_000_000
    return ConversationTurn(*known, USER, KEY, None, case.session_id, is_new, title, now, said, False, 50, 150, 2000)


def _branch(case: Case) -> ConversationTurn:
    turn = _turn(case, is_new=True)
    turn.parent, turn.after = Parent(case.id, case.pk, 4), 4
    return turn


async def _write(database: Database, turn: ConversationTurn) -> None:
    await database.write(conversations.save([turn]))


async def _lease(database: Database, case: Case) -> None:
    lease = Lease(USER, case.id, random_hex())
    await turn_leases.take(database, [lease])
    await database.write([turn_leases.release_step([lease])])


async def _listed(database: Database, case: Case, **how: Any) -> None:
    """A page in the middle; `after` None: the first one."""
    page = {"after": case.id, "order": "desc", **{name: how.pop(name) for name in ("after", "order") if name in how}}
    assert await conversation_reads.listed(database, USER, Wanted(**how), limit=20, **page)


async def _messages(database: Database, case: Case, order: Order) -> None:
    found = await conversation_reads.messages(database, USER, DEEP, limit=20, after=case.message_of_deep, order=order)
    assert found


async def _forgotten(database: Database, case: Case) -> None:
    now = time.time_ns() // 1_000_000
    await conversation_edits.delete(database, USER, case.id, now)
    await conversation_edits.undelete(database, USER, case.id)


async def _stored(database: Database, case: Case | None, *wanted: str, order: Order = "asc") -> None:
    after = None if case is None else await stored.place(database, USER, case.completion)
    assert await stored.listed(database, USER, labels=wanted, after=after, limit=20, order=order)


def _rename(database: Database, case: Case) -> Awaitable[Any]:
    return conversation_edits.edit(database, USER, case.id, Edit(frozenset({"title"}), title="Renamed"), case.at)


QUESTIONS: Mapping[str, Question] = {
    "find a resent history by its chain": lambda db, case: conversations.places(
        db, USER, case.chain, partial(case.chain)
    ),
    "find one of very many that begin alike": lambda db, case: conversations.places(db, USER, SAME, partial(SAME)),
    "find one that nobody said": lambda db, case: conversations.places(db, USER, case.pk, case.pk),
    "load a conversation": lambda db, case: conversations.find(db, USER, case.id),
    "load a branch": lambda db, case: conversations.find(db, USER, BRANCH),
    "load the deep conversation": lambda db, case: conversations.find(db, USER, DEEP),
    "the last chains of a conversation": lambda db, case: conversations.find_chains(db, USER, case.id, LAST_CHAINS),
    "the last chains of the deep one": lambda db, case: conversations.find_chains(db, USER, DEEP, LAST_CHAINS),
    "take a turn and let it go": _lease,
    "the user's session": lambda db, case: sessions.current(db, USER, active_since=case.at),
    "write a turn": lambda db, case: _write(db, _turn(case, is_new=False)),
    "write a new conversation": lambda db, case: _write(db, _turn(case, is_new=True)),
    "write a branch": lambda db, case: _write(db, _branch(case)),
    "list, first page": lambda db, case: _listed(db, case, after=None),
    "list, a page": _listed,
    "list, a page from the oldest on": lambda db, case: _listed(db, case, order="asc"),
    "list with archived ones": lambda db, case: _listed(db, case, archived=None),
    "list of archived ones": lambda db, case: _listed(db, case, archived=True, after=None),
    "list of pinned ones": lambda db, case: _listed(db, case, archived=None, pinned=True, after=None),
    "list of tagged ones": lambda db, case: _listed(db, case, archived=None, tag=TAG, after=None),
    "list of a session": lambda db, case: _listed(db, case, archived=None, session_id=case.session_id, after=None),
    "one conversation": lambda db, case: conversation_reads.get(db, USER, case.id),
    "messages of the deep one, a page": lambda db, case: _messages(db, case, "asc"),
    "messages of the deep one, backwards": lambda db, case: _messages(db, case, "desc"),
    "messages of a branch": lambda db, case: conversation_reads.messages(db, USER, BRANCH, limit=20),
    "rename": _rename,
    "delete and undelete": _forgotten,
    "sessions, first page": lambda db, case: sessions.listed(db, USER, limit=20),
    "sessions, a page": lambda db, case: sessions.listed(db, USER, limit=20, after=case.session_id),
    "messages of a session": lambda db, case: sessions.messages(db, USER, case.session_id, 1_000),
    "a stored completion": lambda db, case: stored.find(db, USER, case.completion),
    "stored completions, first page": lambda db, case: _stored(db, None),
    "stored completions, a page": lambda db, case: _stored(db, case, order="desc"),
    "stored completions of a model": lambda db, case: _stored(db, case, model_label(MODEL)),
    "stored completions of a label": lambda db, case: _stored(db, case, *labels(RARE)),
    "stored completions of both": lambda db, case: _stored(db, case, model_label(MODEL), *labels(RARE)),
    "statistics": lambda db, case: conversation_reads.stats(db, USER),
    "walk through the old ones": lambda db, case: purge.expire(db, case.number, unused_since=1),
    "what is to be removed": lambda db, case: purge.due(db, case.at),
}
SUMS = {"statistics"}
"""What reads all conversations of a user by its nature: not judged."""


async def ask(database: Database, runs: int, large: Container[str]) -> dict[str, Answer]:
    """All questions, each about other conversations every time."""
    cases = await _cases(database)
    found = {}
    for name, question in QUESTIONS.items():
        watched = Watched(database)
        await question(watched, cases[0])
        times = []
        end = time.monotonic() + MOST_SECONDS
        for run in range(runs):
            if time.monotonic() > end:
                break
            began = time.perf_counter()
            await question(database, cases[run % len(cases)])
            times.append(time.perf_counter() - began)
        found[name] = Answer(spread(times), await plans(database, watched.asked, () if name in SUMS else large))
    return found


async def _cases(database: Database) -> list[Case]:
    """Picked by chance, the same ones each time; neither archived nor deleted."""
    chance, found = random.Random(6), list[Case]()
    last = (await database.fetch("SELECT MAX(number) AS n FROM conversations"))[0]["n"]
    deep = await database.fetch("SELECT id FROM messages WHERE conversation_pk = 'c_deep' ORDER BY seq")
    stored_ones = await database.fetch("SELECT id FROM stored_completions ORDER BY pk LIMIT 10000")
    while len(found) < CASES:
        rows = await database.fetch(_CASE, chance.randrange(last), USER)
        if not rows:
            continue
        row = rows[0]
        [answer] = await database.fetch(_CHAIN, row["pk"], row["message_count"])
        spoken = deep[chance.randrange(30, len(deep) - 30)]["id"]
        completion = stored_ones[chance.randrange(100, len(stored_ones) // 2)]["id"]
        found.append(
            Case(
                row["id"], row["pk"], row["number"], row["session_id"], answer[0], row["last_used"], spoken, completion
            )
        )
    return found


# By the index of lists, the answer by its place: for a join PostgreSQL without statistics reads ten million messages.
_CASE = """
    SELECT id, pk, number, session_id, message_count, last_used FROM conversations
    WHERE (user_id || '') = $2 AND number > $1 AND deleted_at IS NULL AND archived_at IS NULL AND session_id IS NOT NULL
    ORDER BY number LIMIT 1"""
_CHAIN = "SELECT chain FROM messages WHERE conversation_pk = $1 AND seq = $2"


@contextlib.asynccontextmanager
async def filled(url: str, size: Size, say: Callable[[str], None] = lambda text: None) -> AsyncIterator[Database]:
    database = database_at(url)
    await database.open()
    try:
        await migrate(database)
        await fill(database, size, say)
        yield database
    finally:
        await database.close()


async def analyze(database: Database) -> None:
    await database.write([("ANALYZE", [()])], timeout=55)


def main(messages: int, *, runs: int = RUNS, write: bool = True, folder: Path = kept.RESULTS) -> str:
    """The page that was made of it."""
    about = {"gateway": machine.commit() or "unknown", **machine.about()}
    size = Size(messages, min(100_000, messages // (2 * EACH)), min(10_000, messages // 10))
    say = say_to_stderr("history")
    found: dict[str, dict[str, Answer]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-history-") as place:
        asyncio.run(_measure("SQLite", f"sqlite:///{Path(place, 'history.db')}", size, runs, say, found))
    with contextlib.closing(OwnPostgres(durable=True, settings=SETTINGS)) as postgres:
        asyncio.run(_measure("PostgreSQL", postgres.create_database(), size, runs, say, found))
    page = markdown(about, size, found)
    if write:
        folder.mkdir(exist_ok=True)
        (folder / "history.md").write_text(page)
    return page


async def _measure(
    engine: str, url: str, size: Size, runs: int, say: Callable[[str], None], found: dict[str, dict[str, Answer]]
) -> None:
    async with filled(url, size, say) as database:
        large = await large_tables(database)
        found[engine] = await ask(database, runs, large)
        await analyze(database)
        found[f"{engine}, analyzed"] = await ask(database, runs, large)


def markdown(about: Mapping[str, str], size: Size, found: Mapping[str, Mapping[str, Answer]]) -> str:
    some = next(iter(found.values()))
    runs = max(answer.times.count for answer in some.values())
    head = ["question", *(f"{way}, {point}" for way in found for point in ("p50 ms", "p99 ms"))]
    rows = [
        [name, *(milliseconds(point) for answers in found.values() for point in _points(answers[name].times))]
        for name in some
    ]
    parts = [
        "# Look-ups in a large history",
        "Made by `python -m benchmarks --history --messages N`. The budget: no table of more than a thousand rows is "
        "read whole, and a list or a look-up takes under 20 ms, without statistics of the tables and with them.",
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
        f"{size.messages:,} messages, {size.conversations:,} conversations, {size.of_user:,} of them one user's, and "
        f"one of these of {size.deep:,} messages. Each question {runs:,} times at the most, one after the other, about "
        "conversations of that user picked by chance.",
        table(head, rows),
        "## What reads too much",
        "\n".join(_faults(found)) or "Nothing.",
        "## Plans",
        *_plans(found),
    ]
    return "\n\n".join(parts) + "\n"


def _faults(found: Mapping[str, Mapping[str, Answer]]) -> list[str]:
    return [
        f"- {way}, {name}: {fault}"
        for way, answers in found.items()
        for name, answer in answers.items()
        for fault in dict.fromkeys(answer.faults)
    ]


def _points(times: Spread) -> tuple[float | None, float | None]:
    return times.p50, times.p99


def _plans(found: Mapping[str, Mapping[str, Answer]]) -> Iterator[str]:
    """Each plan once, with those whose it is: two kinds of parameters may lead to it, or two engines."""
    for name in next(iter(found.values())):
        ways: dict[str, dict[str, None]] = {}
        for way, answers in found.items():
            for plan in answers[name].plans:
                ways.setdefault("\n".join(plan.how), {})[way] = None
        yield f"### {name[0].upper()}{name[1:]}"
        for text, whose in ways.items():
            yield f"{'; '.join(whose)}:\n\n```\n{text or 'a row is written'}\n```"
