"""The usual chunk in one step: from a read of the upstream's socket to a write to the client's.

While a stream runs steadily, a read brings one HTTP chunk with one event that a `Template` knows, and it leaves as one
HTTP chunk with other bytes around the same JSON string (and OpenAI's padding). A lane does for such a read what its
source, the decoder, `ChatStream.pass_piece` and the way out do for it one after the other; of any other read it says
False, and has done nothing. It may be used while nothing waits in any of them: until a read that it does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import orjson

from gateway.wire.assemble import Assembler
from gateway.wire.template import Template

LONGEST = 4096
"""Of the reads that a lane takes."""
_MOST_LENGTHS = 128
_CRLF = b"\r\n"
_QUOTE = 0x22

Lane = Callable[[bytes], bool]
PassChunk = Callable[[bytes], float | None]
"""Writes a whole HTTP chunk and tells the time. None: nothing was done, for more than that would be to do."""


class Source(Protocol):
    """Where a lane's reads come from."""

    lane: Lane | None
    """The one that is asked about each read, before anybody else is."""

    came_at: float
    """When the lane has taken a read."""

    @staticmethod
    def chunk_start(length: int) -> bytes:
        """The first line of an HTTP chunk of so many bytes in all; empty if there is none."""


FindLane = Callable[[Source], Lane | None]


def new_lane(
    template: Template, pieces: list[str], answer: Assembler, most: int, source: Source, pass_chunk: PassChunk
) -> Lane:
    """For a template `in_place`. The texts go to `pieces`; with more than `most` characters an answer is not passed."""
    middle, leaving_middle, quote = template.middle, template.leaving_middle, template.middle[:1]
    tail, leaving_tail = quote + template.behind + _CRLF, quote + template.leaving_behind + _CRLF
    before, leaving_before, changed = template.before, template.leaving_before, template.changed
    leaving_between = leaving_middle.removeprefix(quote)
    longest, grows = template.shortest_two or LONGEST, len(leaving_middle) - len(middle)
    frames: dict[int, tuple[bytes, int, bytes]] = {}
    append = pieces.append

    def frame_of(length: int) -> tuple[bytes, int, bytes] | None:
        """For a read of so many bytes: what stands before the string, how long that is (with all up to the end of the
        padding, if there is one), what stands before it then."""
        start = source.chunk_start(length)
        size = length - len(start) - len(before) - len(tail)
        event = length - len(start) - len(_CRLF)
        if not start or size < 2 or event >= longest or length > LONGEST or len(frames) >= _MOST_LENGTHS:
            return None
        leaving = b"%x\r\n" % (len(leaving_before) + size + grows + len(leaving_tail) - len(_CRLF))
        frame = frames[length] = start + before, size, leaving + leaving_before
        return frame

    def lane(data: bytes) -> bool:
        frame = frames.get(len(data)) or frame_of(len(data))
        if frame is None:
            return False
        head, size, leaving_head = frame
        string = data.removeprefix(head).removesuffix(tail)
        if len(string) != size:
            return False
        rest = leaving_tail
        if middle:
            string, _, padding = string.partition(middle)
            if not padding.isalnum():
                return False
            string += quote
            rest = leaving_between + padding + leaving_tail
        try:
            text = orjson.loads(string)
        except orjson.JSONDecodeError:
            return False
        if not string[0] == string[-1] == _QUOTE:  # another value, or blanks around it
            return False
        characters = answer.characters + len(text)
        if characters > most:
            return False
        at = pass_chunk(leaving_head + string + rest if changed else data)
        if at is None:
            return False
        append(text)
        answer.characters = characters
        source.came_at = at
        return True

    return lane
