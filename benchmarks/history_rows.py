"""A database that has been in use for years: millions of messages, a user with very many conversations, a conversation
with very many messages.

Rows are made by the database itself, in ranges of conversations, and their ids have the form of `gateway/ids.py`: a
time and random digits. Messages of one range of conversations are written turn by turn, so that those of one
conversation lie scattered over it as they do when many people talk at once. What a text looks like matters to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gateway.ids import ordered_hex, random_hex
from gateway.store import conversations
from gateway.store.conversations import ConversationTurn, Parent, StoredMessage
from gateway.store.database import Database, Step
from gateway.stored import labels, model_label

USER, KEY = "heavy", "key_heavy"
DEEP, BRANCH = "conv_" + "d" * 32, "conv_" + "b" * 32
"""The deep conversation, and one that was branched off from it, and from that, `BRANCHES` times."""
BRANCHES, BRANCHED_AT = 10, 40
SAME, SAME_OF = "5a" * 16, 3
"""Every third conversation of the user's opens with the same words."""
TAG, TAGGED_OF = "work", 10
MODEL, RARE = "a-model", {"trial": "one"}
"""What all stored completions were asked of, and the metadata that each hundredth has."""
START = 1_750_000_000_000
"""The first conversation, in milliseconds; each next one a moment later."""
STEP = 1_000
EACH = 10
"""Messages of a usual conversation: five turns."""
RANGE = 5_000
"""Conversations of one transaction."""
WRITE_SECONDS = 55.0


