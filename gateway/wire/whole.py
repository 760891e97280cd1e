"""A streamed answer as the one object that it would have been without a stream.

What the deltas said is put together by `assemble`; here is what stands around them. Of the members of the chunks the
last that is not null counts, as of a choice's own; lists of logprobs are extended. Padding is left out, and usage is
told by who has counted it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.wire.assemble import Assembler

Json = dict[str, Any]

_APART = frozenset({"choices", "usage", "object", "obfuscation"})
_SAID = frozenset({"index", "delta", "text", "finish_reason"})


class Whole:
    """Collects what chunks say beside their deltas."""

    def __init__(self) -> None:
        self._about: Json = {}
        self._choices: dict[int, Json] = {}

    def add_about(self, data: Mapping[str, Any]) -> None:
        """What a chunk says of the whole answer."""
        self._about.update((key, value) for key, value in data.items() if key not in _APART and value is not None)

    def add(self, data: Mapping[str, Any]) -> bool:
        """A chunk whose choices were put right. True: one says more than its delta, so the next chunk has to be given
        even if it looks the same."""
        self.add_about(data)
        more = False
        for choice in data["choices"]:
            for key, value in choice.items():
                if key not in _SAID and value is not None:
                    _join(self._choices.setdefault(choice["index"], {}), key, value)
                    more = True
        return more

    def completion(self, name: Mapping[str, Any], answer: Assembler, reason: str, last: Mapping[str, Any]) -> Json:
        """`name`: of the stream; `reason`: why a choice ended that did not say so; `last`: what its end carries."""
        choices = [
            {
                "index": index,
                "message": {"refusal": None, **answer.message(index)},
                "logprobs": None,
                **self._choices.get(index, {}),
                "finish_reason": answer.finish_reasons.get(index, reason),
            }
            for index in answer.indexes or [0]
        ]
        return {**self._about, **name, "object": "chat.completion", "choices": choices, **last}


def _join(target: Json, key: str, value: Any) -> None:
    old = target.get(key)
    if isinstance(old, dict) and isinstance(value, dict):
        for inner, item in value.items():
            _join(old, inner, item)
    elif isinstance(old, list) and isinstance(value, list):
        old.extend(value)
    elif value is not None or key not in target:
        target[key] = _own(value)


def _own(value: Any) -> Any:
    """A copy, as deep as `_join` writes into it."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value
