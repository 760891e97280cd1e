"""The client's tests run on both loops: asyncio's own and the one that serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from gateway.backends.client import HTTPTransport
from tests_standalone.backends.certificates import certificates
from tests_standalone.backends.faulty import rig
from tests_standalone.backends.raw_upstream import assert_whole

__all__ = ["certificates", "rig"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name.startswith("test_client"):
        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture
async def client() -> AsyncIterator[HTTPTransport]:
    """Afterwards it has nothing lent out and nobody waiting, whatever the test did to it."""
    transport = HTTPTransport()
    yield transport
    await assert_whole(transport)
    await transport.aclose()
