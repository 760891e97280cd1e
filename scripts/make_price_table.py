"""Makes gateway/data/prices.json from the package `genai-prices`: `python scripts/make_price_table.py [DATE]`.

`--check` writes nothing and fails if the file is not what the installed package gives, the date apart.

What becomes of the kinds of prices:
- Of tokens that the gateway counts, by our names: `KINDS`. A fee for every call: `requests`. Pictures that come out are
  counted where the vendor's replies tell them from text (`TELL_PICTURES`).
- Of tokens that the gateway cannot tell from others: `AS_PARENT`. They are billed as the kind they are part of.
- Of tools, which an upstream bills beside a call: `BESIDE`. They are not in the cost of a call.
- All others: seconds, pages, characters, pictures that were made. A price that has one is unknown as a whole, and so is
  one that lacks what its model plainly sells (`LACKS`). Such a model stays in the table, without a price.
No prices at all say nothing, unless the model's name ends in `:free`.

Prices of service tiers are taken over, from the day they are known on. Those for batches, speeds, routes and searches
(the other `price_variants`) are not; how many there are is said.
A kind that is in no list, a rule or a condition of an unknown form, or an inexact number stops the script. The
exception are numbers with 15 digits or more, which came out of a division of binary fractions in the source: they are
rounded to a nano-dollar per million tokens, and named.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time
from decimal import ROUND_HALF_UP, Decimal
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from genai_prices import types
from genai_prices.data import providers
from genai_prices.data_units import unit_data

PACKAGE = "genai-prices"
FILE = Path(__file__).parent.parent / "gateway" / "data" / "prices.json"
LICENSE = f"LICENSE.{PACKAGE}"
NANO = 10**9

KINDS = {
    "input_mtok": "input",
    "cache_read_mtok": "cached_input",
    "cache_write_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "input_audio_mtok": "audio_input",
    "input_image_mtok": "image_input",
    "output_mtok": "output",
    "output_reasoning_mtok": "reasoning",
    "output_audio_mtok": "audio_output",
    "output_image_mtok": "image_output",
}
AS_PARENT = {
    "cache_audio_read_mtok": "cached_input",
    "cache_image_read_mtok": "cached_input",
    "input_video_mtok": "input",
}
BESIDE = frozenset({"web_searches_kcount", "storage_searches_kcount"})
UNBILLABLE = frozenset(
    {
        *("audio_hours", "input_audio_hours", "input_mchars", "input_text_messages_kcount"),
        *("input_document_kpages", "input_annotated_document_kpages"),
        *("output_video_mtok", "output_citation_mtok"),
    }
)
TELL_PICTURES = frozenset({"openai"})
"""The vendors whose usage, in OpenAI's words, says which output tokens were pictures. With those of others a picture
would be billed as text."""
LACKS = {
    r"audio": ("input_audio_mtok", "output_audio_mtok"),
    r"image": ("input_image_mtok", "output_image_mtok"),
    r"(^|[-/])search|deep-research": (),  # each call searches, at a fee
}
"""By what is in a model's name: the kinds of which its price must have one, or it does not say what a call costs."""

NAMES = ("equals", "starts_with", "ends_with", "contains", "regex")

Data = dict[str, Any]


class Unknown(Exception):
    """Something in the source that this script does not understand."""


