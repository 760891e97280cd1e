"""Costs by example: these tokens at these prices, these nano-dollars."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pricing import NANO, Price, usd
from gateway.wire.chat import Usage

GPT_4O = Price.from_usd({"input": Decimal("2.50"), "cached_input": Decimal("1.25"), "output": Decimal("10.00")})


class TestCost:
    @pytest.mark.parametrize(
        ("usage", "nano"),
        [
            (Usage(), 0),
            (Usage(1), 2_500),
            (Usage(0, 1), 10_000),
            (Usage(1000, 500), 2_500_000 + 5_000_000),
            (Usage(1000, 0, cached_tokens=400), 600 * 2_500 + 400 * 1_250),
            (Usage(10**6, 10**6), 12_500_000_000),
        ],
    )
    def test_known_prices(self, usage: Usage, nano: int) -> None:
        assert GPT_4O.cost(usage) == nano

    def test_each_kind_has_its_price(self) -> None:
        price = Price(
            1, 10, cached_input=100, cache_write=1_000, audio_input=10_000, reasoning=10**5, audio_output=10**6
        )
        million = 10**6
        usage = Usage(4 * million, 3 * million, million, million, million, million, million)
        assert price.cost(usage) == 1_111_111

    @pytest.mark.parametrize("kind", ["cached_tokens", "cache_write_tokens", "audio_input_tokens"])
    def test_kinds_of_input_without_a_price_cost_what_input_costs(self, kind: str) -> None:
        usage = Usage(1000, **{kind: 700})
        assert Price(3 * NANO, 0).cost(usage) == Price(3 * NANO, 0).cost(Usage(1000)) == 3_000_000

    @pytest.mark.parametrize("kind", ["reasoning_tokens", "audio_output_tokens"])
    def test_kinds_of_output_without_a_price_cost_what_output_costs(self, kind: str) -> None:
        usage = Usage(0, 1000, **{kind: 700})
        assert Price(0, 5 * NANO).cost(usage) == 5_000_000

    def test_a_price_of_zero_is_a_price(self) -> None:
        assert Price(0, 0).cost(Usage(1000, 1000)) == 0
        assert Price(NANO, NANO, cached_input=0).cost(Usage(1000, cached_tokens=1000)) == 0

    @pytest.mark.parametrize(
        ("price", "usage", "nano"),
        [
            (Price(NANO, None), Usage(1000), 1_000_000),
            (Price(NANO, None), Usage(1000, 1), None),
            (Price(None, NANO), Usage(1), None),
            (Price(None, NANO), Usage(0, 1000), 1_000_000),
            (Price(None, None), Usage(), 0),
            (Price(None, None), Usage(1), None),
            (Price(None, None, cached_input=NANO), Usage(1000, cached_tokens=1000), 1_000_000),
            (Price(None, None, cached_input=NANO), Usage(1001, cached_tokens=1000), None),
            (Price(NANO, None, reasoning=NANO), Usage(0, 1000, reasoning_tokens=1000), 1_000_000),
        ],
    )
    def test_unknown_only_if_tokens_without_a_price_were_used(
        self, price: Price, usage: Usage, nano: int | None
    ) -> None:
        assert price.cost(usage) == nano


class TestRounding:
    @pytest.mark.parametrize(
        ("price", "tokens", "nano"),
        [(499_999, 1, 0), (500_000, 1, 1), (1_499_999, 1, 1), (1_500_000, 1, 2), (250_000, 2, 1), (1, 499_999, 0)],
    )
    def test_half_up(self, price: int, tokens: int, nano: int) -> None:
        assert Price(price, 0).cost(Usage(tokens)) == nano

    def test_once_for_a_row_and_not_for_each_kind(self) -> None:
        price = Price(300_000, 300_000)
        assert price.cost(Usage(1)) == price.cost(Usage(0, 1)) == 0
        assert price.cost(Usage(1, 1)) == 1

    @settings(deadline=None)
    @given(*[st.integers(0, 10**12)] * 2, *[st.integers(0, 10**9)] * 2)
    def test_as_exact_arithmetic_has_it(self, price_in: int, price_out: int, tokens_in: int, tokens_out: int) -> None:
        exact = Fraction(price_in * tokens_in + price_out * tokens_out, 10**6)
        rounded = (Decimal(exact.numerator * 2) / exact.denominator).to_integral_value(ROUND_HALF_UP)
        cost = Price(price_in, price_out).cost(Usage(tokens_in, tokens_out))
        assert isinstance(cost, int)
        assert abs(exact - cost) <= Fraction(1, 2)
        assert cost == int(exact + Fraction(1, 2)), rounded

    def test_a_million_tiny_costs_sum_exactly(self) -> None:
        price = Price.from_usd({"input": Decimal("0.1"), "output": Decimal("0.3")})
        cost = price.cost(Usage(1, 1))
        assert cost == 400
        assert sum(cost for _ in range(10**6)) == 400_000_000
        assert usd(400_000_000) == 0.4


class TestPrice:
    def test_from_dollars_for_a_million(self) -> None:
        price = Price.from_usd({"input": Decimal("0.075"), "output": None, "reasoning": Decimal(60)})
        assert price == Price(75_000_000, None, reasoning=60 * NANO)

    def test_no_binary_fraction_gets_in(self) -> None:
        assert Price.from_usd({"input": Decimal("0.1") + Decimal("0.2")}).input == 300_000_000

    @pytest.mark.parametrize(
        ("price", "stored"),
        [
            (GPT_4O, {"input": 2_500_000_000, "output": 10_000_000_000, "cached_input": 1_250_000_000}),
            (Price(0, None), {"input": 0}),
            (Price(None, None), {}),
        ],
    )
    def test_stored_with_the_row(self, price: Price, stored: dict[str, Any]) -> None:
        assert json.loads(price.to_json()) == stored
        assert Price(**({"input": None, "output": None} | json.loads(price.to_json()))) == price


@pytest.mark.parametrize(("nano", "dollars"), [(None, None), (0, 0.0), (1, 1e-9), (12_500_000, 0.0125), (-5, -5e-9)])
def test_dollars_for_showing(nano: int | None, dollars: float | None) -> None:
    assert usd(nano) == dollars
