"""The server on real sockets, in processes of its own, with clients that write and read bytes.

What the paths do is described in support/tiny_app.py. The tests of one connection run on uvloop and on asyncio.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ConfigError
from gateway.serving import listen, serve
from tests_standalone.support.tiny_app import make_app

PATIENCE = 20.0
ROOT = Path(__file__).parent.parent

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: here\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Running:
    """A server process: its port, what it says, and how it ends."""

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "tests_standalone.support.tiny_app", json.dumps(options)]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.host = options.get("host", "127.0.0.1")
        self.port = 0

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.events.put(json.loads(line))

    def listening(self) -> Running:
        self.port = self.wait_for("listening")["port"]
        return self

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next event of that name; others in between are only noted in `seen`."""
        deadline = time.monotonic() + PATIENCE
        while True:
            said = self.events.get(timeout=max(0.01, deadline - time.monotonic()))
            self.seen.append(said)
            if said["event"] == event:
                return said

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)

    def ask(self, request: bytes) -> bytes:
        """Sends, then reads to the end of file. A reset fails the test."""
        with self.connect() as sock:
            sock.sendall(request)
            return read_all(sock)

    def stop(self, *signals: int) -> int:
        for sig in signals:
            self.process.send_signal(sig)
        return self.ended()

    def ended(self) -> int:
        """The exit status, once the process and all that it said is here."""
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        while not self.events.empty():
            self.seen.append(self.events.get())
        return status

    def said(self, event: str) -> list[int]:
        return [said["pid"] for said in self.seen if said["event"] == event]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join(PATIENCE)


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Running] = []

    def start(**options: Any) -> Running:
        running.append(Running(options, tmp_path / f"log-{len(running)}"))
        return running[-1]

    yield start
    for process in running:
        process.close()


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With the limits that are shipped."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    running = Running({"loop": request.param}, tmp_path_factory.mktemp("server") / "log")
    yield running.listening()
    running.close()


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def hasty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With deadlines that a test can wait for."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    limits = {"head_seconds": 0.3, "body_seconds": 0.7, "write_seconds": 0.5, "linger_seconds": 0.3}
    options = {"loop": request.param, "limits": limits, "keep_alive_seconds": 0.3}
    running = Running(options, tmp_path_factory.mktemp("hasty") / "log")
    yield running.listening()
    running.close()


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def read_until(sock: socket.socket, end: bytes) -> bytes:
    got = b""
    while end not in got:
        piece = sock.recv(65536)
        assert piece, f"ended before {end!r}: {got!r}"
        got += piece
    return got


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """Exactly one answer with a Content-Length, and nothing after it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, f"ended in the head: {head!r}"
        head += byte
    length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
    body = b""
    while len(body) < length:
        body += sock.recv(length - len(body))
    return int(head.split()[1]), body


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def reset_by_peer(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"x")
    except ConnectionError:
        return True
    return False


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d\d\d) ", answers)]


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def head_of(size: int) -> bytes:
    """A GET whose whole head has this size."""
    return GET[:-2] + b"X: " + b"a" * (size - len(GET + b"X: \r\n")) + b"\r\n\r\n"


# -- requests that are refused -----------------------------------------------------------------------------------------

MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version 2.0": b"GET / HTTP/2.0\r\nHost: here\r\n\r\n",
    "version 0.9": b"GET / HTTP/0.9\r\nHost: here\r\n\r\n",
    "CONNECT": b"CONNECT there:443 HTTP/1.1\r\nHost: there:443\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: here\r\nHost: there\r\n\r\n",
    "two equal Hosts": b"GET / HTTP/1.1\r\nHost: here\r\nhost: here\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: here\n\n",
    "bare LF after a header": b"GET / HTTP/1.1\r\nHost: here\nX: y\r\n\r\n",
    "bare CR in a header": b"GET / HTTP/1.1\r\nHost: here\rX: y\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: here\0\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\nHost: here\r\nX: a\r\n b\r\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\nHost : here\r\n\r\n",
    "space in the URL": b"GET /a b HTTP/1.1\r\nHost: here\r\n\r\n",
    "raw bytes in the URL": b"GET /\xff HTTP/1.1\r\nHost: here\r\n\r\n",
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "two equal lengths": POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
    "listed lengths": POST + b"Content-Length: 1, 1\r\n\r\na",
    "negative length": POST + b"Content-Length: -1\r\n\r\na",
    "signed length": POST + b"Content-Length: +1\r\n\r\na",
    "endless length": POST + b"Content-Length: 99999999999999999999999\r\n\r\na",
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "hidden coding": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "coding in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size overflow": CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n",
    "negative chunk size": CHUNKED + b"-1\r\n",
    "longer chunk than said": CHUNKED + b"1\r\nabc\r\n0\r\n\r\n",
    "LF after a chunk size": CHUNKED + b"1\na\r\n0\r\n\r\n",
    "LF after a chunk": CHUNKED + b"1\r\na\n0\r\n\r\n",
    "LF in a chunk extension": CHUNKED + b"1;a\n\r\na\r\n0\r\n\r\n",
    "trailer": CHUNKED + b"1\r\na\r\n0\r\nAuthorization: mine\r\n\r\n",
    "forbidden trailer": CHUNKED + b"1\r\na\r\n0\r\nContent-Length: 4\r\n\r\n",
}


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_gets_one_400_and_the_connection_ends(server: Running, request_: bytes) -> None:
    answer = server.ask(request_)
    assert statuses(answer) == [400]
    assert b"connection: close" in answer
    assert error_of(answer)["type"] == "invalid_request_error"
    assert error_of(answer)["code"] == "malformed_request"


@pytest.mark.parametrize("name", ["two Hosts", "unknown coding", "trailer", "longer chunk than said"])
def test_a_malformed_request_is_refused_in_whatever_pieces_it_comes(server: Running, name: str) -> None:
    with server.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in MALFORMED[name]:
            sock.send(bytes([byte]))
        assert statuses(read_all(sock)) == [400]


def test_a_body_cut_short_is_refused(server: Running) -> None:
    for cut in (CHUNKED + b"1\r\na\r\n0\r\n", POST + b"Content-Length: 5\r\n\r\nab", GET[:-2]):
        with server.connect() as sock:
            sock.sendall(cut)
            sock.shutdown(socket.SHUT_WR)
            assert statuses(read_all(sock)) == [400]


def test_what_follows_a_good_request_is_refused_after_its_answer(server: Running) -> None:
    answers = server.ask(b"GET /busy?0.2 HTTP/1.1\r\nHost: here\r\n\r\n" + b"garbage\r\n\r\n")
    assert statuses(answers) == [200, 400]


def test_a_body_that_turns_bad_after_its_answer_began_gets_no_second_answer(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(CHUNKED.replace(b"POST /", b"POST /stream") + b"1\r\na\r\n")
        got = read_until(sock, b"first")
        sock.sendall(b"garbage\r\n")
        got += read_all(sock)
    assert statuses(got) == [200]
    assert not got.endswith(b"0\r\n\r\n")
    assert server.wait_for("stream over")["gone"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head_of(64 * 1024), 200),
        (head_of(64 * 1024 + 1), 431),
        (GET[:-2] + b"".join(b"X-%d: y\r\n" % n for n in range(199)) + b"\r\n", 200),
        (GET[:-2] + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + b"\r\n", 431),
        (GET.replace(b"/ ", b"/?" + b"a" * (16 * 1024 - 2) + b" "), 200),
        (GET.replace(b"/ ", b"/?" + b"a" * (16 * 1024 - 1) + b" "), 414),
    ],
    ids=["largest head", "larger head", "most headers", "more headers", "longest URL", "longer URL"],
)
def test_the_head_has_limits(server: Running, request_: bytes, status: int) -> None:
    with server.connect() as sock:
        sock.sendall(request_)
        got, body = read_answer(sock)
    assert got == status
    assert status == 200 or json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("start_", [GET[:-2] + b"X: ", b"GET /", CHUNKED + b"0\r\nX: "], ids=["head", "URL", "trailer"])
def test_an_endless_head_is_refused_long_before_it_is_held(server: Running, start_: bytes) -> None:
    sent = 0
    with server.connect() as sock:
        sock.sendall(start_)
        while not select.select([sock], [], [], 0.001)[0]:
            sock.sendall(b"a" * 8192)
            sent += 8192
            assert sent < 2 * 1024 * 1024
        assert statuses(read_all(sock)) in ([431], [414])


def test_duplicate_credentials_are_for_the_application_to_judge(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(GET[:-2] + b"Authorization: a\r\nAuthorization: b\r\n\r\n")
        _, body = read_answer(sock)
    assert [value for name, value in json.loads(body)["headers"] if name == "authorization"] == ["a", "b"]


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_an_upgrade_is_declined_and_the_request_answered(server: Running, offer: bytes) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + offer + b"\r\nHTTP2-Settings: AAMAAABk\r\n"
    with server.connect() as sock:
        sock.sendall(POST + upgrade + b"Content-Length: 3\r\n\r\nabc" + GET)
        status, body = read_answer(sock)
        assert status == 200
        assert json.loads(body)["length"] == 3
        assert {"upgrade", "http2-settings"}.isdisjoint(name for name, _ in json.loads(body)["headers"])
        assert read_answer(sock)[0] == 200


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_silent_connection_is_closed_without_a_word(hasty: Running) -> None:
    assert hasty.ask(b"") == b""


def test_a_head_that_does_not_come_in_time_gets_408(hasty: Running) -> None:
    answer = hasty.ask(GET[:-2])
    assert statuses(answer) == [408]
    assert error_of(answer)["code"] == "request_timeout"


def test_a_head_in_drops_gets_no_more_time(hasty: Running) -> None:
    with hasty.connect() as sock, contextlib.suppress(ConnectionError):
        for _ in range(200):
            sock.sendall(b"\r\n")
            if select.select([sock], [], [], 0.05)[0]:
                break
        assert statuses(read_all(sock)) == [408]


def test_the_head_of_a_later_request_has_the_same_deadline(hasty: Running) -> None:
    answers = hasty.ask(GET + GET[:10])
    assert statuses(answers) == [200, 408]


def test_an_idle_connection_is_closed(hasty: Running) -> None:
    assert statuses(hasty.ask(GET)) == [200]


def test_a_late_head_does_not_end_the_answer_before_it(hasty: Running) -> None:
    answers = hasty.ask(b"GET /busy?0.8 HTTP/1.1\r\nHost: here\r\n\r\n" + GET[:10])
    assert statuses(answers) == [200, 408]


def test_a_body_that_stops_gets_408_and_the_application_a_disconnect(hasty: Running) -> None:
    answer = hasty.ask(POST + b"Content-Length: 5\r\n\r\nab")
    assert statuses(answer) == [408]
    assert hasty.wait_for("disconnect")["path"] == "/"


def test_a_body_that_keeps_coming_may_take_longer_than_the_deadline(hasty: Running) -> None:
    with hasty.connect() as sock:
        sock.sendall(POST + b"Content-Length: 10\r\n\r\n")
        for _ in range(10):
            time.sleep(0.1)
            sock.sendall(b"x")
        assert read_answer(sock)[0] == 200


def test_a_body_that_we_do_not_read_is_not_late(hasty: Running) -> None:
    body = b"x" * 16_000_000
    with hasty.connect() as sock:
        sock.sendall(b"POST /dawdle?1.5 HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        status, answer = read_answer(sock)
    assert status == 200
    assert json.loads(answer)["length"] == len(body)


def test_a_client_that_never_reads_is_cut_off(hasty: Running) -> None:
    with hasty.connect() as sock:
        sock.sendall(b"GET /flood HTTP/1.1\r\nHost: here\r\n\r\n")
        sent = hasty.wait_for("flood over")["sent"]
    assert sent < 16_000_000  # what the kernels hold for both ends, and little more


def test_a_client_that_never_reads_the_end_is_cut_off(start: Start) -> None:
    server = start(limits={"write_seconds": 0.5}, drain_seconds=60).listening()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((server.host, server.port))
        sock.sendall(b"GET /abort HTTP/1.1\r\nHost: here\r\n\r\n")
        assert select.select([sock], [], [], PATIENCE)[0]
        assert server.stop(signal.SIGTERM) == 0  # so nothing waits for the client


def test_a_slow_client_that_reads_is_served(hasty: Running) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE)
        sock.connect((hasty.host, hasty.port))
        sock.sendall(b"GET /flood HTTP/1.1\r\nHost: here\r\n\r\n")
        for _ in range(40):
            assert sock.recv(4096)
            time.sleep(0.05)
    hasty.wait_for("flood over")


# -- clients that leave, or seem to ------------------------------------------------------------------------------------


def test_a_half_closed_client_gets_its_whole_answer(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /busy?0.2 HTTP/1.1\r\nHost: here\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert statuses(answer) == [100, 200]  # the interim reply finds out whether anyone still listens
    assert b"connection: close" in answer


def test_a_client_that_closes_before_its_answer_has_begun_is_noticed(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /waiting HTTP/1.1\r\nHost: here\r\n\r\n")
        server.wait_for("waiting")
    assert server.wait_for("disconnect")["path"] == "/waiting"


def test_a_half_closed_client_gets_its_whole_stream(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        got = b""
        while len(got) < 20_000:
            got += sock.recv(65536)
    assert server.wait_for("stream over")["gone"]


def test_all_answers_reach_a_half_closed_client_that_pipelined(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(GET.replace(b"/ ", b"/busy?0.1 ") * 3)
        sock.shutdown(socket.SHUT_WR)
        assert [status for status in statuses(read_all(sock)) if status != 100] == [200, 200, 200]


def test_a_client_that_closes_is_noticed_by_what_we_write(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n")
        read_until(sock, b"first")
    assert server.wait_for("stream over")["gone"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next write tells")
def test_one_write_is_enough_to_notice_that_a_client_has_closed(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /silent?0.2 HTTP/1.1\r\nHost: here\r\n\r\n")
        read_until(sock, b"first")
    assert server.wait_for("disconnect")["path"] == "/silent"


def test_a_reset_is_noticed_at_once(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /silent?0 HTTP/1.1\r\nHost: here\r\n\r\n")
        read_until(sock, b"ping")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.wait_for("disconnect")["path"] == "/silent"


def test_the_running_application_hears_of_a_reset_though_others_are_queued_behind_it(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n" + GET)
        read_until(sock, b"first")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.wait_for("stream over")["gone"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems lack some of the options")
def test_a_vanished_peer_is_noticed_within_a_minute() -> None:
    with listen("127.0.0.1", 0) as ours, socket.create_connection(ours.getsockname()):
        accepted, _ = ours.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            probes = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            assert idle + probes * accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 60
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


# -- answers that do not wait for the request --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 200_000, 20_000_000])
def test_an_early_answer_reaches_a_client_that_is_still_sending(server: Running, size: int) -> None:
    with server.connect() as sock:

        def send() -> None:
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)

        sender = threading.Thread(target=send)
        sender.start()
        status, body = read_answer(sock)
        sender.join(PATIENCE)
    assert (status, body) == (413, b"too large")


def test_a_refused_body_is_not_read_in_full(server: Running) -> None:
    sent = 0
    with server.connect() as sock, contextlib.suppress(ConnectionError, BlockingIOError):
        sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000000\r\n\r\n")
        read_answer(sock)
        while sent < 100_000_000:
            if not select.select([], [sock], [], 0.3)[1]:
                break
            sent += sock.send(b"x" * 65536, socket.MSG_DONTWAIT)
    assert sent < 32_000_000  # what the kernels hold, and little more


def test_an_unread_body_is_never_taken_for_a_request(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /ignore HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n")
        answer = read_until(sock, b"whatever")
        sock.sendall(GET * 10)
        answer += read_all(sock)
    assert statuses(answer) == [200]
    assert b"connection: close" in answer


def test_lingering_ends(hasty: Running) -> None:
    with hasty.connect() as sock:
        sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n")
        assert statuses(read_all(sock)) == [413]
        assert eventually(lambda: reset_by_peer(sock))


def test_expect_100_continue_is_answered_only_if_the_body_is_wanted(server: Running) -> None:
    expect = b"Host: here\r\nExpect: 100-continue\r\nContent-Length: 10000000000\r\n\r\n"
    assert statuses(server.ask(b"POST /refuse HTTP/1.1\r\n" + expect)) == [413]
    with server.connect() as sock:
        sock.sendall(b"POST / HTTP/1.1\r\n" + expect.replace(b"10000000000", b"3"))
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert read_answer(sock)[0] == 200


# -- pipelining --------------------------------------------------------------------------------------------------------


def test_100_pipelined_requests_are_answered_in_order(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"".join(b"GET /?%d HTTP/1.1\r\nHost: here\r\n\r\n" % number for number in range(100)))
        assert [json.loads(read_answer(sock)[1])["query"] for _ in range(100)] == [str(n) for n in range(100)]


def test_more_pipelined_requests_than_are_held_end_the_connection(server: Running) -> None:
    got = statuses(server.ask(GET * 400))
    assert got == [200] * (len(got) - 1) + [400]
    assert len(got) == 1 + 256 + 1


@pytest.mark.parametrize("what", [GET, POST + b"Content-Length: 1000000000\r\n\r\n", b"garbage"])
def test_what_is_sent_during_a_stream_is_not_hoarded(server: Running, what: bytes) -> None:
    sent = 0
    with server.connect() as sock:
        sock.sendall(b"GET /stream?10 HTTP/1.1\r\nHost: here\r\n\r\n")
        read_until(sock, b"first")
        while sent < 100_000_000 and select.select([], [sock], [], 0.3)[1]:
            sent += sock.send(what * (65536 // len(what)), socket.MSG_DONTWAIT)
        assert sent < 32_000_000  # what the kernels hold, and little more
        assert sock.recv(65536)
    server.wait_for("stream over")


# -- how answers end ---------------------------------------------------------------------------------------------------


def test_a_stream_that_is_ended_early_is_delivered_without_its_closing_chunk(server: Running) -> None:
    before = server.log.read_bytes()
    answer = server.ask(b"GET /abort HTTP/1.1\r\nHost: here\r\n\r\n")
    assert answer.count(b"x") == 200_000
    assert not answer.endswith(b"0\r\n\r\n")
    assert server.log.read_bytes() == before  # it was meant, so nothing is logged


@pytest.mark.parametrize("path", [b"/fail", b"/nothing"])
def test_a_failing_application_is_a_500_that_says_nothing(server: Running, path: bytes) -> None:
    answer = server.ask(b"GET %s HTTP/1.1\r\nHost: here\r\n\r\n" % path)
    assert statuses(answer) == [500]
    assert error_of(answer)["type"] == "server_error"
    assert b"secret" not in answer


def test_an_answer_has_a_date_and_does_not_name_the_server(server: Running) -> None:
    head = server.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")).partition(b"\r\n\r\n")[0]
    assert b"\r\ndate: " in head
    assert b"\r\nserver:" not in head


# -- the start of a process --------------------------------------------------------------------------------------------


def test_what_the_start_made_is_not_looked_through_again_by_the_collector_of_cycles() -> None:
    program = """
