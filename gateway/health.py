"""How the routes of this worker are doing: who fails is left alone for a while, if there is somebody else.

A failure that is the upstream's (429, 5xx, a refused key, no answer) cools its route down: for as long as its
`Retry-After` says, else for a second that doubles with each failure in a row. A route that cools comes after all others
and is never refused outright: the last one standing is tried, and the upstream's own words reach the client.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import UpstreamError

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
LONGEST_RETRY_AFTER = 600.0
_CLIENTS_OWN = frozenset({400, 404, 408, 409, 413, 415, 422})


@dataclass(slots=True)
class RouteHealth:
    """Of one upstream model. `cooling_until` by the monotonic clock."""

    cooling_until: float = 0.0
    failures_in_a_row: int = 0
    calls: int = 0
    failures: int = 0
    last_failure: str | None = None
    last_failure_at: float | None = field(default=None)

    @property
    def cooling(self) -> bool:
        return self.cooling_until > time.monotonic()

    def answered(self, failures_before: int | None = None) -> None:
        """`failures_before`: as counted when the call began. One that came since is the newer news, and stands."""
        self.calls += 1
        if failures_before is None or failures_before == self.failures:
            self.failures_in_a_row = 0
            self.cooling_until = 0.0

    def failed(self, failure: UpstreamError) -> None:
        """Counts it; cools down unless it was the client's own."""
        self.calls += 1
        if failure.upstream_status in _CLIENTS_OWN:
            return
        self.failures += 1
        self.failures_in_a_row += 1
        self.last_failure = failure.log or failure.message
        self.last_failure_at = time.time()
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self.failures_in_a_row - 1, 10))
        if failure.retry_after is not None:
            pause = min(LONGEST_RETRY_AFTER, max(0.0, failure.retry_after))
        self.cooling_until = time.monotonic() + pause

    def describe(self) -> dict[str, Any]:
        """For `/admin/backends`; times in Unix seconds."""
        left = max(0.0, self.cooling_until - time.monotonic())
        return {
            "status": "cooling" if left else "ok",
            "retry_in_seconds": round(left, 1) if left else None,
            "calls": self.calls,
            "failures": self.failures,
            "failures_in_a_row": self.failures_in_a_row,
            "last_failure": self.last_failure,
            "last_failure_at": None if self.last_failure_at is None else int(self.last_failure_at),
        }
