"""The load generator counts right, and servers that fail on purpose are told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import samples
from benchmarks.course import Mock
from benchmarks.load import Job
from benchmarks.measure import measured


def job(port: int, kind: Any = "json", **changes: Any) -> Job:
    asked = samples.request(port, "sk-any", stream=kind == "stream").decode()
    given = Job(port, kind, asked, 4, 0.4, samples.LEAST, samples.EVENTS, warm_up=0.1, ramp=0.1, finish=True)
    return replace(given, **changes)


def test_answers_are_counted_and_timed(mock: Mock) -> None:
    found = measured(job(mock.port, watched={"self": [mock.pid]}))

    assert found["errors"] == {}
    assert found["ended"] == found["latency"]["count"] > 0
    assert found["latency"]["largest"] > samples.ANSWER_SECONDS
    assert found["resident"]["self"] > 0


def test_streams_are_counted_by_their_chunks(mock: Mock) -> None:
    found = measured(job(mock.port, "stream"))

    assert found["errors"] == {}
    assert found["done"] > 0
    assert found["gap"]["count"] > 0


def test_an_answer_that_is_too_short_is_an_error(mock: Mock) -> None:
    found = measured(job(mock.port, least=100_000))

    assert found["done"] == 0
    assert set(found["errors"]) == {"short answer"}


def test_a_stream_with_too_few_chunks_is_an_error(mock: Mock) -> None:
    found = measured(job(mock.port, "stream", events=1000))

    assert set(found["errors"]) == {"stream with missing chunks"}


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A server that gives this to every connection, and then closes it."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


CUT = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n"
NO_END_MARK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n"
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("kind", "reply", "error"),
    [
        ("json", REFUSED, "status 429"),
        ("json", b"", "connection lost"),
        ("stream", REFUSED, "status 429"),
        ("stream", CUT, "connection lost"),
        ("stream", NO_END_MARK, "stream without its end mark"),
    ],
)
def test_what_fails_is_told(kind: str, reply: bytes, error: str) -> None:
    with answering(reply) as port:
        found = measured(job(port, kind, connections=1))

    assert set(found["errors"]) == {error}
    assert found["ended"] == 0


def test_a_rate_is_not_exceeded(mock: Mock) -> None:
    """Four connections would do two hundred a second."""
    found = measured(job(mock.port, rate=20.0))

    assert found["errors"] == {}
    assert 0 < found["ended"] <= 20 * found["seconds"] + 4


def test_streams_that_do_not_end_are_not_waited_for_without_end(mock: Mock) -> None:
    asked = samples.request(mock.port, None, samples.SLOW_MODEL, stream=True).decode()
    found = measured(job(mock.port, "stream", request=asked, finish_seconds=0.1))

    assert found["errors"] == {"not ended": 4}


def test_one_who_never_answers_is_not_waited_for_without_end(mock: Mock) -> None:
    asked = samples.request(mock.port, None, samples.SLOW_MODEL, stream=True).decode()
    found = measured(job(mock.port, "stream", request=asked, finish=False, settle_seconds=0.1))

    assert found["ended"] == 0
    assert found["done"] > 0
