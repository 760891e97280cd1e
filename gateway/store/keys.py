"""API keys, and the one row that says whether they have changed.

A key is stored as the SHA-256 of its text: it has 256 random bits, so a slow hash would buy nothing. Every change moves
`revision`, in the same transaction: who has read the new revision must look again.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.store.database import Database, Row, Step
from gateway.wire.jsontext import dumps, loads

_STATE = "SELECT revision, keys_ever_made FROM gateway_state WHERE id = 1"
_TOUCH: Step = ("UPDATE gateway_state SET revision = revision + 1 WHERE id = 1", [()])
_FIRST: Step = ("UPDATE gateway_state SET revision = revision + 1, keys_ever_made = 1 WHERE id = 1", [()])

_COLUMNS = (
    "id, digest, hint, user_id, name, is_admin, models, requests_per_minute, tokens_per_minute, max_parallel, "
    "budget_nanousd, budget_period, created_at, expires_at, revoked_at"
)


@dataclass(frozen=True, slots=True)
class KeyState:
    """`revision` moves with every change of any key; `ever_made` never goes back."""

    revision: int
    ever_made: bool


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key without its secret. `hint` is its last characters; None in `models`: all of them."""

    id: str
    digest: str
    hint: str
    user_id: str
    name: str | None
    is_admin: bool
    models: tuple[str, ...] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_parallel: int | None
    budget_nanousd: int | None
    budget_period: str | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None = None

    def usable(self, now: int) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


async def state(database: Database) -> KeyState:
    rows = await database.fetch(_STATE)
    return KeyState(rows[0]["revision"], bool(rows[0]["keys_ever_made"]))


async def by_digest(database: Database, digest: str) -> StoredKey | None:
    rows = await database.fetch(f"SELECT {_COLUMNS} FROM api_keys WHERE digest = $1", digest)
    return _key(rows[0]) if rows else None


async def listed(database: Database) -> list[StoredKey]:
    rows = await database.fetch(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, id")
    return [_key(row) for row in rows]


async def add(database: Database, key: StoredKey) -> None:
    models = None if key.models is None else dumps(list(key.models)).decode()
    sql = f"INSERT INTO api_keys ({_COLUMNS}) VALUES ({', '.join(f'${index}' for index in range(1, 16))})"
    row = (
        key.id, key.digest, key.hint, key.user_id, key.name, int(key.is_admin), models, key.requests_per_minute,
        key.tokens_per_minute, key.max_parallel, key.budget_nanousd, key.budget_period, key.created_at,
        key.expires_at, key.revoked_at,
    )  # fmt: skip
    await database.write([(sql, [row]), _FIRST])


async def revoke(database: Database, key_id: str, now: int) -> bool:
    """False if there is no such key. A key that is revoked already keeps its time."""
    if not await database.fetch("SELECT id FROM api_keys WHERE id = $1", key_id):
        return False
    sql = "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, $2) WHERE id = $1"
    await database.write([(sql, [(key_id, now)]), _TOUCH])
    return True


def _key(row: Row) -> StoredKey:
    values = [row[column] for column in _COLUMNS.split(", ")]
    values[5] = bool(values[5])
    values[6] = None if values[6] is None else tuple(loads(values[6].encode()))
    return StoredKey(*values)
