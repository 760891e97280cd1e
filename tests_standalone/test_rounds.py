"""Questions in, one round trip for all that wait, never an answer from before."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from gateway.errors import DatabaseUnavailable
from gateway.rounds import Rounds
from tests_standalone.conftest import settle


class Doubling:
    """Answers with twice the question, once it is let; `rounds` are the questions as they came."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.failure: BaseException | None = None

    async def __call__(self, questions: Sequence[int]) -> list[int]:
        self.rounds.append([*questions])
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        return [2 * question for question in questions]


async def test_callers_of_one_moment_share_a_round_trip() -> None:
    asked = Doubling()
    rounds = Rounds(asked, "test")
    assert await asyncio.gather(*(rounds.answer(number) for number in range(100))) == list(range(0, 200, 2))
    assert asked.rounds == [[*range(100)]]
    assert await rounds.answer(7) == 14
    assert asked.rounds[1:] == [[7]]


async def test_who_comes_during_a_round_trip_gets_the_answer_of_the_next_one() -> None:
    asked = Doubling()
    asked.open.clear()
    rounds = Rounds(asked, "test")
    tasks = [asyncio.create_task(rounds.answer(1))]
    await settle()
    tasks += [asyncio.create_task(rounds.answer(number)) for number in (1, 2, 3)]
    await settle()
    assert asked.rounds == [[1]]
    asked.open.set()
    assert await asyncio.gather(*tasks) == [2, 2, 4, 6]
    assert asked.rounds == [[1], [1, 2, 3]]


@pytest.mark.parametrize("failure", [DatabaseUnavailable("down"), RuntimeError("a mistake"), asyncio.CancelledError()])
async def test_a_failure_of_any_kind_reaches_all_who_wait_and_the_next_caller_asks_again(
    failure: BaseException,
) -> None:
    asked = Doubling()
    asked.failure = failure
    rounds = Rounds(asked, "test")
    told = await asyncio.gather(*(rounds.answer(number) for number in range(3)), return_exceptions=True)
    assert [type(found) for found in told] == [type(failure)] * 3
    asked.failure = None
    assert await rounds.answer(4) == 8


@pytest.mark.parametrize("down", [False, True])
async def test_a_caller_that_leaves_harms_nobody(down: bool) -> None:
    asked = Doubling()
    asked.open.clear()
    asked.failure = DatabaseUnavailable("down") if down else None
    rounds = Rounds(asked, "test")
    tasks = [asyncio.create_task(rounds.answer(1)) for _ in range(6)]
    await settle()
    tasks += [asyncio.create_task(rounds.answer(1)) for _ in range(6)]
    await settle()
    for task in tasks[::2]:
        task.cancel()
    asked.open.set()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    answer = DatabaseUnavailable if down else int
    assert [type(found) for found in told] == [asyncio.CancelledError, answer] * 6


async def test_all_may_leave_even_before_a_failure() -> None:
    asked = Doubling()
    asked.open.clear()
    asked.failure = DatabaseUnavailable("down")
    rounds = Rounds(asked, "test")
    tasks = [asyncio.create_task(rounds.answer(1)) for _ in range(3)]
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    asked.open.set()
    await rounds.aclose()
    asked.failure = None
    assert await rounds.answer(4) == 8


async def test_closing_waits_for_the_round_trip() -> None:
    asked = Doubling()
    asked.open.clear()
    rounds = Rounds(asked, "test")
    asking = asyncio.create_task(rounds.answer(1))
    await settle()
    closing = asyncio.create_task(rounds.aclose())
    await settle()
    assert not closing.done()
    asked.open.set()
    await closing
    assert await asking == 2


async def test_closing_what_was_never_asked() -> None:
    await Rounds(Doubling(), "test").aclose()
