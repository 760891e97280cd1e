"""The OpenAI wire by example: this request out, this reply in, without a network."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.backends.adapt import Adapter
from gateway.backends.base import ModelInfo
from gateway.backends.openai import OpenAIDecoder, OpenAITranslator
from gateway.backends.vendors import Quirks
from gateway.errors import BadRequest, UpstreamError
from gateway.wire import WireError
from gateway.wire.chat import ChatRequest, Chunk, CompletionRequest
from gateway.wire.operation import OperationRequest
from tests_standalone.wire_samples import sample

NO_STREAM_OPTIONS = Quirks(usage_in_stream=False)
TRANSLATOR = OpenAITranslator("sk-upstream")
REQUEST = ChatRequest.parse(b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}')
REPLY = b'{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}]}'


class TestRequest:
    RAW = b'{ "model": "m", "messages": [ {"role":"user"} ], "x": 1.0 }'

    def test_whole(self) -> None:
        sent = TRANSLATOR.request(ChatRequest.parse(self.RAW))
        assert (sent.method, sent.path, sent.body) == ("POST", "/chat/completions", self.RAW)
        assert sent.headers == {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "authorization": "Bearer sk-upstream",
            "accept": "application/json",
        }

    def test_streamed_asks_for_usage(self) -> None:
        raw = self.RAW.replace(b'"x": 1.0', b'"stream": true')
        sent = TRANSLATOR.request(ChatRequest.parse(raw))
        assert sent.body == raw.replace(b" }", b',"stream_options":{"include_usage":true}}')
        assert sent.headers["accept"] == "text/event-stream"

    def test_streamed_that_asks_already_stays(self) -> None:
        raw = b'{"messages":[{"role":"user"}],"stream":true,"stream_options":{ "include_usage":true }}'
        assert TRANSLATOR.request(ChatRequest.parse(raw)).body is raw

    def test_not_streamed_is_not_asked(self) -> None:
        raw = b'{"messages":[{"role":"user"}],"stream":false,"stream_options":{"include_usage":false}}'
        assert TRANSLATOR.request(ChatRequest.parse(raw)).body is raw

    def test_in_the_words_of_the_upstream(self) -> None:
        translator = OpenAITranslator("", Adapter(Quirks(rename={"x": "y"}, by_model={"old*": NO_STREAM_OPTIONS})))
        assert translator.request(ChatRequest.parse(self.RAW)).body == self.RAW.replace(b', "x": 1.0 ', b',"y":1.0')
        raw = b'{"model":"%b","messages":[{"role":"user"}],"stream":true%b}'
        sent = [translator.request(ChatRequest.parse(raw % (model, b""))).body for model in (b"m", b"old")]
        assert sent == [raw % (b"m", b',"stream_options":{"include_usage":true}'), raw % (b"old", b"")]
        asked = ChatRequest.parse(raw % (b"old", b',"stream_options":{"include_usage":true}'))
        assert translator.request(asked).body == raw % (b"old", b"")

    def test_without_stream_options_that_were_dropped_in_part(self) -> None:
        translator = OpenAITranslator("", Adapter(Quirks(drop=("stream_options.include_obfuscation",))))
        raw = b'{"messages":[{"role":"user"}],"stream":true,"stream_options":{"include_obfuscation":false}}'
        body = translator.request(ChatRequest.parse(raw)).body
        assert body == raw.replace(b'"include_obfuscation":false', b'"include_usage":true')

    def test_what_the_upstream_can_never_do(self) -> None:
        translator = OpenAITranslator("", Adapter(Quirks(most_choices=1)))
        with pytest.raises(BadRequest):
            translator.request(ChatRequest.parse(self.RAW.replace(b'"x": 1.0', b'"n": 2')))

    def test_the_older_completions(self) -> None:
        sent = TRANSLATOR.request(CompletionRequest.parse(b'{"model":"m","prompt":"a"}'))
        assert (sent.path, sent.body) == ("/completions", b'{"model":"m","prompt":"a"}')

    def test_operations_keep_their_type(self) -> None:
        sent = TRANSLATOR.operation_request(OperationRequest.parse("embeddings", "application/json", b'{"model":"m"}'))
        assert (sent.method, sent.path, sent.body) == ("POST", "/embeddings", b'{"model":"m"}')
        assert sent.headers == {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "authorization": "Bearer sk-upstream",
            "accept": "*/*",
        }

    def test_without_a_key(self) -> None:
        assert "authorization" not in OpenAITranslator().request(ChatRequest.parse(self.RAW)).headers


class TestModels:
    def test_asked_for(self) -> None:
        sent = TRANSLATOR.models_request()
        assert (sent.method, sent.path, sent.body) == ("GET", "/models", None)
        assert sent.headers["accept"] == "application/json"

    @pytest.mark.parametrize(
        ("data", "models"),
        [
            ([], []),
            ([{"id": "a", "created": 5, "owned_by": "me", "object": "model", "x": 1}], [ModelInfo("a", 5, "me")]),
            ([{"id": "org/a:8b", "created": None}, {"id": "b"}], [ModelInfo("org/a:8b"), ModelInfo("b")]),
            ([{"id": "a", "created": "5", "owned_by": 7}], [ModelInfo("a")]),
            ([{}, None, "a", {"id": 5}, {"id": "b"}], [ModelInfo("b")]),
        ],
    )
    def test_listed(self, data: list[Any], models: list[ModelInfo]) -> None:
        assert TRANSLATOR.models(json.dumps({"object": "list", "data": data}).encode()) == models

    @pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"data":{}}', b'{"data":null}'])
    def test_no_list(self, body: bytes) -> None:
        with pytest.raises(WireError):
            TRANSLATOR.models(body)


class TestCompletion:
    def test_bytes_stay_as_they_came(self) -> None:
        body = b' {"choices": [ {"x": 1.0} ] , "y": 1e2}\r\n'
        completion = TRANSLATOR.completion(REQUEST, body)
        assert completion.raw == body.strip()
        assert completion.data == {"choices": [{"x": 1}], "y": 100}

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>Bad gateway</html>",
            b"[]",
            b"null",
            b"{}",
            b'{"choices":null}',
            b'{"choices":{}}',
            REPLY[:-1],
            b"\xff",
        ],
    )
    def test_no_reply(self, body: bytes) -> None:
        with pytest.raises(WireError):
            TRANSLATOR.completion(REQUEST, body)

    @pytest.mark.parametrize(
        ("body", "status", "message"),
        [
            (b'{"error":{"message":"no","code":429}}', 429, "no"),
            (b'{"error":{"message":"no"},"choices":[]}', 502, "no"),
            (b'{"error":"no"}', 502, "no"),
        ],
    )
    def test_an_error_with_status_200(self, body: bytes, status: int, message: str) -> None:
        with pytest.raises(UpstreamError) as caught:
            TRANSLATOR.completion(REQUEST, body)
        assert (caught.value.status, caught.value.message) == (status, message)

    def test_an_error_that_is_null(self) -> None:
        assert TRANSLATOR.completion(REQUEST, b'{"error":null,"choices":[]}').data["choices"] == []


class TestError:
    def test_by_status_and_body(self) -> None:
        failure = TRANSLATOR.error(404, {}, b'{"error":{"message":"no such model","code":"model_not_found"}}')
        assert (failure.status, failure.message, failure.code) == (404, "no such model", "model_not_found")
        assert failure.upstream_status == 404

    @pytest.mark.parametrize("body", [b"", b"<html>secret</html>", b"\xff", b'{"error":', b"[" * 10**5])
    def test_a_body_that_is_no_json(self, body: bytes) -> None:
        failure = TRANSLATOR.error(400, {}, body)
        assert failure.message == "The upstream refused the request with status 400."
        assert TRANSLATOR.error(500, {}, body).status == 502

    def test_waiting_time(self) -> None:
        assert TRANSLATOR.error(429, {"retry-after": "3"}, b"").headers == {"retry-after": "3"}


def decoded(*pieces: bytes) -> tuple[list[bytes], bool]:
    decoder = OpenAIDecoder()
    chunks: list[Chunk] = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    return [chunk.raw for chunk in chunks + decoder.flush()], decoder.complete


class TestDecoder:
    @pytest.mark.parametrize(
        ("stream", "chunks", "complete"),
        [
            (b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n', [b'{"a":1}', b'{"b":2}'], True),
            (b'data: {"a":1}\n\ndata: [DONE]\n\ndata: [DONE]\n\ndata: {"b":2}\n\n', [b'{"a":1}'], True),
            (b'data: {"a":1}\n\ndata: [DONE] \n\n', [b'{"a":1}'], True),
            (b'data: {"a":1}\n\ndata: [DONE]', [b'{"a":1}'], True),
            (b'data: {"a":1}\n', [b'{"a":1}'], False),
            (b'data: {"a":1}\n\ndata: {"b"', [b'{"a":1}'], False),
            (b'data:\n\ndata: \n\ndata: {"a":1}\n\n', [b'{"a":1}'], False),
            (b": only a comment\n\n", [], False),
            (b"", [], False),
        ],
    )
    def test_up_to_its_end_mark(self, stream: bytes, chunks: list[bytes], complete: bool) -> None:
        assert decoded(stream) == (chunks, complete)
        assert decoded(*(bytes([byte]) for byte in stream)) == (chunks, complete)

    @pytest.mark.parametrize("name", ["openai_text", "openai_tool_calls", "deepseek", "two_choices", "llama_cpp"])
    def test_samples_cut_at_any_byte(self, name: str) -> None:
        stream = sample(name)
        whole = decoded(stream)
        assert whole[1]
        for cut in range(len(stream)):
            assert decoded(stream[:cut], stream[cut:]) == whole, cut

    def test_what_comes_after_the_end_may_be_anything(self) -> None:
        decoder = OpenAIDecoder()
        assert decoder.feed(b"data: [DONE]\n\n") == []
        assert decoder.feed(b"x" * (2 << 20)) == decoder.flush() == []

    def test_a_line_without_end(self) -> None:
        with pytest.raises(WireError):
            decoded(b"data: " + b"x" * (2 << 20))


class TestLargeReplies:
    """Those that fit are not parsed: an object that ends too early shows it."""

    @staticmethod
    def reply(embedding: str) -> bytes:
        data = ",".join([f'{{"embedding":{embedding}}}'] * 40_000)
        return f'{{"object":"list","data":[{data}]'.encode()

    @staticmethod
    def asked(encoding: str) -> OperationRequest:
        body = b'{"model":"m","input":"a","encoding_format":"%b"}' % encoding.encode()
        return OperationRequest.parse("embeddings", "application/json", body)

    @pytest.mark.parametrize(("embedding", "encoding"), [("[0.5]", "float"), ('"AAAAPw=="', "base64")])
    def test_those_that_fit_are_not_parsed(self, embedding: str, encoding: str) -> None:
        body = self.reply(embedding)
        assert TRANSLATOR.operation_reply(self.asked(encoding), body) is body

    def test_the_others_are_turned(self) -> None:
        body = self.reply("[0.5]") + b"}"
        assert TRANSLATOR.operation_reply(self.asked("base64"), body) == self.reply('"AAAAPw=="') + b"}"


@pytest.mark.parametrize(("most", "fits"), [(4 << 20, True), (1 << 20, False)])
def test_how_large_an_event_may_be_is_a_setting(most: int, fits: bool) -> None:
    event = b'data: {"choices":[{"delta":{"images":["' + b"A" * (3 << 20) + b'"]}}]}\n\n'
    decoder = OpenAITranslator(max_event=most).decoder(REQUEST)
    if fits:
        assert len(decoder.feed(event)) == 1
    else:
        with pytest.raises(WireError, match="longer than"):
            decoder.feed(event)
