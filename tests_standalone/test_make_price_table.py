"""The price table agrees with its source, and the script that makes it stops at what it does not know."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import genai_prices
import pytest
from genai_prices import data, types

from gateway.price_table import PriceTable
from gateway.wire.chat import Usage

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "make_price_table.py"
FILE = ROOT / "gateway" / "data" / "prices.json"
SHIPPED = PriceTable.load()

spec = importlib.util.spec_from_file_location("make_price_table", SCRIPT)
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


KINDS = {
    "input_tokens": "input_tokens",
    "cached_tokens": "cache_read_tokens",
    "cache_write_tokens": "cache_write_tokens",
    "cache_write_1h_tokens": "cache_write_1h_tokens",
    "audio_input_tokens": "input_audio_tokens",
    "output_tokens": "output_tokens",
    "reasoning_tokens": "output_reasoning_tokens",
    "audio_output_tokens": "output_audio_tokens",
    "image_input_tokens": "input_image_tokens",
    "image_output_tokens": "output_image_tokens",
}
MIXED = Usage(
    1003,
    77,
    cached_tokens=301,
    cache_write_tokens=200,
    audio_input_tokens=99,
    audio_output_tokens=13,
    image_input_tokens=41,
    image_output_tokens=17,
    cache_write_1h_tokens=150,
)
USAGES = (
    Usage(1),
    Usage(1000),
    Usage(1000, 500),
    Usage(1000, 500, cached_tokens=400, reasoning_tokens=499),
    MIXED,
    Usage(7_654_321, 1_234_567, 7_000_000, 600_000, 54_321, 1_000_000, 234_567),
)
UNKNOWN_BY_NAME = re.compile(r"audio|image|(^|[-/])search|deep-research")
CANNOT_BE_BILLED = re.compile(r".*_(hours|mchars|kpages|messages_kcount)|output_(image|video|citation)_mtok")


def tiers(model: types.ModelInfo, tier: str = "priority") -> list[types.PriceVariant]:
    return [one for one in model.price_variants or () if one.when == {"service_tier": tier}]


class TestAgainstTheSource:
    """The whole calculation of the source, from the name to the cost, for each of its models."""

    @pytest.mark.parametrize("provider", data.providers, ids=lambda provider: provider.id)
    def test_every_name_costs_the_same(self, provider: types.Provider) -> None:
        compared = 0
        for model in provider.models:
            for usage in USAGES + edges(model):
                compared += sum(same(provider.id, model.id, moment, usage) for moment in moments(model))
            compared += sum(same(provider.id, name, NOW, MIXED) for name in names(model))
        assert compared >= len(provider.models)

    @pytest.mark.parametrize("provider", [one for one in data.providers if one.fallback_model_providers])
    def test_so_do_the_models_of_others_that_a_vendor_sells(self, provider: types.Provider) -> None:
        others = [one for one in data.providers if one.id in (provider.fallback_model_providers or ())]
        refs = {name for other in others for model in other.models for name in names(model)}
        assert sum(same(provider.id, name, NOW, MIXED) for name in sorted(refs)) > len(others)

    @pytest.mark.parametrize("provider", [one for one in data.providers if any(map(tiers, one.models))])
    def test_so_do_service_tiers_from_the_day_on_which_the_source_knows_them(self, provider: types.Provider) -> None:
        known = 0
        for model in provider.models:
            for tier in ("flex", "priority", "fast", "scale"):
                for moment in moments(model):
                    if any(one.constraint is None or one.constraint.active(moment) for one in tiers(model, tier)):
                        known += sum(
                            same(provider.id, model.id, moment, usage, tier) for usage in (MIXED, *edges(model))
                        )
                    else:
                        priced = SHIPPED.find(provider.id, model.id)
                        assert priced is None or priced.at(milliseconds(moment), tier) is None
        assert known


NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def same(vendor: str, name: str, moment: datetime, usage: Usage, tier: str | None = None) -> int:
    """1: the costs agree. 0: the name is not one to compare, for a reason that is checked."""
    priced = SHIPPED.find(vendor, name)
    price = priced.at(milliseconds(moment), tier) if priced is not None else None
    context = None if tier is None else {"service_tier": tier}
    reported = {theirs: getattr(usage, ours) for ours, theirs in KINDS.items()}
    theirs = genai_prices.Usage(**reported, cache_audio_read_tokens=0, cache_image_read_tokens=0)
    try:
        expected = genai_prices.calc_price(
            theirs, name, provider_id=vendor, genai_request_timestamp=moment, price_context=context
        )
    except LookupError:
        assert priced is None
        return 0
    given = {key: value for key, value in vars(expected.model_price).items() if value is not None}
    where = f"{vendor}/{name} {moment} {usage} {given}"
    if price is None:
        no_price = not given and not expected.model.id.endswith(":free")
        assert no_price or UNKNOWN_BY_NAME.search(expected.model.id) or any(map(CANNOT_BE_BILLED.fullmatch, given)), (
            where
        )
        return 1
    cost = price.cost(usage)
    if usage.output_tokens and given and "output_mtok" not in given:
        assert cost is None, where
        return 1
    exact = expected.total_price * 10**9
    inexact = any(len(number.as_tuple().digits) >= 15 for one in given.values() for number in numbers(one))
    assert cost is not None, where
    assert abs(cost - int(exact.to_integral_value(ROUND_HALF_UP))) <= inexact, where
    return 1


def names(model: types.ModelInfo) -> set[str]:
    """Its id, and names made from its rule: some fit it, some another, some none."""
    found = {model.id}
    clauses: list[Any] = [model.match]
    while clauses:
        clause = clauses.pop()
        clauses += getattr(clause, "or_", []) + getattr(clause, "and_", [])
        for text in (value for value in vars(clause).values() if isinstance(value, str)):
            found |= {text, f"{text}-20260102", f"x{text}"}
    return found


def numbers(price: Decimal | types.TieredPrices) -> list[Decimal]:
    return [price.base, *(tier.price for tier in price.tiers)] if isinstance(price, types.TieredPrices) else [price]


def prices(model: types.ModelInfo) -> list[types.ConditionalPrice]:
    return model.prices if isinstance(model.prices, list) else [types.ConditionalPrice(prices=model.prices)]


def edges(model: types.ModelInfo) -> tuple[Usage, ...]:
    """Usages just below, at and above the marks of its tiers."""
    given = [value for one in prices(model) for value in vars(one.prices).values()]
    marks = {tier.start for value in given if isinstance(value, types.TieredPrices) for tier in value.tiers}
    return tuple(Usage(mark + more, 100, cached_tokens=50) for mark in sorted(marks) for more in (-1, 0, 1))


def moments(model: types.ModelInfo) -> Iterator[datetime]:
    """Just before and at each change of its prices."""
    yield NOW
    for one in (*prices(model), *tiers(model)):
        at: list[datetime] = []
        if isinstance(one.constraint, types.StartDateConstraint):
            at = [datetime.combine(one.constraint.start_date, time(), UTC)]
        elif isinstance(one.constraint, types.TimeOfDateConstraint):
            at = [datetime.combine(NOW, part, UTC) for part in (one.constraint.start_time, one.constraint.end_time)]
        for moment in at:
            yield from (moment - timedelta(milliseconds=1), moment)


def milliseconds(moment: datetime) -> int:
    return (moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


class TestTheScript:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)

    def test_the_committed_file_is_what_the_source_gives(self) -> None:
        done = self.run("--check")
        assert (done.returncode, done.stderr) == (0, "")

    def test_written_twice_it_is_the_same_and_only_the_date_may_differ(self, tmp_path: Path) -> None:
        file = tmp_path / "prices.json"
        assert self.run("2020-02-03", "--file", str(file)).returncode == 0
        lines, committed = file.read_text("utf-8").splitlines(), FILE.read_text("utf-8").splitlines()
        assert lines[1] == '"made_on": "2020-02-03",'
        assert lines[:1] + lines[2:] == committed[:1] + committed[2:]
        assert self.run("--check", "--file", str(file)).returncode == 0

    def test_another_file_fails_the_check(self, tmp_path: Path) -> None:
        file = tmp_path / "prices.json"
        assert self.run("--check", "--file", str(file)).returncode == 1
        file.write_text(FILE.read_text("utf-8").replace("2500000000", "2500000001", 1), "utf-8")
        done = self.run("--check", "--file", str(file))
        assert done.returncode == 1
        assert "prices.json is not what genai-prices" in done.stderr

    def price(self, name: str = "m", **given: Any) -> Any:
        return script.price(types.ModelPrice(**given), name, f"acme/{name}", script.Counted())

    def test_dollars_become_nano_dollars(self) -> None:
        given = {"input_mtok": Decimal("2.5"), "cache_read_mtok": Decimal("0.0000001"), "output_mtok": Decimal("10")}
        assert self.price(**given) == {"input": 2_500_000_000, "cached_input": 100, "output": 10_000_000_000}
        assert self.price(input_mtok=Decimal(0)) == {"input": 0}
        assert self.price(input_mtok=Decimal(1), requests_kcount=Decimal(12)) == {
            "input": 10**9,
            "requests": 12_000_000,
        }

    def test_tiers_that_only_some_kinds_have(self) -> None:
        tiers = [types.Tier(100, Decimal(2)), types.Tier(500, Decimal(3))]
        found = self.price(
            input_mtok=types.TieredPrices(Decimal(1), tiers),
            output_mtok=Decimal(9),
            cache_read_mtok=types.TieredPrices(Decimal(4), [types.Tier(300, Decimal(5))]),
        )
        assert found == {
            "input": 10**9,
            "cached_input": 4 * 10**9,
            "output": 9 * 10**9,
            "tiers": [
                {"above": 100, "input": 2 * 10**9, "cached_input": 4 * 10**9, "output": 9 * 10**9},
                {"above": 300, "input": 2 * 10**9, "cached_input": 5 * 10**9, "output": 9 * 10**9},
                {"above": 500, "input": 3 * 10**9, "cached_input": 5 * 10**9, "output": 9 * 10**9},
            ],
        }

    def test_a_tier_begins_above_its_mark(self) -> None:
        prices = types.TieredPrices(Decimal(1), [types.Tier(0, Decimal(2))])
        assert self.price(input_mtok=prices) == {"input": 10**9, "tiers": [{"above": 0, "input": 2 * 10**9}]}

    def test_dates_that_change_nothing_we_bill_are_left_out(self) -> None:
        def model(after: types.ModelPrice) -> Any:
            given = [
                types.ConditionalPrice(prices=types.ModelPrice(input_mtok=Decimal(1))),
                types.ConditionalPrice(types.StartDateConstraint(date(2026, 1, 5)), prices=after),
            ]
            source = types.ModelInfo("m", types.ClauseEquals("M"), prices=given)
            return script.model("acme", source, script.Counted())

        known = {"id": "m", "equals": ["m"]}
        one, two = {"price": {"input": 10**9}}, {"from": "2026-01-05", "price": {"input": 2 * 10**9}}
        searching = types.ModelPrice(input_mtok=Decimal(1), web_searches_kcount=Decimal(14))
        assert model(searching) == known | one
        assert model(types.ModelPrice(input_mtok=Decimal(2))) == known | {"prices": [one, two]}
        assert model(types.ModelPrice()) == known | {"prices": [one, {"from": "2026-01-05", "price": None}]}

    @pytest.mark.parametrize(
        ("name", "given"),
        [
            ("m", {}),
            ("m", {"audio_hours": 1}),
            ("m", {"input_mtok": 1, "audio_hours": 1}),
            ("m", {"input_mtok": 1, "output_image_mtok": 1}),
            ("m", {"web_searches_kcount": 1}),
            ("m-audio-1", {"input_mtok": 1}),
            ("m-image", {"input_mtok": 1}),
            ("m-search-preview", {"input_mtok": 1}),
        ],
    )
    def test_prices_that_do_not_say_what_a_call_costs(self, name: str, given: dict[str, int]) -> None:
        assert self.price(name, **{key: Decimal(value) for key, value in given.items()}) is None

    @pytest.mark.parametrize(
        ("name", "given", "price"),
        [
            ("m:free", {}, {"input": 0, "output": 0}),
            ("m", {"input_mtok": 1, "web_searches_kcount": 5}, {"input": 10**9}),
            ("m", {"input_mtok": 1, "cache_image_read_mtok": 5, "input_video_mtok": 7}, {"input": 10**9}),
            ("m", {"input_mtok": 1, "cache_write_1h_mtok": 2}, {"input": 10**9, "cache_write_1h": 2 * 10**9}),
            ("m-image", {"input_mtok": 1, "input_image_mtok": 2}, {"input": 10**9, "image_input": 2 * 10**9}),
            ("m-audio-1", {"input_mtok": 1, "input_audio_mtok": 2}, {"input": 10**9, "audio_input": 2 * 10**9}),
            ("acme-research/m", {"input_mtok": 1}, {"input": 10**9}),
        ],
    )
    def test_prices_that_do(self, name: str, given: dict[str, int], price: dict[str, int]) -> None:
        assert self.price(name, **{key: Decimal(value) for key, value in given.items()}) == price

    def test_pictures_that_come_out_have_a_price_where_replies_count_them(self) -> None:
        given = types.ModelPrice(output_mtok=Decimal(1), output_image_mtok=Decimal(2))
        told = script.price(given, "m", "openai/m", script.Counted())
        assert told == {"output": 10**9, "image_output": 2 * 10**9}
        assert script.price(given, "m", "google/m", script.Counted()) is None

    def service_tiers(self, *variants: types.PriceVariant, standard: Any = None) -> Any:
        flat = types.ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(4))
        source = types.ModelInfo("m", types.ClauseEquals("m"), prices=standard or flat, price_variants=list(variants))
        return script.model("acme", source, script.Counted()).get("service_tiers")

    def test_a_service_tier_takes_from_the_standard_price_what_it_does_not_say(self) -> None:
        flex, none = types.ModelPrice(input_mtok=Decimal("0.5")), types.ModelPrice()
        found = self.service_tiers(
            types.PriceVariant({"service_tier": "flex"}, flex), types.PriceVariant({"service_tier": "default"}, none)
        )
        assert found == {"flex": {"price": {"input": 5 * 10**8, "output": 4 * 10**9}}}

    def test_a_service_tier_is_unknown_before_its_price_and_follows_the_standard_one(self) -> None:
        standard = [
            types.ConditionalPrice(prices=types.ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(4))),
            types.ConditionalPrice(
                types.StartDateConstraint(date(2026, 3, 1)),
                prices=types.ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(3)),
            ),
        ]
        begin, dear = types.StartDateConstraint(date(2026, 2, 1)), types.ModelPrice(input_mtok=Decimal(2))
        found = self.service_tiers(types.PriceVariant({"service_tier": "fast"}, dear, begin), standard=standard)
        periods = [
            {"price": None},
            {"from": "2026-02-01", "price": {"input": 2 * 10**9, "output": 4 * 10**9}},
            {"from": "2026-03-01", "price": {"input": 2 * 10**9, "output": 3 * 10**9}},
        ]
        assert found == {"fast": {"prices": periods}}

    def test_service_tiers_that_it_does_not_understand_stop_it(self) -> None:
        night = types.TimeOfDateConstraint(time(1), time(2))
        with pytest.raises(script.Unknown, match="under more conditions"):
            self.service_tiers(types.PriceVariant({"service_tier": "flex", "region": "eu"}, types.ModelPrice()))
        with pytest.raises(script.Unknown, match="by the time of day"):
            self.service_tiers(types.PriceVariant({"service_tier": "flex"}, types.ModelPrice(), night))

    @pytest.mark.parametrize(
        ("given", "word"),
        [
            ({"input_smell_mtok": Decimal(1)}, "input_smell_mtok"),
            ({"input_mtok": Decimal("0.0000000001")}, "no whole number"),
            ({"input_mtok": Decimal("-1")}, "-1 USD"),
        ],
    )
    def test_what_it_does_not_know_stops_it(self, given: dict[str, Decimal], word: str) -> None:
        with pytest.raises(script.Unknown, match=word):
            self.price(**given)

    def test_conditions_and_rules_that_it_does_not_know_stop_it(self) -> None:
        with pytest.raises(script.Unknown, match="a condition of the kind object"):
            script.when(object(), "acme/m")
        with pytest.raises(script.Unknown, match="a rule for names of the kind object"):
            script.rule(object(), "acme/m")

    def test_artefacts_of_binary_fractions_are_rounded_and_named(self) -> None:
        counted = script.Counted()
        found = script.price(types.ModelPrice(input_mtok=Decimal("0.18000000000000002")), "m", "acme/m", counted)
        assert found == {"input": 180_000_000}
        assert counted.rounded == ["acme/m 0.18000000000000002"]
