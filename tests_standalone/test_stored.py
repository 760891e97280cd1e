"""Requests with `store: true` in, rows out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway import stored
from gateway.auth import Caller
from gateway.errors import BadRequest
from gateway.stored import Keep
from gateway.wire.chat import ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]
ANSWER: dict[str, Any] = {"id": "theirs", "model": "m-2026", "choices": [], "metadata": {"not": "ours"}}


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"model": "m", "messages": HELLO, "store": True, **fields}).encode())


def kept(asked: ChatRequest) -> Keep:
    keep = stored.wanted(asked, "req_1", allowed=True)
    assert keep is not None
    return keep


def row(**fields: Any) -> stored.StoredCompletion:
    caller = Caller(user_id="ann", key_id="key_1", is_admin=False)
    return kept(request(**fields)).completed({**ANSWER, "conversation_id": "conv"}, caller, "m", 5)


@pytest.mark.parametrize("store", [None, False])
def test_what_does_not_ask_for_it_is_not_kept(store: bool | None) -> None:
    assert stored.wanted(request(store=store, metadata={"any": 1}), "req_1", allowed=False) is None


def test_the_older_completions_have_no_store() -> None:
    asked = CompletionRequest.parse(b'{"model":"m","prompt":"p","store":true}')
    assert stored.wanted(asked, "req_1", allowed=True) is None


def test_no_content_may_be_stored() -> None:
    with pytest.raises(BadRequest, match="store_content") as refused:
        stored.wanted(request(), "req_1", allowed=False)
    assert refused.value.param == "store"


def test_the_upstream_sees_neither_store_nor_metadata() -> None:
    sent = stored.for_upstream(request(metadata={"a": "b"}, temperature=1))
    assert json.loads(sent.raw) == sent.data == {"model": "m", "messages": HELLO, "temperature": 1}


def test_a_row() -> None:
    made = row(metadata={"a": "b"}, temperature=0.5, user="kid")
    assert (made.user_id, made.key_id, made.created_at, made.model) == ("ann", "key_1", 5, "m")
    assert made.id.startswith("chatcmpl-")
    assert made.pk == made.id.replace("chatcmpl-", "s_")
    assert json.loads(made.metadata) == {"a": "b"}
    assert sorted(made.labels) == sorted(
        [*stored.labels({"a": "b"}), stored.model_label("m"), stored.model_label("m-2026")]
    )
    shown = json.loads(made.completion)
    assert shown["id"] == made.id
    assert (shown["request_id"], shown["input_user"], shown["temperature"], shown["seed"]) == (
        "req_1",
        "kid",
        0.5,
        None,
    )
    assert not {"metadata", "conversation_id"} & shown.keys()


def test_ids_are_in_the_order_of_the_calls() -> None:
    first, second = kept(request()).id, kept(request()).id
    assert first[:21] <= second[:21]
    assert first != second


def test_a_pair_is_not_another_pair_or_a_model() -> None:
    pairs = [{"a": "b"}, {"b": "a"}, {"ab": ""}, {"a": "b "}]
    found = [label for pair in pairs for label in stored.labels(pair)]
    assert len({*found, stored.model_label("a"), stored.model_label("ab")}) == 6


def test_messages_as_they_are_listed() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    made = row(messages=[{"role": "user", "content": parts, "id": "theirs"}, {"role": "tool", "content": "x", "y": 1}])
    assert json.loads(made.messages) == [
        {"id": f"{made.id}-0", "role": "user", "name": None, "content": "one\ntwo", "content_parts": parts},
        {"id": f"{made.id}-1", "role": "tool", "name": None, "content": "x", "content_parts": None, "y": 1},
    ]


def test_a_picture_of_more_than_8_mb_is_not_kept() -> None:
    small = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    large = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (12 << 20)}}
    made = row(messages=[{"role": "user", "content": [large, small]}])
    assert json.loads(made.messages)[0]["content_parts"] == [small]
    assert json.loads(made.messages)[0]["content"] is None


def test_shown_with_its_conversation_and_metadata() -> None:
    found = stored.Found("s_1", "id", "conv_1", '{"k":"v"}', '{"id":"id"}')
    assert json.loads(stored.shown(found)) == {"id": "id", "conversation_id": "conv_1", "metadata": {"k": "v"}}
    found = stored.Found("s_1", "id", None, "{}", '{"id":"id"}')
    assert json.loads(stored.shown(found)) == {"id": "id", "metadata": {}}
