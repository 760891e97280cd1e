"""A chat stream on its way to the client: what leaves at once, what is held, what the end carries.

Rules (contract, section 4). Not asked for usage: each `usage: null` that we caused is taken out, and the last choice's
`finish_reason` chunk is held until the turn is durable; it is the last one then and carries `usage` with `cost`,
`timings` and `conversation_id`. Asked: the usage chunk is the held one. All other chunks leave as they came. Chunks
with an empty `choices` array that nobody asked for are dropped. Usage appears once: where an upstream sends it on
other chunks too, it is null there. `[DONE]` appears once. An upstream that never says why it ended gets a
`finish_reason` chunk from us. What is broken is put right first (`wire.chunk_repair`); what is recorded is what leaves.

Most chunks differ from the one before in their text only and are not parsed: see `wire.template`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from gateway.wire import WireError, repair, splice, sse
from gateway.wire.assemble import Assembler
from gateway.wire.chat import Chunk, Usage
from gateway.wire.chunk_edit import counted, last_words, said_and_end, with_last_words, without_usage
from gateway.wire.chunk_repair import ChunkRepair, no_less
from gateway.wire.failures import StreamedError, error_in
from gateway.wire.jsontext import dumps
from gateway.wire.known import Known
from gateway.wire.lane import Lane, PassChunk, Source, new_lane
from gateway.wire.operation import CHAT
from gateway.wire.template import MARK, Probe, Template, plain_parts
from gateway.wire.whole import Whole

__all__ = ["ChatStream", "StreamedError"]

_parsed = orjson.loads
_QUOTE = ord('"')
_MOST_CHARACTERS = 32 << 20
"""Of one answer. What streams past this is a broken upstream, not an answer."""
_MOST_PROBES = 16
"""Learning costs as much as reading two more chunks, and some upstreams never send the same twice."""
_WORTH_IT = 8
"""Chunks that a template has to spare us, so that it does not count as a probe."""


class ChatStream:
    """Feed it the upstream's chunks; it gives the bytes that may leave now and remembers what the record needs."""

    __slots__ = (
        *("_begun", "_held", "_known", "_known_end", "_lane", "_may_know", "_probes", "_repair", "_template", "_texts"),
        *("_usage_data", "_wants_usage", "_whole", "_worth_it"),
        *("answer", "failure", "service_tier", "timings", "usage", "usage_doubted"),
    )

    def __init__(
        self, *, wants_usage: bool, operation: str = CHAT, model: str = "", at: int = 0, id: str | None = None
    ) -> None:
        """`operation`: chat/completions, or the older completions. `model` and `at` (Unix seconds) are for upstreams
        that leave these out. `id`: the answer has this one instead of its upstream's, and `whole` gives all of it."""
        self._wants_usage = wants_usage
        self._repair = ChunkRepair(operation, model=model, at=at, id=id or "")
        self._whole = Whole() if id else None
        self._may_know = not wants_usage and not id and operation == CHAT
        self._known: Known | None = None
        self._known_end: tuple[Chunk, bytes, bytes] | None = None
        self._template: Template | None = None
        self._lane: tuple[Template, Source, Lane] | None = None
        self._probes = 0
        self._worth_it = 0
        self._begun = False
        self._texts: list[list[str]] = []
        self._held: Chunk | None = None
        self._usage_data: Mapping[str, Any] | None = None
        self.answer = Assembler()
        self.usage: Usage | None = None
        self.usage_doubted = False
        """Was something told that cannot be true?"""
        self.timings: object = None
        self.service_tier: str | None = None
        self.failure: StreamedError | WireError | None = None

    def feed(self, chunks: Sequence[Chunk]) -> bytes:
        """Raises StreamedError, or WireError for a chunk that is none. What came before it in the same read leaves
        first: the failure is then kept in `failure`, to be raised instead of reading on."""
        if self.failure is not None:
            raise self.failure
        if not chunks:
            return b""
        leaving: list[bytes] = []
        try:
            for chunk in chunks:
                usual = self._template.read(chunk.raw) if self._template is not None else None
                if usual is None:
                    self._one(chunk, leaving)
                else:
                    text, raw = usual
                    for pieces in self._texts:
                        pieces.append(text)
                    self.answer.characters += len(text)
                    leaving.append(raw)
            if self.answer.characters > _MOST_CHARACTERS:
                raise WireError("the answer is longer than any answer can be")
        except (StreamedError, WireError) as failure:
            if not leaving:
                raise
            self._template, self.failure = None, failure
        return sse.encode(leaving)

    def pass_piece(self, write: Callable[[bytes], bool], piece: bytes) -> bool | None:
        """Writes, for one read of the upstream's socket that begins and ends with an event, what `feed` would give for
        its chunks, and says what `write` says. None: they are not of the usual kind, and nothing was done."""
        template = self._template
        if template is None:
            return None
        string = piece.removeprefix(template.before).removesuffix(template.behind)
        size = len(piece)
        if size >= template.shortest_two or size - len(string) != template.around:
            leaving = self._pass_events(template, piece)
            return None if leaving is None else write(leaving)
        try:
            text = _parsed(string)
        except orjson.JSONDecodeError:
            return None
        if not string[0] == string[-1] == _QUOTE:  # another value, or blanks around it
            return None
        answer = self.answer
        characters = answer.characters + len(text)
        if characters > _MOST_CHARACTERS:
            return None
        for pieces in self._texts:
            pieces.append(text)
        answer.characters = characters
        return write(template.leaving_before + string + template.leaving_behind if template.changed else piece)

    def pass_no_pieces(self) -> None:
        """From now on every chunk is taken apart."""
        self._template, self._probes = None, _MOST_PROBES
        if self._lane is not None:
            self._lane[1].lane = None

    def lane(self, pass_chunk: PassChunk, source: Source) -> Lane | None:
        """What does the work of `pass_piece` for the next reads of `source`, the same one each time; see there."""
        template = self._template
        if template is None or not template.in_place or len(self._texts) != 1:
            return None
        if self._lane is None or self._lane[0] is not template:
            lane = new_lane(template, self._texts[0], self.answer, _MOST_CHARACTERS, source, pass_chunk)
            self._lane = template, source, lane
        return self._lane[2]

    def _pass_events(self, template: Template, piece: bytes) -> bytes | None:
        usual = template.events(piece)
        if usual is None:
            return None
        texts, leaving = usual
        characters = self.answer.characters + sum(map(len, texts))
        if characters > _MOST_CHARACTERS:
            return None
        for pieces in self._texts:
            pieces += texts
        self.answer.characters = characters
        return leaving

    def _one(self, chunk: Chunk, leaving: list[bytes]) -> None:
        if self._template is not None:
            self._forget()
        if self._may_know and self._is_known(chunk, leaving):
            return
        try:
            data = chunk.data
        except ValueError as failure:
            raise WireError(f"a chunk is not valid JSON: {failure}") from None
        choices = data.get("choices")
        if not choices or "error" in data or data.get("object") == "error":
            error = error_in(data)
            if error is not None:
                raise StreamedError(error)
        self._note(data)
        if not isinstance(choices, list) or not choices:
            self._hold_usage_chunk(chunk)
            return
        right = self._repair.chunk(data)
        if right is None:
            return
        self.answer.add(right["choices"])
        tells_more = self._whole is not None and self._whole.add(right)
        ended = self._pass(chunk if right is data else Chunk(data=right), leaving)
        if self._begun and not tells_more and not ended and self._held is None and self._probes < _MOST_PROBES:
            self._learn(chunk, usual=right is data)
        self._begun = True  # the first one tells the role: no other is like it

    # --- chunks whose likes other streams had: to the same effect as below, tests hold the one to the other

    def _is_known(self, chunk: Chunk, leaving: list[bytes]) -> bool:
        """False: nothing was done."""
        if self._known is None:
            self._may_know = self._opens(chunk.raw, leaving)
            return self._may_know
        return self._ends(chunk) or self._tells_usage(chunk.raw)

    def _opens(self, raw: bytes, leaving: list[bytes]) -> bool:
        known = Known.of(raw)
        if known is None:
            return False
        self._known = known
        self._repair.begin(known.told)
        self.answer.say(known.opening.text)
        self.service_tier = known.opening.tier
        self._begun = True
        leaving.append(known.first)
        if self._probes < _MOST_PROBES and (template := known.template()) is not None:
            self._probes += 1
            self._texts, self._worth_it = [self.answer.pieces(0, "content")], _WORTH_IT + 1
            self._template = template
        return True

    def _ends(self, chunk: Chunk) -> bool:
        """The sole choice."""
        assert self._known is not None
        found = self._known.ending(chunk.raw) if self._held is None else None
        if found is None or not self._repair.end():
            return False
        ending, before, behind = found
        self.answer.say(ending.text, ending.reason)
        self.service_tier = ending.tier or self.service_tier
        self._held, self._known_end = chunk, (chunk, before, behind)
        return True

    def _tells_usage(self, raw: bytes) -> bool:
        assert self._known is not None
        told = self._known.usage(raw)
        if told is None:
            return False
        usage, tier = told
        self.service_tier = tier or self.service_tier
        self._note_usage(usage)
        return True

    # --- all others

    def _note(self, data: Mapping[str, Any]) -> None:
        tier = data.get("service_tier")
        if isinstance(tier, str):
            self.service_tier = tier
        if "timings" in data:
            self.timings = data["timings"]
        if data.get("usage") is None and "x_groq" not in data:
            return
        self._note_usage(repair.told_usage(data))

    def _note_usage(self, said: object) -> None:
        """The last that was told, and no count less than it was told before."""
        usage = repair.usage(said)
        told = Usage.read(usage) if usage is not None else None
        if usage is None or told is None:
            self.usage_doubted = self.usage_doubted or repair.is_untrue(said)
            return
        before = self.usage
        if before and (told.input_tokens < before.input_tokens or told.output_tokens < before.output_tokens):
            self.usage_doubted = True
            if told.input_tokens <= before.input_tokens and told.output_tokens <= before.output_tokens:
                return
            usage = no_less(self._usage_data or {}, usage)
            told = Usage.read(usage)
        self._usage_data, self.usage = usage, told

    def _hold_usage_chunk(self, chunk: Chunk) -> None:
        if self._whole is not None:
            self._whole.add_about(chunk.data)
        if self._wants_usage and isinstance(chunk.data.get("usage"), dict):
            right = self._repair.named(chunk.data)
            if not isinstance(right.get("choices"), list):
                right = {**right, "choices": []}
            self._held = chunk if right is chunk.data else Chunk(data=right)

    def _pass(self, chunk: Chunk, leaving: list[bytes]) -> bool:
        """What comes behind the end of a choice (a filter's verdict, more text from an upstream that says the end with
        every chunk) overtakes that end, and nothing that was said with it. Is it such an end?"""
        ends = False
        for choice in chunk.data["choices"]:
            if choice.get("finish_reason"):
                ends = True
        if not self._wants_usage and (ends or not self.answer.finish_reasons or not self.finished):
            if self._held is not None:
                leaving.append(self._clean(self._held.raw, self._held.data))
            self._held = chunk if ends else None
            if ends:
                return True
        elif self._held is not None and not self._wants_usage:
            self._let_go_what_it_says(self._held, leaving)
        leaving.append(self._clean(chunk.raw, chunk.data) if "usage" in chunk.data else chunk.raw)
        return ends

    def _let_go_what_it_says(self, held: Chunk, leaving: list[bytes]) -> None:
        """The end stays held, alone."""
        parts = said_and_end(held.data)
        if parts is not None:
            said, end = parts
            leaving.append(self._clean(dumps(said), said))
            self._held = Chunk(data=end)

    def _clean(self, raw: bytes, data: Mapping[str, Any]) -> bytes:
        """A chunk without its usage, or with null for it where the client asked for a usage chunk."""
        if "usage" not in data:
            return raw
        if self._wants_usage:
            return raw if data["usage"] is None else splice.edit(raw, data, {"usage": b"null"})
        return without_usage(raw, data)

    def _learn(self, chunk: Chunk, *, usual: bool) -> None:
        """A template for the next chunk, if it is like this one. `usual`: nothing had to be put right."""
        if not (usual and self._learn_at_once(chunk.raw, chunk.data)):
            self._learn_by_probe(chunk)
        if self._template is not None:
            self._worth_it = len(self._texts[0]) + _WORTH_IT

    def _learn_at_once(self, raw: bytes, data: Mapping[str, Any]) -> bool:
        """Where the text of a chunk stands for certain, and its usage too, nothing has to be tried."""
        plain = plain_parts(raw, data, without_usage=not self._wants_usage)
        if plain is None:
            return False
        key, parts, leaving = plain
        self._probes += 1
        self._texts = [self.answer.pieces(data["choices"][0]["index"], key)]
        self._template = Template(parts, leaving, rewritten=False)
        return True

    def _learn_by_probe(self, chunk: Chunk) -> None:
        probe = Probe.of(chunk.raw, chunk.data)
        if probe is None:
            return
        self._probes += 1
        right = self._repair.next(probe.data)
        self._texts = list(self._marked(right["choices"][0])) if right is not None else []
        if right is None or not self._texts:
            return
        raw = probe.raw if right is probe.data else dumps(right)
        self._template = probe.template(right, self._clean(raw, right))

    def _forget(self) -> None:
        self._probes -= len(self._texts[0]) >= self._worth_it
        self._template = None

    def _marked(self, choice: dict[str, Any]) -> Iterator[list[str]]:
        """Where the text of a chunk goes in the record: the places where the probe has its mark."""
        index = choice["index"]
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            yield self.answer.pieces(index, "content")
            return
        yield from (self.answer.pieces(index, key) for key, value in delta.items() if value == MARK)
        for piece in delta.get("tool_calls") or ():
            yield self.answer.arguments(index, piece["index"])
            yield self._repair.arguments(index, piece["index"])

    @property
    def finished(self) -> bool:
        """Has every choice seen so far got its `finish_reason`?"""
        return bool(self.answer.finish_reasons) and set(self.answer.indexes) <= set(self.answer.finish_reasons)

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reasons.get(0)

    @property
    def assumed_finish_reason(self) -> str:
        """For an upstream that ended its stream properly and never said why."""
        return "tool_calls" if "tool_calls" in self.answer.message() else "stop"

    def end(self, usage: Usage, cost: object, extra: Mapping[str, Any]) -> bytes:
        """The held chunk with usage, cost and `extra` members in it, then `[DONE]`."""
        usage_said = counted(self._usage_data, usage, cost)
        if self._known_end is not None and self._known_end[0] is self._held:
            return b"data: %b\n\ndata: [DONE]\n\n" % last_words(*self._known_end[1:], usage_said, extra)
        chunk = self._held or (self._made_up_chunk([]) if self._wants_usage else self._made_up_finish())
        leaving = [with_last_words(chunk.raw, chunk.data, {"usage": usage_said, **extra}), sse.DONE]
        if self._wants_usage and not self.answer.finish_reasons:
            leaving.insert(0, self._made_up_finish().raw)
        return sse.encode(leaving)

    def whole(self, usage: Usage, cost: object, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The answer as one object, as it would have been without a stream. For a stream with an `id`, at its end."""
        assert self._whole is not None
        last = {"usage": counted(self._usage_data, usage, cost), **extra}
        return self._whole.completion(self._repair.name, self.answer, self.assumed_finish_reason, last)

    def _made_up_finish(self) -> Chunk:
        """For an upstream that never said why it ended."""
        return self._made_up_chunk([self._repair.closing(0, self.finish_reason or self.assumed_finish_reason)])

    def _made_up_chunk(self, choices: list[Any]) -> Chunk:
        """A chunk in the upstream's name."""
        return Chunk(data={**self._repair.name, "choices": choices})
