"""The gateway under gunicorn: `gunicorn -c gunicorn.conf.py "gateway.app:create_app()"`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests_standalone.support.gateway import clean_environment, free_port
from tests_standalone.support.gunicorn import GUNICORN, GunicornProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import end, in_front_of
from tests_standalone.system.http import Answer, answer_of, call, chat, post_chat, request_bytes

Start = Callable[..., Awaitable[GunicornProcess]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts gateways, ready when they are returned; all of them end with the test."""
    async with AsyncExitStack() as stack:

        async def starter(config: dict[str, Any], *arguments: str) -> GunicornProcess:
            process = GunicornProcess(config, folder=tmp_path / "gateway", arguments=arguments)
            return await stack.enter_async_context(process)

        yield starter


@pytest.fixture
async def pair(upstream: ScriptedUpstream, start: Start, database_urls: dict[str, str]) -> GunicornProcess:
    """Two workers on PostgreSQL, in front of the upstream."""
    gateway = await start(in_front_of(upstream, database_urls["postgres"], workers=2))
    while len(gateway.worker_pids()) < 2:  # one of them answers already
        await asyncio.sleep(0.02)
    return gateway


class Held:
    """A stream whose first chunk is here, and whose upstream holds the rest back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes) -> None:
        self._reader, self._writer, self._begun = reader, writer, begun

    @classmethod
    async def open(cls, port: int, probe: str) -> Held:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes("POST", "/v1/chat/completions", body=chat("held", stream=True, user=probe)))
        return cls(reader, writer, await reader.readuntil(b"}\n\n"))

    async def rest(self) -> Answer:
        try:
            return answer_of(self._begun + await self._reader.read())
        finally:
            self._writer.close()


def whole(answer: Answer) -> bool:
    return answer.status == 200 and answer.clean_end and answer.events[-1] == "[DONE]"


async def logged(gateway: GunicornProcess, pattern: str, times: int = 1) -> None:
    while len(re.findall(pattern, gateway.logs())) < times:
        await asyncio.sleep(0.02)


async def gone(pid: int) -> None:
    with suppress(ProcessLookupError):
        while _state(pid) != "Z":
            os.kill(pid, 0)
            await asyncio.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        raise ProcessLookupError from None


async def test_two_workers_stream_record_and_write_one_log(pair: GunicornProcess) -> None:
    answers = [await post_chat(pair.port, chat("answer", stream=True)) for _ in range(6)]
    assert all(map(whole, answers))
    assert len(pair.worker_pids()) == 2
    rows = await asyncio.to_thread(pair.query, "SELECT request_id FROM usage_view WHERE status = 'ok'")
    assert {row["request_id"] for row in rows} == {answer.headers["x-request-id"] for answer in answers}
    assert f"  base URL    http://127.0.0.1:{pair.port}/v1\n" in pair.stdout_file.read_text()
    assert await end(pair) == 0
    lines = [json.loads(line) for line in pair.stderr_file.read_text().splitlines()]
    assert "gunicorn.error" in {line["logger"] for line in lines}
    logged = {line["request_id"] for line in lines if line["logger"] == "gateway.access"}
    assert logged >= {answer.headers["x-request-id"] for answer in answers}


async def test_accepted_connections_have_our_socket_options(pair: GunicornProcess) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", pair.port)
    peer = writer.get_extra_info("sockname")[1]
    kind, expires = _timer(pair.port, peer)
    assert (kind, expires <= 1500) == ("02", True)  # a keep-alive timer, due in at most 15 s
    writer.close()


def _timer(port: int, peer: int) -> tuple[str, int]:
    """What the kernel waits for on the server's end of a connection, and for how many hundredths of a second."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (timer,) = [row[5] for row in rows if row[1].endswith(f":{port:04X}") and row[2].endswith(f":{peer:04X}")]
    kind, _, expires = timer.partition(":")
    return kind, int(expires, 16)


async def test_sigterm_turns_readiness_red_and_lets_streams_finish(
    pair: GunicornProcess, upstream: ScriptedUpstream
) -> None:
    streams = [await Held.open(pair.port, f"p{number}") for number in range(8)]
    reader, asker = await asyncio.open_connection("127.0.0.1", pair.port)
    head = request_bytes("GET", "/health/ready")
    asker.write(head[:-2])
    await asyncio.sleep(0.1)
    pair.terminate()
    await logged(pair, "Ending: ", times=2)
    asker.write(head[-2:])
    ready = answer_of(await reader.read())
    assert (ready.status, ready.json["status"]) == (503, "draining")
    asker.close()
    upstream.release()
    assert all([whole(await stream.rest()) for stream in streams])
    assert await asyncio.to_thread(pair.wait) == 0
    rows = await asyncio.to_thread(pair.query, "SELECT status FROM usage_view")
    assert [row["status"] for row in rows] == ["ok"] * 8


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGQUIT])
async def test_sigint_and_sigquit_cut_streams_at_once_and_say_so(
    pair: GunicornProcess, upstream: ScriptedUpstream, sig: signal.Signals
) -> None:
    stream = await Held.open(pair.port, "p")
    pair.send_signal(sig)
    cut = await stream.rest()
    assert "error" in cut.events[-1]
    assert not cut.clean_end
    assert await asyncio.to_thread(pair.wait) == 0
    rows = await asyncio.to_thread(pair.query, "SELECT status FROM usage_view")
    assert [row["status"] for row in rows] == ["interrupted"]


