"""The book of a worker that is alone with its database: what `store.limits` does, without a round trip."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from gateway.limits import Account, Batch, Grant, Hold, Settlement, State, advance, decide, settle

MOST_ACCOUNTS = 100_000
"""Beyond that, those that were used least recently and hold nothing are forgotten, which fills their buckets."""


def _now() -> int:
    return int(time.time() * 1000)


class MemoryBook:
    """Nobody else's calls are counted, and no worker dies but this one, with all of it."""

    def __init__(self, clock: Callable[[], int] = _now) -> None:
        self._clock = clock
        self._states: OrderedDict[str, State] = OrderedDict()

    def admit(self, batch: Batch) -> list[Grant]:
        now = self._clock() if batch.now is None else batch.now
        self.settle(batch.settlements)
        states = {account.subject: self._present(account, now) for account in batch.accounts}
        return [decide(claim, batch.accounts, states) for claim in batch.claims]

    def settle(self, settlements: Sequence[Settlement]) -> None:
        for one in settlements:
            state = self._states.get(one.subject)
            if state is not None:
                units = settle(state, Hold(one.slots, one.tokens_held, one.cost_held), one)
                if state.tokens is not None:
                    state.tokens += units

    def _present(self, account: Account, now: int) -> State:
        state = self._states.get(account.subject)
        if state is None:
            self._forget()
            state = self._states[account.subject] = State(now)
        self._states.move_to_end(account.subject)
        advance(state, account, now)
        return state

    def _forget(self) -> None:
        while len(self._states) >= MOST_ACCOUNTS:
            subject, state = self._states.popitem(last=False)
            if state.slots or state.reserved or state.period is not None:
                self._states[subject] = state
                return
