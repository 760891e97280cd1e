"""Whole replies by example: this of Ollama's in, that in OpenAI's shape out."""

from __future__ import annotations

import pytest

from gateway.backends import ollama_reply
from gateway.errors import UpstreamError
from gateway.wire import WireError
from tests_standalone.backends.ollama_samples import as_one, counting, sample


class TestCompletion:
    def test_text(self) -> None:
        body = sample("text").splitlines()[-1].replace(b'"content":""', b'"content":"Hi"')
        assert ollama_reply.completion(body, counting()) == {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1760742847,
            "model": "llama3.2",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hi", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 26, "completion_tokens": 282, "total_tokens": 308},
            "timings": {
                "prompt_n": 26,
                "prompt_ms": 342.546,
                "prompt_per_second": 75.9,
                "predicted_n": 282,
                "predicted_ms": 4535.599,
                "predicted_per_second": 62.17,
                "load_ms": 1.335,
            },
        }

    def test_tool_calls_without_text(self) -> None:
        choice = ollama_reply.completion(as_one(sample("tools")))["choices"][0]
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["type"] == "function"
        assert choice["finish_reason"] == "tool_calls"

    def test_ids_differ(self) -> None:
        made = [ollama_reply.completion(as_one(sample("tools_in_last_line"))) for _ in range(2)]
        assert len({each["id"] for each in made}) == 2
        assert len({each["choices"][0]["message"]["tool_calls"][0]["id"] for each in made}) == 2

    @pytest.mark.parametrize(
        "body", [b"", b"<html>", b"[]", b"{}", b'{"done":true}', b'{"done":false,"message":{"content":""}}', b"\xff"]
    )
    def test_no_reply(self, body: bytes) -> None:
        with pytest.raises(WireError):
            ollama_reply.completion(body)

    def test_an_error_with_status_200(self) -> None:
        with pytest.raises(UpstreamError, match="it broke"):
            ollama_reply.completion(b'{"error":"it broke"}')


class TestText:
    """The older completions."""

    def test_whole(self) -> None:
        body = b'{"model":"m","created_at":"2025-10-17T23:14:07Z","response":"Hi","done":true,"eval_count":2}'
        assert ollama_reply.text_completion(body, counting()) == {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1760742847,
            "model": "m",
            "choices": [{"text": "Hi", "index": 0, "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 2, "total_tokens": 2},
        }

    @pytest.mark.parametrize("line", [b'{"response":5,"done":true}', b'{"response":"x"}'])
    def test_no_reply(self, line: bytes) -> None:
        with pytest.raises(WireError):
            ollama_reply.text_completion(line)


class TestEmbeddings:
    BODY = b'{"model":"e","embeddings":[[1.0,-0.5],[0.25,2.0]],"prompt_eval_count":7}'

    def test_numbers(self) -> None:
        assert ollama_reply.embeddings(self.BODY, "float") == {
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [1.0, -0.5]},
                {"object": "embedding", "index": 1, "embedding": [0.25, 2.0]},
            ],
            "model": "e",
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        }

    def test_base64(self) -> None:
        found = ollama_reply.embeddings(self.BODY, "base64")["data"]
        assert [entry["embedding"] for entry in found] == ["AACAPwAAAL8=", "AACAPgAAAEA="]

    @pytest.mark.parametrize(
        ("body", "usage"),
        [
            (b'{"embeddings":[[1.0]]}', None),
            (b'{"embeddings":[]}', {"prompt_tokens": 0, "total_tokens": 0}),
        ],
    )
    def test_uncounted(self, body: bytes, usage: object) -> None:
        assert ollama_reply.embeddings(body, None).get("usage") == usage

    @pytest.mark.parametrize("body", [b"{}", b'{"embeddings":5}', b'{"embeddings":[5]}', b"x"])
    def test_none(self, body: bytes) -> None:
        with pytest.raises(WireError):
            ollama_reply.embeddings(body, None)