class Counted:
    """What was met on the way."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.unpriced: list[str] = []
        self.rounded: list[str] = []
        self.variants: Counter[str] = Counter()


def table(made_on: str, counted: Counted) -> Data:
    vendors = {one.id: vendor(one, counted) for one in sorted(providers, key=lambda one: one.id)}
    return {"made_on": made_on, "source": f"{PACKAGE} {distribution(PACKAGE).version}", "vendors": vendors}


def vendor(source: types.Provider, counted: Counted) -> Data:
    fallbacks = source.fallback_model_providers
    models = [model(source.id, one, counted) for one in source.models]
    return {**({"fallbacks": fallbacks} if fallbacks else {}), "models": models}


def model(owner: str, source: types.ModelInfo, counted: Counted) -> Data:
    path = f"{owner}/{source.id}"
    given = source.prices if isinstance(source.prices, list) else [types.ConditionalPrice(prices=source.prices)]
    found = [{**when(one.constraint, path), "price": price(one.prices, source.id, path, counted)} for one in given]
    prices = shortest(found)
    if prices:
        prices |= service_tiers(source, path, counted)
    else:
        counted.unpriced.append(path)
    window = {"context_window": source.context_window} if source.context_window else {}
    return {"id": source.id, **rule(source.match, path), **window, **prices}


def shortest(periods: list[Data]) -> Data:
    """One price, if it never changes; nothing, if it is never known."""
    first = periods[0]["price"]
    if any(one["price"] != first for one in periods):
        return {"prices": periods}
    return {} if first is None else {"price": first}


def service_tiers(source: types.ModelInfo, path: str, counted: Counted) -> Data:
    """What the model costs in each tier but the standard one."""
    variants = source.price_variants or ()
    counted.variants.update(key for one in variants for key in one.when if key != "service_tier")
    tiers = {one.when["service_tier"] for one in variants if "service_tier" in one.when} - {"default"}
    if any("service_tier" in one.when and len(one.when) > 1 for one in variants):
        raise Unknown(f"{path}: prices of a service tier under more conditions")
    found = {tier: shortest(tier_periods(source, tier, path, counted)) for tier in sorted(tiers)}
    known = {tier: one for tier, one in found.items() if one}
    return {"service_tiers": known} if known else {}


def tier_periods(source: types.ModelInfo, tier: str, path: str, counted: Counted) -> list[Data]:
    """What the source says on each day on which one of its prices begins; unknown before the tier's own."""
    own = [one.constraint for one in source.price_variants or () if one.when == {"service_tier": tier}]
    standard = [one.constraint for one in source.prices] if isinstance(source.prices, list) else []
    begins = {first_day(one, path) for one in (*own, *standard) if one is not None}
    periods: list[Data] = []
    for begin in sorted({date.min, *begins}):
        moment = datetime.combine(begin, time(), UTC)
        known = any(one is None or one.active(moment) for one in own)
        prices = source.get_prices(moment, {"service_tier": tier})
        found = price(prices, source.id, path, counted) if known else None
        if not periods or periods[-1]["price"] != found:
            periods.append({**({"from": begin.isoformat()} if periods else {}), "price": found})
    return periods


def first_day(constraint: Any, path: str) -> date:
    if not isinstance(constraint, types.StartDateConstraint):
        raise Unknown(f"{path}: prices of a service tier by the time of day")
    return constraint.start_date


def rule(clause: Any, path: str) -> Data:
    """A condition on names, as lists of which anything will do. All but patterns are compared in small letters."""
    found: Data = {}
    for one in clause.or_ if isinstance(clause, types.ClauseOr) else [clause]:
        for key, values in part(one, path).items():
            found.setdefault(key, []).extend(values)
    return {key: found[key] if key == "all" else sorted(set(found[key])) for key in (*NAMES, "all") if key in found}


def part(clause: Any, path: str) -> Data:
    match clause:
        case types.ClauseEquals(equals=text):
            return {"equals": [text.lower()]}
        case types.ClauseStartsWith(starts_with=text):
            return {"starts_with": [text.lower()]}
        case types.ClauseEndsWith(ends_with=text):
            return {"ends_with": [text.lower()]}
        case types.ClauseContains(contains=text):
            return {"contains": [text.lower()]}
        case types.ClauseRegex(regex=text):
            return {"regex": [re.compile(text).pattern]}
        case types.ClauseAnd(and_=clauses):
            return {"all": [[rule(one, path) for one in clauses]]}
        case types.ClauseOr():
            return rule(clause, path)
    raise Unknown(f"{path}: a rule for names of the kind {type(clause).__name__}")


def when(constraint: Any, path: str) -> Data:
    match constraint:
        case None:
            return {}
        case types.StartDateConstraint(start_date=day):
            return {"from": day.isoformat()}
        case types.TimeOfDateConstraint(start_time=start, end_time=end):
            return {"daily": [time_of_day(start), time_of_day(end)]}
    raise Unknown(f"{path}: a condition of the kind {type(constraint).__name__}")


def time_of_day(value: time) -> str:
    """In UTC."""
    moment = datetime.combine(date(2000, 1, 1), value if value.tzinfo is not None else value.replace(tzinfo=UTC))
    return moment.astimezone(UTC).time().isoformat()


def price(source: types.ModelPrice, name: str, path: str, counted: Counted) -> Data | None:
    """None: it does not say what a call costs."""
    given = {key: value for key, value in vars(source).items() if value is not None}
    counted.kinds.update(given.keys())
    strange = given.keys() - {*KINDS, *AS_PARENT, *BESIDE, *UNBILLABLE, "requests_kcount"}
    if strange:
        raise Unknown(f"{path}: prices of the kinds {', '.join(sorted(strange))}")
    if not given:
        return {"input": 0, "output": 0} if name.endswith(":free") else None
    pictures = "output_image_mtok" in given and path.partition("/")[0] not in TELL_PICTURES
    if pictures or given.keys() & UNBILLABLE or lacking(name, given) or not given.keys() & KINDS.keys():
        return None
    marks = sorted({tier.start for one in given.values() if isinstance(one, types.TieredPrices) for tier in one.tiers})
    tiers = [{"above": mark, **kinds(given, mark + 1, path, counted)} for mark in marks]
    return kinds(given, 0, path, counted) | ({"tiers": tiers} if tiers else {})


