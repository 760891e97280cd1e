"""Group commit of finished turns. Nothing is acknowledged before it is durable.

All turns that finish while a commit is on its way go into the next one: no artificial wait, one transaction for many.
A turn is its usage rows, its messages, the totals of its conversation and session, and what it gives back of its
limits, all or nothing.

- A failed commit always reaches its waiters: `record` ends with NotRecorded after `DEADLINE` seconds at the latest.
- The turn itself is kept and tried again until the database takes it: the client was told, the money row is not lost.
  At most `MOST_WAITING` turns and `MOST_WAITING_BYTES` are kept; beyond that `record` refuses at once.
- While commits fail, `check` raises: nothing new is started that could not be recorded.
- A batch that failed is halved, and a large one has more time: a slow line cannot wedge it for good.
- On a data error the batch is halved until the culprit is alone, and only that fails: its figures go to the log.
- A turn that goes on from a message that is not the last any more (`ConversationTurn.after`) is written as a branch;
  one that was to make a conversation goes into that of its name, if somebody has made it meanwhile and it is empty.
- A commit whose answer was lost is tried again: its usage rows are there already, which says that all of it is.
- Conflicts of these two kinds are looked for in the whole batch at once (`late_turns`), which then goes on together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar

from gateway import late_turns
from gateway.current_sessions import IDLE_MS, CurrentSessions
from gateway.errors import DatabaseUnavailable, NotRecorded
from gateway.limits import Settlement
from gateway.store import usage
from gateway.store.database import AlreadyThere, Database, RowRejected
from gateway.talks import branched
from gateway.turns import Turn, figures, name_rows, size_of, steps

log = logging.getLogger("gateway.ledger")
T = TypeVar("T")

DEADLINE = 10.0
MOST_IN_BATCH = 500
MOST_WAITING = 20_000
MOST_WAITING_BYTES = 256 << 20
MOST_BATCH_BYTES = 4 << 20
COMMIT_SECONDS = 5.0
BYTES_PER_SECOND = 1 << 20
"""What a commit gets on top of its seconds: the slowest line that is worth waiting for."""
RETRY_PAUSE = 0.25


_SIZE: Callable[[Turn], int] = attrgetter("size")


class LedgerMetrics(Protocol):
    """Who is told how the ledger is doing. Times are in seconds."""

    def committed(self, turns: int, seconds: float) -> None: ...

    def commit_failed(self) -> None: ...

    def turn_recorded(self, seconds: float) -> None: ...

    def turn_refused(self) -> None: ...


class Ledger:
    """One committer for each worker. `async with` it inside the running loop."""

    def __init__(
        self,
        database: Database,
        metrics: LedgerMetrics | None = None,
        lost: Callable[[Sequence[Settlement]], None] = lambda settlements: None,
        session_idle_ms: int = IDLE_MS,
    ) -> None:
        """`lost` gets the settlements of a turn that cannot be written."""
        self.sessions = CurrentSessions(database, session_idle_ms)
        self._database = database
        self._lost = lost
        self._metrics = metrics
        self._waiting: list[Turn] = []
        self._waiting_bytes = 0
        self._trouble: str | None = None
        self._most_in_batch = MOST_IN_BATCH
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._loop: asyncio.AbstractEventLoop
        """Since `start`: asking asyncio for it costs a system call each time."""

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="ledger")

    async def aclose(self, grace: float = 3.0) -> None:
        """Writes what waits; what the database does not take in `grace` seconds is logged as lost."""
        self._closing = True
        self._wake.set()
        try:
            if self._task is not None:
                await asyncio.wait({self._task}, timeout=grace)
        finally:
            if self._task is not None:
                self._task.cancel()
            if self._timer is not None:
                self._timer.cancel()
            for turn in self._waiting:
                if not turn.settled:
                    log.error("turn not recorded: %s", figures(turn))
                    _settle(turn, NotRecorded(log="the gateway ends and the database takes nothing"))

    @property
    def trouble(self) -> str | None:
        """Why the last commit failed, while turns wait for the next."""
        return self._trouble if self._waiting else None

    def check(self) -> None:
        """Raises DatabaseUnavailable while commits fail, whatever reads say: full, read-only, locked."""
        if self.trouble is not None:
            raise DatabaseUnavailable(f"commits fail: {self.trouble}")

    @property
    def waiting(self) -> int:
        """Turns that are not durable yet."""
        return len(self._waiting)

    async def record(self, turn: Turn) -> None:
        """Returns once the turn is durable. Raises NotRecorded."""
        try:
            await self._accepted(turn)
        except NotRecorded:
            if self._metrics is not None:
                self._metrics.turn_refused()
            raise
        if self._metrics is not None:
            self._metrics.turn_recorded(self._loop.time() - turn.given_at)

    def _accepted(self, turn: Turn) -> asyncio.Future[None]:
        """What the turn's caller waits for; who stops waiting takes nothing but this along."""
        size = turn.size = size_of(turn)
        full = len(self._waiting) >= MOST_WAITING or self._waiting_bytes + size > MOST_WAITING_BYTES
        if (full and self._waiting) or self._task is None or self._task.done():
            log.error("turn not recorded, no room: %s", figures(turn))
            self._lost(turn.settlements)
            raise NotRecorded(log="the ledger takes no more turns")
        loop = self._loop
        turn.waiter, turn.given_at = loop.create_future(), loop.time()
        if not self._waiting:  # else the committer is awake
            self._wake.set()
        self._waiting.append(turn)
        self._waiting_bytes += size
        if self._timer is None:
            self._timer = loop.call_at(turn.given_at + DEADLINE, self._tell_late_ones)
        return turn.waiter

    def _tell_late_ones(self) -> None:
        """Waiters whose time is up hear so; their turns stay. One timer serves them all: they wait in line."""
        self._timer = None
        for turn in self._waiting:
            if turn.waiter is None or turn.waiter.done():
                continue
            give_up_at = turn.given_at + DEADLINE
            if give_up_at > self._loop.time():
                self._timer = self._loop.call_at(give_up_at, self._tell_late_ones)
                return
            _tell(turn.waiter, NotRecorded(log="no commit in time; the turn is kept and tried again"))

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = self._next_batch()
                started = time.perf_counter()
                try:
                    await self._commit(batch)
                except DatabaseUnavailable as failure:
                    log.warning("commit of %d turns failed, trying again: %s", len(batch), failure.cause)
                    self._trouble = failure.cause
                    self._most_in_batch = max(1, len(batch) // 2)
                    if self._metrics is not None:
                        self._metrics.commit_failed()
                    await asyncio.sleep(RETRY_PAUSE)
                else:
                    self._trouble = None
                    self._most_in_batch = min(MOST_IN_BATCH, 2 * self._most_in_batch)
                    del self._waiting[: len(batch)]
                    self._waiting_bytes -= _bytes(batch)
                    if self._metrics is not None:
                        self._metrics.committed(len(batch), time.perf_counter() - started)
            if self._closing:
                return

    def _next_batch(self) -> list[Turn]:
        """The oldest turns, as many as fit; at least one."""
        if self._waiting_bytes <= MOST_BATCH_BYTES and len(self._waiting) <= self._most_in_batch:
            return self._waiting[:]
        size = 0
        for count, turn in enumerate(self._waiting[: self._most_in_batch]):
            size += turn.size
            if count and size > MOST_BATCH_BYTES:
                return self._waiting[:count]
        return self._waiting[: self._most_in_batch]

    async def _commit(self, batch: list[Turn], *, sort_out: bool = True) -> None:
        """Settles every turn of the batch. Raises DatabaseUnavailable if the database took none of the rest."""
        batch = [turn for turn in batch if not turn.settled]
        if len(batch) < 2:
            for turn in batch:
                await self._commit_alone(turn)
            return
        try:
            await self._write(batch)
        except DatabaseUnavailable:
            raise
        except Exception as failure:  # whatever one turn holds must not cost the others theirs, nor much of their time
            if sort_out and await self._is_put_right(failure, self._sorted_out, batch):
                await self._commit(batch, sort_out=False)
                return
            half = len(batch) // 2
            await self._commit(batch[:half])
            await self._commit(batch[half:])
        else:
            for turn in batch:
                _settle(turn, None)

    async def _is_put_right(self, failure: Exception, look: Callable[[T], Awaitable[bool]], what: T) -> bool:
        """After a conflict: can it be written now? Whatever comes of the look at it, the committer goes on."""
        if not isinstance(failure, AlreadyThere):
            return False
        try:
            return await look(what)
        except DatabaseUnavailable:
            raise
        except Exception:
            log.exception("a conflict could not be looked at")
            return False

    async def _sorted_out(self, batch: Sequence[Turn]) -> bool:
        """Settles what is durable already, and changes what somebody was quicker than. False: nothing is like that."""
        there = await usage.existing(self._database, [turn.usage[0].id for turn in batch])
        left = [turn for turn in batch if turn.usage[0].id not in there]
        for turn in batch:
            if turn.usage[0].id in there:
                _settle(turn, None)
        talks = [turn.conversation for turn in left if turn.conversation is not None]
        try:
            changed = await late_turns.sort_out(self._database, talks)
        finally:  # some may be changed already when the database goes away
            for turn in left:
                name_rows(turn)
        return bool(there or changed)

    async def _commit_alone(self, turn: Turn) -> None:
        if turn.settled:
            return
        try:
            await self._write([turn])
        except DatabaseUnavailable:
            raise
        except Exception as failure:
            if await self._is_put_right(failure, self._sorted_out_alone, turn):
                await self._commit_alone(turn)
                return
            known = isinstance(failure, RowRejected)
            log.error("turn not recorded (%s): %s", failure, figures(turn), exc_info=not known)
            _settle(turn, NotRecorded(log=str(failure)))
            self._lost(turn.settlements)
        else:
            _settle(turn, None)

    async def _sorted_out_alone(self, turn: Turn) -> bool:
        """The same of one, which becomes a branch in any case, if it can."""
        if await usage.exists(self._database, turn.usage[0].id):
            _settle(turn, None)
            return True
        talk = turn.conversation
        if talk is None or not (await late_turns.joined(self._database, talk) or branched(talk)):
            return False
        name_rows(turn)
        return True

    async def _write(self, batch: Sequence[Turn]) -> None:
        await self._give_sessions(batch)
        await self._database.write(steps(batch), timeout=COMMIT_SECONDS + _bytes(batch) / BYTES_PER_SECOND)

    async def _give_sessions(self, batch: Sequence[Turn]) -> None:
        """A new conversation joins its user's session."""
        is_news_due = self.sessions.is_news_due
        for turn in batch:
            talk = turn.conversation
            if talk is None:
                continue
            if talk.is_new and talk.session_id is None:
                if is_news_due:
                    is_news_due = False
                    await self.sessions.look_for_news()
                known = self.sessions.known(talk.user_id, talk.at)
                talk.session_id = known or await self.sessions.of(talk.user_id, talk.at)
            for row in turn.usage:
                row.session_id = talk.session_id


def _bytes(batch: Sequence[Turn]) -> int:
    return sum(map(_SIZE, batch))


def _settle(turn: Turn, failure: NotRecorded | None) -> None:
    turn.settled = True
    waiter = turn.waiter
    if waiter is None or waiter.done():
        return
    if failure is None:
        waiter.set_result(None)
    else:
        _tell(waiter, failure)


def _tell(waiter: asyncio.Future[None], failure: NotRecorded) -> None:
    waiter.set_exception(failure)
    waiter.exception()  # marks it as seen: a waiter that has left must not make the loop complain
