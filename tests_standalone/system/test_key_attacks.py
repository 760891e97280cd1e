"""Attacks on keys, from outside. What one request cannot show is where the code is: A5 and A6 in `test_auth` and
`test_known_keys`, A11 and A93 in `api/test_admin_keys`, A14's other half in `test_middleware`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from gateway.known_keys import PAUSE
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.postgres import OwnPostgres
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import Start, in_front_of
from tests_standalone.system.http import Answer, answer_of, call, chat, post_chat

ADMIN_KEY = "the-admin-key-of-this-test"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
KEYS_ONLY = {"auth": {"mode": "keys", "admin_key": ADMIN_KEY}}
POLLED = 1.0
"""Seconds after which every worker knows of a change."""

SQL = [
    "' OR '1'='1", "' OR 1=1 --", '" OR ""="', "'; DROP TABLE api_keys; --", "' UNION SELECT * FROM api_keys --", "\\'",
    "1; SELECT pg_sleep(10)", "admin'/*", "%' OR '%'='", "$1", "' || (SELECT digest FROM api_keys) || '", "'" * 8192,
    "\\", "\\\\", "\\x27", "%27", "''", "`", "0x27", "';--", "*/", "/**/", "1 OR 1=1", "sk-' OR key_id='1", "{{7*7}}",
    "${jndi:ldap://x}", "$(id)", "|id", "\u00e4\u00f6\u00fc", "\uff07 OR 1=1", "\u02bc OR 1=1", "\U0001f642", "\u202e",
    "NULL", "null", "undefined", "true", "0", "-1", "1e309", "E'\\047'", "$$x$$", "U&'\\0027'", "CHR(39)",
]  # fmt: skip
NO_HEADER = ["a\x00b"]
"""What HTTP itself does not carry."""


@pytest.fixture
async def gateway(start: Start, upstream: ScriptedUpstream) -> AsyncIterator[GatewayProcess]:
    """In front of the upstream, for who has a key; alive and well at the end."""
    models = {"cheap": {"backend": "up", "model": "answer", "aliases": ["small"]}, "dear": {"backend": "up"}}
    running = await start(in_front_of(upstream, models=models, **KEYS_ONLY))
    yield running
    assert running.process.poll() is None
    assert "Traceback" not in running.logs()


@pytest.fixture(scope="module")
def talkative() -> Iterator[OwnPostgres]:
    """A PostgreSQL that writes down every statement and its parameters."""
    server = OwnPostgres(settings={"log_statement": "all"})
    yield server
    server.close()


async def ask(gateway: GatewayProcess, key: str, model: Any = "cheap", **headers: str) -> Answer:
    sent = {"authorization": f"Bearer {key}".encode().decode("latin-1")}
    return await post_chat(gateway.port, chat(model), sent | headers)


async def make(gateway: GatewayProcess, **fields: Any) -> dict[str, Any]:
    answer = await call(gateway.port, "POST", "/admin/keys", ADMIN, {"user": "ann", **fields})
    assert answer.status == 200, answer.body
    made: dict[str, Any] = answer.json
    return made


async def raw(gateway: GatewayProcess, lines: Sequence[str]) -> Answer:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    answer = answer_of(await reader.read())
    writer.close()
    return answer


async def test_a1_sql_in_a_key_is_a_wrong_key(start: Start, talkative: OwnPostgres) -> None:
    gateway = await start({"database": {"url": talkative.create_database()}, **KEYS_ONLY})
    key = (await make(gateway))["key"]
    answers = [await ask(gateway, payload, "echo") for payload in SQL]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.body for answer in answers}) == 1
    for payload in NO_HEADER:
        assert (await ask(gateway, payload, "echo")).status == 400
    assert (await ask(gateway, key, "echo")).status == 200
    told = [line for line in talkative.log.splitlines() if "api_keys" in line and "digest IN" in line]
    assert told
    assert all("digest IN ($1, $2," in line for line in told)
    unusual = [payload for payload in SQL if len(payload) > 8]
    assert [payload for payload in unusual if payload in talkative.log] == []
    assert hashlib.sha256(SQL[0].encode()).hexdigest() in talkative.log, "it was looked for, by its digest"


async def test_a2_what_is_no_key(gateway: GatewayProcess) -> None:
    key = (await make(gateway))["key"]
    for value in (
        "Bearer %", "Bearer _", "Bearer *", "Bearer .*", "Bearer", "Bearer ", "Bearer    ", "", "   ", "Basic KEY",
        "Token KEY", "Digest KEY", "KEY", "Bearer: KEY", "Bearer,KEY", "Negotiate KEY", "bearerKEY",
    ):  # fmt: skip
        answer = await post_chat(gateway.port, chat("cheap"), {"authorization": value.replace("KEY", key)})
        assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key"), value
        assert key.encode() not in answer.body


async def test_a3_two_keys_are_none(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    one, two = (await make(gateway))["key"], (await make(gateway, admin=True))["key"]
    for sent in (
        [f"authorization: Bearer {one}", f"authorization: Bearer {two}"],
        [f"authorization: Bearer {one}", f"x-api-key: {two}"],
        [f"api-key: {two}", f"authorization: Bearer {one}"],
        [f"x-api-key: {one}", f"x-api-key: {two}"],
        [f"authorization: Bearer {one}", "x-api-key: sk-wrong"],
        ["authorization: Bearer sk-wrong", f"x-api-key: {one}"],
    ):
        for path in ("/v1/models", "/admin/keys"):
            answer = await raw(gateway, [f"GET {path} HTTP/1.1", "host: localhost", "connection: close", *sent])
            assert (answer.status, answer.json["error"]["code"]) == (400, "ambiguous_credentials")
    assert upstream.tally == []


async def test_a7_a_stored_digest_is_no_key(gateway: GatewayProcess) -> None:
    made = await make(gateway, admin=True)
    await call(gateway.port, "POST", f"/admin/keys/{made['id']}/rotate", ADMIN, {"overlap_seconds": 600})
    (row,) = await asyncio.to_thread(gateway.query, "SELECT id, digest, previous_digest FROM api_keys")
    for stored in (row["digest"], row["previous_digest"], row["id"]):
        for shown in (stored, stored.upper(), f"sk-{stored}", f"sha256:{stored}"):
            assert (await ask(gateway, shown)).status == 401
    assert (await ask(gateway, made["key"])).status == 200


async def test_a9_a_change_reaches_all_workers_within_a_second(
    start: Start, upstream: ScriptedUpstream, database_urls: dict[str, str]
) -> None:
    """Whoever asks the database learns it at once, the others when what they know has run out."""
    gateway = await start(in_front_of(upstream, database_urls["postgres"], workers=4, **KEYS_ONLY))
    made = await make(gateway)
    headers = {"authorization": f"Bearer {made['key']}"}

    async def lists() -> set[int]:
        return {(await call(gateway.port, "GET", "/v1/models", headers)).status for _ in range(60)}

    async def calls() -> list[int]:
        found = await asyncio.gather(*(ask(gateway, made["key"], "answer") for _ in range(40)))
        return [answer.status for answer in found]

    async def change(**fields: Any) -> None:
        answer = await call(gateway.port, "PATCH", f"/admin/keys/{made['id']}", ADMIN, fields)
        assert answer.status == 200

    assert await lists() == {200}
    assert {*await calls()} == {200}
    await change(requests_per_minute=1, request_burst=1)
    await asyncio.sleep(POLLED)
    found = await calls()
    assert found.count(200) <= 2
    assert found.count(200) + found.count(429) == 40

    await change(requests_per_minute=None, request_burst=None, models=["another"])
    await asyncio.sleep(POLLED)
    assert {*await calls()} == {403}
    await change(models=None)
    await asyncio.sleep(POLLED)
    assert {*await calls()} == {200}

    assert (await call(gateway.port, "DELETE", f"/admin/keys/{made['id']}", ADMIN)).status == 200
    await asyncio.sleep(POLLED)
    assert {*await calls()} == {401}
    assert await lists() == {401}
    assert len(gateway.worker_pids()) == 4


async def test_a9_a_stream_that_runs_is_not_cut_by_its_keys_end(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    made = await make(gateway)
    held = chat("dear", json.dumps({"script": "answer", "then": "hold", "after": 1, "words": 5}), stream=True)
    running = asyncio.create_task(post_chat(gateway.port, held, {"authorization": f"Bearer {made['key']}"}))
    await upstream.until(lambda tally: any(record.reply for record in tally))
    assert (await call(gateway.port, "DELETE", f"/admin/keys/{made['id']}", ADMIN)).status == 200
    await asyncio.sleep(POLLED)
    assert (await ask(gateway, made["key"])).status == 401
    upstream.release()
    answer = await running
    assert (answer.status, answer.events[-1]) == (200, "[DONE]")


EVASIONS: list[Any] = [
    "dear", "CHEAP", "Cheap", "cheap ", " cheap", "cheap\u0000", "che\u0430p", "\uff43heap", "cheap*", "*", "ch?ap",
    ".*", "up/cheap", "up/answer", "answer", "up/dear", "openai/cheap", "cheap:dear", "cheap,dear", "cheap|dear",
    "cheap/../dear", "%63heap", "cheap;dear", ["cheap"], ["cheap", "dear"], {"name": "cheap"}, True, 1, "ft:cheap",
    "cheap\u200b",
]  # fmt: skip


async def test_a10_a_key_for_a_model_opens_no_other(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    key = (await make(gateway, models=["cheap"]))["key"]
    for model in EVASIONS:
        answer = await ask(gateway, key, model)
        assert answer.status in ((400,) if not isinstance(model, str) else (400, 403, 404)), model
    for more in ({"models": ["dear"]}, {"fallbacks": ["dear"]}, {"route": "fallback", "models": ["cheap", "dear"]}):
        answer = await post_chat(gateway.port, chat("cheap", **more), {"authorization": f"Bearer {key}"})
        assert answer.status == 403
    path = "/openai/deployments/dear/chat/completions"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await call(gateway.port, "POST", path, {"api-key": key}, body)).status == 403
    doubled = b'{"model": "cheap", "model": "dear", "messages": [{"role": "user", "content": "hi"}]}'
    assert (await post_chat(gateway.port, doubled, {"authorization": f"Bearer {key}"})).status in (400, 403)
    assert upstream.tally == []
    assert (await ask(gateway, key)).status == 200


async def test_a13_nothing_of_the_inside_without_a_key(gateway: GatewayProcess) -> None:
    paths = ["/metrics", "/admin/keys", "/admin/keys/x", "/admin/backends", "/admin/config", "/admin/usage",
             "/v1/models", "/docs", "/redoc", "/openapi.json", "/debug", "/debug/vars", "/debug/pprof",
             "/config/reload", "/reload", "/env", "/.env", "/server-status", "/actuator/env"]  # fmt: skip
    for path in paths:
        for method in ("GET", "POST"):
            answer = await call(gateway.port, method, path)
            assert answer.status in (401, 404, 405), (method, path)
            assert ADMIN_KEY.encode() not in answer.body
    for path in ("/health", "/health/live", "/health/ready"):
        answer = await call(gateway.port, "GET", path)
        assert answer.status == 200
        assert "details" not in answer.json


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/chat/completions", "application/json"), ("/v1/audio/transcriptions", "multipart/form-data; boundary=x"),
     ("/admin/keys", "application/json")],
)  # fmt: skip
async def test_a14_a_gigabyte_with_a_bad_key_is_not_read(gateway: GatewayProcess, path: str, kind: str) -> None:
    """The answer comes before a byte of the body is sent, and the connection ends with it."""
    head = [f"POST {path} HTTP/1.1", "host: localhost", "authorization: Bearer sk-bad", f"content-type: {kind}"]
    answer = await raw(gateway, [*head, f"content-length: {1 << 30}"])
    assert (answer.status, answer.headers["connection"]) == (401, "close")
    answer = await raw(gateway, [*head, "transfer-encoding: chunked"])
    assert (answer.status, answer.headers["connection"]) == (401, "close")


async def test_a15_a_thousand_bad_keys_are_429_and_few_queries(start: Start, talkative: OwnPostgres) -> None:
    gateway = await start({"database": {"url": talkative.create_database()}, **KEYS_ONLY})
    key = (await make(gateway))["key"]
    await asyncio.sleep(POLLED)  # then nothing that is known is forgotten
    before = talkative.log.count("previous_digest IN")
    at_once, started = asyncio.Semaphore(50), time.monotonic()

    async def wrong(number: int) -> Answer:
        async with at_once:
            return await call(gateway.port, "GET", "/v1/models", {"authorization": f"Bearer sk-wrong-{number}"})

    async def right() -> int:
        async with at_once:
            return (await call(gateway.port, "GET", "/v1/models", {"authorization": f"Bearer {key}"})).status

    answers, good = await asyncio.gather(
        asyncio.gather(*(wrong(number) for number in range(1000))), asyncio.gather(*(right() for _ in range(50)))
    )
    assert {*good} == {200}
    statuses = [answer.status for answer in answers]
    assert {*statuses} == {401, 429}
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.json["error"]["code"] == "rate_limit_exceeded"
    assert refused.json["error"]["type"] == "requests"
    assert int(refused.headers["retry-after"]) == 1
    assert 1 <= int(refused.headers["retry-after-ms"]) <= 100
    asked, seconds = talkative.log.count("previous_digest IN") - before, time.monotonic() - started
    print(f"1000 wrong keys in {seconds:.1f} s: {statuses.count(429)} times 429, {asked} queries")
    assert asked <= 2 + seconds / PAUSE
    for number in range(0, 1000, 50):
        assert (await wrong(number)).status in (401, 429)
    assert talkative.log.count("previous_digest IN") - before == asked, "they are known to be wrong"


async def test_a17_methods(gateway: GatewayProcess) -> None:
    made = await make(gateway)
    sent = ["host: localhost", "connection: close", "content-length: 0", f"authorization: Bearer {made['key']}"]
    for line, statuses in (
        ("TRACE /v1/models", {405}),
        ("TRACE /v1/chat/completions", {405}),
        ("HEAD /v1/completions", {405}),
        ("HEAD /admin/keys/x/rotate", {405}),
        ("get /v1/models", {400, 405}),
        ("post /v1/chat/completions", {400, 405}),
        ("FOO /v1/models", {400, 405}),
        ("PUT /v1/chat/completions", {405}),
        ("GET /v1/completions", {405}),
        ("CONNECT /v1/models", {400, 405}),
    ):
        answer = await raw(gateway, [f"{line} HTTP/1.1", *sent])
        assert answer.status in statuses, line
        assert made["key"].encode() not in answer.raw_body
    for name in ("x-http-method-override", "x-http-method", "x-method-override"):
        path = f"/admin/keys/{made['id']}"
        overridden = await call(gateway.port, "GET", path, {**ADMIN, name: "DELETE"})
        assert (overridden.status, overridden.json["revoked_at"]) == (200, None)
        assert (await call(gateway.port, "GET", f"{path}?_method=DELETE", ADMIN)).json["revoked_at"] is None


async def test_a18_nothing_crosses_between_calls_of_one_key(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    key = (await make(gateway))["key"]

    async def one(number: int) -> Answer:
        headers = {"authorization": f"Bearer {key}", "x-request-id": f"trace-{number}"}
        body = chat("echo-request", f"canary-{number}-end", user=f"user-{number}", stream=number % 2 == 0)
        return await post_chat(gateway.port, body, headers)

    answers = await asyncio.gather(*(one(number) for number in range(50)))
    for number, answer in enumerate(answers):
        assert (answer.status, answer.headers["x-request-id"]) == (200, f"trace-{number}")
        others = [other for other in range(50) if other != number and f"canary-{other}-end".encode() in answer.body]
        assert others == []
    rows = await asyncio.to_thread(gateway.query, "SELECT request_id, end_user, user_id FROM usage_view")
    told = {(row["request_id"], row["end_user"], row["user_id"]) for row in rows}
    assert told == {(f"trace-{number}", f"user-{number}", "ann") for number in range(50)}
    assert len(rows) == len(upstream.tally) == 50
    for record in upstream.tally:
        number = str(record.probe).removeprefix("user-")
        assert record.request["messages"][0]["content"] == f"canary-{number}-end"
        assert key not in json.dumps(record.headers)
