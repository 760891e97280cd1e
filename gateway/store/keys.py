"""API keys, and the one row that says whether they have changed.

A key is stored as the SHA-256 of its text: it has 256 random bits, so a slow hash would buy nothing. After a rotation
the digest from before is good for a while, too.

Every change moves `revision`, in the same transaction and as its first statement: who has read the new revision must
look again, and changes of keys, which hold that row until they are committed, come one after the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gateway.errors import NotFound
from gateway.store.database import Database, Row, Step, Transaction, Value
from gateway.wire.jsontext import dumps, loads

DIGESTS_AT_ONCE = 64

_STATE = "SELECT revision, keys_ever_made FROM gateway_state WHERE id = 1"
_TOUCH = "UPDATE gateway_state SET revision = revision + 1 WHERE id = 1"
_EVER_MADE = "UPDATE gateway_state SET keys_ever_made = 1 WHERE id = 1"
_FIRST: Step = ("UPDATE gateway_state SET revision = revision + 1, keys_ever_made = 1 WHERE id = 1", [()])

_NAMES = (
    "id", "digest", "hint", "user_id", "name", "is_admin", "models", "requests_per_minute", "tokens_per_minute",
    "max_parallel", "budget_nanousd", "budget_period", "created_at", "expires_at", "revoked_at", "request_burst",
    "token_burst", "per_end_user", "labels", "created_by", "previous_digest", "previous_until",
)  # fmt: skip
_COLUMNS = ", ".join(_NAMES)
_ASKED = ", ".join(f"${place}" for place in range(1, DIGESTS_AT_ONCE + 1))
_BY_DIGESTS = f"""
    SELECT {_COLUMNS} FROM api_keys WHERE digest IN ({_ASKED})
    UNION ALL
    SELECT {_COLUMNS} FROM api_keys WHERE previous_digest IS NOT NULL AND previous_digest IN ({_ASKED})"""
_BY_ID = f"SELECT {_COLUMNS} FROM api_keys WHERE id = $1"
_ADD = f"INSERT INTO api_keys ({_COLUMNS}) VALUES ({', '.join(f'${place}' for place in range(1, len(_NAMES) + 1))})"
_PUT = "UPDATE api_keys SET {} WHERE id = $1".format(
    ", ".join(f"{name} = ${place}" for place, name in enumerate(_NAMES[1:], 2))
)
_LISTED = f"""
    SELECT {_COLUMNS} FROM api_keys
    WHERE (CAST($1 AS TEXT) IS NULL OR user_id = $1)
        AND (CAST($2 AS TEXT) IS NULL OR (created_at, id) > (SELECT created_at, id FROM api_keys WHERE id = $2))
    ORDER BY created_at, id LIMIT $3"""
_REMOVE_ENDED = "DELETE FROM api_keys WHERE user_id = $1 AND created_at <= $2 AND revoked_at IS NOT NULL"
_ALL = 2**62


@dataclass(frozen=True, slots=True)
class KeyState:
    """`revision` moves with every change of any key; `ever_made` never goes back."""

    revision: int
    ever_made: bool


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key without its secret. `hint` is its last characters; None in `models`: all of them. `created_by` is the key
    that made it; None: the command line, or the admin key of the configuration."""

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
    budget_period: Literal["day", "month", "total"] | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None = None
    request_burst: int | None = None
    token_burst: int | None = None
    per_end_user: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    created_by: str | None = None
    previous_digest: str | None = None
    previous_until: int | None = None

    def usable(self, now: int) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def accepts(self, now: int) -> tuple[str, ...]:
        """The digests that open it: its own, and for a while that from before its rotation."""
        if self.previous_digest is not None and self.previous_until is not None and now < self.previous_until:
            return self.digest, self.previous_digest
        return (self.digest,)

    def rotated(self, digest: str, hint: str, until: int | None) -> StoredKey:
        """With a new secret. The present one stays good until then (None: it ends at once), an older one does not."""
        previous = self.digest if until is not None else None
        return replace(self, digest=digest, hint=hint, previous_digest=previous, previous_until=until)


