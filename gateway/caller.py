"""Who is asking, and what it may do."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.errors import PermissionDenied
from gateway.limits import Period
from gateway.store.keys import StoredKey


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """A key's own. None: what the configuration says of every key. Rates are for a minute, bursts sizes of buckets."""

    requests_per_minute: int | None = None
    request_burst: int | None = None
    tokens_per_minute: int | None = None
    token_burst: int | None = None
    max_parallel: int | None = None
    budget_nanousd: int | None = None
    budget_period: Period | None = None
    per_end_user: bool = False


_NONE = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """A principal: whose tokens these are and what it may do. `models` None: all of them. `limits` None: none of its
    own. `revision` is that of the keys under which it was found, by its `digest` if it has a key."""

    user_id: str
    key_id: str | None = None
    is_admin: bool = False
    models: frozenset[str] | None = None
    limits: KeyLimits | None = None
    revision: int = field(default=0, compare=False)
    digest: str | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, key: StoredKey, digest: str, revision: int) -> Caller:
        """`digest` is that which it was asked for by: its own, or that from before its rotation."""
        limits = KeyLimits(
            key.requests_per_minute, key.request_burst, key.tokens_per_minute, key.token_burst, key.max_parallel,
            key.budget_nanousd, key.budget_period, key.per_end_user,
        )  # fmt: skip
        models = None if key.models is None else frozenset(key.models)
        return cls(key.user_id, key.id, key.is_admin, models, None if limits == _NONE else limits, revision, digest)

    def check_model(self, name: str, alias: str | None = None) -> None:
        """The key must name the model, or the alias that it was asked by. Raises PermissionDenied."""
        if self.models is not None and not self.models & {name, alias or name}:
            raise PermissionDenied(f"This key may not use the model '{alias or name}'.", param="model")

    def check_admin(self) -> None:
        """Raises PermissionDenied."""
        if not self.is_admin:
            raise PermissionDenied("This needs an admin key: `gateway keys create --user NAME --admin` makes one.")
