from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import course
from benchmarks.course import Mock


@pytest.fixture
def mock() -> Iterator[Mock]:
    with course.upstream() as running:
        yield running
