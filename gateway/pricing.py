"""Usage to cost, in integer nano-dollars: no float ever holds money.

A price is nano-dollars for a million tokens, so `0.075` USD per million is exact. A row's cost is rounded once, half
up, at its end. A kind of token without a price of its own costs what its parent costs: cached, cache-write and audio
input are input; reasoning and audio output are output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from gateway.wire.chat import Usage
from gateway.wire.jsontext import dumps

NANO = 10**9
_MILLION = 10**6


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-dollars for a million tokens of each kind; None: nobody said."""

    input: int | None
    output: int | None
    cached_input: int | None = None
    cache_write: int | None = None
    audio_input: int | None = None
    reasoning: int | None = None
    audio_output: int | None = None

    @classmethod
    def from_usd(cls, usd: Mapping[str, Decimal | None]) -> Price:
        """From USD per million tokens, by the names of the configuration."""
        given = {kind: int(price * NANO) for kind, price in usd.items() if price is not None}
        return cls(given.pop("input", None), given.pop("output", None), **given)

    def cost(self, usage: Usage) -> int | None:
        """Nano-dollars, or None if tokens were used whose price nobody said."""
        cached, written, heard = usage.cached_tokens, usage.cache_write_tokens, usage.audio_input_tokens
        thought, spoken = usage.reasoning_tokens, usage.audio_output_tokens
        plain_in = max(0, usage.input_tokens - cached - written - heard)
        plain_out = max(0, usage.output_tokens - thought - spoken)
        total = 0
        for tokens, price in (
            (plain_in, self.input),
            (cached, _either(self.cached_input, self.input)),
            (written, _either(self.cache_write, self.input)),
            (heard, _either(self.audio_input, self.input)),
            (plain_out, self.output),
            (thought, _either(self.reasoning, self.output)),
            (spoken, _either(self.audio_output, self.output)),
        ):
            if tokens:
                if price is None:
                    return None
                total += tokens * price
        return (total + _MILLION // 2) // _MILLION

    def to_json(self) -> str:
        """As stored on the row: nano-dollars per million tokens, only what was said."""
        said = {kind: getattr(self, kind) for kind in self.__slots__}
        return dumps({kind: price for kind, price in said.items() if price is not None}).decode()


def usd(nano: int | None) -> float | None:
    """Dollars for a reply; None stays None. Only for showing: nothing is added up in dollars."""
    return None if nano is None else nano / NANO


def _either(price: int | None, parent: int | None) -> int | None:
    return parent if price is None else price