def lacking(name: str, given: Iterable[str]) -> bool:
    return any(re.search(word, name) and not set(needed) & set(given) for word, needed in LACKS.items())


def kinds(given: Mapping[str, Any], input_tokens: int, path: str, counted: Counted) -> Data:
    """The flat price of calls with so many input tokens."""
    found = {
        ours: per_million(key, given[key], input_tokens, path, counted) for key, ours in KINDS.items() if key in given
    }
    if "requests_kcount" in given:
        found["requests"] = nano(reached(given["requests_kcount"], input_tokens) / 1000, path, counted)
    return found


def per_million(key: str, value: Any, input_tokens: int, path: str, counted: Counted) -> int:
    if UNITS[key] != 10**6:
        raise Unknown(f"{path}: {key} is for {UNITS[key]} and not for a million")
    return nano(reached(value, input_tokens), path, counted)


UNITS = {unit.get("price_key", name): unit["per"] for name, unit in unit_data.items()}


def reached(value: Any, input_tokens: int) -> Decimal:
    """A tier begins above its mark."""
    if not isinstance(value, types.TieredPrices):
        return Decimal(value)
    return next((tier.price for tier in reversed(value.tiers) if input_tokens > tier.start), value.base)


def nano(dollars: Decimal, path: str, counted: Counted) -> int:
    exact = dollars * NANO
    whole = int(exact.to_integral_value(ROUND_HALF_UP))
    if whole != exact:
        if len(dollars.as_tuple().digits) < 15:
            raise Unknown(f"{path}: {dollars} USD is no whole number of nano-dollars")
        counted.rounded.append(f"{path} {dollars}")
    if whole < 0:
        raise Unknown(f"{path}: {dollars} USD")
    return whole


def text(found: Data) -> str:
    """One line for each model, so that the difference of two releases can be read."""
    lines = ["{", f'"made_on": {dumps(found["made_on"])},', f'"source": {dumps(found["source"])},', '"vendors": {']
    blocks = []
    for name, one in found["vendors"].items():
        head = "".join(f"{dumps(key)}: {dumps(value)}, " for key, value in one.items() if key != "models")
        models = ",\n".join(map(dumps, one["models"]))
        blocks.append(f'{dumps(name)}: {{{head}"models": [\n{models}\n]}}')
    return "\n".join([*lines, ",\n".join(blocks), "}", "}", ""])


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def undated(content: str) -> str:
    return re.sub(r'(?m)^"made_on": .*\n', "", content)


def license_text() -> str:
    """Of the source, which is to go with copies of it."""
    paths = [path for path in distribution(PACKAGE).files or () if path.name == "LICENSE"]
    return Path(str(paths[0].locate())).read_text("utf-8")


def report(found: Data, counted: Counted) -> None:
    total = sum(len(one["models"]) for one in found["vendors"].values())
    print(
        f"{found['source']}: {len(found['vendors'])} vendors, {total} models, {len(counted.unpriced)} without a price"
    )
    print("prices by kind:", ", ".join(f"{kind} {count}" for kind, count in counted.kinds.most_common()))
    print("not taken over, prices by:", ", ".join(f"{key} {count}" for key, count in counted.variants.most_common()))
    print(f"rounded, as the source is not exact ({len(counted.rounded)}):", *counted.rounded, sep="\n  ")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("date", nargs="?", type=date.fromisoformat, help="the date in the file; default: today, in UTC")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is out of date")
    parser.add_argument("--file", type=Path, default=FILE, help="another file than that of the package")
    options = parser.parse_args(arguments)
    counted = Counted()
    try:
        found = table((options.date or datetime.now(UTC).date()).isoformat(), counted)
    except Unknown as failure:
        print(f"{PACKAGE}: {failure}. Teach scripts/make_price_table.py what to do with it.", file=sys.stderr)
        return 1
    report(found, counted)
    content = text(found)
    if not options.check:
        options.file.write_text(content, "utf-8")
        options.file.with_name(LICENSE).write_text(license_text(), "utf-8")
    elif not options.file.exists() or undated(options.file.read_text("utf-8")) != undated(content):
        print(
            f"{options.file.name} is not what {found['source']} gives: run scripts/make_price_table.py", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
