"""What the scripted Ollama's models say: values for `/api/chat` and `/api/generate`, and how Go writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests_standalone.support.ollama_scripts import CREATED_AT, IMAGE_TOKENS, LOAD_NS, TOKEN_NS, Json, OllamaScript


class Answer:
    """What a model says to a request, in `/api/chat`'s or `/api/generate`'s words."""

    def __init__(self, request: Json, script: OllamaScript) -> None:
        self._request = request
        self._script = script

    def lines(self) -> Iterator[Json]:
        raise NotImplementedError

    def whole(self) -> Json:
        raise NotImplementedError

    def _line(self, said: Json, **more: Any) -> Json:
        return {"model": self._request["model"], "created_at": CREATED_AT, **said, "done": False, **more}

    def _end(self, prompt: int, said: int) -> Json:
        most = (self._request.get("options") or {}).get("num_predict")
        reason = "length" if most is not None and said >= most > 0 else self._script.done_reason
        told = {"done_reason": reason, "total_duration": LOAD_NS + said * TOKEN_NS}
        told["load_duration"] = LOAD_NS
        if self._script.counts:
            told |= {"prompt_eval_count": prompt, "prompt_eval_duration": prompt * TOKEN_NS // 10}
            told |= {"eval_count": said, "eval_duration": said * TOKEN_NS}
        return {key: value for key, value in told.items() if value}


class Talk(Answer):
    def __init__(self, request: Json, script: OllamaScript) -> None:
        super().__init__(request, script)
        think = request.get("think")
        self._thinking = script.thinking if "thinking" in script.capabilities and think is not False else ""
        self._calls = script.calls if request.get("tools") and request["messages"][-1]["role"] != "tool" else ()
        said = script.answer if script.answer is not None else "" if self._calls else self._echo()
        self._said = _limited(_json_for(request["format"]) if request.get("format") else said, request)

    def lines(self) -> Iterator[Json]:
        for piece in _pieces(self._thinking):
            yield self._line({"message": {"role": "assistant", "content": "", "thinking": piece}})
        for piece in _pieces(self._said):
            odds = {"logprobs": [_odds(piece, self._request)]} if self._request.get("logprobs") else {}
            yield self._line({"message": {"role": "assistant", "content": piece}}, **odds)
        if self._calls:
            yield self._line({"message": {"role": "assistant", "content": "", "tool_calls": self._called()}})
        yield self._line({"message": {"role": "assistant", "content": ""}}) | {"done": True} | self._counts()

    def whole(self) -> Json:
        message: Json = {"role": "assistant", "content": self._said}
        if self._thinking:
            message["thinking"] = self._thinking
        if self._calls:
            message["tool_calls"] = self._called()
        odds = [_odds(piece, self._request) for piece in _pieces(self._said)]
        more = {"logprobs": odds} if self._request.get("logprobs") else {}
        return self._line({"message": message}) | {"done": True} | more | self._counts()

    def _called(self) -> list[Json]:
        named = [{"function": {"index": index, **call}} for index, call in enumerate(self._calls)]
        if not self._script.call_ids:
            return named
        return [{"id": f"call_abc{index:05}", **call} for index, call in enumerate(named)]

    def _counts(self) -> Json:
        messages = self._request["messages"]
        prompt = sum(words(each["content"]) + IMAGE_TOKENS * len(each.get("images") or ()) for each in messages)
        called = sum(1 + len(call["arguments"]) for call in self._calls)
        return self._end(prompt, words(self._thinking) + words(self._said) + called)

    def _echo(self) -> str:
        return f"You said: {self._request['messages'][-1]['content']}"


class Text(Answer):
    def lines(self) -> Iterator[Json]:
        for piece in _pieces(self._said):
            yield self._line({"response": piece})
        yield self._line({"response": ""}) | {"done": True, "context": [1, 2, 3]} | self._counts()

    def whole(self) -> Json:
        return self._line({"response": self._said}) | {"done": True, "context": [1, 2, 3]} | self._counts()

    @property
    def _said(self) -> str:
        around = " ... " + self._request["suffix"] if self._request.get("suffix") else ""
        return _limited(self._script.answer or f"Continuing: {self._request['prompt']}{around}", self._request)

    def _counts(self) -> Json:
        return self._end(words(self._request["prompt"]), words(self._said))


def load_line(request: Json, reason: str) -> Json:
    said = {"role": "assistant", "content": ""}
    return {"model": request["model"], "created_at": CREATED_AT, "message": said, "done": True, "done_reason": reason}


def listed(name: str) -> Json:
    details = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"]}
    details |= {"parameter_size": "8.0B", "quantization_level": "Q4_K_M"}
    told = {"name": name, "model": name, "modified_at": "2025-05-04T17:37:44.706015396-07:00"}
    return {**told, "size": 6_000_000_000, "digest": "46e0c10c039e", "details": details}


def _json_for(schema: object) -> str:
    return json.dumps(_instance(schema) if isinstance(schema, dict) else {"answer": 42}, separators=(",", ":"))


def _instance(schema: Json) -> Any:
    """The simplest value that a schema allows."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {key: _instance(inside) for key, inside in schema.get("properties", {}).items()}
    return {"string": "Paris", "integer": 7, "number": 1.5, "boolean": True, "array": []}.get(str(kind))


def _limited(text: str, request: Json) -> str:
    most = (request.get("options") or {}).get("num_predict")
    return "".join(_pieces(text)[:most]) if most and most > 0 else text


def _odds(piece: str, request: Json) -> Json:
    one = {"token": piece, "logprob": -0.25, "bytes": list(piece.encode())}
    if most := request.get("top_logprobs"):
        one["top_logprobs"] = [{"token": piece, "logprob": -0.25}, {"token": "x", "logprob": -2.5}][:most]
    return one


def _pieces(text: str) -> list[str]:
    """Words with the white space before them."""
    words = text.split(" ")
    return [piece for index, word in enumerate(words) if (piece := word if index == 0 else " " + word)]


def words(text: str) -> int:
    return len(text.split())


def go_json(value: Json) -> bytes:
    """As Go's encoder writes it: no spaces, UTF-8, and escapes for what HTML and JavaScript stumble over."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for odd in "<>&\u2028\u2029":
        text = text.replace(odd, f"\\u{ord(odd):04x}")
    return text.encode()