async def test_what_outlasts_the_drain_is_cut_before_gunicorn_kills(upstream: ScriptedUpstream, start: Start) -> None:
    gateway = await start(in_front_of(upstream, server={"drain_seconds": 1}))
    stream = await Held.open(gateway.port, "p")
    gateway.terminate()
    cut = await stream.rest()
    assert "error" in cut.events[-1]
    assert await asyncio.to_thread(gateway.wait) == 0
    assert "SIGKILL" not in gateway.logs()


async def test_a_repeated_sigterm_hurries_nothing(pair: GunicornProcess, upstream: ScriptedUpstream) -> None:
    stream = await Held.open(pair.port, "p")
    old = pair.worker_pids()
    for _ in range(3):  # as gunicorn does, every second, to a worker that is replaced
        for pid in old:
            with suppress(ProcessLookupError):  # the one without the stream has ended
                os.kill(pid, signal.SIGTERM)
        await asyncio.sleep(0.2)
    upstream.release()
    assert whole(await stream.rest())
    for pid in old:
        await gone(pid)
    assert whole(await post_chat(pair.port, chat("answer", stream=True)))


async def test_a_killed_worker_is_replaced_and_the_other_serves(
    pair: GunicornProcess, upstream: ScriptedUpstream
) -> None:
    streams = [await Held.open(pair.port, f"p{number}") for number in range(8)]
    victim, other = pair.worker_pids()
    os.kill(victim, signal.SIGKILL)
    while len(pids := pair.worker_pids()) < 2 or victim in pids:
        await asyncio.sleep(0.02)
    assert other in pids
    assert whole(await post_chat(pair.port, chat("answer", stream=True)))
    upstream.release()
    for stream in streams:  # each is whole, or broken off so that its client can tell
        with suppress(ConnectionError):
            answer = await stream.rest()
            assert whole(answer) or not answer.clean_end
    assert await end(pair) == 0


async def test_a_reload_under_load_loses_nothing(pair: GunicornProcess, upstream: ScriptedUpstream) -> None:
    stream = await Held.open(pair.port, "p")
    done, answers = asyncio.Event(), list[Answer]()

    async def client() -> None:
        while not done.is_set():
            answers.append(await post_chat(pair.port, chat("answer", stream=True)))

    clients = [asyncio.create_task(client()) for _ in range(4)]
    for _ in range(3):
        old, before = set(pair.worker_pids()), len(answers)
        pair.send_signal(signal.SIGHUP)
        while len(new := set(pair.worker_pids()) - old) < 2 or len(answers) < before + 20:
            await asyncio.sleep(0.05)
        upstream.release("p")  # what a drained worker still had is let go, so that gunicorn takes the next signal
        while set(pair.worker_pids()) != new:
            await asyncio.sleep(0.05)
    done.set()
    await asyncio.gather(*clients)
    assert all(map(whole, answers))
    assert whole(await stream.rest())
    assert await end(pair) == 0
    rows = await asyncio.to_thread(pair.query, "SELECT COUNT(*) AS n FROM usage_view WHERE status = 'ok'")
    assert rows[0]["n"] == len(answers) + 1


async def test_a_reload_takes_new_settings_and_refuses_mistakes(upstream: ScriptedUpstream, start: Start) -> None:
    gateway = await start(in_front_of(upstream, server={"name": "one"}))
    for name, more in (("two", {}), ("three", {"prot": 1})):
        gateway.config["server"] |= {"name": name, **more}
        gateway.config_file.write_text(json.dumps(gateway.config))
        (old,) = gateway.worker_pids()
        gateway.send_signal(signal.SIGHUP)
        await gone(old)
        assert (await call(gateway.port, "GET", "/health")).json["name"] == "two"
    assert "is refused, and the old one stays: server.prot: unknown setting" in gateway.logs()


async def test_a_stuck_worker_is_replaced_and_a_long_stream_is_not_stuck(
    upstream: ScriptedUpstream, start: Start
) -> None:
    gateway = await start(in_front_of(upstream), "--timeout", "2")
    stream = await Held.open(gateway.port, "p")
    await asyncio.sleep(4)
    upstream.release("p")
    assert whole(await stream.rest())
    (stuck,) = gateway.worker_pids()
    os.kill(stuck, signal.SIGSTOP)
    while stuck in gateway.worker_pids():
        await asyncio.sleep(0.05)
    assert whole(await post_chat(gateway.port, chat("answer", stream=True)))
    assert f"WORKER TIMEOUT (pid:{stuck})" in gateway.logs()


