"""Token counts for turns whose upstream reported none; such a row says `counted_by` = gateway.

Rules:

- Models whose encoding tiktoken names as cl100k_base or o200k_base are counted in it, from rank files that lie in the
  package: no network, no shared cache. For all others it is an estimate: characters divided by four, rounded up.
- As OpenAI documents for chat, a message costs three tokens and its role, a name one more than its text, the start of
  the answer three. Tool calls are their names and arguments, tool definitions their JSON text: models see another form
  of it that is not public, so this part is near, not exact. Pictures and sound count nothing.
- Text is text: `<|endoftext|>` is no special token, a lone surrogate counts as U+FFFD.
- One thread for each worker counts, `SLICE` characters at a time; callers take turns after each slice, so memory stays
  flat and a long text delays nobody. A slice ends before a space that follows something else, where both encodings
  split in any case; a longer run without such a space is cut, which may count a token more for each cut. What is
  shorter than the way to the thread and back is counted at once.
- A count never fails. What cannot be counted is estimated, and the log says why.

An encoding is read when it is first needed, in the thread: 0.2 s and 41 MB for cl100k_base, 0.4 s and 77 MB for
o200k_base. In the last part of it, 0.05 and 0.13 s, tiktoken builds its tables and lets nothing else of the worker run.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import lzma
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, NamedTuple

from gateway.wire.chat import Message, Usage
from gateway.wire.jsontext import dumps

if TYPE_CHECKING:
    from tiktoken import Encoding

log = logging.getLogger("gateway.tokens")

CHARACTERS_PER_TOKEN = 4
SLICE = 16_384
MOST_SECONDS = 3.0
_AT_ONCE = 1_000
_PER_PIECE = 16  # a piece costs time even if it is empty; in characters
_MESSAGE, _NAME, _ANSWER = 4, 1, 3

Piece = tuple[str, int]
"""A text, and the tokens that come with it beside its own."""


class RankFile(NamedTuple):
    """What is fixed about an encoding: its rank file, by digest, and the pattern that splits text beforehand."""

    sha256: str
    pattern: str


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
RANK_FILES = {
    "cl100k_base": RankFile(
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ),
    "o200k_base": RankFile(
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}|{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
_SAME_RANKS = {"o200k_harmony": "o200k_base"}
_BARE_FAMILIES = {"gpt-oss": "gpt-oss-"}  # `gpt-oss:20b`, as Ollama has it; tiktoken knows `gpt-oss-20b`


class TokenCounter:
    """One for each worker; makes its thread on first use."""

    def __init__(self, folder: Traversable | None = None) -> None:
        self._encodings = _Encodings(folder or files("gateway") / "data")
        self._thread: ThreadPoolExecutor | None = None

    async def usage(
        self,
        model: str,
        messages: Sequence[Message],
        answers: Sequence[Message],
        *,
        tools: object = None,
        hurried: Callable[[], bool] = lambda: False,
    ) -> Usage:
        """Of a chat: everything that was sent to the model, and all choices that it gave. Once `hurried`, or after
        `MOST_SECONDS`, what is left is estimated: a record must not come too late for the sake of its figures."""
        return Usage(
            input_tokens=await self._count(model, lambda: _prompt(messages, tools), hurried),
            output_tokens=await self._count(model, lambda: _answers(answers), hurried),
        )

    async def text(self, model: str, texts: Sequence[str], *, hurried: Callable[[], bool] = lambda: False) -> int:
        """Of plain texts, as in completions, embeddings and speech."""
        return await self._count(model, lambda: ((text, 0) for text in texts), hurried)

    async def knows(self, model: str) -> bool:
        """Are counts for it exact, or are they estimates?"""
        if self._encodings.knows(model):
            return self._encodings.find(model) is not None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor(), self._encodings.find, model) is not None

    def close(self) -> None:
        """Ends the thread when what it was given is done."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _count(self, model: str, pieces: Callable[[], Iterator[Piece]], hurried: Callable[[], bool]) -> int:
        tally = _Tally(pieces())
        if self._encodings.knows(model) and _is_short(pieces()):
            while tally.take(self._encodings.find(model)):
                pass
            return tally.tokens
        loop = asyncio.get_running_loop()
        end = loop.time() + MOST_SECONDS
        left = True
        while left and not hurried() and loop.time() < end:
            left = await loop.run_in_executor(self._executor(), lambda: tally.take(self._encodings.find(model)))
        while left:
            left = tally.take(None)
        return tally.tokens

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "tokens")
        return self._thread


def _estimated(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)


# --- what counts


def _prompt(messages: Iterable[Message], tools: object) -> Iterator[Piece]:
    for message in messages:
        yield "", _MESSAGE
        if name := _string(message.get("name")):
            yield name, _NAME
        for text in _texts(message):
            yield text, 0
    if tools:
        yield dumps(tools).decode(), 0
    yield "", _ANSWER


def _answers(messages: Iterable[Message]) -> Iterator[Piece]:
    return ((text, 0) for message in messages for text in _texts(message))


