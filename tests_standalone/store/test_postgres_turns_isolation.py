"""A batch as one statement leaves what is another user's, however alike it is."""

from __future__ import annotations

import pytest

from gateway.store.database import Database
from gateway.store.turn_leases import Lease
from tests_standalone.conftest import rows
from tests_standalone.store.test_postgres_turns import TABLES, database, save, talk, url

__all__ = ["database", "url"]


@pytest.mark.parametrize("turns", [1, 3])
async def test_a_turn_ends_its_own_lease_alone(database: Database, turns: int) -> None:
    """Others hold conversations of the same name, by a holder of the same name."""
    own = [Lease("ann", f"chat-{number}", f"h{number}") for number in range(turns)]
    before = await rows(database, TABLES["turn_leases"])
    await save(database, *(talk(lease.conversation_id, "hello", lease=lease) for lease in own))
    assert await rows(database, TABLES["turn_leases"]) == [lease for lease in before if lease not in own]
