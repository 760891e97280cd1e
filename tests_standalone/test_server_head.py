"""What a connection judges of a head by itself."""

from __future__ import annotations

from typing import Any

import httptools
import pytest

from gateway.server_head import MOST_REMEMBERED, Header, Refusal, SameHead, check_head, expects_continue, path_of

HOST = (b"host", b"here")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (b"/v1/models", ("/v1/models", b"/v1/models", b"")),
        (b"/v1/models/a%2Fb", ("/v1/models/a/b", b"/v1/models/a%2Fb", b"")),
        (b"/v1/models?key=1", ("/v1/models", b"/v1/models", b"key=1")),
        (b"http://here/v1/models", ("/v1/models", b"/v1/models", b"")),
        (b"/" + b"a" * 1000, ("/" + "a" * 1000, b"/" + b"a" * 1000, b"")),
    ],
)
def test_path_of_is_the_same_each_time(url: bytes, found: tuple[str, bytes, bytes]) -> None:
    assert [path_of(url), path_of(url)] == [found, found]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([HOST], False),
        ([HOST, (b"expect", b"100-Continue")], True),
        ([(b"expect", b"100-continue"), (b"expect", b"else")], True),
        ([(b"expect", b"else")], False),
    ],
)
def test_expects_continue(headers: list[Header], expected: bool) -> None:
    assert expects_continue(headers) is expected


@pytest.mark.parametrize(
    ("version", "headers", "message"),
    [
        ("1.1", [HOST], None),
        ("1.0", [], None),
        ("1.1", [HOST, (b"transfer-encoding", b"Chunked")], None),
        ("1.1", [], "exactly one Host"),
        ("1.1", [HOST, HOST], "exactly one Host"),
        ("1.0", [HOST, HOST], "exactly one Host"),
        ("1.1", [HOST, (b"transfer-encoding", b"gzip")], "transfer encoding"),
        ("1.1", [HOST, (b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"gzip")], "transfer encoding"),
        ("1.0", [HOST, (b"transfer-encoding", b"chunked")], "transfer encoding"),
        ("2.0", [HOST], "Only HTTP/1.1"),
        ("1.1", [HOST, (b"x", b"a" * 65)], "larger than 100"),
        ("1.1", [HOST, (b"x", b"a" * 64)], None),
    ],
)
def test_check_head(version: str, headers: list[Header], message: str | None) -> None:
    """The last ones: 4 + 1 + 14 of the first line and the last, 8 + 4 and 1 + 4 of the headers, and the value."""
    if message is None:
        check_head(b"POST", b"/", version, headers, 100)
    else:
        with pytest.raises(Refusal, match=message):
            check_head(b"POST", b"/", version, headers, 100)


LINES = b"POST /v1?a=b HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer one\r\n"
SCOPE: Any = {"type": "http"}


def told_by_the_parser(data: bytes) -> tuple[list[Header], bytes]:
    """Of one whole request."""

    class Reader:
        def __init__(self) -> None:
            self.headers: list[Header] = []
            self.body = b""
            self.complete = 0

        def on_header(self, name: bytes, value: bytes) -> None:
            self.headers.append((name.lower(), value))

        def on_body(self, body: bytes) -> None:
            self.body += body

        def on_message_complete(self) -> None:
            self.complete += 1

    reader = Reader()
    httptools.HttpRequestParser(reader).feed_data(data)
    assert reader.complete == 1
    return reader.headers, reader.body


def same_head(data: bytes) -> SameHead | None:
    return SameHead.of(data, told_by_the_parser(data)[0], SCOPE, {})


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\r\nX-Last: z\r\n\r\n", b"\r\nX-Last: 5\r\nX-5: 5\r\n\r\n"])
@pytest.mark.parametrize("name", [b"Content-Length", b"content-length"])
@pytest.mark.parametrize("body", [b"", b"other", b"longer than before", b"\r\n\r\n", b"x" * 12345])
def test_a_head_that_differs_in_its_length_is_told_as_the_parser_tells_it(end: bytes, name: bytes, body: bytes) -> None:
    same = same_head(LINES + name + b": 5" + end + b"hello")
    data = LINES + name + b": %d" % len(body) + end + body
    assert same is not None
    assert same.told_by(data) == told_by_the_parser(data)


@pytest.mark.parametrize(
    "data",
    [
        LINES + b"Content-Length: 5\r\n\r\nhell",
        LINES + b"Content-Length: 5\r\n\r\nhello!",
        LINES + b"Content-Length: 5\r\n\r\nhello" + LINES + b"Content-Length: 5\r\n\r\nhello",
        LINES + b"Content-Length: 5\r\nX: y\r\n\r\nhello",
        LINES + b"Content-Length: +5\r\n\r\nhello",
        LINES + b"Content-Length: \r\n\r\nhello",
        LINES + b"Content-Length: 5 \r\n\r\nhello",
        LINES + b"Content-Length: 000000005\r\n\r\nhello",
        LINES + b"Content-Length: 5\r\n\nhello",
        LINES + b"Content-Length: 5",
        LINES + b"Content-Length: 5\r",
        LINES.replace(b"one", b"two") + b"Content-Length: 5\r\n\r\nhello",
        LINES.replace(b"Host", b"host") + b"Content-Length: 5\r\n\r\nhello",
        LINES.replace(b"a=b", b"a=c") + b"Content-Length: 5\r\n\r\nhello",
        LINES[1:] + b"Content-Length: 5\r\n\r\nhello",
        b"\r\n" + LINES + b"Content-Length: 5\r\n\r\nhello",
        b"",
    ],
)
def test_any_other_bytes_are_for_the_parser(data: bytes) -> None:
    same = same_head(LINES + b"Content-Length: 5\r\n\r\nhello")
    assert same is not None
    assert same.told_by(data) is None


@pytest.mark.parametrize(
    "data",
    [
        LINES + b"\r\n",
        LINES + b"Content-Length:  5\r\n\r\nhello",
        LINES + b"Content-Length: 5 \r\n\r\nhello",
        LINES + b"Content-Length:5\r\n\r\nhello",
        LINES + b"X:  y\r\nContent-Length: 5\r\n\r\nhello",
        LINES + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
        LINES + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        LINES + b"X: " + b"y" * MOST_REMEMBERED + b"\r\nContent-Length: 5\r\n\r\nhello",
        b"\r\n" + LINES + b"Content-Length: 5\r\n\r\nhello",
    ],
)
def test_a_head_that_has_more_than_one_spelling_is_not_remembered(data: bytes) -> None:
    assert same_head(data) is None


def test_a_head_is_of_a_request_that_is_alone() -> None:
    data = LINES + b"Content-Length: 5\r\n\r\nhello"
    headers = told_by_the_parser(data)[0]
    assert SameHead.of(data + data, headers, SCOPE, {}) is None
    assert SameHead.of(data + b"\r\n", headers, SCOPE, {}) is None
    assert SameHead.of(data, headers, SCOPE, {}) is not None
