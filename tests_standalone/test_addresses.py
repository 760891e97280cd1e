"""What sockets and proxies tell in; an address out."""

from __future__ import annotations

import pytest

from gateway.addresses import client_address, is_loopback, neighbourhood

TRUSTED = ("10.0.0.0/8", "fd00::/8")


@pytest.mark.parametrize(
    ("peer", "told", "address"),
    [
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("fd00::1", "198.51.100.1", "198.51.100.1"),
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.1 , 10.9.9.9", "198.51.100.1"),
        ("10.0.0.1", "10.0.0.2, 10.0.0.3", "10.0.0.2"),
        ("10.0.0.1", " , ", "10.0.0.1"),
        ("10.0.0.1", "unknown", "unknown"),
        ("10.0.0.1", "x" * 100, "x" * 64),
        (None, "198.51.100.1", None),
        ("", "198.51.100.1", ""),
    ],
)
def test_hops_are_counted_from_the_right_as_far_as_they_are_trusted(
    peer: str | None, told: str, address: str | None
) -> None:
    headers = [(b"host", b"x"), *((b"x-forwarded-for", part.encode()) for part in told.split(",", 1))]
    assert client_address(peer, headers, TRUSTED) == address
    assert client_address(peer, headers, ()) == peer


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
        ("", ""),
        (None, ""),
    ],
)
def test_one_client_has_an_address_or_a_64(address: str | None, found: str) -> None:
    assert neighbourhood(address) == found


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
     ("::ffff:10.0.0.1", False), ("localhost", False), ("", False), (None, False), ("0.0.0.0", False)],
)  # fmt: skip
def test_loopback(address: str | None, loopback: bool) -> None:
    assert is_loopback(address) is loopback