def _texts(message: Message) -> Iterator[str]:
    """Also the empty ones: who walks through a message wants to know how far it is."""
    content = message.get("content")
    for part in content if isinstance(content, list) else ({"text": content},):
        yield _string(part.get("text")) or _string(part.get("refusal")) if isinstance(part, dict) else ""
    yield _string(message.get("reasoning_content")) or _string(message.get("reasoning"))
    yield _string(message.get("refusal"))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        yield from _call(call)
    if message.get("function_call"):
        yield from _call({"function": message["function_call"]})


def _call(call: object) -> Iterator[str]:
    """Name and arguments of a function, name and input of a custom tool, the JSON text of what else there may be."""
    for kind, given in (("function", "arguments"), ("custom", "input")):
        called = call.get(kind) if isinstance(call, dict) else None
        if isinstance(called, dict):
            yield _string(called.get("name"))
            yield _string(called.get(given))
            return
    yield dumps(call).decode()


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


# --- counting


class _Tally:
    """Adds up pieces, some at a time; without an encoding it estimates."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = ((part, beside) for text, beside in pieces for part, beside in _sliced(text, beside))
        self._tokens = 0
        self._characters = 0

    @property
    def tokens(self) -> int:
        return self._tokens + _estimated(self._characters)

    def take(self, encoding: Encoding | None) -> bool:
        """Counts about `SLICE` characters; False if that was all."""
        room = SLICE
        for text, beside in self._pieces:
            if encoding is None or (tokens := _tokens(encoding, text)) is None:
                self._characters += len(text)
            else:
                self._tokens += tokens + beside
            room -= len(text) + _PER_PIECE
            if room <= 0:
                return True
        return False


def _tokens(encoding: Encoding, text: str) -> int | None:
    try:
        return len(encoding.encode_ordinary(text))
    except BaseException as failure:  # a panic in tiktoken is no Exception
        if isinstance(failure, (KeyboardInterrupt, SystemExit)):
            raise
        log.warning("%s cannot count %d characters, they are estimated: %s", encoding.name, len(text), failure)
        return None


def _is_short(pieces: Iterable[Piece]) -> bool:
    room = _AT_ONCE
    for text, _ in pieces:
        room -= len(text) + _PER_PIECE
        if room < 0:
            return False
    return True


def _sliced(text: str, beside: int) -> Iterator[Piece]:
    start = 0
    while len(text) - start > SLICE:
        end = _cut(text, start + SLICE // 2, start + SLICE)
        yield text[start:end], beside
        start, beside = end, 0
    yield text[start:], beside


def _cut(text: str, least: int, most: int) -> int:
    """Before the last space that follows something else."""
    place = text.rfind(" ", least, most)
    while place > 0 and text[place - 1].isspace():
        place = text.rfind(" ", least, place)
    return place if place > 0 else most


# --- encodings


class _Encodings:
    """The encodings of a worker, each read when it is first needed; what is broken is reported once, and is None."""

    def __init__(self, folder: Traversable) -> None:
        self._folder = folder
        self._name_for: Callable[[str], str] | None = None
        self._found: dict[str | None, Encoding | None] = {None: None}

    def knows(self, model: str) -> bool:
        """Does `find` answer at once?"""
        return self._name_for is not None and self._name(model) in self._found

    def find(self, model: str) -> Encoding | None:
        """The encoding of a model, or None if it has to be estimated. Takes long when an encoding has to be read."""
        if self._name_for is None:
            self._name_for = _import_names()
        name = self._name(model)
        if name is not None and name not in self._found:
            self._found[name] = self._read(name)
        return self._found[name]

    def _name(self, model: str) -> str | None:
        """Also for `vendor/model`, `ft:model:organisation`, `model:variant`; None: there is no rank file."""
        assert self._name_for is not None
        bare = model.rpartition("/")[2].removeprefix("ft:").partition(":")[0]
        try:
            name = self._name_for(_BARE_FAMILIES.get(bare, bare))
        except KeyError:
            return None
        name = _SAME_RANKS.get(name, name)
        return name if name in RANK_FILES else None

    def _read(self, name: str) -> Encoding | None:
        file = f"{name}.tiktoken.xz"
        try:
            return _encoding(name, self._folder.joinpath(file).read_bytes())
        except Exception as failure:
            log.warning("%s cannot be used, tokens are estimated: %s", file, failure)
            return None


def _import_names() -> Callable[[str], str]:
    try:
        from tiktoken.model import encoding_name_for_model
    except ImportError as failure:
        log.warning("tiktoken cannot be imported, tokens are estimated: %s", failure)
        nothing: dict[str, str] = {}
        return nothing.__getitem__
    return encoding_name_for_model


def _encoding(name: str, packed: bytes) -> Encoding:
    """Raises ValueError if it is not the file it should be."""
    from tiktoken import Encoding

    raw = lzma.decompress(packed)
    if hashlib.sha256(raw).hexdigest() != RANK_FILES[name].sha256:
        raise ValueError("its digest is not the one of the original")
    lines = (line.split() for line in raw.splitlines())
    ranks = {b64decode(token): int(rank) for token, rank in lines}
    return Encoding(name, pat_str=RANK_FILES[name].pattern, mergeable_ranks=ranks, special_tokens={})
