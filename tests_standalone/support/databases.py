"""Fresh databases for any test: an empty SQLite file and an empty database in a real PostgreSQL.

A folder's conftest.py imports the fixtures it needs; however many do, one PostgreSQL serves the whole test run.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest

from tests_standalone.support.postgres import Postgres, launch

T = TypeVar("T")


@functools.cache
def running_postgres() -> Postgres:
    return launch()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The PostgreSQL that all tests share: take a database in it, leave the server alone."""
    yield running_postgres()
    running_postgres().close()


@pytest.fixture
def database_urls(tmp_path: Path, postgres: Postgres) -> Iterator[dict[str, str]]:
    """One empty database per engine, as `{"sqlite": url, "postgres": url}`."""
    with postgres.lent_database() as url:
        yield {"sqlite": sqlite_url(tmp_path), "postgres": url}


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'gateway.db'}"


def in_processes(count: int, work: Callable[..., T], *args: object) -> list[T]:
    """What `work(number, *args)` returns in that many fresh processes, which begin together. Blocks."""
    context = multiprocessing.get_context("spawn")
    start = (context.Barrier(count),)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin_together, initargs=start) as processes:
        return [done.result() for done in [processes.submit(work, number, *args) for number in range(count)]]


def _begin_together(barrier: Barrier) -> None:
    barrier.wait()
