"""Who gets in, tried from outside (contract, section 2)."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from pathlib import Path

import pytest

from gateway.slices import GOOD_SECONDS
from tests_standalone.support.databases import running_postgres
from tests_standalone.support.gateway import GatewayProcess, clean_environment, free_port
from tests_standalone.system.conftest import Start
from tests_standalone.system.http import Answer, call, chat, post_chat


@pytest.fixture
async def gateway(start: Start, database_url: str) -> GatewayProcess:
    """With its defaults: `auto`, no key yet, the built-in model."""
    return await start({"database": {"url": database_url}, "server": {"allowed_hosts": ["chat.example"]}})


async def ask(gateway: GatewayProcess, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await post_chat(gateway.port, chat("echo"), named)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "chat.example"}, 200),
        ({"host": "attacker.example"}, 401),
        ({"host": "localhost.attacker.example"}, 401),
        ({"x-forwarded-for": "127.0.0.1"}, 401),
        ({"x-forwarded-proto": "http"}, 401),
        ({"forwarded": "for=127.0.0.1"}, 401),
        ({"x-real-ip": "127.0.0.1"}, 401),
        ({"via": "1.1 proxy"}, 401),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "http://127.0.0.1"}, 200),
        ({"origin": "https://attacker.example"}, 401),
        ({"origin": "null"}, 401),
        ({"authorization": "Bearer sk-whatever"}, 200),
        ({"authorization": "Basic abc", "x-api-key": "other"}, 200),
    ],
)
async def test_auto_lets_this_machine_in_without_a_key(
    gateway: GatewayProcess, headers: dict[str, str], status: int
) -> None:
    answer = await post_chat(gateway.port, chat("echo"), headers)
    assert answer.status == status
    if status == 401:
        assert answer.json["error"]["code"] == "invalid_api_key"
        assert "gateway keys create" in answer.json["error"]["message"]
        assert "access-control-allow-origin" in answer.headers or "origin" not in headers


async def test_after_the_first_key_every_call_needs_one_also_after_the_last_was_revoked(
    gateway: GatewayProcess,
) -> None:
    assert (await ask(gateway)).status == 200
    key_id, key = await asyncio.to_thread(gateway.create_key, "ann")
    assert (await ask(gateway)).status == 401
    for name, value in (("authorization", f"Bearer {key}"), ("x-api-key", key), ("api-key", key)):
        assert (await ask(gateway, **{name: value})).status == 200
    assert (await ask(gateway, authorization=f"Bearer {key}x")).status == 401
    assert (await ask(gateway, authorization=f"Bearer {key}", x_api_key=key)).status == 200
    assert (await ask(gateway, authorization=f"Bearer {key}", x_api_key="sk-other")).status == 400
    assert (await call(gateway.port, "GET", f"/v1/models?api_key={key}")).status == 400

    await asyncio.to_thread(gateway.run, "keys", "revoke", key_id)
    assert (await ask(gateway, authorization=f"Bearer {key}")).status == 401
    assert (await ask(gateway)).status == 401
    users = await asyncio.to_thread(gateway.query, "SELECT DISTINCT user_id, key_id FROM usage_view")
    assert {(row["user_id"], row["key_id"]) for row in users} == {("default", None), ("ann", key_id)}
    assert key not in gateway.logs()


async def test_a_key_may_be_held_to_its_models(gateway: GatewayProcess) -> None:
    _, key = await asyncio.to_thread(gateway.create_key, "ann", models=["gpt-none"])
    answer = await ask(gateway, authorization=f"Bearer {key}")
    assert (answer.status, answer.json["error"]["code"]) == (403, "permission_denied")
    listed = await call(gateway.port, "GET", "/v1/models", {"authorization": f"Bearer {key}"})
    assert listed.json["data"] == []


async def test_a_key_for_an_alias_can_use_it(start: Start) -> None:
    models = {"fast": {"backend": "demo", "model": "echo", "aliases": ["quick"]}}
    gateway = await start({"backends": {"demo": {"type": "scripted"}}, "models": models})
    _, key = await asyncio.to_thread(gateway.create_key, "ann", models=["quick"])
    headers = {"authorization": f"Bearer {key}"}
    listed = await call(gateway.port, "GET", "/v1/models", headers)
    assert [model["id"] for model in listed.json["data"]] == ["quick"]
    assert (await post_chat(gateway.port, chat("quick"), headers)).status == 200
    assert (await post_chat(gateway.port, chat("fast"), headers)).status == 403


async def test_azure_shaped_paths_name_the_model(gateway: GatewayProcess) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    path = "/openai/deployments/echo/chat/completions?api-version=2024-10-21"
    answer = await call(gateway.port, "POST", path, {"api-key": "any"}, body)
    assert (answer.status, answer.json["model"]) == (200, "echo")
    assert (await call(gateway.port, "GET", "/openai/v1/models")).json["data"][0]["id"] == "echo"


async def test_no_key_is_made_for_a_gateway_that_cannot_listen(start: Start, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        gateway = GatewayProcess({"server": {"host": "0.0.0.0", "port": port}}, folder=tmp_path / "one")
        gateway.launch()
        assert await asyncio.to_thread(gateway.wait) == 1
        assert f"port {port}" in gateway.logs()
    assert "key_" not in gateway.run("keys", "list").stdout
    gateway.close()


async def test_a_stopped_database_lets_nobody_in(start: Start) -> None:
    server = running_postgres()
    gateway = await start({"database": {"url": server.create_database()}})
    assert (await ask(gateway)).status == 200
    server.pause()
    await asyncio.sleep(GOOD_SECONDS)
    try:
        for headers in ({}, {"authorization": "Bearer sk-unknown"}):
            answer = await ask(gateway, **headers)
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
        assert (await call(gateway.port, "GET", "/health/live")).status == 200
        assert (await call(gateway.port, "GET", "/health/ready")).status == 503
    finally:
        server.resume()
    await asyncio.to_thread(_until_ready, gateway)
    assert (await ask(gateway)).status == 200


async def test_serving_other_machines_makes_the_first_admin_key_and_shows_it_once(start: Start) -> None:
    gateway = await start({"server": {"host": "0.0.0.0"}})
    shown = re.findall(r"(?<![\w-])sk-[\w-]+", gateway.logs())
    assert len(shown) == 1
    assert (await ask(gateway)).status == 401
    assert (await ask(gateway, authorization=f"Bearer {shown[0]}")).status == 200
    gateway.terminate()
    await asyncio.to_thread(gateway.wait)
    await asyncio.to_thread(gateway.start)
    assert re.findall(r"(?<![\w-])sk-[\w-]+", gateway.logs()) == shown
    assert (await ask(gateway)).status == 401


async def test_another_peer_is_not_let_in_without_a_key(tmp_path: Path, own_address: str) -> None:
    """Under a server that makes no key: the peer's address alone decides."""
    port = free_port()
    arguments = ["-m", "uvicorn", "--factory", "gateway.app:create_app", "--host", "0.0.0.0", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        "--no-proxy-headers",
        "--log-level",
        "error",
        cwd=tmp_path,
        env=clean_environment(tmp_path),
    )
    try:
        while True:
            try:
                near = await call(port, "POST", "/v1/chat/completions", body=chat("echo"))
                break
            except ConnectionError:
                await asyncio.sleep(0.05)
        far = await call(port, "POST", "/v1/chat/completions", body=chat("echo"), host=own_address)
        assert (near.status, far.status) == (200, 401)
    finally:
        process.terminate()
        await process.wait()


async def test_open_asks_nobody_and_keys_asks_everybody(start: Start) -> None:
    wide = await start({"auth": {"mode": "open"}})
    strict = await start({"auth": {"mode": "keys", "admin_key": "the-admin-key-of-this-test"}})
    assert (await ask(wide, host="anything.example", x_forwarded_for="1.2.3.4")).status == 200
    assert (await ask(strict)).status == 401
    assert (await ask(strict, authorization="Bearer the-admin-key-of-this-test")).status == 200
    assert "the-admin-key-of-this-test" not in strict.logs()
    shown = await asyncio.to_thread(strict.run, "check-config")
    assert "the-admin-key-of-this-test" not in shown.stdout + shown.stderr


async def test_a_bad_key_is_refused_before_the_body_is_read(gateway: GatewayProcess) -> None:
    await asyncio.to_thread(gateway.create_key, "ann")
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer sk-bad\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {1 << 30}\r\n\r\n".encode())
    reply = await reader.read()
    assert reply.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in reply
    writer.close()


@pytest.fixture
def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks the kernel which address it would use
        address: str = probe.getsockname()[0]
    assert not address.startswith("127.")
    return address


def _until_ready(gateway: GatewayProcess) -> None:
    while not gateway._answers():
        pass
