"""Any text in, text out that both engines store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.store.text import clean


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        (None, None),
        ("", ""),
        ("plain", "plain"),
        ("🙂 ünïcode \U0010ffff", "🙂 ünïcode \U0010ffff"),
        ("a\x00b", "a\ufffdb"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("\ude42\x00", "\ufffd\ufffd"),
        ("\x01\x1b\n\x7f", "\x01\x1b\n\x7f"),
        ("x" * 300, "x" * 256),
    ],
)
def test_what_no_engine_stores_is_replaced_and_the_rest_is_kept(text: str | None, stored: str | None) -> None:
    assert clean(text) == stored


def test_the_length_can_be_chosen() -> None:
    assert clean("abcdef", 3) == "abc"


@given(st.text(st.characters(exclude_categories=())), st.integers(0, 20))
def test_the_result_is_short_and_can_be_written(text: str, most: int) -> None:
    found = clean(text, most)
    assert len(found) == min(len(text), most)
    assert b"\x00" not in found.encode()
    assert clean(found, most) == found
