"""Two hosts behind nginx, with the site that is shipped (`deploy/nginx.conf`): two workers each, one PostgreSQL; run by
`gateway serve` and by gunicorn."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests_standalone.support.gateway import GatewayProcess, children
from tests_standalone.support.gunicorn import GunicornProcess
from tests_standalone.support.nginx import Nginx
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import end, in_front_of
from tests_standalone.system.http import Answer, answer_of, call, chat, post_chat, request_bytes


@dataclass(frozen=True)
class Site:
    port: int
    hosts: list[GatewayProcess]
    key: dict[str, str]

    def logs(self) -> list[dict[str, str]]:
        """The access log of both hosts, whole once they have ended."""
        lines = [line for host in self.hosts for line in host.stderr_file.read_text().splitlines()]
        return [line for line in map(json.loads, lines) if line["logger"] == "gateway.access"]


@pytest.fixture(
    params=[(["127.0.0.0/8"], GatewayProcess), (["127.0.0.0/8"], GunicornProcess)], ids=["serve", "gunicorn"]
)
async def site(
    request: pytest.FixtureRequest, upstream: ScriptedUpstream, database_urls: dict[str, str], tmp_path: Path
) -> AsyncIterator[Site]:
    trusted, host = request.param
    server = {"trusted_proxies": trusted, "first_chunk_wait": 60}
    async with AsyncExitStack() as stack:
        hosts = []
        for name in ("one", "two"):
            config = in_front_of(upstream, database_urls["postgres"], workers=2, server=server)
            hosts.append(await stack.enter_async_context(host(config, folder=tmp_path / name)))
        nginx = await stack.enter_async_context(Nginx(tmp_path / "nginx", [host.port for host in hosts]))
        before = await post_chat(nginx.port, chat("answer"))
        assert before.status == 401, "a forwarded request is a stranger's, though it comes from this machine"
        assert (await post_chat(hosts[0].port, chat("answer"))).status == 200
        _, key = await asyncio.to_thread(hosts[0].create_key)
        upstream.reset()
        yield Site(nginx.port, hosts, {"authorization": f"Bearer {key}"})


class Held:
    """A stream whose first chunk is here, and whose upstream holds the rest back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes) -> None:
        self._reader, self._writer, self._begun = reader, writer, begun

    @classmethod
    async def open(cls, site: Site, probe: str) -> Held:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        body = chat("held", stream=True, user=probe)
        writer.write(request_bytes("POST", "/v1/chat/completions", site.key, body))
        return cls(reader, writer, await reader.readuntil(b"}\n\n"))

    async def rest(self) -> Answer:
        try:
            return answer_of(self._begun + await self._reader.read())
        finally:
            self._writer.close()


def whole(answer: Answer) -> bool:
    return answer.status == 200 and answer.clean_end and answer.events[-1] == "[DONE]"


async def refused(port: int) -> None:
    """Returns when nobody listens there any more."""
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        await asyncio.sleep(0.02)


async def test_the_first_chunk_passes_before_the_second_is_made(site: Site, upstream: ScriptedUpstream) -> None:
    stream = await Held.open(site, "p")
    assert upstream.tally[-1].outcome is None
    upstream.release("p")
    assert whole(await stream.rest())


@pytest.mark.parametrize("script", ["cut-fin", "error-mid-stream"])
async def test_a_stream_that_fails_does_not_look_finished_behind_nginx_either(site: Site, script: str) -> None:
    body = chat(script, json.dumps({"script": script, "after": 3, "delay": 0.01}), stream=True)
    answer = await post_chat(site.port, body, site.key)
    assert answer.status == 200
    assert not answer.clean_end
    assert "message" in answer.events[-1]["error"]


