"""Numbers by name and labels: where a worker adds to them, and how those of all workers become one.

A family's set of labels has one row of cells (doubles): one cell for a counter or a gauge, a cell for each bucket and
one for the sum for a histogram. Rows lie in pages, in memory or in a file:

    page    its size, how much of it is used, rows
    row     how long its text is, how many cells it has, text, cells

The text says what is counted, as JSON. All begins at multiples of 8 bytes, and a row stays where it is: whoever counts
holds its cells and adds to them, whoever reads may do so at any time, from another process too. A file is taken up as
it is by the next worker, and what a killed worker has added is in it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from gateway.wire.jsontext import dumps, loads

if TYPE_CHECKING:
    from prometheus_client import Metric

    Cells = memoryview[float]

log = logging.getLogger("gateway.metrics")

_PAGE = 1 << 16
"""At least. A page of a file must begin where the kernel can map it: at a multiple of this, everywhere."""

_HEAD = 8
"""Of a page and of a row: two numbers, each written in one go, so that no reader finds half of one."""


@dataclass(frozen=True, slots=True)
class Family:
    """What has one name. `combine` makes one of the numbers of several workers."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    about: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    combine: Callable[[Iterable[float]], float] = sum

    def text(self, labels: Sequence[str]) -> bytes:
        """What a row's text says of it."""
        clean = [label.encode("utf-8", "replace").decode() for label in labels]
        text = dumps([self.name, self.bounds, clean])
        return text.ljust(-(-len(text) // 8) * 8)

    @property
    def size(self) -> int:
        return len(self.bounds) + 2 if self.kind == "histogram" else 1


class Histogram:
    """A row of a histogram, to be added to."""

    __slots__ = ("_bounds", "_cells", "_sum")

    def __init__(self, bounds: Sequence[float], cells: Cells) -> None:
        self._bounds, self._cells, self._sum = tuple(map(float, bounds)), cells, len(bounds) + 1

    def observe(self, value: float) -> None:
        cells = self._cells
        cells[bisect_left(self._bounds, value)] += 1.0
        cells[self._sum] += value


class Rows:
    """Of one worker. With `file`, an open one, in that file, after what is there."""

    def __init__(self, file: int | None = None) -> None:
        self._file = file
        self._pages: list[memoryview[int]] = []
        if file is not None and os.fstat(file).st_size:
            self._pages = list(_pages(memoryview(mmap.mmap(file, 0))))
        self._end = sum(map(len, self._pages))
        self._rows = {text: cells for page in self._pages for text, cells in _rows(page)}

    def cells(self, family: Family, *labels: str) -> Cells:
        """Made when they are asked for the first time."""
        text = family.text(labels)
        found = self._rows.get(text)
        if found is None:
            found = self._rows[text] = self._new_row(text, family.size)
        return found

    def histogram(self, family: Family, *labels: str) -> Histogram:
        return Histogram(family.bounds, self.cells(family, *labels))

    def copy(self) -> bytes:
        return b"".join(self._pages)

    def _new_row(self, text: bytes, count: int) -> Cells:
        size = _HEAD + len(text) + 8 * count
        page = self._pages[-1] if self._pages else self._new_page(size)
        if _head(page)[1] + size > len(page):
            page = self._new_page(size)
        at = _head(page)[1]
        row = page[at : at + size]
        row[_HEAD:] = text + bytes(8 * count)
        _head(row)[0], _head(row)[1] = len(text), count
        _head(page)[1] = at + size  # now it is there
        return row[_HEAD + len(text) :].cast("d")

    def _new_page(self, row_size: int) -> memoryview[int]:
        size = -(-(_HEAD + row_size) // _PAGE) * _PAGE
        page = memoryview(bytearray(size)) if self._file is None else self._new_page_of(self._file, size)
        _head(page)[0], _head(page)[1] = size, _HEAD
        self._pages.append(page)
        return page

    def _new_page_of(self, file: int, size: int) -> memoryview[int]:
        """Written, not only made longer: a disk that is full must be an error here and not the end of the process."""
        try:
            if os.pwrite(file, bytes(size), self._end) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            page = memoryview(mmap.mmap(file, size, offset=self._end))
        except OSError as failure:
            log.warning("the folder of the metrics takes nothing more, so some will be missing: %s", failure.strerror)
            return memoryview(bytearray(size))
        self._end += size
        return page


class Together:
    """The rows of several workers as one. A collector, as prometheus_client's encoders want it."""

    def __init__(self, families: Iterable[Family], workers: Iterable[bytes]) -> None:
        self._families = {family.name: family for family in families}
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        found: dict[bytes, list[Cells]] = {}
        for data in self._workers:
            for page in _pages(memoryview(data)):
                for text, cells in _rows(page):
                    found.setdefault(text, []).append(cells)
        told: dict[str, list[tuple[list[str], list[float]]]] = {name: [] for name in self._families}
        for text, rows in found.items():
            name, bounds, labels = loads(text)
            family = self._families.get(name)
            if family is not None and tuple(bounds) == family.bounds and len(labels) == len(family.labels):
                told[name].append((labels, [family.combine(column) for column in zip(*rows, strict=True)]))
        return [_metric(family, told[name]) for name, family in self._families.items()]


def _metric(family: Family, rows: Iterable[tuple[Sequence[str], Sequence[float]]]) -> Metric:
    from prometheus_client import metrics_core
    from prometheus_client.utils import floatToGoString

    name = f"gateway_{family.name}"
    if family.kind == "histogram":
        bounds = [floatToGoString(bound) for bound in (*family.bounds, float("inf"))]  # type: ignore[no-untyped-call]
        histogram = metrics_core.HistogramMetricFamily(name, family.about, labels=family.labels)
        for labels, cells in rows:
            counted = accumulate(cells[:-1])
            histogram.add_metric(labels, list(zip(bounds, counted, strict=True)), cells[-1])
        return histogram
    of_kind = metrics_core.CounterMetricFamily if family.kind == "counter" else metrics_core.GaugeMetricFamily
    metric = of_kind(name, family.about, labels=family.labels)
    for labels, cells in rows:
        metric.add_metric(labels, cells[0])
    return metric


def _pages(data: memoryview[int]) -> Iterator[memoryview[int]]:
    """Those that are whole: the last one of a worker that was killed may not be."""
    at = 0
    while at + _HEAD <= len(data):
        size, used = _head(data[at:])
        if not _HEAD <= used <= size <= len(data) - at:
            return
        yield data[at : at + size]
        at += size


def _rows(page: memoryview[int]) -> Iterator[tuple[bytes, Cells]]:
    used, at = _head(page)[1], _HEAD
    while at < used:
        length, count = _head(page[at:])
        start = at + _HEAD + length
        at = start + 8 * count
        yield bytes(page[start - length : start]), page[start:at].cast("d")


def _head(data: memoryview[int]) -> memoryview[int]:
    return data[:_HEAD].cast("I")