@dataclass(frozen=True, slots=True)
class Size:
    """So many messages in all, and so many conversations of the one user, of which the deep one has `deep` messages."""

    messages: int
    of_user: int = 100_000
    deep: int = 10_000

    @property
    def conversations(self) -> int:
        return max((self.messages - self.deep) // EACH, self.of_user)

    @property
    def stored(self) -> int:
        """Completions of the user's: enough for a scan of them to be a fault."""
        return max(self.of_user, 20_000)

    @property
    def stride(self) -> int:
        """Every so manieth conversation is the user's."""
        return self.conversations // self.of_user


# What only one engine can say: a number as 12 hexadecimal digits, and 32 random ones.
_DIGITS = {"postgres": "lpad(to_hex({}), 12, '0')", "sqlite": "printf('%012x', {})"}
_RANDOM = {"postgres": "md5(random()::text || {})", "sqlite": "lower(hex(randomblob(16)))"}

# Those that are no constraint are made anew, which is quicker.
_INDEXES = {
    "postgres": """
        SELECT CAST(indexname AS TEXT) AS name, indexdef AS sql FROM pg_indexes
        WHERE schemaname = 'public' AND tablename IN ('messages', 'conversations', 'sessions')
            AND indexname NOT IN (SELECT conname FROM pg_constraint)""",
    "sqlite": """
        SELECT name, sql FROM sqlite_master
        WHERE type = 'index' AND sql IS NOT NULL AND tbl_name IN ('messages', 'conversations', 'sessions')""",
}

_NUMBERS = """
    WITH RECURSIVE numbers (n) AS (
        SELECT CAST($1 AS BIGINT) UNION ALL SELECT n + 1 FROM numbers WHERE n < CAST($2 AS BIGINT)
    )"""

_CONVERSATIONS = """
    INSERT INTO conversations (pk, id, user_id, key_id, session_id, created_at, last_used, message_count,
        total_tokens_input, total_tokens_output, total_cost_nanousd, title, pinned_at, archived_at, deleted_at)
    {numbers}
    SELECT 'c_' || {at} || '00000000000000000000' || {digits}, 'conv_' || {random},
        CASE WHEN {is_user} THEN '{user}' ELSE 'user_' || (n % 9973) END,
        CASE WHEN {is_user} THEN '{key}' END,
        'sess_' || {day} || {session},
        {start} + n * {step}, {start} + n * {step} + 60000, {each}, 500, 1500, 20000, 'Question number ' || n,
        CASE WHEN n / {stride} % 1000 = 1 THEN {start} END, CASE WHEN n / {stride} % 20 = 2 THEN {start} END,
        CASE WHEN n / {stride} % 50 = 3 THEN {start} + n * {step} END
    FROM numbers ORDER BY n"""

_MESSAGES = """
    INSERT INTO messages (id, conversation_pk, seq, role, content, chain, tokens, cost_nanousd, model, finish_reason,
        created_at)
    {numbers}, places (seq) AS (SELECT 1 UNION ALL SELECT seq + 1 FROM places WHERE seq < {each})
    SELECT 'msg_' || {at} || {random}, 'c_' || {at} || '00000000000000000000' || {digits}, seq,
        CASE WHEN seq % 2 = 1 THEN 'user' ELSE 'assistant' END,
        '"What was said in this place, at the length that one might expect of it: ' || n || ' and ' || seq || '"',
        CASE WHEN seq = 2 AND {is_user} AND n / {stride} % {same_of} = 0 THEN '{same}' ELSE {random} END,
        CASE WHEN seq % 2 = 0 THEN 300 ELSE 0 END, CASE WHEN seq % 2 = 0 THEN 4000 END,
        CASE WHEN seq % 2 = 0 THEN 'a-model' END, CASE WHEN seq % 2 = 0 THEN 'stop' END,
        {start} + n * {step} + seq * 1000
    FROM places CROSS JOIN numbers ORDER BY seq, n"""

_SESSIONS = """
    INSERT INTO sessions (id, user_id, created_at, last_activity, conversation_count, total_tokens, total_cost_nanousd)
    SELECT session_id, MIN(user_id), MIN(created_at), MAX(last_used), COUNT(*), SUM(total_tokens_output),
        SUM(total_cost_nanousd)
    FROM conversations WHERE session_id IS NOT NULL GROUP BY session_id"""

_TAGS = """
    INSERT INTO conversation_tags (number, tag, user_id)
    SELECT number, '{tag}', user_id FROM conversations WHERE user_id = '{user}' AND number % {tagged_of} = 0"""

_DEEP = """
    INSERT INTO conversations (pk, id, user_id, key_id, created_at, last_used, message_count, total_tokens_input,
        total_tokens_output, total_cost_nanousd, title)
    VALUES ('c_deep', $1, $2, $3, $4, $4, $5, 0, 0, 0, 'The deep one')"""

_STORED = """
    INSERT INTO stored_completions (pk, id, user_id, key_id, created_at, model, metadata, completion, messages)
    {numbers}
    SELECT 's_' || {at} || '00000000000000000000' || {digits},
        'chatcmpl-' || {at} || '00000000000000000000' || {digits}, '{user}', '{key}', {start} + n * {step}, '{model}',
        '{{}}', '{{"choices": "what was answered"}}', '[]'
    FROM numbers ORDER BY n"""

_LABELS = """
    INSERT INTO stored_labels (completion_pk, label, user_id)
    {numbers}, labels (label, every) AS (SELECT '{all}', 1 UNION ALL SELECT '{rare}', 100)
    SELECT 's_' || {at} || '00000000000000000000' || {digits}, label, '{user}'
    FROM numbers CROSS JOIN labels WHERE n % every = 0 ORDER BY n"""

_DEEP_MESSAGES = """
    INSERT INTO messages (id, conversation_pk, seq, role, content, chain, tokens, cost_nanousd, model, finish_reason,
        created_at)
    {numbers}
    SELECT 'msg_deep' || {random}, 'c_deep', n, CASE WHEN n % 2 = 1 THEN 'user' ELSE 'assistant' END,
        '"What was said in this place, at the length that one might expect of it: ' || n || '"', {random},
        CASE WHEN n % 2 = 0 THEN 300 ELSE 0 END, CASE WHEN n % 2 = 0 THEN 4000 END,
        CASE WHEN n % 2 = 0 THEN 'a-model' END, CASE WHEN n % 2 = 0 THEN 'stop' END, {start} + n * 1000
    FROM numbers ORDER BY n"""


async def fill(database: Database, size: Size, say: Callable[[str], None] = lambda text: None) -> None:
    """Into a migrated database without rows."""
    began = time.monotonic()
    made = 0
    indexes = {str(row["name"]): str(row["sql"]) for row in await database.fetch(_INDEXES[database.dialect])}
    await database.write([(f"DROP INDEX {name}", [()]) for name in indexes])
    while made < size.conversations:
        last = min(made + RANGE, size.conversations)
        given = [(made + 1, last)]
        steps: list[Step] = [(_sql(sql, database, size), given) for sql in (_CONVERSATIONS, _MESSAGES)]
        await database.write(steps, timeout=WRITE_SECONDS)
        if last // 100_000 > made // 100_000 or last == size.conversations:
            say(f"{database.dialect}: {last * EACH:,} messages, {time.monotonic() - began:.0f} s")
        made = last
    deep = (DEEP, USER, KEY, START + size.conversations * STEP, size.deep)
    rest: list[Step] = [
        (_SESSIONS, [()]),
        (_TAGS.format(tag=TAG, user=USER, tagged_of=TAGGED_OF * size.stride), [()]),
        (_DEEP, [deep]),
        (_sql(_DEEP_MESSAGES, database, size), [(1, size.deep)]),
        (_sql(_STORED, database, size), [(1, size.stored)]),
        (_sql(_LABELS, database, size), [(1, size.stored)]),
    ]
    for step in [*rest, *((sql, [()]) for sql in indexes.values())]:
        await database.write([step], timeout=WRITE_SECONDS)
    for turn in _branches(size):
        await database.write(conversations.save([turn]))
    say(f"{database.dialect}: ready, {time.monotonic() - began:.0f} s")


def _branches(size: Size) -> Iterator[ConversationTurn]:
    parent = Parent(DEEP, "c_deep", BRANCHED_AT)
    for number in range(1, BRANCHES + 1):
        own = BRANCH if number == BRANCHES else f"conv_{number:032x}"
        at = START + size.conversations * STEP + number
        said = [
            StoredMessage(f"msg_{ordered_hex()}", role, '"What was said"', None, random_hex())
            for role in ("user", "assistant")
        ]
        turn = ConversationTurn(f"c_branch{number}", own, USER, KEY, None, None, True, "A branch", at, said)
        turn.parent, turn.after = parent, parent.seq
        yield turn
        parent = Parent(own, turn.pk, parent.seq + len(said))


def _sql(text: str, database: Database, size: Size) -> str:
    """`session`: fifty conversations of one user in a row have the same."""
    digits = _DIGITS[database.dialect]
    group = f"n / {50 * size.stride}"
    is_user = f"n % {size.stride} = 0 AND n <= {size.stride * size.of_user}"
    owner = f"CASE WHEN {is_user} THEN 0 ELSE 1 + n % 9973 END"
    return text.format(
        numbers=_NUMBERS,
        digits=digits.format("n"),
        at=digits.format(f"{START} + n * {STEP}"),
        day=digits.format(f"{START} + ({group}) * {STEP}"),
        session=f"'00000000' || {digits.format(owner)} || {digits.format(group)}",
        random=_RANDOM[database.dialect].format("n"),
        is_user=is_user, stride=size.stride, same=SAME, same_of=SAME_OF, user=USER, key=KEY, start=START,
        step=STEP, each=EACH, model=MODEL, all=model_label(MODEL), rare=labels(RARE)[0],
    )  # fmt: skip
