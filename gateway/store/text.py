"""Text that every engine can store in a column of its own."""

from __future__ import annotations

import re
from typing import overload

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@overload
def clean(text: str, most: int = 256) -> str: ...
@overload
def clean(text: None, most: int = 256) -> None: ...
def clean(text: str | None, most: int = 256) -> str | None:
    """No U+0000, no lone surrogate (each becomes U+FFFD), at most `most` characters."""
    if text is None or (len(text) <= most and text.isprintable()):
        return text
    return _UNSTORABLE.sub("\ufffd", text[:most])