import gc
from functools import partial
from tests_standalone.support.tiny_app import make_app
from gateway.serving import serve
import os, signal

def started(port):
    print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

serve(partial(make_app, {}), host="127.0.0.1", port=0, workers=1, drain_seconds=1, on_started=started)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[0] == "True True"


# -- the end of a process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_with_status_0(start: Start, sig: int) -> None:
    server = start(drain_seconds=60).listening()
    with server.connect() as idle, server.connect():
        idle.sendall(GET)
        read_answer(idle)
        began = time.monotonic()
        assert server.stop(sig) == 0
        assert time.monotonic() - began < 3
        assert read_all(idle) == b""
    assert [said["event"] for said in server.seen] == ["listening", "drain.begin", "lifespan.shutdown"]


def test_what_runs_is_finished_and_nothing_new_taken(start: Start) -> None:
    server = start(drain_seconds=60).listening()
    with server.connect() as busy, server.connect() as receiving, server.connect() as idle:
        idle.sendall(GET)
        read_answer(idle)
        receiving.sendall(GET[:-2])
        busy.sendall(b"GET /busy?1 HTTP/1.1\r\nHost: here\r\n\r\n")
        server.wait_for("running")

        server.process.send_signal(signal.SIGTERM)
        server.wait_for("drain.begin")
        assert read_all(idle) == b""
        receiving.sendall(b"\r\n")
        for sock in (receiving, busy):
            answer = read_all(sock)
            assert statuses(answer) == [200]
            assert b"connection: close" in answer
        with pytest.raises(ConnectionError):
            server.connect()
    assert server.ended() == 0


