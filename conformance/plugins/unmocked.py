"""A plugin for openai-python's tests: cases that would answer themselves ask the server instead.

What they would have said, the mock server says: see speech in `spec.py`.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> MagicMock | None:
    """Takes the place of the fixture that catches requests: this one takes every instruction and does nothing."""
    if fixturedef.argname != "respx2_mock":
        return None
    idle = MagicMock()
    fixturedef.cached_result = (idle, fixturedef.cache_key(request), None)
    return idle
