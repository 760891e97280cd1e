"""Requests as bytes, by example; and what is refused because it could say more than one request."""

from __future__ import annotations

import pytest

from gateway.backends.client_request import Origin, header_lines, target_of


class TestTarget:
    @pytest.mark.parametrize(
        ("url", "origin", "line", "host"),
        [
            ("http://a/", Origin(False, "a", 80), "/", "a"),
            ("http://a", Origin(False, "a", 80), "/", "a"),
            ("http://a?b=1", Origin(False, "a", 80), "/?b=1", "a"),
            ("https://a.b.c/d/e?f=g&h", Origin(True, "a.b.c", 443), "/d/e?f=g&h", "a.b.c"),
            ("https://a:443/", Origin(True, "a", 443), "/", "a"),
            ("http://a:443/", Origin(False, "a", 443), "/", "a:443"),
            ("HTTP://Example.COM:8080/Path", Origin(False, "example.com", 8080), "/Path", "example.com:8080"),
            ("http://[::1]:8000/v1", Origin(False, "::1", 8000), "/v1", "[::1]:8000"),
            ("https://[2001:db8::1]/", Origin(True, "2001:db8::1", 443), "/", "[2001:db8::1]"),
            ("http://a/%2e%2E/x//y#part", Origin(False, "a", 80), "/%2e%2E/x//y", "a"),
            ("http://a/models/gemini:stream?key=a%20b", Origin(False, "a", 80), "/models/gemini:stream?key=a%20b", "a"),
            ("http://a/é?ü=☃", Origin(False, "a", 80), "/%C3%A9?%C3%BC=%E2%98%83", "a"),
            ("http://bücher.example/", Origin(False, "xn--bcher-kva.example", 80), "/", "xn--bcher-kva.example"),
        ],
    )
    def test_lines(self, url: str, origin: Origin, line: str, host: str) -> None:
        target = target_of("GET", url)
        assert target.origin == origin
        assert target.start == f"GET {line} HTTP/1.1\r\nhost: {host}\r\n".encode()

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "a",
            "//a/",
            "ftp://a/",
            "http://",
            "http:///x",
            "http://user@a/",
            "http://user:key@a/",
            "http://a:0x50/",
            "http://a:99999/",
            "http://a/ b",
            "http://a/\r\nx: y",
            "http://a/\n",
            "http://a\r\n/",
            "http://a/\x00",
            "http://a/\x7f",
            "http://a/\tb",
            " http://a/",
            "http://a b/",
            "http://a\\b/",
            "http://[::1/",
        ],
    )
    def test_what_is_no_url(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
            target_of("GET", url)

    @pytest.mark.parametrize("method", ["", "GET ", "GET /x HTTP/1.1\r\nhost: b\r\n\r\nGET", "G\x00T", "GÉT"])
    def test_what_is_no_method(self, method: str) -> None:
        with pytest.raises(ValueError, match="method"):
            target_of(method, "http://a/")


class TestHead:
    @pytest.mark.parametrize(
        ("method", "body", "length"),
        [
            ("POST", b"{}", b"content-length: 2\r\n"),
            ("POST", b"", b"content-length: 0\r\n"),
            ("POST", None, b"content-length: 0\r\n"),
            ("GET", None, b""),
            ("HEAD", None, b""),
            ("DELETE", None, b""),
            ("GET", b"{}", b"content-length: 2\r\n"),
        ],
    )
    def test_length(self, method: str, body: bytes | None, length: bytes) -> None:
        target = target_of(method, "http://a/")
        assert target.head(b"x: y\r\n", body) == target.start + length + b"x: y\r\n\r\n"


class TestHeaders:
    def test_lines(self) -> None:
        assert header_lines([("A", "b"), ("x-key", "c d\te"), ("e", "")]) == b"A: b\r\nx-key: c d\te\r\ne: \r\n"

    def test_other_alphabets(self) -> None:
        assert header_lines([("x-name", "Jürgen")]) == "x-name: Jürgen\r\n".encode()

    @pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb", "a\x00b", "\x7f", "\x1b", "\r\n"])
    def test_values_of_two_lines(self, value: str) -> None:
        with pytest.raises(ValueError, match="x-key"):
            header_lines([("x-key", value)])

    @pytest.mark.parametrize("name", ["", "a b", "a:", "a\r\nb", "a\n", "é", "a\x00", "(a)"])
    def test_names_that_are_none(self, name: str) -> None:
        with pytest.raises(ValueError, match="header"):
            header_lines([(name, "b")])

    @pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding", "connection", "Expect", "upgrade"])
    def test_names_that_are_the_clients_own(self, name: str) -> None:
        with pytest.raises(ValueError, match="may not be sent"):
            header_lines([(name, "1")])

    def test_a_lone_surrogate(self) -> None:
        with pytest.raises(ValueError, match="surrogates"):
            header_lines([("x", "\ud800")])
