"""Heads that are known from replies before: read as the parser reads them, or left to it."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends import client_head
from gateway.backends.client_head import KnownHeads
from gateway.backends.client_reply import Reply
from gateway.backends.transport import Timeouts

HEAD = (
    b"HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 08:43:%02d GMT\r\nserver: uvicorn\r\nContent-Length: %d\r\n"
    b"content-type: application/json\r\nx-request-id: %b\r\n\r\n"
)


def reply(body: bytes = b'{"a":1}', second: int = 7, name: bytes = b"req_1") -> bytes:
    return HEAD % (second, len(body), name) + body


class Line:
    """What a reply tells its connection."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def due(self, at: float) -> None:
        pass

    def pause(self) -> None:
        self.said.append("pause")

    def resume(self) -> None:
        self.said.append("resume")

    def stop_sending(self) -> None:
        self.said.append("stop sending")

    def finish(self, keep: bool) -> None:
        self.said.append(("finish", keep))

    def retire(self, reply: Reply) -> None:
        self.said.append("retire")

    def drop(self) -> None:
        self.said.append("drop")


async def _read(data: bytes, heads: KnownHeads | None, *, bodiless: bool = False) -> Any:
    """All that can be seen of a reply."""
    line = Line()
    loop = asyncio.get_running_loop()
    found = Reply(line, loop, bodiless=bodiless, timeouts=Timeouts(), end=math.inf, heads=heads)
    waiter = found.head_came(None)
    found.feed(data)
    done, ended = waiter.done(), found.at_end()
    pieces = b"".join(found._pieces)
    found.close()
    failure = found._failure and (type(found._failure), found._failure.log)
    return found.status, list(found.headers.items()), pieces, done, ended, failure, line.said


def read(data: bytes, heads: KnownHeads | None, *, bodiless: bool = False) -> Any:
    return asyncio.run(_read(data, heads, bodiless=bodiless))


def knowing(*told: bytes) -> KnownHeads:
    heads = KnownHeads()
    for data in told:
        heads._pause = 0
        read(data, heads)
    return heads


def test_what_differs_in_date_id_and_length_is_known() -> None:
    heads = knowing(reply())
    assert heads.read(reply(b"{}", 8, b"req_2")) == (
        {
            "date": "Sun, 22 Nov 2026 08:43:08 GMT",
            "server": "uvicorn",
            "content-length": "2",
            "content-type": "application/json",
            "x-request-id": "req_2",
        },
        b"{}",
    )


@pytest.mark.parametrize(
    "told",
    [
        reply().replace(b"200 OK", b"201 Created"),
        reply().replace(b"HTTP/1.1", b"HTTP/1.0"),
        reply().replace(b"server: uvicorn", b"connection: close"),
        reply().replace(b"server: uvicorn", b"date: today"),
        reply().replace(b"server: uvicorn", b"server:uvicorn"),
        reply().replace(b"server: uvicorn", b"server: " + b"x" * 5000),
        reply().replace(b"server: uvicorn", b"server: \xe9"),
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + reply(),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        reply() + b"more",
        reply()[:-1],
    ],
)
def test_the_unusual_is_not_learnt(told: bytes) -> None:
    assert knowing(told)._heads == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"uvicorn\r\n", b"uvicorn\r\ntransfer-encoding: chunked\r\n"),
        (b"uvicorn\r\n", b"uvicorn\r\nconnection: close\r\n"),
        (b"uvicorn\r\n", b"uvicorn\n"),
        (b"uvicorn", b"uvi\x01corn"),
        (b"uvicorn", b"\xe9"),
        (b"uvicorn", b" uvicorn "),
        (b"uvicorn", b""),
        (b"Content-Length: 7", b"Content-Length: 6"),
        (b"Content-Length: 7", b"Content-Length: 8"),
        (b"Content-Length: 7", b"Content-Length: 0"),
        (b"Content-Length: 7", b"Content-Length: 07"),
        (b"Content-Length: 7", b"Content-Length: 7, 7"),
        (b"Content-Length: 7", b"Content-Length: -7"),
        (b"Content-Length: 7", b"Content-Length: 7\r\nContent-Length: 7"),
        (b"application/json", b"text/plain"),
        (b"HTTP/1.1 200 OK", b"HTTP/1.1 503 OK"),
        (b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK"),
    ],
)
def test_other_heads_go_to_the_parser(old: bytes, new: bytes) -> None:
    heads, data = knowing(reply()), reply().replace(old, new)
    assert heads.read(data) is None
    assert read(data, heads) == read(data, None)


def test_a_reply_that_has_no_body_goes_to_the_parser() -> None:
    heads = knowing(reply())
    assert read(reply(), heads, bodiless=True) == read(reply(), None, bodiless=True)


def test_several_are_known_and_the_oldest_is_forgotten() -> None:
    told = [reply().replace(b"server", b"server%d" % number) for number in range(client_head._MOST_HEADS + 1)]
    heads = knowing(*told)
    assert [heads.read(data) is not None for data in told] == [False, *[True] * client_head._MOST_HEADS]


def test_learning_is_done_once_in_a_while() -> None:
    heads = KnownHeads()
    told = [reply().replace(b"server", b"server%d" % number) for number in range(client_head._PAUSE + 2)]
    for data in told:
        read(data, heads)
    assert [heads.read(data) is not None for data in told] == [True, *[False] * client_head._PAUSE, True]


_ENDS = [
    b"",
    b" ",
    b"\r\n",
    b"\r\nconnection: close",
    b"\r\ntransfer-encoding: chunked",
    b"\r\n x",
    b"\x00",
    b"\t",
    b"\xff",
]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(reply())), st.sampled_from([*_ENDS, b"7", b":", b"a"])), max_size=3))
def test_read_as_the_parser_reads_it(changes: list[tuple[int, bytes]]) -> None:
    data = reply()
    for place, text in changes:
        data = data[:place] + text + data[place:]
    assert read(data, knowing(reply(b"{}", 9))) == read(data, None)
