"""Usage to cost, in integer nano-dollars: no float ever holds money.

A price is nano-dollars for a million tokens, so `0.075` USD per million is exact. A row's cost is rounded once, half
up, at its end. A kind of token without a price of its own costs what its parent costs: cached, cache-write, audio and
image input are input; what is written to a cache for an hour is cache-write; reasoning, audio and image output are
output. A price with tiers bills the whole call, input and output, at the last tier whose mark its input tokens are
above.

A price may also change with time, and with the service tier that answered (flex, priority): whoever holds one asks it
`at` the time of the call, and the answer is what the row stores. A price from the configuration holds for every service
tier, unless it says what others cost; one from the price table holds for those that it names. No cost is better than a
wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Protocol

from gateway.wire.chat import Usage
from gateway.wire.jsontext import dumps

NANO = 10**9
DAY = 24 * 60 * 60 * 1000
"""Milliseconds; a day begins at midnight UTC."""
_MILLION = 10**6
_HALF = _MILLION // 2
_PRICED_APART = frozenset({"batch", "fast", "flex", "performance", "priority", "scale", "ultrafast"})
"""Service tiers that have prices of their own. Any other word for a tier, and none, means the standard one."""


class Priced(Protocol):
    """What a model costs, now and then."""

    def at(self, milliseconds: int, service_tier: str | None = None) -> Price | None:
        """The price of a call that began then (UTC) and was served so; None: nobody knows it."""


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-dollars for a million tokens of each kind, and for one call (`requests`); None: nobody said."""

    input: int | None
    output: int | None
    cached_input: int | None = None
    cache_write: int | None = None
    audio_input: int | None = None
    reasoning: int | None = None
    audio_output: int | None = None
    image_input: int | None = None
    image_output: int | None = None
    cache_write_1h: int | None = None
    requests: int | None = None
    tiers: tuple[Tier, ...] = ()
    """By rising mark."""
    _json: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """Written once: every row of the model has it."""

    @classmethod
    def from_usd(cls, usd: Mapping[str, Any]) -> Price:
        """From USD per million tokens, by the names of the configuration; the standard price, where others are said."""
        return cls.read({kind: int(usd[kind] * NANO) for kind in _KINDS if usd.get(kind) is not None})

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Price:
        """The price that `to_json` wrote, parsed: what a row stores gives its cost again."""
        said = {kind: price for kind, price in data.items() if kind not in ("above", "tiers")}
        tiers = tuple(Tier(tier["above"], cls.read(tier)) for tier in data.get("tiers", ()))
        return cls(said.pop("input", None), said.pop("output", None), **said, tiers=tiers)

    def at(self, milliseconds: int, service_tier: str | None = None) -> Price:
        """Always the same."""
        return self

    def times(self, factor: Decimal) -> Price:
        """Each price so many times as high, to the nearest nano-dollar for a million tokens."""
        changed: dict[str, Any] = {
            kind: _rounded(price * factor) for kind in _KINDS if (price := getattr(self, kind)) is not None
        }
        tiers = tuple(Tier(tier.above, tier.price.times(factor)) for tier in self.tiers)
        return replace(self, **changed, tiers=tiers)

    def cost(self, usage: Usage) -> int | None:
        """Nano-dollars of one call, or None if tokens were used whose price nobody said."""
        price = self._reached(usage.input_tokens) if self.tiers else self
        total = price.requests * _MILLION if price.requests else 0
        if price.input is not None and price.output is not None and not _has_parts(usage):
            total += usage.input_tokens * price.input + usage.output_tokens * price.output
            return (total + _HALF) // _MILLION
        for tokens, each in price._billed(usage):
            if tokens:
                if each is None:
                    return None
                total += tokens * each
        return (total + _HALF) // _MILLION

    def most(self, input_tokens: int, output_tokens: int) -> int | None:
        """Nano-dollars that no call with so many tokens, of whatever kind, costs more than; None if nobody knows."""
        bounds = [price._most(input_tokens, output_tokens) for price in (self, *(tier.price for tier in self.tiers))]
        known = [bound for bound in bounds if bound is not None]
        return max(known) if len(known) == len(bounds) else None

    def to_json(self) -> str:
        """As stored on the row: nano-dollars per million tokens, only what was said, with all tiers."""
        if not self._json:
            self._json.append(dumps(self._said()).decode())
        return self._json[0]

    def _billed(self, usage: Usage) -> list[tuple[int, int | None]]:
        """Every token once, with its price."""
        cached, written, lasting = usage.cached_tokens, usage.cache_write_tokens, usage.cache_write_1h_tokens
        heard, seen = usage.audio_input_tokens, usage.image_input_tokens
        thought, spoken, drawn = usage.reasoning_tokens, usage.audio_output_tokens, usage.image_output_tokens
        billed = [
            (max(0, usage.input_tokens - cached - written - heard - seen), self.input),
            (max(0, usage.output_tokens - thought - spoken - drawn), self.output),
        ]
        if cached:
            billed.append((cached, _either(self.cached_input, self.input)))
        if written or lasting or heard or seen:
            write = _either(self.cache_write, self.input)
            billed += (
                (max(0, written - lasting), write),
                (lasting, _either(self.cache_write_1h, write)),
                (heard, _either(self.audio_input, self.input)),
                (seen, _either(self.image_input, self.input)),
            )
        if thought or spoken or drawn:
            billed += (
                (thought, _either(self.reasoning, self.output)),
                (spoken, _either(self.audio_output, self.output)),
                (drawn, _either(self.image_output, self.output)),
            )
        return billed

    def _most(self, input_tokens: int, output_tokens: int) -> int | None:
        if (input_tokens and self.input is None) or (output_tokens and self.output is None):
            return None
        read = (
            self.input,
            self.cached_input,
            self.cache_write,
            self.cache_write_1h,
            self.audio_input,
            self.image_input,
        )
        written = (self.output, self.reasoning, self.audio_output, self.image_output)
        total = (self.requests or 0) * _MILLION
        for tokens, prices in ((input_tokens, read), (output_tokens, written)):
            total += tokens * max((price for price in prices if price is not None), default=0)
        return -(-total // _MILLION)

    def _reached(self, input_tokens: int) -> Price:
        reached = self
        for tier in self.tiers:
            if input_tokens > tier.above:
                reached = tier.price
        return reached

    def _said(self) -> dict[str, Any]:
        said: dict[str, Any] = {kind: price for kind in _KINDS if (price := getattr(self, kind)) is not None}
        return (
            said | {"tiers": [{"above": tier.above, **tier.price._said()} for tier in self.tiers]}
            if self.tiers
            else said
        )


_KINDS = tuple(kind.name for kind in fields(Price) if kind.name not in ("tiers", "_json"))


@dataclass(frozen=True, slots=True)
class Tier:
    """The whole price of calls with more input tokens than the mark."""

    above: int
    price: Price


@dataclass(frozen=True, slots=True)
class Period:
    """A price and when it holds, in milliseconds (UTC): from a moment on, or daily from the first time of day until
    before the second, over midnight too; always, if neither is given.
    """

    price: Price | None
    since: int | None = None
    daily: tuple[int, int] | None = None

    def holds(self, milliseconds: int) -> bool:
        if self.since is not None and milliseconds < self.since:
            return False
        if self.daily is None:
            return True
        begin, end = self.daily
        now = milliseconds % DAY
        return begin <= now < end if begin <= end else now >= begin or now < end


class PriceSchedule:
    """A price that changes: that of the last period that holds, or of the first one if none does."""

    __slots__ = ("periods",)

    def __init__(self, periods: Sequence[Period]) -> None:
        self.periods = tuple(periods)

    def at(self, milliseconds: int, service_tier: str | None = None) -> Price | None:
        for period in reversed(self.periods):
            if period.holds(milliseconds):
                return period.price
        return self.periods[0].price


class ServicePrices:
    """The standard price, and those of other service tiers. A tier that is sold apart and is not among them has an
    unknown price.
    """

    __slots__ = ("others", "standard")

    def __init__(self, standard: Priced, others: Mapping[str, Priced]) -> None:
        self.standard = standard
        self.others = others

    def at(self, milliseconds: int, service_tier: str | None = None) -> Price | None:
        if service_tier is not None and service_tier in self.others:
            return self.others[service_tier].at(milliseconds)
        return None if service_tier in _PRICED_APART else self.standard.at(milliseconds)


def configured(usd: Mapping[str, Any]) -> Priced:
    """What the configuration says a model costs: USD per million tokens, and in `service_tiers` factors on them all."""
    price, factors = Price.from_usd(usd), usd.get("service_tiers")
    if not factors:
        return price
    return ServicePrices(price, {tier: price.times(factor) for tier, factor in factors.items()})


def usd(nano: int | None) -> float | None:
    """Dollars for a reply; None stays None. Only for showing: nothing is added up in dollars."""
    return None if nano is None else nano / NANO


def _has_parts(usage: Usage) -> bool:
    """Are there tokens of kinds that may have prices of their own?"""
    return bool(
        usage.cached_tokens
        or usage.cache_write_tokens
        or usage.cache_write_1h_tokens
        or usage.audio_input_tokens
        or usage.image_input_tokens
        or usage.reasoning_tokens
        or usage.audio_output_tokens
        or usage.image_output_tokens
    )


def _either(price: int | None, parent: int | None) -> int | None:
    return parent if price is None else price


def _rounded(amount: Decimal) -> int:
    return int(amount.to_integral_value(ROUND_HALF_UP))
