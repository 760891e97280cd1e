"""`/admin/keys`: what it takes and tells, and that no key grants more than its maker has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests_standalone.api.conftest import Answer, App, Launch

JSON = {"content-type": "application/json"}
SHOWN = {
    "id", "object", "user", "name", "hint", "admin", "models", "requests_per_minute", "request_burst",
    "tokens_per_minute", "token_burst", "max_parallel", "budget_usd", "budget_period", "per_end_user", "labels",
    "expires_at", "created_at", "created_by", "revoked_at",
}  # fmt: skip
FULL = {
    "user": "ann", "name": "laptop 🙂", "admin": True, "models": ["a", "b/c:d"], "requests_per_minute": 10,
    "request_burst": 20, "tokens_per_minute": 2000, "token_burst": 4000, "max_parallel": 3, "budget_usd": "12.5",
    "budget_period": "month", "per_end_user": True, "labels": {"team": "blue"},
    "expires_at": "2099-01-31T00:00:00.000Z",
}  # fmt: skip


@pytest.fixture
async def app(launch: Launch) -> App:
    return await launch()


async def make(app: App, key: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    answer = await app.call("POST", "/admin/keys", {"user": "ann", **fields}, key)
    assert answer.status == 200, answer.body
    made: dict[str, Any] = answer.json
    return made


def bearer(made: dict[str, Any]) -> dict[str, str]:
    return {"authorization": f"Bearer {made['key']}"}


def error(answer: Answer) -> tuple[int, str, str]:
    found = answer.json["error"]
    assert found["message"].isprintable()
    return answer.status, found["code"], found["param"]


async def works(app: App, made: dict[str, Any]) -> bool:
    return (await app.call("GET", "/v1/models", headers=bearer(made))).status == 200


# What it takes and tells


async def test_a_key_is_made_and_its_secret_told_once(app: App) -> None:
    answer = await app.call("POST", "/admin/keys", {"user": "ann"})
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    made = answer.json
    secret = made.pop("key")
    assert made.keys() == SHOWN
    assert made | {"id": "", "created_at": ""} == {
        "id": "", "object": "api_key", "user": "ann", "name": None, "hint": secret[-4:], "admin": False, "models": None,
        "requests_per_minute": None, "request_burst": None, "tokens_per_minute": None, "token_burst": None,
        "max_parallel": None, "budget_usd": None, "budget_period": None, "per_end_user": False, "labels": {},
        "expires_at": None, "created_at": "", "created_by": None, "revoked_at": None,
    }  # fmt: skip
    assert made["created_at"].endswith("Z")
    assert await works(app, {"key": secret})
    for path in ("/admin/keys", f"/admin/keys/{made['id']}"):
        shown = await app.call("GET", path)
        assert shown.status == 200
        assert secret.encode() not in shown.body
        assert shown.headers["cache-control"] == "no-store"
    assert (await app.call("GET", f"/admin/keys/{made['id']}")).json == made


async def test_all_that_a_key_can_have(app: App) -> None:
    made = await make(app, **FULL)
    assert {field: made[field] for field in FULL} == FULL
    assert await app.rows("SELECT budget_nanousd, expires_at FROM api_keys") == [(12_500_000_000, 4_073_500_800_000)]


@pytest.mark.parametrize(
    ("raw", "nano"),
    [("0.1", 100_000_000), ("123456789.123456789", 123_456_789_123_456_789), ("3", 3_000_000_000),
     ('"0.30"', 300_000_000)],
)  # fmt: skip
async def test_money_is_exact_as_a_number_and_as_a_text(app: App, raw: str, nano: int) -> None:
    answer = await app.call("POST", "/admin/keys", b'{"user": "ann", "budget_usd": %s}' % raw.encode())
    assert answer.json["budget_usd"] == raw.strip('"').rstrip("0" if "." in raw else "")
    assert await app.rows("SELECT budget_nanousd, budget_period FROM api_keys") == [(nano, "total")]


@pytest.mark.parametrize(
    ("said", "code", "param"),
    [
        ({}, "missing_parameter", "user"),
        ({"user": ""}, "invalid_value", "user"),
        ({"user": "ann", "requests_per_minute": 0}, "invalid_value", "requests_per_minute"),
        ({"user": "ann", "requests_per_minute": "5"}, "invalid_value", "requests_per_minute"),
        ({"user": "ann", "budget_usd": 0.0000000001}, "invalid_value", "budget_usd"),
        ({"user": "ann", "budget_period": "day"}, "invalid_value", "budget_period"),
        ({"user": "ann", "expires_at": "2020-01-01"}, "invalid_value", "expires_at"),
        ({"user": "ann", "models": "a"}, "invalid_value", "models"),
        ({"user": "ann", "labels": {"a": 1}}, "invalid_value", "labels"),
        ({"user": "ann", "rights": "all"}, "unknown_parameter", "rights"),
        ({"user": "ann", "is_admin": True}, "unknown_parameter", "is_admin"),
        ({"user": "ann", "tenant": "other"}, "unknown_parameter", "tenant"),
        ({"user": "ann", "id": "key_1"}, "read_only_parameter", "id"),
        ({"user": "ann", "key": "sk-mine"}, "read_only_parameter", "key"),
        ({"user": "ann", "created_by": None}, "read_only_parameter", "created_by"),
        ({"user": "ann", "revoked_at": None}, "read_only_parameter", "revoked_at"),
    ],
)
async def test_every_mistake_names_its_field(app: App, said: dict[str, Any], code: str, param: str) -> None:
    assert error(await app.call("POST", "/admin/keys", said)) == (400, code, param)
    assert await app.rows("SELECT id FROM api_keys") == []
    if param != "user":
        made = await make(app)
        said.pop("user")
        assert error(await app.call("PATCH", f"/admin/keys/{made['id']}", said)) == (400, code, param)


async def test_an_unknown_field_is_told_the_nearest(app: App) -> None:
    answer = await app.call("POST", "/admin/keys", {"user": "ann", "requests_per_minut": 5})
    assert "did you mean requests_per_minute?" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"[]", b"nonsense", b'"x"', b'{"user": "ann", "budget_usd": 1e400}', b'{"user": NaN}']
)
async def test_a_body_that_is_no_object(app: App, body: bytes) -> None:
    assert (await app.call("POST", "/admin/keys", body)).status == 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_bodies_are_json_and_say_so(app: App, kind: str) -> None:
    made = await make(app)
    for method, path in (("POST", ""), ("PATCH", f"/{made['id']}"), ("POST", f"/{made['id']}/rotate")):
        answer = await app.call(method, f"/admin/keys{path}", {"user": "bob"}, {"content-type": kind})
        assert answer.status == 415
    assert await app.rows("SELECT user_id FROM api_keys") == [("ann",)]


@pytest.mark.parametrize("method", ["PATCH", "POST"])
async def test_a_change_is_of_the_fields_that_are_sent(app: App, method: str) -> None:
    made = await make(app, **FULL)
    answer = await app.call(method, f"/admin/keys/{made['id']}", {"requests_per_minute": None, "budget_usd": 0.5})
    assert answer.status == 200
    made.pop("key")
    assert answer.json == made | {"requests_per_minute": None, "budget_usd": "0.5"}
    nothing = dict.fromkeys(FULL) | {"user": "bob", "admin": False, "per_end_user": False}
    answer = await app.call(method, f"/admin/keys/{made['id']}", nothing)
    assert {field: answer.json[field] for field in FULL} == nothing | {"labels": {}}


async def test_a_rotated_key_has_two_secrets_for_a_while(app: App) -> None:
    old = await make(app)
    path = f"/admin/keys/{old['id']}/rotate"
    answer = await app.call("POST", path, {"overlap_seconds": 3600})
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    new = answer.json
    assert new | {"hint": "", "key": ""} == old | {"hint": "", "key": ""}
    assert new["hint"] == new["key"][-4:]
    assert await works(app, old)
    assert await works(app, new)
    last = (await app.call("POST", path, b"")).json
    assert last["key"] not in (old["key"], new["key"])
    assert (await app.call("GET", "/v1/models", headers=bearer(last))).status == 200
    assert await app.rows("SELECT previous_digest, previous_until FROM api_keys") == [(None, None)]


@pytest.mark.parametrize(
    ("said", "param"),
    [({"overlap_seconds": value}, "overlap_seconds") for value in (-1, 2592001, 1.5, "60", True, None, [])]
    + [({"overlap": 60}, "overlap"), ({"user": "bob"}, "user")],
)
async def test_an_overlap_is_at_most_thirty_days(app: App, said: dict[str, Any], param: str) -> None:
    made = await make(app)
    answer = await app.call("POST", f"/admin/keys/{made['id']}/rotate", said)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert await works(app, made)


async def test_a_revoked_key_stays_listed_and_cannot_be_changed(app: App) -> None:
    made = await make(app)
    path = f"/admin/keys/{made['id']}"
    answer = await app.call("DELETE", path)
    assert answer.status == 200
    assert answer.json["revoked_at"] is not None
    assert (await app.call("DELETE", path)).json == answer.json
    assert (await app.call("GET", path)).json == answer.json
    assert error(await app.call("PATCH", path, {"name": "x"})) == (400, "key_revoked", "id")
    assert error(await app.call("POST", f"{path}/rotate", {})) == (400, "key_revoked", "id")


async def test_a_key_that_is_not_there(app: App) -> None:
    for method, path in (("GET", ""), ("PATCH", ""), ("POST", ""), ("DELETE", ""), ("POST", "/rotate")):
        answer = await app.call(method, f"/admin/keys/key_none{path}", {})
        assert error(answer) == (404, "not_found", "id"), method
    assert await app.rows("SELECT revision FROM gateway_state") == [(0,)]


async def test_other_methods(app: App) -> None:
    for method, path in (("PUT", "/admin/keys/x"), ("DELETE", "/admin/keys"), ("GET", "/admin/keys/x/rotate")):
        assert (await app.call(method, path, {})).status == 405


# Lists


async def test_keys_are_listed_in_pages(app: App) -> None:
    made = [await make(app, user=user) for user in ("ann", "bob", "ann", "bob", "ann")]
    ids = sorted((key["created_at"], key["id"]) for key in made)

    async def page(query: str) -> dict[str, Any]:
        answer = await app.call("GET", "/admin/keys", query_string=query.encode())
        assert answer.status == 200
        found: dict[str, Any] = answer.json
        return found

    whole = await page("")
    assert [key["id"] for key in whole["data"]] == [key for _, key in ids]
    assert all(key.keys() == SHOWN for key in whole["data"])
    assert whole["has_more"] is False
    first = await page("limit=2")
    assert (len(first["data"]), first["has_more"]) == (2, True)
    rest = await page(f"limit=3&after={first['last_id']}")
    assert (first["data"] + rest["data"], rest["has_more"]) == (whole["data"], False)
    assert (rest["first_id"], rest["last_id"]) == (ids[2][1], ids[4][1])
    assert {key["user"] for key in (await page("user=bob"))["data"]} == {"bob"}
    assert len((await page("user=bob&limit=1"))["data"]) == 1
    assert await page("user=nobody") == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("sort=digest", "sort"), ("order=created_at;DROP TABLE api_keys", "order"), ("order_by=1", "order_by"),
        ("limit=0", "limit"), ("limit=-1", "limit"), ("limit=1001", "limit"), ("limit=5;DROP", "limit"),
        ("limit=1%20OR%201=1", "limit"), ("limit=", "limit"), ("limit=%D9%A1", "limit"), ("limit=1e2", "limit"),
        ("limit=99999999999999999999", "limit"), ("limit=1&limit=2", "limit"), ("after=nothing", "after"),
        ("after='%20OR%20'1'='1", "after"), ("after=%00", "after"), ("after=", "after"), ("user=%00", "user"),
        ("labels.team=blue", "labels.team"), ("metadata[x'--]=1", "metadata[x'--]"),
    ],
)  # fmt: skip
async def test_a93_nothing_in_the_query_reaches_the_sql(app: App, query: str, param: str) -> None:
    await make(app)
    answer = await app.call("GET", "/admin/keys", query_string=query.encode())
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert len(await app.rows("SELECT id FROM api_keys")) == 1


async def test_a93_names_and_labels_are_only_text(app: App) -> None:
    hostile = "'); DROP TABLE api_keys; --"
    made = await make(app, user=hostile, name=hostile, labels={hostile: hostile}, models=[hostile])
    assert (made["user"], made["labels"]) == (hostile, {hostile: hostile})
    listed = await app.call("GET", "/admin/keys", query_string=b"user=%27);%20DROP%20TABLE%20api_keys;%20--")
    assert [key["id"] for key in listed.json["data"]] == [made["id"]]
    for path in (hostile, "%27", "..", "*"):
        assert (await app.call("GET", f"/admin/keys/{path}")).status == 404


# Who may, and how much


CALLS = (("GET", ""), ("POST", ""), ("GET", "/ID"), ("PATCH", "/ID"), ("POST", "/ID"), ("DELETE", "/ID"),
         ("POST", "/ID/rotate"))  # fmt: skip


async def test_a11_who_is_no_admin_does_nothing_here(app: App) -> None:
    plain, target = await make(app), await make(app, user="bob")
    before = await app.rows("SELECT * FROM api_keys")
    for headers, status in (
        (bearer(plain), 403),
        ({"authorization": ""}, 401),
        ({"authorization": "Bearer sk-x"}, 401),
    ):
        for method, path in CALLS:
            for body in ({"user": "ann", "admin": True}, {"admin": True}, {"models": None}, {}):
                for key in (plain, target):
                    answer = await app.call(method, f"/admin/keys{path.replace('ID', key['id'])}", body, headers)
                    assert answer.status == status, (method, path)
    assert await app.rows("SELECT * FROM api_keys") == before


@pytest.mark.parametrize("mode", ["auto", "open"])
async def test_a11_who_needs_no_key_is_no_admin(launch: Launch, mode: str) -> None:
    app = await launch(auth={"mode": mode})
    for method, path in CALLS:
        answer = await app.call(method, f"/admin/keys{path.replace('ID', 'x')}", {"user": "a"}, {"authorization": ""})
        assert answer.status == 403
    assert await app.rows("SELECT id FROM api_keys") == []


LIMITED = {
    "admin": True, "models": ["a", "b"], "requests_per_minute": 10, "tokens_per_minute": 100, "max_parallel": 2,
    "budget_usd": 5, "budget_period": "month", "expires_at": "2099-01-31",
}  # fmt: skip
WIDER = [
    ({"models": None}, "models"), ({"models": ["a", "c"]}, "models"), ({"models": ["A"]}, "models"),
    ({"requests_per_minute": None}, "requests_per_minute"), ({"requests_per_minute": 11}, "requests_per_minute"),
    ({"request_burst": 11}, "request_burst"), ({"tokens_per_minute": 101}, "tokens_per_minute"),
    ({"token_burst": 10**6}, "token_burst"), ({"max_parallel": None}, "max_parallel"),
    ({"max_parallel": 3}, "max_parallel"),
    ({"budget_usd": None, "budget_period": None}, "budget_usd"), ({"budget_usd": "5.000000001"}, "budget_usd"),
    ({"budget_period": "day"}, "budget_period"), ({"expires_at": None}, "expires_at"),
    ({"expires_at": "2099-02-01"}, "expires_at"), ({"per_end_user": True}, "per_end_user"),
]  # fmt: skip


@pytest.mark.parametrize(("wider", "field"), WIDER, ids=range(len(WIDER)))
async def test_a11_a_limited_admin_grants_no_more_than_it_has(app: App, wider: dict[str, Any], field: str) -> None:
    maker = await make(app, **LIMITED)
    me = bearer(maker)
    wide = {"user": "ann", **LIMITED, **wider}
    assert error(await app.call("POST", "/admin/keys", wide, me)) == (403, "permission_denied", field)

    own = await make(app, me, **LIMITED)
    assert own["created_by"] == maker["id"]
    for key in (own, maker):
        path = f"/admin/keys/{key['id']}"
        assert error(await app.call("PATCH", path, wider, me)) == (403, "permission_denied", field)

    wide_key = await make(app, **{**LIMITED, **wider})
    path = f"/admin/keys/{wide_key['id']}"
    for method, end, body in (("PATCH", "", {"name": "x"}), ("POST", "/rotate", {}), ("DELETE", "", b"")):
        assert error(await app.call(method, path + end, body, me)) == (403, "permission_denied", field)
    assert await works(app, wide_key)


async def test_a_limited_admin_may_do_what_is_within_its_limits(app: App) -> None:
    me = bearer(await make(app, **LIMITED))
    made = await make(app, me, **{**LIMITED, "admin": False, "models": ["a"], "requests_per_minute": 1})
    path = f"/admin/keys/{made['id']}"
    assert (await app.call("PATCH", path, {"requests_per_minute": 10, "admin": True}, me)).status == 200
    assert (await app.call("PATCH", path, {"budget_usd": 1}, me)).status == 200
    assert (await app.call("POST", f"{path}/rotate", {"overlap_seconds": 5}, me)).status == 200
    assert (await app.call("DELETE", path, b"", me)).json["revoked_at"] is not None
    assert (await app.call("GET", "/admin/keys", headers=me)).status == 200


async def test_what_a_maker_may_is_what_it_may_now(app: App) -> None:
    """However much it had when this worker last looked."""
    maker = await make(app, admin=True)
    me, path = bearer(maker), f"/admin/keys/{maker['id']}"
    assert (await app.call("GET", "/admin/keys", headers=me)).status == 200
    assert (await app.call("PATCH", path, {"requests_per_minute": 5})).status == 200
    answer = await app.call("POST", "/admin/keys", {"user": "ann", "requests_per_minute": 6}, me)
    assert error(answer) == (403, "permission_denied", "requests_per_minute")
    assert (await app.call("PATCH", path, {"admin": False})).status == 200
    assert (await app.call("POST", "/admin/keys", {"user": "ann", "requests_per_minute": 5}, me)).status == 403
    assert (await app.call("DELETE", path)).status == 200
    assert (await app.call("POST", "/admin/keys", {"user": "ann", "requests_per_minute": 5}, me)).status == 401
    assert len(await app.rows("SELECT id FROM api_keys")) == 1


async def test_the_secret_is_nowhere_in_the_database(app: App) -> None:
    made = await make(app)
    rotated = (await app.call("POST", f"/admin/keys/{made['id']}/rotate", {"overlap_seconds": 60})).json
    text = json.dumps(await app.rows("SELECT * FROM api_keys"))
    assert made["key"] not in text
    assert rotated["key"] not in text
