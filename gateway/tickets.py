"""What a call asks of its limits, and what it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.allowances import headers
from gateway.limits import Account, Claim, Grant, Settlement, taken
from gateway.store.keys import KeyState


@dataclass(slots=True)
class Demand:
    """What a call asks for: tokens and nano-dollars at most. `cost` None: nobody knows its price."""

    tokens: int = 0
    cost: int | None = 0


@dataclass(slots=True)
class Ticket:
    """A call that was let in. `holds` is what it has not given back; `headers` are for its reply."""

    holds: Sequence[Settlement] = ()
    headers: Sequence[tuple[bytes, bytes]] = ()


@dataclass(slots=True)
class Offer:
    """What the book said. `accounts` are those that were asked, as they were asked; `state` None: it was not told."""

    grant: Grant
    ticket: Ticket
    accounts: Sequence[Account]
    state: KeyState | None = None


NOTHING = Demand()


def claim_of(
    demand: Demand,
    accounts: Sequence[Account],
    known: list[Account] | None = None,
    places: dict[str, int] | None = None,
) -> Claim:
    """A claim on its accounts; on those `known` to a batch, of which `places` tells the subjects."""
    if known is None or places is None:
        return Claim(demand.tokens, demand.cost or 0, range(len(accounts)))
    asked = []
    for account in accounts:
        place = places.setdefault(account.subject, len(known))
        if place == len(known):
            known.append(account)
        elif account.seed is not None:
            known[place] = account
        asked.append(place)
    return Claim(demand.tokens, demand.cost or 0, asked)


def most(holds: Sequence[Settlement]) -> tuple[int, int]:
    """The tokens and nano-dollars that a call has reserved; 0 where these are not limited."""
    if len(holds) == 1:
        [(_, _, _, tokens, _, cost, _, _)] = holds
        return tokens, cost
    tokens = cost = 0
    for one in holds:
        if one.tokens_held > tokens:
            tokens = one.tokens_held
        if one.cost_held > cost:
            cost = one.cost_held
    return tokens, cost


def ticket_for(worker: str, demand: Demand, accounts: Sequence[Account], grant: Grant) -> Ticket:
    told = headers(accounts[0], grant) if accounts else ()
    if grant.reason:
        return Ticket((), told)
    tokens, cost = demand.tokens, demand.cost or 0
    holds = []
    for account, period in zip(accounts, grant.periods, strict=True):
        if account.token_rate is not None or account.max_parallel is not None or account.budget is not None:
            holds.append(taken(account, tokens, cost, period, worker))
    return Ticket(holds, told)
