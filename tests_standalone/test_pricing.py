"""Costs by example: these tokens at these prices, these nano-dollars."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pricing import DAY, NANO, Period, Price, PriceSchedule, ServicePrices, Tier, configured, usd
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
            1,
            10,
            cached_input=100,
            cache_write=1_000,
            audio_input=10_000,
            reasoning=10**5,
            audio_output=10**6,
            image_input=10**7,
            image_output=10**8,
            cache_write_1h=10**9,
        )
        million = 10**6
        usage = Usage(
            6 * million,
            4 * million,
            cached_tokens=million,
            cache_write_tokens=2 * million,
            audio_input_tokens=million,
            reasoning_tokens=million,
            audio_output_tokens=million,
            image_input_tokens=million,
            image_output_tokens=million,
            cache_write_1h_tokens=million,
        )
        assert price.cost(usage) == 1_111_111_111

    @pytest.mark.parametrize(
        "kind", ["cached_tokens", "cache_write_tokens", "audio_input_tokens", "image_input_tokens"]
    )
    def test_kinds_of_input_without_a_price_cost_what_input_costs(self, kind: str) -> None:
        usage = Usage(1000, **{kind: 700})
        assert Price(3 * NANO, 0).cost(usage) == Price(3 * NANO, 0).cost(Usage(1000)) == 3_000_000

    @pytest.mark.parametrize(("price", "nano"), [(Price(NANO, 0), 1000), (Price(NANO, 0, cache_write=2 * NANO), 2000)])
    def test_an_hour_in_the_cache_costs_what_writing_costs(self, price: Price, nano: int) -> None:
        assert price.cost(Usage(1, cache_write_tokens=1, cache_write_1h_tokens=1)) == nano

    @pytest.mark.parametrize("kind", ["reasoning_tokens", "audio_output_tokens", "image_output_tokens"])
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

    def test_a_call_may_have_a_price_of_its_own(self) -> None:
        price = Price(NANO, NANO, requests=12_000_000)
        assert price.cost(Usage()) == 12_000_000
        assert price.cost(Usage(1000, 500)) == 12_000_000 + 1_000_000 + 500_000
        assert Price(None, NANO, requests=12_000_000).cost(Usage(1)) is None


class TestTiers:
    TIERED = Price(
        2 * NANO,
        10 * NANO,
        cached_input=NANO,
        tiers=(
            Tier(200_000, Price(4 * NANO, 15 * NANO, cached_input=2 * NANO)),
            Tier(500_000, Price(8 * NANO, 20 * NANO)),
        ),
    )

    @pytest.mark.parametrize(
        ("usage", "nano"),
        [
            (Usage(199_999, 10), 199_999 * 2_000 + 10 * 10_000),
            (Usage(200_000, 10), 200_000 * 2_000 + 10 * 10_000),
            (Usage(200_001, 10), 200_001 * 4_000 + 10 * 15_000),
            (Usage(500_000, 10), 500_000 * 4_000 + 10 * 15_000),
            (Usage(500_001, 10), 500_001 * 8_000 + 10 * 20_000),
            (Usage(10**7), 10**7 * 8_000),
            (Usage(0, 10**7), 10**7 * 10_000),
            (Usage(200_001, cached_tokens=200_000), 4_000 + 200_000 * 2_000),
            (Usage(500_001, cached_tokens=500_000), 500_001 * 8_000),
        ],
    )
    def test_the_input_tokens_decide_for_the_whole_call(self, usage: Usage, nano: int) -> None:
        assert self.TIERED.cost(usage) == nano

    def test_a_tier_does_not_borrow_from_the_one_below(self) -> None:
        price = Price(NANO, NANO, tiers=(Tier(10, Price(NANO, None)),))
        assert price.cost(Usage(10, 1)) == 11_000
        assert price.cost(Usage(11, 1)) is None

    def test_what_a_row_stores_gives_the_cost_again(self) -> None:
        stored = json.loads(self.TIERED.to_json())
        assert stored == {
            "input": 2 * NANO,
            "output": 10 * NANO,
            "cached_input": NANO,
            "tiers": [
                {"above": 200_000, "input": 4 * NANO, "output": 15 * NANO, "cached_input": 2 * NANO},
                {"above": 500_000, "input": 8 * NANO, "output": 20 * NANO},
            ],
        }
        assert Price.read(stored) == self.TIERED


JANUARY = 1_767_225_600_000
"""2026-01-01T00:00:00Z in milliseconds."""
OLD, NEW, NIGHT = Price(1, 1), Price(2, 2), Price(3, 3)


class TestTime:
    @pytest.mark.parametrize("moment", [0, JANUARY, JANUARY + DAY // 2])
    def test_a_flat_price_is_always_the_same(self, moment: int) -> None:
        assert OLD.at(moment) is OLD

    @pytest.mark.parametrize(
        ("moment", "price"),
        [(0, OLD), (JANUARY - 1000, OLD), (JANUARY - 1, OLD), (JANUARY, NEW), (JANUARY + 1000, NEW)],
    )
    def test_a_new_price_begins_at_midnight(self, moment: int, price: Price) -> None:
        assert PriceSchedule([Period(OLD), Period(NEW, since=JANUARY)]).at(moment) is price

    @pytest.mark.parametrize("day", [0, JANUARY, JANUARY + 45 * DAY])
    @pytest.mark.parametrize(
        ("begin", "end", "moment", "price"),
        [
            ("00:30", "16:30", "00:29:59.999", OLD),
            ("00:30", "16:30", "00:30:00.000", NIGHT),
            ("00:30", "16:30", "16:29:59.999", NIGHT),
            ("00:30", "16:30", "16:30:00.000", OLD),
            ("16:30", "00:30", "16:29:59.999", OLD),
            ("16:30", "00:30", "16:30:00.000", NIGHT),
            ("16:30", "00:30", "23:59:59.999", NIGHT),
            ("16:30", "00:30", "00:00:00.000", NIGHT),
            ("16:30", "00:30", "00:29:59.999", NIGHT),
            ("16:30", "00:30", "00:30:00.000", OLD),
            ("16:30", "16:30", "16:30:00.000", OLD),
        ],
    )
    def test_a_time_of_day_ends_before_its_end(self, day: int, begin: str, end: str, moment: str, price: Price) -> None:
        schedule = PriceSchedule([Period(OLD), Period(NIGHT, daily=(clock(begin), clock(end)))])
        assert schedule.at(day + clock(moment)) is price

    def test_the_last_period_that_holds_counts(self) -> None:
        schedule = PriceSchedule([Period(OLD), Period(NIGHT, daily=(0, 1000)), Period(NEW, since=JANUARY)])
        assert schedule.at(JANUARY - DAY) is NIGHT
        assert schedule.at(JANUARY) is NEW

    def test_the_first_one_counts_if_none_holds(self) -> None:
        assert PriceSchedule([Period(NEW, since=JANUARY), Period(NIGHT, since=JANUARY + DAY)]).at(0) is NEW

    def test_a_price_may_become_unknown(self) -> None:
        assert PriceSchedule([Period(OLD), Period(None, since=JANUARY)]).at(JANUARY) is None


class TestServiceTiers:
    PRICES = ServicePrices(
        OLD, {"flex": NEW, "own": NIGHT, "dated": PriceSchedule([Period(None), Period(NEW, since=9)])}
    )

    @pytest.mark.parametrize("tier", [None, "priority", "flex", "default"])
    def test_a_flat_price_holds_for_all(self, tier: str | None) -> None:
        assert OLD.at(0, tier) is OLD
        assert PriceSchedule([Period(OLD)]).at(0, tier) is OLD

    @pytest.mark.parametrize(
        ("tier", "price"),
        [
            *((tier, OLD) for tier in (None, "auto", "default", "standard", "on_demand", "no word of a tier", "")),
            ("flex", NEW),
            ("own", NIGHT),
            ("dated", None),
            *((tier, None) for tier in ("priority", "fast", "scale", "ultrafast", "batch", "performance")),
        ],
    )
    def test_no_tier_is_lent_the_price_of_another(self, tier: str | None, price: Price | None) -> None:
        assert self.PRICES.at(0, tier) is price

    def test_tiers_change_with_time_too(self) -> None:
        assert (self.PRICES.at(8, "dated"), self.PRICES.at(9, "dated")) == (None, NEW)

    def test_a_configured_price_without_factors_holds_for_all(self) -> None:
        usd = {"input": Decimal(2), "output": None, "service_tiers": {}}
        assert configured(usd) == Price(2 * NANO, None)

    def test_factors_are_on_every_price(self) -> None:
        factors = {"priority": Decimal("1.75"), "flex": Decimal("0.5"), "scale": Decimal(0)}
        priced = configured({"input": Decimal("2.50"), "image_output": Decimal(40), "service_tiers": factors})
        standard = Price(2_500_000_000, None, image_output=40 * NANO)
        assert priced.at(0) == priced.at(0, "default") == standard
        assert priced.at(0, "priority") == Price(4_375_000_000, None, image_output=70 * NANO)
        assert priced.at(0, "flex") == Price(1_250_000_000, None, image_output=20 * NANO)
        assert priced.at(0, "scale") == Price(0, None, image_output=0)
        assert priced.at(0, "fast") is None

    @pytest.mark.parametrize(
        ("price", "factor", "product"),
        [
            (Price(3, 5), "0.5", Price(2, 3)),
            (Price(1, None), "0.4", Price(0, None)),
            (Price(10**15, 1), "1.000000001", Price(10**15 + 10**6, 1)),
            (Price(1, 1, requests=7), "3", Price(3, 3, requests=21)),
            (Price(1, 1, tiers=(Tier(9, Price(2, None)),)), "2", Price(2, 2, tiers=(Tier(9, Price(4, None)),))),
        ],
    )
    def test_a_product_is_rounded_to_the_nano_dollar_for_a_million(
        self, price: Price, factor: str, product: Price
    ) -> None:
        assert price.times(Decimal(factor)) == product


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
            (Price(NANO, NANO, requests=5), {"input": NANO, "output": NANO, "requests": 5}),
        ],
    )
    def test_stored_with_the_row(self, price: Price, stored: dict[str, Any]) -> None:
        assert json.loads(price.to_json()) == stored
        assert Price.read(json.loads(price.to_json())) == price

    def test_one_that_was_made_of_another_has_its_own_words(self) -> None:
        price = Price(1, 2, tiers=(Tier(5, Price(3, 4)),))
        assert price.to_json() == price.to_json() == '{"input":1,"output":2,"tiers":[{"above":5,"input":3,"output":4}]}'
        twice = price.times(Decimal(2))
        assert twice.to_json() == '{"input":2,"output":4,"tiers":[{"above":5,"input":6,"output":8}]}'
        assert price == Price(1, 2, tiers=(Tier(5, Price(3, 4)),)), "to write it does not change it"


@pytest.mark.parametrize(("nano", "dollars"), [(None, None), (0, 0.0), (1, 1e-9), (12_500_000, 0.0125), (-5, -5e-9)])
def test_dollars_for_showing(nano: int | None, dollars: float | None) -> None:
    assert usd(nano) == dollars


def clock(text: str) -> int:
    """Milliseconds since midnight of `16:30` or `16:29:59.999`."""
    hours, minutes, seconds = ([float(part) for part in text.split(":")] + [0.0])[:3]
    return round(((hours * 60 + minutes) * 60 + seconds) * 1000)
