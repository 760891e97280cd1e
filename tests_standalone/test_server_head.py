"""What a connection judges of a head by itself."""

from __future__ import annotations

import pytest

from gateway.server_head import Header, Refusal, check_head, expects_continue, path_of

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
