"""What our own JSON routes take and tell alike: fields and queries that are checked, lists, times, money.

Every mistake is a BadRequest that names its field and says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import parse_qsl

from gateway.api.common import read_json_body
from gateway.errors import BadRequest, GatewayError
from gateway.key_rules import Mistake, UnknownField, did_you_mean
from gateway.middleware import header
from gateway.responses import Receive, Scope
from gateway.store.text import clean
from gateway.wire.body import read_object
from gateway.wire.jsontext import dumps

Order = Literal["asc", "desc"]
Reader = Callable[[Any], Any]
MOST_LISTED = 100
_MOST_PAIRS, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512
_NANO = 10**9
_JOINERS = dict.fromkeys((0x200C, 0x200D))
"""Python calls them unprintable, and Persian words and many emoji are written with them."""


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for."""

    limit: int
    after: str | None
    order: Order


def bad_request(mistake: Mistake) -> BadRequest:
    name = mistake.field[:64]
    code = "unknown_parameter" if isinstance(mistake, UnknownField) else "invalid_value"
    return BadRequest(f"'{name}' {mistake.what}{'' if mistake.what.endswith('?') else '.'}", param=name, code=code)


def detailed_error(failure: GatewayError) -> bytes:
    """OpenAI's error object and, beside it, seed 3's `detail`."""
    fields = {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}
    return dumps({"error": fields, "detail": failure.message})


async def read_fields(
    scope: Scope, receive: Receive, readers: Mapping[str, Reader], fixed: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of the body that `readers` know, as they make them; `fixed` ones are told that they cannot be set.
    No body is an empty object, and needs no type."""
    if _has_no_body(scope):
        return {}
    raw = await read_json_body(scope, receive)
    return checked(read_object(raw) if raw.strip() else {}, readers, fixed)


def checked(said: Mapping[str, Any], readers: Mapping[str, Reader], fixed: Collection[str] = ()) -> dict[str, Any]:
    """Raises BadRequest for the first field that cannot be. A reader's ValueError says what must be."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        if name in fixed:
            raise BadRequest(f"'{name}' cannot be set.", param=name, code="read_only_parameter")
        if name not in readers:
            raise bad_request(UnknownField(name, did_you_mean(name, list(readers))))
        try:
            found[name] = readers[name](value)
        except ValueError as wrong:
            raise bad_request(Mistake(name, str(wrong))) from None
    return found


def read_query(scope: Scope, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """The parameters of the query, each once, as `readers` make them of their texts."""
    said: dict[str, str] = {}
    for name, value in parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True):
        if name in said:
            raise bad_request(Mistake(name, "is there twice"))
        said[name] = value
    return checked(said, readers)


def page_of(query: Mapping[str, Any], *, limit: int = 20, order: Order = "desc") -> Page:
    """Of what PAGE has read."""
    return Page(query.get("limit", limit), query.get("after"), query.get("order", order))


def list_of(data: Sequence[Mapping[str, Any]], limit: int) -> bytes:
    """OpenAI's list; `data` may have one more than is shown, which says that there are more."""
    shown = data[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return dumps({"object": "list", "data": shown, **ends, "has_more": len(data) > limit})


def iso_time(milliseconds: int | None) -> str | None:
    """ISO 8601 in UTC."""
    if milliseconds is None:
        return None
    found = datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
    return found.replace("+00:00", "Z")


def usd(nano: int | None) -> float | None:
    return None if nano is None else nano / _NANO


def limit_reader(most: int = MOST_LISTED) -> Reader:
    def read(value: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) < 6 and 1 <= int(value) <= most):
            raise ValueError(f"must be 1 to {most:,}")
        return int(value)

    return read


def name_reader(value: str) -> str:
    """An id or another name."""
    if not (value and len(value) <= 256 and is_shown(value)):
        raise ValueError("must be 1 to 256 printable characters")
    return value


def is_shown(text: str) -> bool:
    """Without what nobody sees, and what no column of texts takes."""
    return text.translate(_JOINERS).isprintable()


def choice_reader(**choices: Any) -> Reader:
    def read(value: str) -> Any:
        if value not in choices:
            raise ValueError(f"must be {' or '.join(choices)}")
        return choices[value]

    return read


PAGE: Mapping[str, Reader] = {
    "limit": limit_reader(),
    "after": name_reader,
    "order": choice_reader(asc="asc", desc="desc"),
}


def text_reader(most: int) -> Reader:
    """A text or null. U+0000 and half a surrogate pair are in no column of texts."""

    def read(value: Any) -> str | None:
        if value is not None and not (isinstance(value, str) and value.strip() and value == clean(value, most)):
            raise ValueError(f"must be null or a text of 1 to {most:,} characters that can be stored")
        return value

    return read


def flag_reader(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def metadata_reader(value: Any) -> str:
    """OpenAI's rule, as JSON text; null is nothing."""
    pairs = {} if value is None else value
    if not (
        isinstance(pairs, dict)
        and len(pairs) <= _MOST_PAIRS
        and all(0 < len(key) <= _LONGEST_KEY for key in pairs)
        and all(isinstance(text, str) and len(text) <= _LONGEST_VALUE for text in pairs.values())
    ):
        raise ValueError(
            f"must be an object of up to {_MOST_PAIRS} pairs, with keys of 1 to {_LONGEST_KEY} characters and texts of "
            f"up to {_LONGEST_VALUE} as values"
        )
    return dumps(pairs).decode()


def is_id(text: str) -> bool:
    """Could it be one? What else a path may hold is no matter for a database."""
    return 0 < len(text) <= 256 and text.isprintable() and text == clean(text)


def _has_no_body(scope: Scope) -> bool:
    return header(scope, b"content-length") in (None, b"0") and header(scope, b"transfer-encoding") is None
