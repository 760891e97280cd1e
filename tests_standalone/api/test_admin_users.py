"""`/admin/users`: who there is, and who may delete whom."""

from __future__ import annotations

from typing import Any

import pytest

from tests_standalone.api.conftest import App, Launch
from tests_standalone.api.test_admin_keys import bearer, error, make
from tests_standalone.conftest import eventually


@pytest.fixture
async def app(launch: Launch) -> App:
    return await launch()


async def say(app: App, key: dict[str, str]) -> int:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
    return (await app.call("POST", "/v1/chat/completions", body, key)).status


async def test_users_are_listed_by_name_and_a_page_goes_on_after_one(app: App) -> None:
    for user in ("ann", "bob", "cleo"):
        await make(app, user=user)
    assert await say(app, bearer(await make(app, user="bob"))) == 200
    listed = (await app.call("GET", "/admin/users", query_string=b"limit=2")).json
    assert [(user["id"], user["object"], user["active_keys"]) for user in listed["data"]] == [
        ("ann", "user", 1),
        ("bob", "user", 2),
    ]
    assert [user["last_call_at"] is not None for user in listed["data"]] == [False, True]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("ann", "bob", True)
    rest = (await app.call("GET", "/admin/users", query_string=b"after=bob")).json
    assert ([user["id"] for user in rest["data"]], rest["has_more"]) == (["cleo"], False)


@pytest.mark.parametrize("query", [b"limit=0", b"limit=x", b"limit=1&limit=2", b"after=", b"order=asc"])
async def test_a_query_that_nobody_understands_is_told_so(app: App, query: bytes) -> None:
    assert (await app.call("GET", "/admin/users", query_string=query)).status == 400


async def test_a_deleted_user_is_locked_out_and_leaves_figures(app: App) -> None:
    made = await make(app, user="ann")
    assert await say(app, bearer(made)) == 200
    answer = await app.call("DELETE", "/admin/users/ann")
    told = answer.json
    assert (answer.status, told | {"anonymous_id": ""}) == (
        200,
        {"id": "ann", "object": "user.deleted", "deleted": True, "finished": True, "anonymous_id": ""},
    )
    assert await app.rows("SELECT user_id, key_id, conversation_id FROM usage_rows") == [
        (told["anonymous_id"], None, None)
    ]
    for table in ("api_keys", "conversations", "messages", "sessions"):
        assert await app.rows(f"SELECT * FROM {table}") == []

    async def locked_out() -> bool:
        return await say(app, bearer(made)) == 401

    await eventually(locked_out)
    assert (await app.call("DELETE", "/admin/users/ann")).json["anonymous_id"] == told["anonymous_id"]


@pytest.mark.parametrize("user", ["nobody", "ann ", "%", "x" * 300, "a\x00b", "' OR '1'='1"])
async def test_who_is_not_there_cannot_be_deleted(app: App, user: str) -> None:
    await make(app, user="ann")
    assert (await app.call("DELETE", f"/admin/users/{user}")).status == 404
    assert await app.rows("SELECT user_id, revoked_at FROM api_keys") == [("ann", None)]


@pytest.mark.parametrize("user", ["ann/laptop", "ann@example.com", "Zoë 🙂", "a:b?c"])
async def test_names_of_all_kinds(app: App, user: str) -> None:
    await make(app, user=user)
    assert (await app.call("DELETE", f"/admin/users/{user}")).json["id"] == user
    assert await app.rows("SELECT * FROM api_keys") == []


@pytest.mark.parametrize(("method", "path"), [("GET", "/admin/users"), ("DELETE", "/admin/users/ann")])
async def test_only_for_admins(app: App, method: str, path: str) -> None:
    ann = await make(app, user="ann")
    assert (await app.call(method, path, headers=bearer(ann))).status == 403
    assert (await app.call(method, path, headers={"authorization": "Bearer sk-none"})).status == 401
    assert await app.rows("SELECT revoked_at FROM api_keys") == [(None,)]


@pytest.mark.parametrize(
    ("has", "allowed"),
    [({}, True), ({"requests_per_minute": 5}, True), ({"admin": True}, True), ({"models": ["a", "b"]}, False)],
)
async def test_nobody_deletes_a_user_who_has_more(app: App, has: dict[str, Any], allowed: bool) -> None:
    admin = await make(app, user="root", admin=True, models=["a"])
    await make(app, user="ann", **({"models": ["a"]} | has))
    answer = await app.call("DELETE", "/admin/users/ann", headers=bearer(admin))
    if allowed:
        assert answer.status == 200
    else:
        assert error(answer)[0] == 403
        assert error(answer)[2] == "models"
        assert await app.rows("SELECT COUNT(*) FROM api_keys WHERE revoked_at IS NOT NULL") == [(0,)]


async def test_an_admin_may_delete_himself(app: App) -> None:
    admin = await make(app, user="root", admin=True)
    assert (await app.call("DELETE", "/admin/users/root", headers=bearer(admin))).status == 200

    async def locked_out() -> bool:
        return (await app.call("GET", "/admin/users", headers=bearer(admin))).status == 401

    await eventually(locked_out)
