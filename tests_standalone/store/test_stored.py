"""Stored completions: what goes in is found by id, in the order of time, by label, by its user alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gateway.store import stored
from gateway.store.database import AlreadyThere, Database
from gateway.store.stored import Order, StoredCompletion
from tests_standalone.conftest import NOON, rows


def completion(number: int, *labels: str, user: str = "ann", **fields: Any) -> StoredCompletion:
    values: dict[str, Any] = {
        "pk": f"s_{user}{number}", "id": f"id-{number}", "key_id": None, "created_at": NOON, "model": "m",
        "metadata": "{}",
        "completion": f'{{"n":{number}}}',
        "messages": f'["{number}"]',
    }  # fmt: skip
    return StoredCompletion(user_id=user, labels=labels, **values | fields)


async def save(database: Database, *completions: StoredCompletion) -> None:
    await database.write(stored.save((one, f"conv of {one.id}") for one in completions))


async def ids(database: Database, *labels: str, user: str = "ann", **how: Any) -> list[str]:
    values: dict[str, Any] = {"after": None, "limit": 100, "order": "asc"}
    return [one.id for one in await stored.listed(database, user, labels=labels, **values | how)]


async def test_found_by_user_and_id(migrated: Database) -> None:
    await save(migrated, completion(1), completion(1, user="bob", completion='{"bobs":1}'))
    found = await stored.find(migrated, "ann", "id-1")
    assert found == stored.Found("s_ann1", "id-1", "conv of id-1", "{}", '{"n":1}')
    assert await stored.messages(migrated, "ann", "id-1") == '["1"]'
    assert await stored.place(migrated, "ann", "id-1") == "s_ann1"
    assert await stored.find(migrated, "eve", "id-1") is None
    assert await stored.messages(migrated, "eve", "id-1") is None
    assert await stored.place(migrated, "eve", "id-1") is None


async def test_one_id_is_once_for_a_user(migrated: Database) -> None:
    await save(migrated, completion(1))
    with pytest.raises(AlreadyThere):
        await save(migrated, completion(1, pk="s_another"))


async def test_lists_in_both_orders_beyond_a_place(migrated: Database) -> None:
    await save(migrated, *(completion(number) for number in (3, 1, 4, 2)), completion(5, user="bob"))
    assert await ids(migrated) == ["id-1", "id-2", "id-3", "id-4"]
    assert await ids(migrated, order="desc") == ["id-4", "id-3", "id-2", "id-1"]
    assert await ids(migrated, after="s_ann2", limit=1) == ["id-3"]
    assert await ids(migrated, after="s_ann3", order="desc") == ["id-2", "id-1"]
    assert await ids(migrated, after="s_ann25") == ["id-3", "id-4"]  # a row that is gone


async def test_lists_what_has_all_the_labels(migrated: Database) -> None:
    await save(
        migrated,
        *(completion(number, "even" if number % 2 == 0 else "odd", "all") for number in range(1, 7)),
        completion(7, "odd", "even", "all"),
        completion(8, "all", user="bob"),
    )
    assert await ids(migrated, "all") == [f"id-{number}" for number in range(1, 8)]
    assert await ids(migrated, "even") == ["id-2", "id-4", "id-6", "id-7"]
    assert await ids(migrated, "all", "even", order="desc", limit=2) == ["id-7", "id-6"]
    assert await ids(migrated, "all", "even", order="desc", limit=2, after="s_ann6") == ["id-4", "id-2"]
    assert await ids(migrated, "odd", "all", "even") == ["id-7"]
    assert await ids(migrated, "all", "none") == []


async def test_metadata_and_its_labels_change_together(migrated: Database) -> None:
    await save(migrated, completion(1, "model", "old", "both"), completion(1, "old", user="bob"))
    async with migrated.transaction() as transaction:
        held = await stored.hold(transaction, "ann", "id-1")
        assert held is not None
        assert await stored.hold(transaction, "eve", "id-1") is None
        await stored.set_metadata(transaction, "ann", "id-1", held, '{"a":"b"}', gone=["old"], come=["new"])
    found = await stored.find(migrated, "ann", "id-1")
    assert found is not None
    assert found.metadata == '{"a":"b"}'
    assert await ids(migrated, "new", "both", "model") == ["id-1"]
    assert await ids(migrated, "old") == []
    assert await ids(migrated, "old", user="bob") == ["id-1"]


async def test_delete_leaves_nothing_and_only_ones_own(migrated: Database) -> None:
    await save(migrated, completion(1, "x"), completion(2, "x"), completion(1, "x", user="bob"))
    assert await stored.delete(migrated, "ann", "id-1")
    assert not await stored.delete(migrated, "ann", "id-1")
    assert not await stored.delete(migrated, "eve", "id-2")
    assert await rows(migrated, "SELECT pk FROM stored_completions ORDER BY pk") == [("s_ann2",), ("s_bob1",)]
    labels = "SELECT completion_pk FROM stored_labels ORDER BY completion_pk"
    assert await rows(migrated, labels) == [("s_ann2",), ("s_bob1",)]


@pytest.mark.parametrize("analyzed", [False, True])
async def test_of_a_frequent_label_no_more_is_read_than_is_shown(migrated: Database, analyzed: bool) -> None:
    """By a planner that expects to find enough of it. One that takes the label for a rare one may read and sort all its
    rows. Ann is the first user and the last."""
    labelled = [(f"s_{number:05}", label, "ann") for label in ("another", "wanted") for number in range(4000)]
    await migrated.write([(stored.INSERT_LABEL, labelled), *([("ANALYZE", [()])] if analyzed else [])])
    explain = "EXPLAIN QUERY PLAN " if migrated.dialect == "sqlite" else "EXPLAIN "
    values = {"$1": "'ann'", "$2": "''", "$3": "20", "$4": "'wanted'", "$5": "'s_g'", "$6": "'another'"}
    walks = [stored._WALK.format(also=also, **stored._WAYS["asc"]) for also in ("", stored.ALSO_LABELLED.format(6))]
    async with migrated.transaction() as transaction:
        for walk in walks:
            sql = re.sub(r"\$\d", lambda place: values[place[0]], walk)
            plan = "\n".join(str(tuple(row)) for row in await transaction.fetch(explain + sql))
            assert re.search("(INDEX|Index Only Scan using) stored_labels_by_user", plan)
            assert not re.search("Sort|TEMP B-TREE", plan)
            if migrated.dialect == "postgres":
                assert int(re.findall(r"Index Only Scan .* rows=(\d+)", plan)[0]) >= 20


async def test_the_label_that_fewest_have_from_there_on_is_walked(migrated: Database) -> None:
    early = [completion(number, "all", "early") for number in range(1100, 1400)]
    late = [completion(number, "all", *(["late"] if number % 4 else ["fourth"])) for number in range(1400, 1900)]
    await save(migrated, *early, *late)

    async def front(*labels: str, begin: str, order: Order = "asc") -> str:
        return (await stored._rarest_first(migrated, "ann", labels, begin, order))[0]

    assert await front("all", "late", "fourth", begin="") == "fourth"
    assert await front("all", "late", "early", begin="") == "late"
    assert await front("all", "late", "early", begin="s_ann1390") == "early"
    assert await front("all", "early", "none", begin="") == "none"
    assert await front("all", "early", "late", begin="s_g", order="desc") == "early"
    assert await front("all", "late", begin="s_ann1450", order="desc") == "late"