def test_streams_are_told_to_end_when_the_drain_is_over(start: Start) -> None:
    server = start(drain_seconds=0.3).listening()
    with server.connect() as sock:
        sock.sendall(b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n")
        server.wait_for("streaming")
        server.process.send_signal(signal.SIGTERM)
        answer = read_all(sock)
    assert answer.endswith(b"last\r\n0\r\n\r\n")
    assert server.ended() == 0
    order = [said["event"] for said in server.seen][2:]
    assert order == ["drain.begin", "drain.cut", "stream over", "lifespan.shutdown"]


def test_what_does_not_end_is_cancelled(start: Start) -> None:
    server = start(drain_seconds=0.1, limits={"cut_seconds": 0.1}).listening()
    with server.connect() as sock:
        sock.sendall(b"GET /stubborn HTTP/1.1\r\nHost: here\r\n\r\n")
        server.wait_for("running")
        assert server.stop(signal.SIGTERM) == 0
        assert read_all(sock).endswith(b"first\r\n")
    assert server.said("lifespan.shutdown")


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("path", [b"/stream", b"/stubborn"])
def test_a_second_signal_cuts_at_once(start: Start, path: bytes, sig: int) -> None:
    server = start(drain_seconds=60).listening()
    with server.connect() as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: here\r\n\r\n" % path)
        read_until(sock, b"first")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("drain.begin")
        began = time.monotonic()
        assert server.stop(sig) == 0
        assert time.monotonic() - began < 5
        assert read_all(sock).endswith(b"last\r\n0\r\n\r\n") == (path == b"/stream")
    assert server.said("drain.cut")
    assert server.said("lifespan.shutdown")


def test_a_shutdown_that_hangs_is_not_waited_for(start: Start) -> None:
    server = start(shutdown_seconds=3600, limits={"lifespan_seconds": 0.2}).listening()
    assert server.stop(signal.SIGTERM) == 0
    assert server.said("lifespan.shutdown")


def test_a_second_signal_ends_a_start_that_hangs(start: Start) -> None:
    server = start(startup_seconds=3600)
    deadline = time.monotonic() + PATIENCE
    while server.process.poll() is None:  # the first may come before anybody listens for it
        assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert server.ended() != 0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_application_that_cannot_start_ends_the_server_with_status_1(start: Start, workers: int) -> None:
    assert start(workers=workers, fail=True).ended() == 1


# -- the supervisor ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def streams_on_both_workers(server: Running) -> Iterator[dict[int, socket.socket]]:
    """One open stream on each of two workers, by the worker's pid."""
    streams: dict[int, socket.socket] = {}
    deadline = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while len(streams) < 2:
            assert time.monotonic() < deadline
            sock = stack.enter_context(server.connect())
            sock.sendall(b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n")
            pid = server.wait_for("streaming")["pid"]
            if streams.setdefault(pid, sock) is not sock:
                sock.close()
        yield streams


def worker_of(server: Running) -> int:
    """The pid of a worker that answers now."""
    with server.connect() as sock:
        sock.sendall(GET)
        pid: int = json.loads(read_answer(sock)[1])["pid"]
        return pid


def test_all_workers_drain_at_the_same_time(start: Start) -> None:
    server = start(workers=2, drain_seconds=0.5).listening()
    with streams_on_both_workers(server) as streams:
        assert server.stop(signal.SIGTERM) == 0
        for sock in streams.values():
            assert read_all(sock).endswith(b"last\r\n0\r\n\r\n")
    assert set(server.said("drain.begin")) == set(server.said("lifespan.shutdown")) == set(streams)


def test_a_signal_to_the_whole_group_is_one_signal(start: Start) -> None:
    server = start(workers=2, drain_seconds=60).listening()
    with streams_on_both_workers(server) as streams:
        for pid in streams:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        for _ in streams:
            server.wait_for("drain.begin")
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(0.5)
    assert server.ended() == 0
    assert not server.said("drain.cut")


def test_a_second_signal_to_the_supervisor_cuts_all_workers(start: Start) -> None:
    server = start(workers=2, drain_seconds=60).listening()
    with streams_on_both_workers(server) as streams:
        server.process.send_signal(signal.SIGTERM)
        for _ in streams:
            server.wait_for("drain.begin")
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 5
        for sock in streams.values():
            assert read_all(sock).endswith(b"last\r\n0\r\n\r\n")
    assert set(server.said("drain.cut")) == set(streams)


def test_a_killed_worker_is_replaced_and_the_others_go_on(start: Start) -> None:
    server = start(workers=2, drain_seconds=0).listening()
    with streams_on_both_workers(server) as streams:
        (victim, lost), (other, kept) = streams.items()
        os.kill(victim, signal.SIGKILL)
        with contextlib.suppress(ConnectionError):
            read_all(lost)
        assert eventually(lambda: worker_of(server) not in (victim, other))
        assert kept.recv(65536)
        assert server.stop(signal.SIGTERM) == 0


def test_sighup_replaces_the_workers_and_fails_no_request(start: Start) -> None:
    server = start(workers=2, drain_seconds=5).listening()
    with streams_on_both_workers(server) as streams:
        old = set(streams)
    answering: set[int] = set()
    server.process.send_signal(signal.SIGHUP)

    def all_are_new() -> bool:
        answering.add(worker_of(server))
        while not server.events.empty():
            server.seen.append(server.events.get())
        return old <= set(server.said("lifespan.shutdown")) and len(answering - old) == 2

    assert eventually(all_are_new)
    assert server.process.poll() is None
    assert server.stop(signal.SIGTERM) == 0


def test_workers_end_when_their_supervisor_is_killed_and_the_port_is_free(start: Start) -> None:
    server = start(workers=2, drain_seconds=0.1).listening()
    with streams_on_both_workers(server) as streams:
        server.process.kill()
        server.ended()  # the pipe for what they say is closed once the last worker is gone
    assert set(server.said("lifespan.shutdown")) == set(streams)
    listen(server.host, server.port).close()


# -- serve() -----------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            serve(lambda: make_app({}), host="127.0.0.1", port=port, workers=1, drain_seconds=1)
    (problem,) = caught.value.problems
    assert problem.startswith(f"server.port: port {port} on 127.0.0.1 is in use")
    assert "GATEWAY_PORT" in problem


def test_a_host_that_is_not_ours_is_one_clear_line() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(ConfigError) as caught:
            listen(host, 0)
        assert caught.value.problems[0].startswith("server.host: ")


@pytest.mark.parametrize("host", ["::1", "::"])
@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6(start: Start, host: str) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 address here")
    server = start(host=host).listening()
    for address in ["::1", "127.0.0.1"] if host == "::" else ["::1"]:
        server.host = address
        with server.connect() as sock:
            sock.sendall(GET)
            assert read_answer(sock)[0] == 200
    assert server.stop(signal.SIGTERM) == 0