async def test_a_client_that_leaves_is_noticed_behind_nginx(site: Site, upstream: ScriptedUpstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    body = chat("answer", json.dumps({"script": "answer", "words": 1000, "delay": 0.05}), stream=True)
    writer.write(request_bytes("POST", "/v1/chat/completions", site.key, body))
    await reader.readuntil(b"}\n\n")
    writer.transport.abort()
    assert (await upstream.settled())[0].outcome == "client_closed"


async def test_hosts_restart_one_after_the_other_under_load_and_nothing_is_lost(
    site: Site, upstream: ScriptedUpstream
) -> None:
    streams = [await Held.open(site, f"p{number}") for number in range(4)]
    answers, done = list[Answer](), asyncio.Event()

    async def client() -> None:
        while not done.is_set():
            answers.append(await post_chat(site.port, chat("answer", stream=True), site.key))

    async def more() -> None:
        count = len(answers) + 50
        while len(answers) < count:
            await asyncio.sleep(0.01)

    clients = [asyncio.create_task(client()) for _ in range(6)]
    await more()
    for host in site.hosts:
        host.terminate()
        await refused(host.port)
        await more()
        assert (await call(site.port, "GET", "/health/ready")).status == 200  # the other one's
        for probe in range(4):
            upstream.release(f"p{probe}")
        assert await asyncio.to_thread(host.wait) == 0
        await more()
        await asyncio.to_thread(host.start)
        await more()
    done.set()
    await asyncio.gather(*clients)
    assert [answer.status for answer in answers if not whole(answer)] == []
    assert all([whole(await stream.rest()) for stream in streams])
    query = "SELECT COUNT(*) AS n FROM usage_view WHERE status = 'ok'"
    rows = await asyncio.to_thread(site.hosts[0].query, query)
    assert rows[0]["n"] == len(answers) + len(streams) + 1


async def test_a_call_that_a_dead_host_had_is_not_repeated_and_the_next_goes_elsewhere(
    site: Site, upstream: ScriptedUpstream
) -> None:
    calls = [
        asyncio.create_task(post_chat(site.port, chat("held-headers", stream=True, user=f"p{number}"), site.key))
        for number in range(2)
    ]
    await upstream.until(lambda tally: len(tally) == 2)
    dead, alive = site.hosts
    for pid in [dead.pid, *children(dead.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await refused(dead.port)
    for _ in range(20):
        assert whole(await post_chat(site.port, chat("answer", stream=True), site.key))
    upstream.release()
    answers = await asyncio.gather(*calls)
    assert sorted(answer.status for answer in answers) == [200, 502]
    assert len(upstream.tally) == 22
    assert await end(alive) == 0


@pytest.mark.parametrize(
    ("site", "logged"),
    [
        ((["127.0.0.1"], GatewayProcess), "127.0.0.2"),
        ((["127.0.0.0/8"], GatewayProcess), "198.51.100.7"),
        (([], GatewayProcess), "127.0.0.1"),
    ],
    indirect=["site"],
    ids=["nginx", "nginx-and-client", "nobody"],
)
async def test_the_clients_address_is_that_of_the_last_hop_that_is_not_trusted(site: Site, logged: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, local_addr=("127.0.0.2", 0))
    headers = {**site.key, "x-request-id": "this-one", "x-forwarded-for": "198.51.100.7"}
    writer.write(request_bytes("POST", "/v1/chat/completions", headers, chat("answer")))
    assert answer_of(await reader.read()).status == 200
    writer.close()
    assert [await end(host) for host in site.hosts] == [0, 0]
    assert [line["client"] for line in site.logs() if line["request_id"] == "this-one"] == [logged]


async def test_big_bodies_pass_and_too_big_ones_are_refused_by_the_gateway(
    site: Site, upstream: ScriptedUpstream
) -> None:
    big = await post_chat(site.port, chat("answer", "word " * (6 << 20)), site.key)
    assert big.status == 200
    assert len(upstream.tally[-1].body) > 30 << 20
    too_big = await post_chat(site.port, chat("answer", "word " * (7 << 20)), site.key)
    assert (too_big.status, too_big.json["error"]["code"]) == (413, "request_too_large")
