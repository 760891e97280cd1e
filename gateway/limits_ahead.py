"""What a worker holds ahead of its calls, as the book enters it: what it has used of it and gives back, and what it is
lent. Pure, like `limits`, whose rules these are too.

An account is entered in this order: what came back (`returned`), the present (`limits.advance`), the calls that ask
(`limits.decide`), and last what is lent (`lend`): so no call is refused what a worker would only hold.
"""

from __future__ import annotations

from gateway.limits import AHEAD_SHARE, UNIT, Account, Ahead, Hold, State, Wish

WORTH_IT = 4
"""Nothing is lent if that is not a fourth of what is wanted of each thing: near a limit nothing lies in parts too small
for a call."""


def returned(state: State, hold: Hold, wish: Wish) -> int:
    """Enters what a worker has used of what it held ahead, and what it wants no more. Returns the units of tokens to
    give back, for `advance`."""
    used, back = min(hold.requests_ahead, wish.used_requests), 0
    if wish.requests < 0:
        back = min(hold.requests_ahead - used, -wish.requests)
        if state.requests is not None:
            state.requests += back * UNIT
    hold.requests_ahead, state.requests_ahead = hold.requests_ahead - used - back, state.requests_ahead - used - back
    used, back = min(hold.tokens_ahead, wish.used_tokens), 0
    if wish.tokens < 0:
        back = min(hold.tokens_ahead - used, hold.tokens, -wish.tokens)
    hold.tokens_ahead, state.tokens_ahead = hold.tokens_ahead - used - back, state.tokens_ahead - used - back
    hold.tokens -= back
    slots, cost = min(hold.slots, max(0, -wish.slots)), min(hold.cost, max(0, -wish.cost))
    hold.slots, hold.cost = hold.slots - slots, hold.cost - cost
    state.slots, state.reserved = state.slots - slots, state.reserved - cost
    return back * UNIT


def lend(state: State, hold: Hold, account: Account, wish: Wish) -> Ahead:
    """Gives a worker of what its account has left, once all claims are decided; nothing at all if of one thing there is
    too little."""
    wanted, left = (wish.requests, wish.tokens, wish.slots, wish.cost), _left(state, account)
    given = [0, 0, 0, 0]
    shares = [max(0, have) // AHEAD_SHARE for have in left]
    if all(WORTH_IT * share >= want for want, share in zip(wanted, shares, strict=True)):
        given = [max(0, min(want, share)) for want, share in zip(wanted, shares, strict=True)]
    requests, tokens, slots, cost = given
    if requests:
        state.requests = (state.requests or 0) - requests * UNIT
    if tokens:
        state.tokens = (state.tokens or 0) - tokens * UNIT
    state.slots, state.reserved = state.slots + slots, state.reserved + cost
    hold.slots, hold.tokens, hold.cost = hold.slots + slots, hold.tokens + tokens, hold.cost + cost
    hold.requests_ahead, hold.tokens_ahead = hold.requests_ahead + requests, hold.tokens_ahead + tokens
    state.requests_ahead, state.tokens_ahead = state.requests_ahead + requests, state.tokens_ahead + tokens
    return Ahead(
        requests,
        tokens,
        slots,
        cost,
        state.requests if account.request_rate is not None else None,
        state.tokens if account.token_rate is not None else None,
        state.period or 0 if account.budget is not None else 0,
    )


def _left(state: State, account: Account) -> tuple[int, int, int, int]:
    """Requests, tokens, slots and money that could still be had; 0 of what is not limited."""
    known = account.budget is not None and state.period is not None
    return (
        (state.requests or 0) // UNIT if account.request_rate is not None else 0,
        (state.tokens or 0) // UNIT if account.token_rate is not None else 0,
        account.max_parallel - state.slots if account.max_parallel is not None else 0,
        (account.budget or 0) - state.spent - state.reserved if known else 0,
    )
