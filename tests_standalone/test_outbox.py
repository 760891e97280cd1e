"""Who is added is flushed when the loop has run what was ready, once, in the order of adding."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from gateway.outbox import Outbox


@dataclass
class Holder:
    name: str
    flushed: list[str]
    then: list[Holder] = field(default_factory=list)
    outbox: Outbox | None = None

    def flush(self) -> None:
        self.flushed.append(self.name)
        for other in self.then:
            assert self.outbox is not None
            self.outbox.add(other)


async def test_all_are_flushed_behind_what_was_ready() -> None:
    flushed: list[str] = []
    loop = asyncio.get_running_loop()
    outbox = Outbox(loop)
    loop.call_soon(flushed.append, "ready before")
    outbox.add(Holder("a", flushed))
    outbox.add(Holder("b", flushed))
    assert flushed == []
    await asyncio.sleep(0)
    assert flushed == ["ready before", "a", "b"]


async def test_who_is_added_by_a_flush_is_flushed_next_time() -> None:
    flushed: list[str] = []
    outbox = Outbox(asyncio.get_running_loop())
    outbox.add(Holder("a", flushed, [Holder("b", flushed)], outbox))
    await asyncio.sleep(0)
    assert flushed == ["a"]
    await asyncio.sleep(0)
    assert flushed == ["a", "b"]


class Broken:
    def flush(self) -> None:
        raise RuntimeError("the socket is gone")


async def test_one_that_fails_does_not_keep_the_others_back(caplog: pytest.LogCaptureFixture) -> None:
    flushed: list[str] = []
    outbox = Outbox(asyncio.get_running_loop())
    outbox.add(Broken())
    outbox.add(Holder("b", flushed))
    await asyncio.sleep(0)
    assert flushed == ["b"]
    assert "the socket is gone" in caplog.text
