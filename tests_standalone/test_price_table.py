"""Prices by vendor and name, from tables made up here and from the one that ships."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.price_table import PriceTable
from gateway.pricing import Price
from gateway.wire.chat import Usage

ROOT = Path(__file__).parent.parent
FILE = ROOT / "gateway" / "data" / "prices.json"
SHIPPED = PriceTable.load()


def table(*models: dict[str, Any], **vendors: Any) -> PriceTable:
    """With the vendor `acme`, whose models cost 1, 2, 3... for what goes in."""
    priced = [{"id": str(index), "price": {"input": index}} | model for index, model in enumerate(models, 1)]
    acme = {"models": priced}
    return PriceTable({"made_on": "2026-01-31", "source": "made up 1.0", "vendors": {"acme": acme, **vendors}})


def found(table: PriceTable, model: str, vendor: str | None = "acme") -> int | None:
    priced = table.find(vendor, model)
    price = priced.at(0) if priced is not None else None
    return price.input if price is not None else None


class TestNames:
    @pytest.mark.parametrize(
        ("rule", "fitting", "others"),
        [
            ({"equals": ["a-1", "a-one"]}, ["a-1", "A-One"], ["a-1x", "xa-1", "a", ""]),
            ({"starts_with": ["a-1", "b"]}, ["a-1", "A-1x", "b2"], ["xa-1", "a-"]),
            ({"ends_with": ["-x", "-y"]}, ["a-x", "A-Y"], ["a-x1"]),
            ({"contains": ["mid"]}, ["mid", "aMIDdle"], ["mi-d"]),
            ({"regex": ["^a-\\d{2}$"]}, ["a-12", "A-12"], ["a-1", "a-123"]),
            ({"equals": ["x"], "starts_with": ["a"]}, ["x", "ab"], ["xa"]),
            ({"all": [[{"starts_with": ["a"]}, {"ends_with": ["z", "y"]}]]}, ["a-z", "ay"], ["a", "z", "za"]),
            ({"equals": ["q"], "all": [[{"contains": ["a"]}, {"equals": ["ab", "b"]}]]}, ["q", "ab"], ["b", "a"]),
        ],
    )
    def test_rules(self, rule: dict[str, Any], fitting: list[str], others: list[str]) -> None:
        assert [found(table(rule), name) for name in fitting] == [1] * len(fitting)
        assert [found(table(rule), name) for name in others] == [None] * len(others)

    @pytest.mark.parametrize(
        ("models", "name", "which"),
        [
            ([{"equals": ["a"]}, {"starts_with": ["a"]}], "a", 1),
            ([{"starts_with": ["a"]}, {"equals": ["a"]}], "a", 1),
            ([{"equals": ["b"]}, {"starts_with": ["a"]}, {"equals": ["a"]}], "a", 2),
            ([{"equals": ["a"]}, {"equals": ["a"]}], "a", 1),
            ([{"equals": ["a"]}, {"starts_with": ["a"]}], "ab", 2),
        ],
    )
    def test_the_first_that_fits_counts(self, models: list[dict[str, Any]], name: str, which: int) -> None:
        assert found(table(*models), name) == which

    @pytest.mark.parametrize(
        ("name", "which"),
        [
            ("m-20251231", 1),
            ("m-2025-12-31", 1),
            ("m-20251231-v1:0", 2),
            ("m-20251231:free", 3),
            ("m-20251301", None),
            ("m-20250231", None),
            ("m-202512311", None),
            ("m-19991231", None),
            ("n-20251231", 4),
        ],
    )
    def test_a_compact_date_is_the_dashed_one_if_nothing_else_fits(self, name: str, which: int | None) -> None:
        names = (["m-2025-12-31"], ["m-2025-12-31-v1:0"], ["m-2025-12-31:free"], ["n-20251231"], ["n-2025-12-31"])
        assert found(table(*({"equals": each} for each in names)), name) == which

    def test_a_model_without_a_price_is_not_lent_that_of_a_broader_one(self) -> None:
        models = [{"id": "a-x", "equals": ["a-x"]}, {"id": "a", "starts_with": ["a"], "price": {"input": 2}}]
        prices = table(acme={"models": models})
        assert prices.find("acme", "a-x") is None
        assert found(prices, "a-y") == 2


class TestVendors:
    OTHERS = {
        "reseller": {
            "fallbacks": ["acme"],
            "models": [{"id": "a", "equals": ["a"], "price": {"input": 90}}],
        },
        "far": {"fallbacks": ["reseller"], "models": []},
    }
    TABLE = table({"equals": ["a"]}, {"equals": ["b-2025-01-01"]}, **OTHERS)

    @pytest.mark.parametrize(
        ("vendor", "model", "price"),
        [
            ("acme", "a", 1),
            ("reseller", "a", 90),
            ("reseller", "b-2025-01-01", 2),
            ("reseller", "b-20250101", 2),
            ("far", "a", 90),
            ("far", "b-2025-01-01", None),
            ("reseller", "c", None),
            ("ACME", "a", None),
            ("nobody", "a", None),
            ("", "a", None),
            (None, "a", None),
        ],
    )
    def test_fallbacks_go_one_step(self, vendor: str | None, model: str, price: int | None) -> None:
        assert found(self.TABLE, model, vendor) == price

    def test_the_window_is_that_of_the_model_or_of_whose_it_is(self) -> None:
        vendors = table(
            {"equals": ["a"], "context_window": 5}, {"equals": ["b"]}, other={"models": [], "fallbacks": ["acme"]}
        )
        assert vendors.context_window("acme", "A") == vendors.context_window("other", "a") == 5
        assert vendors.context_window("acme", "b") is None
        assert vendors.context_window("acme", "c") is None
        assert vendors.context_window(None, "a") is None

    def test_what_the_file_says_about_itself(self) -> None:
        assert (self.TABLE.made_on, self.TABLE.source) == ("2026-01-31", "made up 1.0")


class TestPrices:
    def test_all_kinds_and_tiers(self) -> None:
        data = {"input": 1, "cached_input": 2, "output": 3, "requests": 4, "tiers": [{"above": 9, "input": 5}]}
        priced = table({"equals": ["a"], "price": data}).find("acme", "a")
        assert priced is not None
        price = priced.at(0)
        assert price is not None
        assert json.loads(price.to_json()) == data

    SERVED = (
        {"equals": ["a"], "service_tiers": {"flex": {"price": {"input": 50}}}},
        {
            "equals": ["b"],
            "service_tiers": {"fast": {"prices": [{"price": None}, {"from": "1970-01-02", "price": {}}]}},
        },
    )

    @pytest.mark.parametrize(
        ("vendor", "name", "day", "tier", "price"),
        [
            ("acme", "a", 0, "flex", 50),
            ("acme", "a", 0, "priority", None),
            ("acme", "a", 0, None, 1),
            ("acme", "a", 0, "default", 1),
            ("acme", "b", 0, "fast", None),
            ("acme", "b", 0, "default", 2),
            ("reseller", "a", 0, None, 1),
            ("reseller", "a", 0, "flex", None),
        ],
    )
    def test_service_tiers(self, vendor: str, name: str, day: int, tier: str | None, price: int | None) -> None:
        prices = table(*self.SERVED, reseller={"fallbacks": ["acme"], "models": []})
        priced = prices.find(vendor, name)
        assert priced is not None
        found = priced.at(day, tier)
        assert (None if found is None else found.input) == price

    def test_a_service_tier_may_get_a_price_later(self) -> None:
        priced = table(*self.SERVED).find("acme", "b")
        assert priced is not None
        assert (priced.at(86_399_999, "fast"), priced.at(86_400_000, "fast")) == (None, Price(None, None))

    @pytest.mark.parametrize(
        ("moment", "price"),
        [
            ("2026-02-28T23:59:59.999", 1),
            ("2026-03-01T00:00:00", 3),
            ("2026-02-28T16:29:59.999", 1),
            ("2026-02-28T16:30:00", 2),
            ("2026-02-28T17:29:59.999", 2),
            ("2026-02-28T17:30:00", 1),
            ("2026-03-01T16:30:00", 3),
        ],
    )
    def test_dates_and_times_are_of_utc(self, moment: str, price: int) -> None:
        periods = [
            {"price": {"input": 1}},
            {"daily": ["16:30:00", "17:30:00"], "price": {"input": 2}},
            {"from": "2026-03-01", "price": {"input": 3}},
        ]
        model = {"id": "a", "equals": ["a"], "prices": periods}
        priced = table(acme={"models": [model]}).find("acme", "a")
        assert priced is not None
        assert priced.at(milliseconds(datetime.fromisoformat(moment))) == Price(price, None)

    def test_no_longer_known(self) -> None:
        periods = [{"price": {"input": 1}}, {"from": "1971-01-01", "price": None}]
        model = {"id": "a", "equals": ["a"], "prices": periods}
        priced = table(acme={"models": [model]}).find("acme", "a")
        assert priced is not None
        assert priced.at(0) == Price(1, None)
        assert priced.at(366 * 86_400_000) is None


class TestWhatShips:
    """Computed by hand: USD for a million tokens times tokens is millionths of a dollar."""

    @pytest.mark.parametrize(
        ("vendor", "model", "moment", "usage", "micro_usd"),
        [
            ("openai", "gpt-4o", "2026-06-01", Usage(1000, 500), 1000 * 2.5 + 500 * 10),
            ("openai", "gpt-4o", "2026-06-01", Usage(1000, 0, cached_tokens=400), 600 * 2.5 + 400 * 1.25),
            ("openai", "o1", "2026-06-01", Usage(100, 500, reasoning_tokens=400), 100 * 15 + 500 * 60),
            (
                "openai",
                "gpt-4o-transcribe",
                "2026-06-01",
                Usage(100, 10, audio_input_tokens=80),
                20 * 2.5 + 80 * 6 + 100,
            ),
            ("openai", "text-embedding-3-small", "2026-06-01", Usage(1000), 1000 * 0.02),
            ("azure", "gpt-4o", "2026-06-01", Usage(1000, 500), 1000 * 2.5 + 500 * 10),
            (
                *("anthropic", "claude-3-opus-20240229", "2026-06-01"),
                *(Usage(1000, 10, cached_tokens=600, cache_write_tokens=300), 100 * 15 + 600 * 1.5 + 300 * 18.75 + 750),
            ),
            ("anthropic", "claude-sonnet-4-5", "2026-01-01", Usage(200_000, 100), 200_000 * 3 + 100 * 15),
            ("anthropic", "claude-sonnet-4-5", "2026-01-01", Usage(200_001, 100), 200_001 * 6 + 100 * 22.5),
            ("google", "gemini-2.5-pro", "2026-06-01", Usage(200_000, 100), 200_000 * 1.25 + 100 * 10),
            ("google", "gemini-2.5-pro", "2026-06-01", Usage(200_001, 100), 200_001 * 2.5 + 100 * 15),
            ("deepseek", "deepseek-chat", "2025-08-01T00:29:59", Usage(1000, 100), 1000 * 0.135 + 100 * 0.55),
            ("deepseek", "deepseek-chat", "2025-08-01T00:30:00", Usage(1000, 100), 1000 * 0.27 + 100 * 1.1),
            (
                "deepseek",
                "deepseek-chat",
                "2025-08-01T16:29:59",
                Usage(1000, cached_tokens=500),
                500 * 0.27 + 500 * 0.07,
            ),
            (
                "deepseek",
                "deepseek-chat",
                "2025-08-01T16:30:00",
                Usage(1000, cached_tokens=500),
                500 * 0.135 + 500 * 0.035,
            ),
            ("openrouter", "deepseek/deepseek-r1:free", "2026-06-01", Usage(1000, 100), 0),
            (
                *("anthropic", "claude-3-opus-20240229", "2026-06-01"),
                *(Usage(1000, cache_write_tokens=300, cache_write_1h_tokens=200), 700 * 15 + 100 * 18.75 + 200 * 30),
            ),
            (
                *("openai", "gpt-image-1", "2026-06-01"),
                *(Usage(1000, 400, image_input_tokens=900, image_output_tokens=400), 100 * 5 + 900 * 10 + 400 * 40),
            ),
            (
                *("openai", "gpt-image-1.5", "2026-06-01"),
                *(Usage(50, 400, image_output_tokens=390), 50 * 5 + 10 * 10 + 390 * 32),
            ),
        ],
    )
    def test_costs(self, vendor: str, model: str, moment: str, usage: Usage, micro_usd: float) -> None:
        priced = SHIPPED.find(vendor, model)
        assert priced is not None
        price = priced.at(milliseconds(datetime.fromisoformat(moment)))
        assert price is not None
        assert price.cost(usage) == round(micro_usd * 1000)

    @pytest.mark.parametrize(
        ("tier", "micro_usd"),
        [
            *((tier, 1000 * 1.25 + 100 * 10) for tier in (None, "auto", "default", "on_demand")),
            ("priority", 1000 * 2.5 + 100 * 20),
            ("fast", 1000 * 2.5 + 100 * 20),
            ("flex", 1000 * 0.625 + 100 * 5),
            ("scale", None),
            ("ultrafast", None),
        ],
    )
    def test_service_tiers(self, tier: str | None, micro_usd: float | None) -> None:
        priced = SHIPPED.find("openai", "gpt-5")
        assert priced is not None
        price = priced.at(milliseconds(datetime(2026, 11, 21, tzinfo=UTC)), tier)
        cost = None if price is None else price.cost(Usage(1000, 100))
        assert cost == (None if micro_usd is None else round(micro_usd * 1000))

    @pytest.mark.parametrize(
        ("vendor", "model"),
        [
            (None, "gpt-4o"),
            ("local", "gpt-4o"),
            ("anthropic", "gpt-4o"),
            ("openai", "a-model-nobody-knows"),
            ("openai", "whisper-1"),  # by the minute
            ("openai", "gpt-4o-audio-preview"),  # the source has no price for its audio
            ("google", "gemini-3-pro-image-preview"),  # pictures that were made are not told apart
            ("mistral", "mistral-ocr-latest"),  # by the page
        ],
    )
    def test_unknown(self, vendor: str | None, model: str) -> None:
        assert SHIPPED.find(vendor, model) is None


class TestTheFile:
    DATA = json.loads(FILE.read_bytes())

    def test_it_is_dated_and_says_its_source(self) -> None:
        assert date.fromisoformat(SHIPPED.made_on) <= datetime.now(UTC).date()
        assert re.fullmatch(r"genai-prices \d+\.\d+\.\d+", SHIPPED.source)

    def test_it_is_sorted_with_a_line_for_each_model(self) -> None:
        vendors = self.DATA["vendors"]
        assert list(vendors) == sorted(vendors)
        lines = FILE.read_text("utf-8").splitlines()
        listed = [json.loads(line.rstrip(","))["id"] for line in lines if line.startswith('{"id"')]
        assert listed == [model["id"] for vendor in vendors.values() for model in vendor["models"]]
        assert len(listed) > 2000

    def test_it_holds_no_number_but_integers(self) -> None:
        def no_float(text: str) -> float:
            raise AssertionError(text)

        json.loads(FILE.read_bytes(), parse_float=no_float, parse_constant=no_float)

    def test_the_licence_of_the_source_is_beside_it(self) -> None:
        assert "Permission is hereby granted" in FILE.with_name("LICENSE.genai-prices").read_text("utf-8")


def milliseconds(moment: datetime) -> int:
    return (moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