class Changes:
    """Keys as they stand while nobody else changes any. `transaction`: for what is to be done together with it."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = self._transaction = transaction

    async def find(self, key_id: str) -> StoredKey:
        """Raises NotFound, which undoes all."""
        found = _first(await self._transaction.fetch(_BY_ID, key_id))
        if found is None:
            raise NotFound("There is no key with this id.", param="id")
        return found

    async def of(self, user_id: str) -> list[StoredKey]:
        """All of a user's, revoked ones too."""
        return [_key(row) for row in await self._transaction.fetch(_LISTED, user_id, None, _ALL)]

    async def remove_ended(self, user_id: str, made_until: int) -> None:
        """Those of a user that are revoked. Of a key that is only revoked, the row stays."""
        await self._transaction.execute(_REMOVE_ENDED, user_id, made_until)

    async def put(self, key: StoredKey) -> None:
        """The key with this id becomes what is given."""
        await self._transaction.execute(_PUT, *_values(key))

    async def add(self, key: StoredKey) -> None:
        await self._transaction.execute(_EVER_MADE)
        await self._transaction.execute(_ADD, *_values(key))


@asynccontextmanager
async def changing(database: Database) -> AsyncIterator[Changes]:
    """Looks and changes in one transaction, in which no key changes but by it; nothing is done if it raises."""
    async with database.transaction() as transaction:
        await transaction.execute(_TOUCH)
        yield Changes(transaction)


async def state(database: Database) -> KeyState:
    rows = await database.fetch(_STATE)
    return KeyState(rows[0]["revision"], bool(rows[0]["keys_ever_made"]))


async def by_digest(database: Database, digest: str, now: int) -> StoredKey | None:
    return (await by_digests(database, [digest], now)).get(digest)


async def by_digests(database: Database, digests: Sequence[str], now: int) -> dict[str, StoredKey]:
    """Those that are there, by the digest that was asked for: their own, or that from before a rotation while it is
    good. One statement for each `DIGESTS_AT_ONCE`."""
    found: dict[str, StoredKey] = {}
    for start in range(0, len(digests), DIGESTS_AT_ONCE):
        asked = digests[start : start + DIGESTS_AT_ONCE]
        rows = await database.fetch(_BY_DIGESTS, *asked, *[""] * (DIGESTS_AT_ONCE - len(asked)))
        for key in map(_key, rows):
            found.update((digest, key) for digest in key.accepts(now) if digest in asked)
    return found


async def by_id(database: Database, key_id: str) -> StoredKey | None:
    return _first(await database.fetch(_BY_ID, key_id))


async def listed(
    database: Database, *, limit: int | None = None, after: str | None = None, user_id: str | None = None
) -> list[StoredKey]:
    """Oldest first, revoked ones too. `after` is an id: those that come later; none if no key has it."""
    rows = await database.fetch(_LISTED, user_id, after, _ALL if limit is None else limit)
    return [_key(row) for row in rows]


async def add(database: Database, key: StoredKey) -> None:
    await database.write([_FIRST, (_ADD, [_values(key)])])


async def update(database: Database, key_id: str, change: Callable[[StoredKey], StoredKey]) -> StoredKey:
    """The key as `change` makes it of what it is. Raises NotFound, and what `change` raises: then nothing changes."""
    async with changing(database) as changes:
        changed = change(await changes.find(key_id))
        await changes.put(changed)
    return changed


async def rotate(database: Database, key_id: str, digest: str, hint: str, until: int | None) -> StoredKey:
    """A new secret; see `StoredKey.rotated`. Raises NotFound."""
    return await update(database, key_id, lambda key: key.rotated(digest, hint, until))


async def revoke(database: Database, key_id: str, now: int) -> bool:
    """False if there is no such key. A key that is revoked already keeps its time."""
    try:
        await update(database, key_id, lambda key: replace(key, revoked_at=key.revoked_at or now))
    except NotFound:
        return False
    return True


def _first(rows: Sequence[Row]) -> StoredKey | None:
    return _key(rows[0]) if rows else None


def _values(key: StoredKey) -> list[Value]:
    values: dict[str, Any] = {name: getattr(key, name) for name in _NAMES}
    values["is_admin"], values["per_end_user"] = int(key.is_admin), int(key.per_end_user)
    values["models"] = None if key.models is None else dumps(list(key.models)).decode()
    values["labels"] = dumps(dict(key.labels)).decode() if key.labels else None
    return list(values.values())


def _key(row: Row) -> StoredKey:
    values: dict[str, Any] = {name: row[name] for name in _NAMES}
    values["is_admin"], values["per_end_user"] = bool(values["is_admin"]), bool(values["per_end_user"])
    values["models"] = None if values["models"] is None else tuple(loads(values["models"].encode()))
    values["labels"] = {} if values["labels"] is None else loads(values["labels"].encode())
    return StoredKey(**values)
