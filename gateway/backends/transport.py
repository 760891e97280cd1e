"""HTTP to upstreams: the seam between backends and the client that carries the bytes (`client`).

The client's rules: no redirects, no cookies, no proxy but the one in `Access`, identity encoding asked for, one time
limit each for connecting, for the first byte, for silence between reads, and in total. Reading pauses the socket.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Access:
    """How upstreams are reached. Nothing said: trusting whom the system trusts, as nobody, and directly.

    `ca_file`: whom to trust instead. `client_cert`, `client_key`: files of a chain and of its key, which may stand in
    the same one. `proxy`: http://[user:password@]host:port.
    """

    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    proxy: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; None: no limit. `first_byte` counts from when the request leaves; a whole answer has none before it is
    done, so it is long."""

    connect: float | None = 5
    first_byte: float | None = 600
    idle: float | None = 120
    total: float | None = None


Body = bytes | AsyncGenerator[bytes, None] | None
"""Of a request. A generator's pieces leave as they come; it is closed when no more are wanted."""


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

    def distrust(self) -> None:
        """Closes, and the connection is not used again: the body held more than belongs there."""


class Transport(Protocol):
    """Raises UpstreamUnreachable (nothing was sent), UpstreamTimeout or UpstreamError. Headers that were given once are
    not changed afterwards."""

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: Body, timeouts: Timeouts
    ) -> Response: ...

    async def aclose(self) -> None: ...
