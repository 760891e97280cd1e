"""The JSON body of a request, read once: an object, with numbers that everybody can hold, and small enough to read."""

from __future__ import annotations

from typing import Any

from gateway.errors import BadRequest, BodyTooLarge
from gateway.wire.jsontext import loads, numbers_out_of_range

_MOST_MARKS = ((b"[", 500_000), (b"{", 500_000), (b'":', 500_000), (b",", 2_000_000))
"""More than any conversation has, text included; what has more would hold up a worker for seconds."""
_FEWEST_MARKS = min(most for _, most in _MOST_MARKS)


def read_object(raw: bytes) -> dict[str, Any]:
    """Raises BadRequest, BodyTooLarge."""
    data = parsed(raw)
    check_members(raw, data)
    return data


def parsed(raw: bytes) -> dict[str, Any]:
    """The first half of `read_object`, for those who can tell that the second one would find nothing."""
    if len(raw) > _FEWEST_MARKS and any(raw.count(mark) > most for mark, most in _MOST_MARKS):
        raise BodyTooLarge("The body holds too many JSON values to be read while others wait.")
    try:
        data = loads(raw)
    except ValueError as failure:
        _check_numbers(raw)
        raise BadRequest(f"The body is not valid JSON: {failure}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    return data


def check_members(raw: bytes, data: dict[str, Any]) -> None:
    """Numbers that everybody can hold, and one `model`."""
    _check_numbers(raw, data)
    for key in data:
        if len(key) == 5 and key != "model" and key.casefold() == "model":
            raise BadRequest(f"'{key}' must be written 'model': upstreams differ in how they read it.", param=key)


def _check_numbers(raw: bytes, data: dict[str, Any] | None = None) -> None:
    bad = numbers_out_of_range(raw, data)
    if bad is not None:
        raise BadRequest(f"The number at '{bad}' is out of range.", param=bad, code="invalid_value")
