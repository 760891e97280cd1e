"""The price table that ships with the package: what vendors ask for their models, found by vendor and model name.

`data/prices.json` is made by `scripts/make_price_table.py` from a public collection of prices; the file says which and
when. A vendor's models are tried in the order of the file, and the first whose names fit counts, even if its price is
unknown: a broader entry further down must not lend it a price. A vendor that sells others' models has their vendors as
`fallbacks`, whose standard prices apply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from importlib.resources import files
from typing import Any

import orjson

from gateway.pricing import Period, Price, Priced, PriceSchedule, ServicePrices

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COMPACT_DATE = re.compile(r"-(20[0-9]{2})([0-9]{2})([0-9]{2})(?=-|:|$)")
_PATTERNS = frozenset({"starts_with", "ends_with", "contains", "regex", "all"})

Entry = Mapping[str, Any]
"""A model in the file, or a part of its rule: the names it goes by, any of which will do."""


class PriceTable:
    """Built once; `made_on` is an ISO date, `source` a name and a version."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.made_on: str = data["made_on"]
        self.source: str = data["source"]
        self._data: Mapping[str, Any] = data["vendors"]
        self._vendors: dict[str, _Vendor] = {}

    @classmethod
    def load(cls) -> PriceTable:
        """The table of the package."""
        return cls(orjson.loads((files("gateway") / "data" / "prices.json").read_bytes()))

    def find(self, vendor: str | None, model: str) -> Priced | None:
        """The price that the vendor asks for a model of that name; None: nobody knows it."""
        found = self._of(vendor, model)
        return None if found is None else _priced(found)

    def context_window(self, vendor: str | None, model: str) -> int | None:
        """How many tokens its input and its answer may have together; None: nobody knows it."""
        found = self._of(vendor, model)
        return None if found is None else found.get("context_window")

    def _of(self, vendor: str | None, model: str) -> Entry | None:
        if vendor is None or vendor not in self._data:
            return None
        name = model.lower()
        found = self._entry(vendor, name)
        if found is None and (dashed := _dashed(name)) != name:
            found = self._entry(vendor, dashed)
        return found

    def _entry(self, vendor: str, name: str) -> Entry | None:
        for one in (vendor, *self._data[vendor].get("fallbacks", ())):
            if one not in self._vendors:
                self._vendors[one] = _Vendor(self._data[one]["models"])
            found = self._vendors[one].find(name)
            if found is not None:
                return found if one == vendor else {**found, "service_tiers": {}}
        return None


class _Vendor:
    """The models of one vendor: whole names in a dictionary, the others one after the other."""

    def __init__(self, models: list[Entry]) -> None:
        self._models = models
        self._whole: dict[str, int] = {}
        self._patterns: list[int] = []
        for index, model in enumerate(models):
            for name in model.get("equals", ()):
                self._whole.setdefault(name, index)
            if model.keys() & _PATTERNS:
                self._patterns.append(index)

    def find(self, name: str) -> Entry | None:
        last = self._whole.get(name, len(self._models))
        for index in self._patterns:
            if index >= last:
                break
            if _fits(self._models[index], name):
                return self._models[index]
        return self._models[last] if last < len(self._models) else None


def _fits(rule: Entry, name: str) -> bool:
    return (
        name in rule.get("equals", ())
        or name.startswith(tuple(rule.get("starts_with", ())))
        or name.endswith(tuple(rule.get("ends_with", ())))
        or any(part in name for part in rule.get("contains", ()))
        or any(re.search(pattern, name) is not None for pattern in rule.get("regex", ()))
        or any(all(_fits(part, name) for part in parts) for parts in rule.get("all", ()))
    )


def _dashed(name: str) -> str:
    """`gpt-5-20250807` is `gpt-5-2025-08-07`, where the digits are a date."""

    def dashes(found: re.Match[str]) -> str:
        try:
            return f"-{date(*map(int, found.groups()))}"
        except ValueError:
            return found[0]

    return _COMPACT_DATE.sub(dashes, name)


def _priced(model: Entry) -> Priced | None:
    """For no service tier but those it names: nobody said that the others cost the same."""
    others = {tier: _flat_or_changing(one) for tier, one in model.get("service_tiers", {}).items()}
    standard = _flat_or_changing(model) if "price" in model or "prices" in model else None
    return None if standard is None else ServicePrices(standard, others)


def _flat_or_changing(entry: Entry) -> Priced:
    return PriceSchedule([_period(one) for one in entry["prices"]]) if "prices" in entry else Price.read(entry["price"])


def _period(data: Mapping[str, Any]) -> Period:
    price, since, daily = data["price"], data.get("from"), data.get("daily")
    return Period(
        None if price is None else Price.read(price),
        None if since is None else _milliseconds(datetime.combine(date.fromisoformat(since), time(tzinfo=UTC))),
        None if daily is None else (_time_of_day(daily[0]), _time_of_day(daily[1])),
    )


def _time_of_day(text: str) -> int:
    return _milliseconds(datetime.combine(_EPOCH, time.fromisoformat(text), UTC))


def _milliseconds(moment: datetime) -> int:
    passed = moment - _EPOCH
    return passed.days * 86_400_000 + passed.seconds * 1000
