"""A form (`multipart/form-data`, RFC 7578) that is passed on: where its parts stand, and its texts.

Files are never copied or decoded here; a text is changed by splicing, so all other bytes stay as they were. What
another reader could take apart in another way is refused: the upstream must not find a model that was not found here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gateway.errors import BadRequest

MOST_PARTS = 1000
MAX_PART_HEAD = 16 << 10
MAX_TEXT = 1 << 20
MOST_OPTIONS = 20
_OPTION = re.compile(rb';[ \t]*([^\s"=;]+)=(?:"((?:[^"\\]|\\.)*+)"|([^\s";]*))[ \t]*', re.DOTALL)
_FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,199}[0-9A-Za-z'()+_,./:=?-]")
"""What RFC 2046 allows, and more of it: others would be read in another way by somebody."""
_ODD_LINE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\r\n[ \t]|\0")
"""What some take for the end of a header, or for its continuation, and others do not."""


@dataclass(frozen=True, slots=True)
class Part:
    """One field: its value stands from `start` to `end`. `filename` None: it is a text."""

    name: str
    filename: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Form:
    """`texts` by name; of a name that comes twice, the last counts."""

    raw: bytes
    boundary: bytes
    parts: tuple[Part, ...]
    texts: Mapping[str, str]

    @classmethod
    def parse(cls, content_type: str, raw: bytes) -> Form:
        """Raises BadRequest for a body that is no form, or not a whole one."""
        boundary = _options(content_type.encode("latin-1", "replace"))[1].get(b"boundary", b"")
        if not _BOUNDARY.fullmatch(boundary):
            raise BadRequest("The form's Content-Type names no boundary, or an odd one.", code="invalid_form")
        parts = tuple(_parts(raw, boundary))
        texts = {}
        for part in parts:
            if part.filename is None:
                if part.end - part.start > MAX_TEXT:
                    raise BadRequest(f"The field '{part.name[:100]}' is too long.", param=part.name[:100])
                texts[part.name] = raw[part.start : part.end].decode("utf-8", "replace")
        return cls(raw, boundary, parts, texts)

    def with_text(self, name: str, value: str) -> Form:
        """The same form with a text set; a name that comes twice keeps one."""
        found = [part for part in self.parts if part.name == name and part.filename is None]
        text = value.encode()
        if not found:
            head = b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n' % (self.boundary, name.encode())
            raw = b"".join((head, text, b"\r\n", self.raw[_first(self.raw, b"--" + self.boundary) :]))
        else:
            ends = [0, *(part.end for part in found)]
            kept = [self.raw[end : part.start] for end, part in zip(ends, found, strict=False)]
            raw = text.join([*kept, self.raw[ends[-1] :]])
        return Form(raw, self.boundary, tuple(_parts(raw, self.boundary)), {**self.texts, name: value})


def _first(raw: bytes, delimiter: bytes) -> int:
    """Where the first boundary begins."""
    for before in (b"", b"\r\n"):
        if raw.startswith(before + delimiter):
            return len(before)
    raise BadRequest("The form does not begin with its boundary.", code="invalid_form")


def _parts(raw: bytes, boundary: bytes) -> Iterator[Part]:
    delimiter = b"--" + boundary
    if raw.count(b"\n" + delimiter) != raw.count(b"\r\n" + delimiter) or b"\r" + delimiter in raw:
        raise BadRequest("The form has a boundary on a line that does not begin after CR LF.", code="invalid_form")
    at = _first(raw, delimiter)
    count = 0
    while True:
        at += len(delimiter)
        last = raw.startswith(b"--", at)
        at += 2 * last
        line = raw.find(b"\r\n", at, at + 1000)
        if last and line < 0 and len(raw) - at < 1000:
            line = len(raw)
        if line < 0 or raw[at:line].strip(b" \t"):
            raise BadRequest("The form has a boundary that no line ends.", code="invalid_form")
        if last:
            return
        # A part without headers and value has its delimiter's line end doing duty for the next one: look from there.
        end = raw.find(b"\r\n" + delimiter, line)
        if end < 0:
            raise BadRequest("The form breaks off before its last boundary.", code="invalid_form")
        count += 1
        if count > MOST_PARTS:
            raise BadRequest(f"The form has more than {MOST_PARTS} parts.", code="invalid_form")
        yield _part(raw, line + 2, end)
        at = end + 2


def _part(raw: bytes, start: int, end: int) -> Part:
    head_end = raw.find(b"\r\n\r\n", max(start - 2, 0), min(end, start + MAX_PART_HEAD))
    if head_end < 0:
        raise BadRequest("A part of the form has no headers, or too many.", code="invalid_form")
    head = raw[start:head_end]
    lines = [line.partition(b":") for line in head.split(b"\r\n")]
    told = [value for name, _, value in lines if name.lower() == b"content-disposition"]
    odd = _ODD_LINE.search(head) is not None or not all(
        colon and _FIELD_NAME.fullmatch(name) for name, colon, _ in lines
    )
    kind, options = _options(told[0]) if len(told) == 1 and not odd else (b"", {})
    if kind != b"form-data" or b"name" not in options:
        raise BadRequest("A part of the form has no name, or two.", code="invalid_form")
    filename = options.get(b"filename", b"" if b"filename*" in options else None)
    text = None if filename is None else filename.decode("utf-8", "replace")
    return Part(options[b"name"].decode("utf-8", "replace"), text, head_end + 4, end)


def _options(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """`form-data; name="a"` taken apart. Names given twice, and encoded ones besides `filename*`, are refused."""
    kind = value.partition(b";")[0]
    value = value.rstrip(b" \t;")
    found: dict[bytes, bytes] = {}
    at = len(kind)
    while at < len(value):
        option = _OPTION.match(value, at)
        name = option[1].lower() if option is not None else b""
        doubtful = name in found or (b"*" in name and name != b"filename*") or len(found) == MOST_OPTIONS
        if option is None or doubtful:
            raise BadRequest("The form has a header that cannot be read.", code="invalid_form")
        found[name] = option[3] if option[2] is None else re.sub(rb'\\(["\\])', rb"\1", option[2])
        at = option.end()
    return kind.strip().lower(), found
