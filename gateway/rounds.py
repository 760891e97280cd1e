"""Questions to the database that many callers ask at once, taken to it together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Rounds(Generic[Q, A]):
    """Callers that come while a round trip is under way share the next one; nobody gets an answer from before.

    `ask` is given all questions that wait, and returns an answer for each, in order; what it raises reaches them all.
    """

    def __init__(self, ask: Callable[[Sequence[Q]], Awaitable[Sequence[A]]], name: str) -> None:
        self._ask = ask
        self._name = name
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def answer(self, question: Q) -> A:
        loop = self._loop
        if loop is None:  # asking asyncio for it costs a system call each time
            loop = self._loop = asyncio.get_running_loop()
        answer: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, answer))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), name=self._name)
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                answers = await self._ask([question for question, _ in batch])
            except BaseException as failure:
                for _, waiting in batch:
                    if not waiting.done():
                        waiting.set_exception(failure)
                if not isinstance(failure, Exception):
                    raise
            else:
                for (_, waiting), answer in zip(batch, answers, strict=True):
                    if not waiting.done():
                        waiting.set_result(answer)

    async def aclose(self) -> None:
        """Waits for the round trip that is under way."""
        if self._task is not None:
            await asyncio.wait({self._task})
