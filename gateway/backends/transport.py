"""HTTP to upstreams: the seam between backends and the client that carries the bytes (`client`).

The client's rules: no redirects, no cookies, no proxy from the environment, identity encoding asked for, one time
limit each for connecting, for the first byte, for silence between reads, and in total. Reading pauses the socket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; None: no limit. `first_byte` counts from when the request leaves; a whole answer has none before it is
    done, so it is long."""

    connect: float | None = 5
    first_byte: float | None = 600
    idle: float | None = 120
    total: float | None = None


class Response(Protocol):
    """A reply whose head has come."""

    status: int
    headers: Mapping[str, str]
    """By name, whatever its case."""

    async def read(self) -> bytes:
        """The next bytes of the body, as they come; empty at its end."""

    async def read_all(self, limit: int) -> bytes:
        """The whole body. Raises UpstreamError if it is longer than `limit`."""

    def at_end(self) -> bool:
        """Has the end of the body been read?"""

    def close(self) -> None:
        """Gives the connection back after the end of the body, else drops it; a waiting read fails."""


class Transport(Protocol):
    """Raises UpstreamUnreachable (nothing was sent), UpstreamTimeout or UpstreamError."""

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, timeouts: Timeouts
    ) -> Response: ...

    async def aclose(self) -> None: ...