async def test_max_requests_replaces_a_worker_that_then_drains(upstream: ScriptedUpstream, start: Start) -> None:
    gateway = await start(in_front_of(upstream), "--max-requests", "10")
    (first,) = gateway.worker_pids()
    for _ in range(30):
        assert whole(await post_chat(gateway.port, chat("answer", stream=True)))
    await gone(first)
    assert await end(gateway) == 0
    assert "exited with code" not in gateway.logs()


async def test_workers_whose_master_is_gone_drain_and_end(pair: GunicornProcess, upstream: ScriptedUpstream) -> None:
    stream = await Held.open(pair.port, "p")
    workers = pair.worker_pids()
    pair.kill()
    await logged(pair, "master is gone", times=2)
    upstream.release()
    assert whole(await stream.rest())
    for pid in workers:
        await gone(pid)


async def test_log_files_are_reopened(upstream: ScriptedUpstream, start: Start, tmp_path: Path) -> None:
    log = tmp_path / "gunicorn.log"
    gateway = await start(in_front_of(upstream), "--error-logfile", str(log))
    log.rename(tmp_path / "old.log")
    gateway.send_signal(signal.SIGUSR1)
    while not log.exists():
        await asyncio.sleep(0.02)
    assert whole(await post_chat(gateway.port, chat("answer", stream=True)))
    assert await end(gateway) == 0
    assert "Shutting down: Master" in log.read_text()


async def test_where_strangers_could_call_the_first_key_is_made(upstream: ScriptedUpstream, start: Start) -> None:
    port = free_port()
    gateway = await start(in_front_of(upstream, server={"port": port}), "--bind", f"0.0.0.0:{port}")
    (key,) = re.findall(r"admin key   (sk-[\w-]+)", gateway.stdout_file.read_text())
    assert (await post_chat(port, chat("answer"))).status == 401
    assert (await post_chat(port, chat("answer"), {"authorization": f"Bearer {key}"})).status == 200


class TestStartsThatFail:
    async def run(self, folder: Path, *arguments: str, **environment: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *GUNICORN,
            *arguments,
            cwd=folder,
            env=clean_environment(folder) | {"GATEWAY_PORT": str(free_port())} | environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        stdout, stderr = await process.communicate()
        return process.returncode, stdout.decode(), stderr.decode()

    @pytest.mark.parametrize(
        ("config", "line"),
        [
            ("server: {prot: 1}", "error: server.prot: unknown setting; did you mean server.port?\n"),
            ("server: {workers: none}", "error: server.workers: must be a whole number\n"),
        ],
        ids=["unknown", "wrong"],
    )
    async def test_a_mistake_in_the_configuration_is_one_line(self, tmp_path: Path, config: str, line: str) -> None:
        (tmp_path / "config.yaml").write_text(config)
        assert await self.run(tmp_path) == (1, "", line)

    async def test_migrations_that_wait_are_one_line(self, tmp_path: Path) -> None:
        code, _, stderr = await self.run(tmp_path, GATEWAY__DATABASE__AUTO_MIGRATE="false")
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (1, 1)
        assert "run `gateway migrate`" in errors[0]

    async def test_an_application_that_does_not_start_ends_gunicorn(self, tmp_path: Path) -> None:
        (tmp_path / "prompt.txt").write_bytes(b"\xff is no UTF-8")
        code, _, stderr = await self.run(tmp_path, GATEWAY__CONVERSATIONS__SYSTEM_PROMPT_FILE="prompt.txt")
        assert code == 3
        assert "Worker failed to boot" in stderr
        assert "conversations.system_prompt_file: cannot be read" in stderr

    async def test_tls_is_refused_instead_of_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "some.pem").touch()
        code, _, stderr = await self.run(tmp_path, "--certfile", "some.pem", "--keyfile", "some.pem")
        assert code == 1
        assert "speaks no TLS" in stderr


@pytest.mark.parametrize(
    ("environment", "arguments", "workers"),
    [
        ({}, [], 3),
        ({"WEB_CONCURRENCY": "4"}, [], 4),
        ({"WEB_CONCURRENCY": "4", "GATEWAY_WORKERS": "5"}, [], 5),
        ({"WEB_CONCURRENCY": "4"}, ["--workers", "6"], 6),
    ],
)
async def test_the_settings_become_gunicorns(
    tmp_path: Path, environment: dict[str, str], arguments: Sequence[str], workers: int
) -> None:
    (tmp_path / "config.yaml").write_text("server: {workers: 3, host: '::1', port: 81, drain_seconds: 7.5}")
    process = await asyncio.create_subprocess_exec(
        *GUNICORN,
        *arguments,
        "--print-config",
        cwd=tmp_path,
        env=clean_environment(tmp_path) | environment,
        stdout=asyncio.subprocess.PIPE,
    )
    printed = (await process.communicate())[0].decode()
    found = dict(re.findall(r"^(\w+) += (.*)$", printed, re.MULTILINE))
    assert (found["workers"], found["bind"]) == (str(workers), "['[::1]:81']")
    assert (found["graceful_timeout"], found["timeout"]) == ("23", "30")
