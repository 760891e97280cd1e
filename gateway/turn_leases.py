"""One turn at a time: the right to a conversation, from before its history is read until its turn is written.

- A conversation that is taken is `ConversationBusy`, or is waited for (`wait`), at most `LONGEST_WAIT`.
- A lease runs out by itself, so a worker that dies holds up nobody for long; one that lives renews what it holds. A
  worker that stood still for longer has lost it and may not know: what it then writes is refused by the order of the
  messages (`store.conversations`), not by this.
- It ends in the transaction of its turn; if there is none, by a statement of its own, which nobody waits for.
- Those that are asked for or given back at one moment share a statement.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from gateway.errors import ConversationBusy, DatabaseUnavailable
from gateway.ids import random_hex
from gateway.rounds import Rounds
from gateway.store import turn_leases as rows
from gateway.store.database import Database
from gateway.store.turn_leases import Lease

log = logging.getLogger("gateway.turn_leases")

RENEW_SECONDS = 5.0
SWEEP_SECONDS = 300.0
RETRY_AFTER = 1.0
LONGEST_WAIT = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class HeldTurn:
    """A lease that a turn holds; `let_go` ends it, as often as it is called."""

    def __init__(self, owner: TurnLeases, lease: Lease) -> None:
        self.lease = lease
        self._owner = owner
        self._held = True

    def let_go(self, recorded: bool) -> asyncio.Future[object] | None:
        """`recorded`: its turn is written, and the lease has ended with it. Otherwise what ends it is under way."""
        if not self._held:
            return None
        self._held = False
        return self._owner.let_go(self.lease, recorded)


class TurnLeases:
    """One for each worker."""

    def __init__(self, database: Database, *, wait: bool = False) -> None:
        self._database = database
        self._wait = wait
        self._held: dict[tuple[str, str], Lease] = {}
        self._taking = Rounds(self._take_all, "turn leases")
        self._releasing = Rounds(self._release_all, "turn leases let go")
        self._tasks: set[asyncio.Future[object]] = set()
        self._ending: dict[tuple[str, str], asyncio.Future[object]] = {}
        """What is being given back. Who asks for one of these waits until it is."""
        self._renewal: asyncio.Task[None] | None = None

    async def take(self, user_id: str, conversation_id: str, in_vain: Callable[[], bool] = lambda: False) -> HeldTurn:
        """Who waits gives up once it is `in_vain`. Raises ConversationBusy, DatabaseUnavailable."""
        deadline, pause = time.monotonic() + LONGEST_WAIT, _FIRST_PAUSE
        while (held := await self._try(user_id, conversation_id)) is None:
            if not self._wait or in_vain() or time.monotonic() + pause > deadline:
                raise ConversationBusy(retry_after=RETRY_AFTER)
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 1.5 * pause)
        return held

    def let_go(self, lease: Lease, recorded: bool) -> asyncio.Future[object] | None:
        if self._held.get(lease[:2]) == lease:
            del self._held[lease[:2]]
        if recorded:
            return None
        ending = self._ending[lease[:2]] = self._in_background(self._releasing.answer(lease))
        return ending

    async def aclose(self) -> None:
        """Gives back what calls that have ended still held."""
        if self._renewal is not None:
            self._renewal.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)

    async def _try(self, user_id: str, conversation_id: str) -> HeldTurn | None:
        key = (user_id, conversation_id)
        if (ending := self._ending.get(key)) is not None:
            await asyncio.wait({ending})
        if key in self._held:
            return None
        lease = self._held[key] = Lease(user_id, conversation_id, random_hex())
        asking = asyncio.ensure_future(self._taking.answer(lease))
        try:
            taken = await asyncio.shield(asking)
        except BaseException:  # nobody knows whether it was taken
            self._ending[key] = self._in_background(self._give_back(asking, lease))
            raise
        if not taken:
            self.let_go(lease, recorded=True)
            return None
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.get_running_loop().create_task(self._renew(), name="turn leases renewed")
        return HeldTurn(self, lease)

    async def _give_back(self, asking: asyncio.Future[bool], lease: Lease) -> None:
        try:
            await asking
        finally:
            del self._held[lease[:2]]
            await self._releasing.answer(lease)

    async def _take_all(self, wanted: Sequence[Lease]) -> Sequence[bool]:
        taken = await rows.take(self._database, wanted)
        return [lease.holder in taken for lease in wanted]

    async def _release_all(self, leases: Sequence[Lease]) -> Sequence[None]:
        await self._database.write([rows.release_step(leases)])
        return [None] * len(leases)

    async def _renew(self) -> None:
        """While there is something to renew. Another lease that was given back already is renewed in vain."""
        sweep_at = time.monotonic() + SWEEP_SECONDS
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            if not self._held:
                return
            try:
                await rows.renew(self._database, list(self._held.values()))
                if time.monotonic() > sweep_at:
                    sweep_at = time.monotonic() + SWEEP_SECONDS
                    await rows.sweep(self._database)
            except DatabaseUnavailable as failure:
                log.warning("turn leases not renewed, trying again: %s", failure.cause)
            except Exception:
                log.exception("turn leases not renewed")

    def _in_background(self, work: Awaitable[object]) -> asyncio.Future[object]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Future[object]) -> None:
        self._tasks.discard(task)
        for key in [key for key, ending in self._ending.items() if ending is task]:
            del self._ending[key]
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.warning("a turn lease is left to run out: %s", getattr(failure, "cause", failure))
