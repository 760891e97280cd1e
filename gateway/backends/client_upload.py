"""A request's body that comes piece by piece, sent in HTTP chunks beside the reply, which may come before the last one.

Its exchange owns it: when that ends, or the upstream refuses, whoever makes the pieces is told to stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol


class Way(Protocol):
    """What an upload asks of its connection."""

    def send_piece(self, data: bytes) -> bool:
        """False: there is no room for more. The upload's `resume` is called when there is."""

    def body_ended(self, data: bytes) -> None:
        """The last bytes of the request."""

    def end(self) -> None:
        """Breaks the exchange off."""


class Upload:
    """`failure`: what the maker of the pieces raised, which ended the exchange."""

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        self.failure: Exception | None = None
        self._pieces = pieces
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def start(self, way: Way) -> None:
        self._task = asyncio.create_task(self._send(way))

    def resume(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def stop(self) -> None:
        """What has not been sent is not wanted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _send(self, way: Way) -> None:
        try:
            async for piece in self._pieces:
                if piece and not way.send_piece(b"%x\r\n%b\r\n" % (len(piece), piece)):
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
        except Exception as failure:
            self._task, self.failure = None, failure
            way.end()
        else:
            self._task = None
            way.body_ended(b"0\r\n\r\n")
        finally:
            await self._pieces.aclose()
