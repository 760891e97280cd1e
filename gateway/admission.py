"""What a call needs from the database before it goes out, taken by all waiting callers of a worker in one round trip.

For now that is the state of the keys: its `revision` says whether what this worker remembers of them is still true, on
every call, so a revoked key is refused by the next request everywhere. It also proves that the database answers:
no upstream is called for a turn that could not be recorded. Buckets, budgets and turn leases join here.
"""

from __future__ import annotations

import asyncio

from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import KeyState


class Admission:
    """`check` callers that come while a round trip is under way share the next one; never an answer from before."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[asyncio.Future[KeyState]] = []
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def check(self) -> KeyState:
        """Raises DatabaseUnavailable."""
        loop = self._loop
        if loop is None:  # asking asyncio for it costs a system call each time
            loop = self._loop = asyncio.get_running_loop()
        answer: asyncio.Future[KeyState] = loop.create_future()
        self._waiting.append(answer)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), name="admission")
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                state = await keys.state(self._database)
            except BaseException as failure:
                for answer in batch:
                    if not answer.done():
                        answer.set_exception(failure)
                if not isinstance(failure, Exception):
                    raise
            else:
                for answer in batch:
                    if not answer.done():
                        answer.set_result(state)

    async def aclose(self) -> None:
        if self._task is not None:
            await asyncio.wait({self._task})
