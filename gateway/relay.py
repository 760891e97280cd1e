"""Chat: a whole reply, or a stream of chunks, edited on its way and recorded as a turn. Rules of its own: `call`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NoReturn

from gateway.backends.base import ChunkStream
from gateway.call import Call, Reply, backend_failed, cut_short
from gateway.catalog import Route
from gateway.errors import GatewayError, UpstreamError
from gateway.metering import Outcome, milliseconds_since, timings, told_tier
from gateway.pricing import usd
from gateway.store.usage import UsageRow
from gateway.wire import WireError, repair, splice
from gateway.wire.chat import ChatRequest, Chunk, Completion, CompletionRequest, Message, Usage, take_apart, text_of
from gateway.wire.failures import StreamedError, streamed_error
from gateway.wire.jsontext import dumps, loads
from gateway.wire.lane import PassChunk
from gateway.wire.stream import ChatStream

DRAIN_CHARACTERS = 4 * 2000


class Exchange(Call[ChatRequest]):
    """A whole chat reply, or the reply of the older completions."""

    _served_as: str | None = None

    async def complete(self) -> Reply:
        """The whole reply, recorded. Raises GatewayError."""
        drain, stop = self._relay.drain, self.interrupt
        try:
            drain.enter(stop)
            try:
                completion = await self._try_routes(_ask_for_all, self._mended)
            except GatewayError as failure:
                raise await self._record_failure(failure) from None
            finally:
                self._stop_timer()
            return await self._record_completion(completion)
        finally:
            self._give_back()
            drain.leave(stop)

    def _mended(self, completion: Completion) -> Completion:
        """Fit for our client. Raises UpstreamError."""
        assert self.route is not None
        told = completion.data
        if not isinstance(told.get("choices"), list):
            raise UpstreamError("The upstream sent something that is no valid reply.", log="no 'choices' array")
        self._served_as = told_tier(told.get("service_tier"))  # before it is mended
        try:
            mended = repair.completion(completion, model=self.route.upstream_model, at=self.job.at // 1000)
        except StreamedError as failure:
            raise streamed_error(failure.error) from None
        if mended is not completion and mended.data.get("usage") is None and repair.is_untrue(told.get("usage")):
            self._doubt_usage()
        return mended

    async def _estimate(self, answers: list[Message]) -> Usage:
        request, count = self.job.request, self._relay.counter
        if isinstance(request, CompletionRequest):
            texts, tokens = take_apart(request.data.get("prompt"))
            said = [text_of(answer.get("content")) for answer in answers]
            asked = tokens + await count.text(self._counted_model, texts, hurried=self._hurried)
            told = await count.text(self._counted_model, said, hurried=self._hurried)
            return Usage(input_tokens=asked, output_tokens=told)
        tools = request.data.get("tools")
        return await count.usage(self._counted_model, request.messages, answers, tools=tools, hurried=self._hurried)

    async def _record_completion(self, completion: Completion) -> Reply:
        choices = completion.data["choices"]
        answer, reason = (_message(choices[0]), choices[0].get("finish_reason")) if choices else (None, None)
        told = completion.usage
        if told is None:
            told = Usage.read(completion.data.get("usage"))
        if told is not None:
            outcome = self._outcome_as_told(told, reason)
        else:
            outcome = await self._outcome(None, [_message(choice) for choice in choices], reason)
        outcome.service_tier = self._served_as
        row = self._row(outcome)
        cost = usd(row.cost_nanousd)
        if self.job.keep is not None:
            self._keep_answer(loads(self._reply_body(completion, outcome, row, cost)), row)
        turn = self._turn(answer, row)
        await self._relay.ledger.record(turn)
        self._was_recorded(turn)
        return Reply(self._reply_body(completion, outcome, row, cost), cost)

    def _reply_body(self, completion: Completion, outcome: Outcome, row: UsageRow, cost: float | None) -> bytes:
        data, talk, price = completion.data, self.job.talk, dumps(cost)
        extended = None
        if self.job.keep is None and outcome.counted_by == "upstream" and _adds_nothing_told(data):
            added = [b',"cost":', price]
            if talk is not None:
                added += (b',"conversation_id":', dumps(talk.id))
            if "timings" not in data:
                added += (b',"timings":', dumps(timings(outcome, row)))
            extended = splice.extended(completion.raw, data, "usage", added[:2], added)
        return self._edited_body(completion, outcome, row, cost) if extended is None else extended

    def _edited_body(self, completion: Completion, outcome: Outcome, row: UsageRow, cost: float | None) -> bytes:
        """Whatever the upstream has told of what is ours to tell."""
        data, conversation_id = completion.data, self.conversation_id
        told, priced = data.get("usage"), {"cost": dumps(cost)}
        changes: dict[str, splice.Change] = {**priced}
        if isinstance(told, dict) and outcome.counted_by == "upstream":
            changes["usage"] = lambda text: splice.edit(text, told, priced)
        else:
            changes["usage"] = dumps({**outcome.usage.to_openai(), "cost": cost})
        if conversation_id is not None:
            changes["conversation_id"] = dumps(conversation_id)
        if self.job.keep is not None:
            changes["id"] = dumps(self.job.keep.id)
        if "timings" not in data:
            changes["timings"] = dumps(timings(outcome, row))
        return splice.edit(completion.raw, data, changes)

    def _keep_answer(self, answer: dict[str, Any], row: UsageRow) -> None:
        """For an answer that came to its end, as the client will see it; it is stored with the turn."""
        if self.job.keep is not None:
            self._stored = self.job.keep.completed(answer, self.job.caller, row.model, row.created_at)


def _adds_nothing_told(data: dict[str, Any]) -> bool:
    """Has the upstream told neither a cost nor a conversation?"""
    told = data.get("usage")
    return type(told) is dict and not ("cost" in told or "cost" in data or "conversation_id" in data)


def _ask_for_all(route: Route, request: ChatRequest) -> Coroutine[Any, Any, Completion]:
    return route.backend.complete(request)


class StreamExchange(Exchange):
    """A streamed exchange. `open` once, then `read` until `ended`; every call gives the bytes that may leave."""

    ended = False
    pass_chunk: PassChunk | None = None
    """Set it where what `read` writes leaves in HTTP chunks; it is as good as `write` then."""
    _editor: ChatStream
    _stream: ChunkStream | None = None
    _ttft_ms: int | None = None
    _seen_when_left = 0
    _closing: asyncio.Task[None] | None = None

    async def open(self) -> bytes:
        """The first bytes, once the first chunk has come. Raises GatewayError, recorded."""
        try:
            return await self._try_routes(self._open_once)
        except GatewayError as failure:
            self.ended = True
            self._stop_timer()
            raise await self._record_failure(failure) from None
        finally:
            if self._stream is None:
                self._give_back()

    async def read(self, write: Callable[[bytes], bool] | None = None) -> bytes:
        """The next bytes; may be empty. The last ones come after the turn is durable. Raises GatewayError, recorded.

        `write`, if given, is called with what comes meanwhile, until it returns False or the end is near."""
        stream, editor = self._stream, self._editor
        assert stream is not None
        try:
            if self._broken_off:
                await self._end_early(UpstreamError("The call was broken off."))
            try:
                pushing = self._pushing(write)
                if pushing is not None:
                    await pushing
                if editor.failure is not None:
                    raise _as_upstream_error(editor.failure)
                chunks = await stream.read()
                leaving = self._feed(chunks)
                if not chunks and not (stream.complete or editor.finished):
                    raise UpstreamError("The upstream broke off its answer.", log="stream ended without its end mark")
            except UpstreamError as failure:
                await self._end_early(failure)
            except Exception as failure:  # a backend's own mistake must not cost the turn its record
                await self._end_early(backend_failed(failure))
            if chunks:
                self._bound_drain()
                return leaving
            return await self._end()
        except GatewayError:
            self.ended = True
            raise
        finally:
            if self.ended:
                await self.close()

    async def close(self) -> None:
        self._stop_timer()
        self._give_back()
        if self._stream is not None:
            await self._stream.close()

    def client_left(self) -> None:
        if self._stream is not None:
            self._seen_when_left = self._editor.answer.characters
            self._editor.pass_no_pieces()  # `_pass_on` looks how much is read on
        super().client_left()

    def _break_off(self) -> None:
        super()._break_off()
        if self._stream is not None and self._closing is None:
            self._closing = asyncio.ensure_future(self._stream.close())

    async def _open_once(self, route: Route, request: ChatRequest) -> bytes:
        job = self.job
        self._editor = ChatStream(
            wants_usage=job.wants_usage,
            operation=job.request.operation,
            model=route.upstream_model,
            at=job.at // 1000,
            id=job.keep.id if job.keep is not None else None,
        )
        stream = await route.backend.stream(request)
        try:
            chunks = await stream.read()
            if not chunks:
                raise UpstreamError("The upstream ended its stream before it began.")
            self._ttft_ms = milliseconds_since(self._attempt_started)
            leaving = self._feed(chunks)
        except BaseException:
            await stream.close()
            raise
        self._stream = stream
        return leaving

    def _pushing(self, write: Callable[[bytes], bool] | None) -> Awaitable[None] | None:
        """What hands over to `write` what comes, where the stream can do that."""
        editor, way = self._editor, self.pass_chunk
        if self.stopped is not None:
            editor.pass_no_pieces()
        push = getattr(self._stream, "push", None)
        if write is None or push is None or editor.failure is not None:
            return None
        find_lane = None if way is None else partial(editor.lane, way)
        pushing: Awaitable[None] = push(partial(self._pass_on, write), partial(editor.pass_piece, write), find_lane)
        return pushing

    def _pass_on(self, write: Callable[[bytes], bool], chunks: Sequence[Chunk]) -> bool:
        leaving = self._feed(chunks)
        if self.stopped is not None:
            self._bound_drain()
        return (not leaving or write(leaving)) and self._editor.failure is None

    def _feed(self, chunks: Sequence[Chunk]) -> bytes:
        try:
            return self._editor.feed(chunks)
        except (StreamedError, WireError) as failure:
            raise _as_upstream_error(failure) from None

    def _bound_drain(self) -> None:
        seen = self._editor.answer.characters - self._seen_when_left
        if self.stopped == "client_disconnected" and seen > DRAIN_CHARACTERS:
            self._break_off()

    async def _end(self) -> bytes:
        self.ended = True
        outcome = await self._stream_outcome()
        if outcome.finish_reason is None:
            outcome.finish_reason = self._editor.assumed_finish_reason
        row = self._row(outcome)
        extra: dict[str, Any] = {"timings": self._editor.timings or timings(outcome, row)}
        if self.job.keep is not None:
            self._keep_answer(self._editor.whole(outcome.usage, usd(row.cost_nanousd), extra), row)
        turn = self._turn(self._editor.answer.message(), row)
        await self._relay.ledger.record(turn)
        self._was_recorded(turn)
        if self.conversation_id is not None:
            extra = {"conversation_id": self.conversation_id, **extra}
        return self._editor.end(outcome.usage, usd(row.cost_nanousd), extra)

    async def _end_early(self, failure: UpstreamError) -> NoReturn:
        """A broken answer: what came is recorded and billed, then the failure is raised."""
        self.ended = True
        outcome = await self._stream_outcome()
        if self.stopped is None:
            self._failed_midway(outcome, failure)
        row = self._row(outcome)
        await self._record(self._partial_answer(), row)
        if self.stopped == "interrupted":
            raise cut_short()
        raise failure

    def _partial_answer(self) -> Message | None:
        """What of a broken answer may stand in a history: no tool call, for its arguments may be half and no result
        will ever follow."""
        answer = self._editor.answer.message()
        if self._editor.finished:
            return answer
        kept = {key: value for key, value in answer.items() if key not in ("tool_calls", "function_call")}
        return kept if any(value for key, value in kept.items() if key != "role") else None

    async def _stream_outcome(self) -> Outcome:
        editor = self._editor
        if editor.usage_doubted:
            self._doubt_usage()
        told, answer = editor.usage, editor.answer
        if told is not None:
            outcome = self._outcome_as_told(told, editor.finish_reason)
        else:
            answers = [answer.message(index) for index in answer.indexes]
            outcome = await self._outcome(None, answers, editor.finish_reason)
        outcome.service_tier = editor.service_tier
        outcome.ttft_ms = self._ttft_ms
        return outcome


def _as_upstream_error(failure: StreamedError | WireError) -> UpstreamError:
    if isinstance(failure, StreamedError):
        return streamed_error(failure.error)
    return UpstreamError("The upstream sent something that is no valid chunk.", log=str(failure))


def _message(choice: dict[str, Any]) -> Message:
    """What a choice says; the text of the older completions as a message."""
    message = choice.get("message")
    return message if isinstance(message, dict) else {"role": "assistant", "content": choice.get("text")}
