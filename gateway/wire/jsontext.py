"""JSON text in and out: orjson, and the standard library for the little that orjson refuses.

What orjson refuses and we keep: lone surrogates written as escapes (an upstream that cuts an emoji in half must not
kill a stream). What we refuse as well: NaN, infinities, numbers that no double holds, text that is not UTF-8, and
nesting deeper than `MAX_DEPTH`: orjson reads deeper than it writes, and a value that cannot be stored is none.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import orjson

MAX_DEPTH = 200
_WALKED_BRACKETS = 50_000
_NAMED_BYTES = 64 << 10
# Where a number may stand and looks as if it might not fit; inside a string that is a coincidence, found out below.
_ODD_NUMBER = re.compile(rb"(?:^|[:\[,\s])(-?[0-9]{19,}(?![0-9.eE])|-?[0-9][0-9.]*[eE][+-]?[0-9]{3,}|-?Infinity|NaN)")
_AS_ZEROS = bytes.maketrans(b"0123456789E", b"0000000000e")
_LARGEST = 2**63
_MOST_LOOKED_AT = 200
_MOST_DIGITS = 308


def loads(raw: bytes) -> Any:
    """The value, or ValueError with a sentence that names line and column."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as failure:
        if b"\\ud" not in raw and b"\\uD" not in raw:
            raise ValueError(_plain(failure)) from None
        value = _loads_surrogates(raw)
    if len(raw) > 2 * MAX_DEPTH:
        brackets = _count(raw, b"[") + _count(raw, b"{")
        if brackets > MAX_DEPTH and _too_deep(value, brackets):
            raise ValueError("it is nested too deeply")
    return value


def _count(raw: bytes, byte: bytes) -> int:
    """As `count`, which looks at each byte by itself, where this one hops from find to find."""
    return len(raw) - len(raw.replace(byte, b""))


def _loads_surrogates(raw: bytes) -> Any:
    try:
        return json.loads(
            raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, parse_int=_printable_int
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as failure:
        raise ValueError(_plain(failure)) from None


def _too_deep(value: object, brackets: int) -> bool:
    """Exact for what a look at each node does not delay; for larger values, what orjson cannot write."""
    if brackets > _WALKED_BRACKETS:
        try:
            orjson.dumps(value)
            return False
        except TypeError as failure:
            if "ecursion" in str(failure):
                return True
    return _deeper_than(value, MAX_DEPTH)


def _deeper_than(value: object, most: int) -> bool:
    """Level by level: a recursion would need the depth that this guards against."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(item, (dict, list))
        ]
    return bool(level)


def dumps(value: Any) -> bytes:
    """Compact JSON. A lone surrogate leaves as an escape, U+0000 always does."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def numbers_out_of_range(raw: bytes, value: object = None) -> str | None:
    """The path of the first number that a 64-bit integer or a double cannot hold (`a.b[0]`), or None.

    orjson turns such integers into floats without a word; a gateway that counts must not. Also for texts that `loads`
    refused because of such a number: it knows the column only. `value`: what `raw` was parsed to, if it was.
    """
    if isinstance(value, (dict, list)) and len(raw) <= _NAMED_BYTES and _has_usual_numbers(value):
        return None
    if _has_plain_numbers(raw) or not any(_is_out_of_range(match[1]) for match in _ODD_NUMBER.finditer(raw)):
        return None
    named = len(raw) <= _NAMED_BYTES
    try:
        data = json.loads(
            raw,
            parse_int=_checked_int if named else _stop_at_int,
            parse_float=_checked_float if named else _stop_at_float,
            parse_constant=lambda _: _OutOfRange(),
        )
        return _path_of_bad(data, "") if named else None
    except _Found:
        return "body"
    except (ValueError, RecursionError):
        return None


def _has_usual_numbers(value: dict[str, Any] | list[Any]) -> bool:
    """What did not fit became 0.0, or a float beyond all integers of 64 bits. For small values: a text can be searched
    faster than many can be looked at."""
    outers: list[Any] = [value]
    seen = 0
    for outer in outers:
        seen += len(outer)
        if seen > _MOST_LOOKED_AT:
            return False
        for item in outer.values() if type(outer) is dict else outer:
            kind = type(item)
            if kind is str:
                continue
            if kind is dict or kind is list:
                outers.append(item)
            elif (kind is float or kind is int) and not (-_LARGEST < item < _LARGEST and (item or kind is int)):
                return False
    return True


def _has_plain_numbers(raw: bytes) -> bool:
    """Without a long row of digits or an exponent anywhere, not even in a text: most bodies, found in no time."""
    zeros = raw.translate(_AS_ZEROS)
    return not (b"0000000000000000000" in zeros or b"0e" in zeros or b"Infinity" in raw or b"NaN" in raw)


def _is_out_of_range(token: bytes) -> bool:
    text = token.decode()
    if text.lstrip("-")[0] in "IN":
        return True
    check = _checked_int if text.lstrip("-").isdigit() else _checked_float
    try:
        return isinstance(check(text), _OutOfRange)
    except ValueError:  # digits and dots that are no number
        return False


class _Found(Exception):
    """A number in a large text is out of range; naming its place would take longer than it is worth."""


class _OutOfRange:
    """Stands where the number was."""


def _checked_int(text: str) -> object:
    return int(text) if len(text) < 30 and -_LARGEST <= int(text) < 2 * _LARGEST else _OutOfRange()


def _checked_float(text: str) -> object:
    number = float(text)
    underflow = number == 0.0 and re.search(r"[1-9]", text.lower().partition("e")[0]) is not None
    return _OutOfRange() if math.isinf(number) or underflow else number


def _stop_at_int(text: str) -> object:
    return _stop(_checked_int(text))


def _stop_at_float(text: str) -> object:
    return _stop(_checked_float(text))


def _stop(number: object) -> object:
    if isinstance(number, _OutOfRange):
        raise _Found
    return number


def _path_of_bad(value: object, path: str) -> str | None:
    if isinstance(value, _OutOfRange):
        return path or "body"
    inside: list[tuple[str, object]] = []
    if isinstance(value, dict):
        inside = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        inside = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    return next((found for where, item in inside if (found := _path_of_bad(item, where))), None)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def _printable_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError("a number is too large")
    return int(text)


def _plain(failure: ValueError) -> str:
    return str(failure).rstrip(".")
