"""What a call may use at most, told before it goes out: tokens by the bytes of its text, money by its dearest route.

No token is shorter than a byte. What is no text (pictures, sound, documents) is taken for what vendors say of large
ones; that bound is not strict, nor is the one for a call that does not limit its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gateway.catalog import Route
from gateway.wire.chat import ChatRequest, take_apart
from gateway.wire.jsontext import dumps
from gateway.wire.operation import EMBEDDINGS, MODERATIONS, OperationRequest

AROUND_MESSAGE = 8
PICTURE = 2_000
CHARACTERS_A_TOKEN_OF_SOUND = 500
CHARACTERS_A_TOKEN_OF_FILE = 8
_OF_MESSAGE = frozenset({"role", "content"})
_ALSO_READ = ("tools", "functions", "response_format")
_TELLS_OUTPUT = frozenset({"max_completion_tokens", "max_tokens", "n", "best_of", "prompt"})
_NO_OUTPUT = frozenset({EMBEDDINGS, MODERATIONS})


def input_tokens(request: ChatRequest | OperationRequest) -> int:
    """No fewer than the upstream will count, as far as it is text."""
    if type(request) is ChatRequest:
        return _of_chat(request.data)
    if isinstance(request, OperationRequest):
        return _of_operation(request)
    return _of_any(request.data.get("prompt")) + _of_any(request.data.get("suffix"))


def _of_chat(data: Mapping[str, Any]) -> int:
    total = 0
    for message in data["messages"]:
        content = message.get("content")
        if type(content) is str:
            total += AROUND_MESSAGE + (len(content) if content.isascii() else _bytes(content))
        else:
            total += AROUND_MESSAGE + _of_parts(content)
        if len(message) > 2 or "content" not in message:
            total += sum(len(dumps(value)) for key, value in message.items() if key not in _OF_MESSAGE)
    for key in _ALSO_READ:
        if data.get(key):
            total += len(dumps(data[key]))
    return total


def output_tokens(request: ChatRequest | OperationRequest, unlimited: int) -> int:
    """`unlimited`: for one answer to a request that does not say."""
    if type(request) is ChatRequest and _TELLS_OUTPUT.isdisjoint(request.data):
        return unlimited
    if request.operation in _NO_OUTPUT:
        return 0
    data = request.data
    if isinstance(request, OperationRequest):
        return unlimited * _count(data.get("n"))
    most = max(data.get("max_completion_tokens") or 0, data.get("max_tokens") or 0)
    if most <= 0:
        most = unlimited
    answers = max(request.choice_count, _count(data.get("best_of")))
    return most * answers * _prompts(data.get("prompt"))


def cost(routes: Iterable[Route], at: int, tokens_in: int, tokens_out: int, tier: object) -> int | None:
    """Nano-dollars on the dearest route, `at` in milliseconds; None if nobody knows what one of them costs.

    `tier`: the service tier that is asked for; an upstream may also serve the standard one."""
    most = 0
    tiers = (None, tier) if isinstance(tier, str) else (None,)
    for route in routes:
        if route.price is None:
            return None
        for each in tiers:
            price = route.price.at(at, each)
            bound = None if price is None else price.most(tokens_in, tokens_out)
            if bound is None:
                return None
            most = max(most, bound)
    return most


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _of_any(value: object) -> int:
    texts, numbers = take_apart(value)
    return numbers + sum(map(_bytes, texts))


def _of_parts(parts: object) -> int:
    if not isinstance(parts, list):
        return 0
    return sum(of_part(part) for part in parts if isinstance(part, dict))


def of_part(part: Mapping[str, Any]) -> int:
    """One part of a message's content."""
    kind = part.get("type")
    if kind == "image_url":
        return PICTURE
    if kind == "input_audio":
        return len(dumps(part)) // CHARACTERS_A_TOKEN_OF_SOUND
    if kind == "file":
        return len(dumps(part)) // CHARACTERS_A_TOKEN_OF_FILE
    text = part.get("text")
    return _bytes(text) if isinstance(text, str) else len(dumps(part))


def _of_operation(request: OperationRequest) -> int:
    files = 0
    if request.form is not None:
        files = sum(part.end - part.start for part in request.form.parts if part.filename is not None)
    texts = sum(_of_any(request.data.get(key)) for key in ("input", "prompt", "instructions"))
    return texts + files // CHARACTERS_A_TOKEN_OF_SOUND


def _prompts(prompt: object) -> int:
    """Each text, or list of tokens, of a list has an answer of its own."""
    if not isinstance(prompt, list):
        return 1
    return max(1, sum(not isinstance(each, int) for each in prompt))


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1
