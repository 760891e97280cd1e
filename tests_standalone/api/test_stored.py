"""Stored chat completions: the official SDK and plain HTTP against a running gateway, on both engines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tests_standalone.api.conftest import ADMIN_KEY, Launch
from tests_standalone.support.databases import running_postgres, sqlite_url
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.ollama import ScriptedOllama
from tests_standalone.support.postgres import Postgres
from tests_standalone.support.upstream import UpstreamProcess

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HELLO: Any = [{"role": "user", "content": "Hello there"}]
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


class Stand:
    """A gateway in front of the scripted upstream. Each test is a user of its own."""

    def __init__(self, gateway: GatewayProcess, upstream: UpstreamProcess) -> None:
        self.gateway = gateway
        self.upstream = upstream
        self._users = 0

    def user(self) -> OpenAI:
        self._users += 1
        with OpenAI(base_url=self.gateway.root_url, api_key=ADMIN_KEY) as admin:
            key = post(admin, "/admin/keys", {"user": f"user{self._users}"})["key"]
        return OpenAI(base_url=self.gateway.base_url, api_key=key, max_retries=0)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def stand(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres: Postgres
) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("stored")
    url = sqlite_url(folder) if request.param == "sqlite" else running_postgres().create_database()
    with ExitStack() as stack:
        upstream = stack.enter_context(UpstreamProcess())
        config: dict[str, Any] = {
            "backends": {
                "up": {"type": "openai", "base_url": upstream.base_url, "api_key": "sk-upstream"},
                "demo": {"type": "scripted"},
            },
            "default_backend": "up",
            "models": {"priced": {"backend": "up", "model": "answer", "price": {"input": 2.0, "output": 8.0}}},
            "database": {"url": url},
            "auth": {"admin_key": ADMIN_KEY},
        }
        yield Stand(stack.enter_context(GatewayProcess(config, folder=folder / "gateway")), upstream)


@pytest.fixture
def client(stand: Stand) -> Iterator[OpenAI]:
    with stand.user() as sdk:
        yield sdk


def store(client: OpenAI, model: str = "answer", **more: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(model=model, store=True, **{"messages": HELLO, **more})
    return answer


def ids(client: OpenAI, **query: Any) -> list[str]:
    return [one.id for one in client.chat.completions.list(**query)]


def as_dict(answer: ChatCompletion) -> dict[str, Any]:
    return answer.model_dump(exclude_unset=True)


def as_seen(found: ChatCompletion) -> dict[str, Any]:
    """Without what a stored one tells beside the answer."""
    shown = as_dict(found)
    for key in ("request_id", "input_user", "metadata", "tool_choice", "seed", "top_p", "temperature", "tools"):
        del shown[key]
    for key in ("presence_penalty", "frequency_penalty", "response_format"):
        del shown[key]
    return shown


@pytest.mark.parametrize("model", ["answer", "priced", "echo", "parallel-tools", "unicode", "lone-surrogate", "nul"])
def test_what_the_client_saw_is_what_is_stored(client: OpenAI, model: str) -> None:
    tools = {"tools": [TOOL]} if "tools" in model else {}
    answer = store(client, model, metadata={"k": "v"}, n=2, logprobs=True, top_logprobs=2, **tools)
    found = client.chat.completions.retrieve(answer.id)
    assert as_seen(found) == as_dict(answer)
    assert found.metadata == {"k": "v"}
    assert answer.id.startswith("chatcmpl-")


def test_what_was_asked_is_shown(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="answer", messages=HELLO, store=True, temperature=0.5, tools=[TOOL], tool_choice="none", user="kid"
    )
    extra = client.chat.completions.retrieve(raw.parse().id).model_extra or {}
    assert extra["request_id"] == raw.headers["x-request-id"]
    assert extra["conversation_id"] == raw.headers["x-conversation-id"]
    assert (extra["temperature"], extra["tool_choice"], extra["input_user"]) == (0.5, "none", "kid")
    assert extra["tools"] == [TOOL]
    assert extra["top_p"] is extra["seed"] is extra["response_format"] is None


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(
    "model", ["answer", "priced", "echo", "parallel-tools", "finish-missing", "surrogate-pair-split"]
)
def test_a_stream_is_stored_whole(client: OpenAI, model: str, usage: bool) -> None:
    more: Any = {"stream_options": {"include_usage": True}} if usage else {}
    more |= {"tools": [TOOL]} if "tools" in model else {}
    stream = client.chat.completions.create(model=model, messages=HELLO, store=True, stream=True, n=2, **more)
    chunks = list(stream)
    [name] = {chunk.id for chunk in chunks}
    found = client.chat.completions.retrieve(name)
    whole = store(client, model, n=2, **{key: value for key, value in more.items() if key == "tools"})
    assert found.object == "chat.completion"
    assert found.created == chunks[0].created
    assert [choice.index for choice in found.choices] == [choice.index for choice in whole.choices]
    for said, right in zip(found.choices, whole.choices, strict=True):
        assert said.finish_reason == right.finish_reason
        assert said.message.content == right.message.content
        calls, rights = said.message.tool_calls or [], right.message.tool_calls or []
        assert [call.function.arguments for call in calls] == [call.function.arguments for call in rights]  # type: ignore[union-attr] # function calls
    assert found.usage is not None
    assert found.usage.to_dict() == chunks[-1].usage.to_dict()  # type: ignore[union-attr] # told at the end
    assert found.model_extra is not None
    assert found.model_extra["conversation_id"] == (chunks[-1].model_extra or {})["conversation_id"]


def test_neither_store_nor_metadata_reach_the_upstream_twice(client: OpenAI, stand: Stand) -> None:
    store(client, metadata={"a": "b"})
    assert not {"store", "metadata"} & stand.upstream.tally[-1].request.keys()
    client.chat.completions.create(model="answer", messages=HELLO, store=False, metadata={"a": "b"})
    asked = stand.upstream.tally[-1].request
    assert (asked["store"], asked["metadata"]) == (False, {"a": "b"})
    assert len(ids(client)) == 1


def test_listed_by_model_and_metadata(client: OpenAI) -> None:
    first = store(client, metadata={"color": "red", "size": "1"}).id
    second = store(client, "echo", metadata={"color": "red", "size": "2"}).id
    third = store(client, "priced", metadata={"color": "blue"}).id
    assert ids(client) == [first, second, third]
    assert ids(client, order="desc") == [third, second, first]
    assert ids(client, metadata={"color": "red"}) == [first, second]
    assert ids(client, metadata={"color": "red", "size": "2"}) == [second]
    assert ids(client, model="echo") == [second]
    assert ids(client, model="priced") == [third]  # the name that was asked for
    assert ids(client, model="answer") == [first, third]  # the one that answered
    assert ids(client, model="echo", metadata={"color": "red"}) == [second]
    assert ids(client, metadata={"color": "green"}) == []


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_paging_goes_on_where_it_was_whatever_happens_meanwhile(client: OpenAI, order: Any) -> None:
    made = [store(client, "echo").id for _ in range(7)]
    wanted = made if order == "asc" else made[::-1]
    assert ids(client, limit=2, order=order) == wanted
    seen = []
    for one in client.chat.completions.list(limit=2, order=order):
        client.chat.completions.delete(one.id)
        seen.append(one.id)
    assert seen == wanted
    assert ids(client) == []


def test_a_page_as_it_is_on_the_wire(client: OpenAI) -> None:
    made = [store(client, "echo").id for _ in range(2)]
    page = get(client, "/chat/completions", limit=1)
    assert [one["id"] for one in page.pop("data")] == made[:1]
    assert page == {"object": "list", "first_id": made[0], "last_id": made[0], "has_more": True}
    page = get(client, "/chat/completions", after=made[1])
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert len(get(client, "/chat//completions/", limit=0)["data"]) == 2


def test_metadata_can_be_changed(client: OpenAI) -> None:
    answer = store(client, metadata={"stays": "1", "goes": "2"})
    before = client.chat.completions.retrieve(answer.id)
    changed = client.chat.completions.update(answer.id, metadata={"stays": "1", "comes": "3"})
    assert changed.metadata == {"stays": "1", "comes": "3"}
    assert changed == client.chat.completions.retrieve(answer.id)
    assert as_seen(changed) == as_seen(before)
    assert ids(client, metadata={"stays": "1"}) == ids(client, metadata={"comes": "3"}) == [answer.id]
    assert ids(client, metadata={"goes": "2"}) == []
    assert client.chat.completions.update(answer.id, metadata=None).metadata == {}
    assert ids(client, metadata={"stays": "1"}) == []
    assert ids(client, model="answer") == [answer.id]


def test_deleted_is_gone_and_its_costs_stay(client: OpenAI, stand: Stand) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="priced", messages=HELLO, store=True, metadata={"x": "y"}
    )
    answer = raw.parse()
    gone = client.chat.completions.delete(answer.id)
    assert gone.to_dict() == {"object": "chat.completion.deleted", "id": answer.id, "deleted": True}
    for again in (client.chat.completions.retrieve, client.chat.completions.delete):
        with pytest.raises(openai.NotFoundError):
            again(answer.id)
    assert ids(client) == ids(client, metadata={"x": "y"}) == []
    request_id = raw.headers["x-request-id"]
    rows = stand.gateway.query(f"SELECT cost_nanousd FROM usage_rows WHERE request_id = '{request_id}'")
    assert rows[0]["cost_nanousd"] > 0


def test_the_messages_that_were_asked(client: OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": PIXEL}}
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    answer = store(
        client,
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "What is it?"}, picture]},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "call_1", "content": "a pixel"},
        ],
    )
    messages = client.chat.completions.messages
    listed = [row.to_dict() for row in messages.list(answer.id, limit=3)]
    empty = {"name": None, "content_parts": None}
    parts = [{"type": "text", "text": "What is it?"}, picture]
    assert listed == [
        {**empty, "id": f"{answer.id}-0", "role": "system", "content": "Be kind."},
        {"id": f"{answer.id}-1", "role": "user", "name": "Ann", "content": "What is it?", "content_parts": parts},
        {**empty, "id": f"{answer.id}-2", "role": "assistant", "content": None, "tool_calls": [called]},
        {**empty, "id": f"{answer.id}-3", "role": "tool", "content": "a pixel", "tool_call_id": "call_1"},
    ]
    newest_first = [row.id[-1] for row in messages.list(answer.id, order="desc", limit=2)]
    assert newest_first == ["3", "2", "1", "0"]
    page = get(client, f"/chat/completions/{answer.id}/messages", after=f"{answer.id}-1", limit=1)
    assert (page["first_id"], page["has_more"]) == (f"{answer.id}-2", True)


def test_a_history_that_the_gateway_prepends_is_not_asked_again(client: OpenAI) -> None:
    first = store(client, extra_body={"conversation_id": "mine"})
    second = store(client, messages=[{"role": "user", "content": "And now?"}], extra_body={"conversation_id": "mine"})
    assert [row.content for row in client.chat.completions.messages.list(second.id)] == ["And now?"]
    for answer in (first, second):
        assert (client.chat.completions.retrieve(answer.id).model_extra or {})["conversation_id"] == "mine"


def test_nobody_else_sees_it(client: OpenAI, stand: Stand) -> None:
    answer = store(client, metadata={"k": "v"})
    with stand.user() as eve:
        for attempt in (
            lambda: eve.chat.completions.retrieve(answer.id),
            lambda: eve.chat.completions.update(answer.id, metadata={}),
            lambda: eve.chat.completions.delete(answer.id),
            lambda: eve.chat.completions.messages.list(answer.id),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                attempt()
            assert refused.value.param == "completion_id"
        assert ids(eve) == ids(eve, metadata={"k": "v"}) == ids(eve, model="answer") == []
    assert client.chat.completions.retrieve(answer.id).metadata == {"k": "v"}


@pytest.mark.parametrize("model", ["cut-fin", "error-mid-stream"])
def test_an_answer_that_breaks_off_is_not_stored(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model=model, messages=HELLO, store=True, stream=True))
    with pytest.raises(openai.APIError):
        store(client, "error-detail")
    assert ids(client) == []


def test_calls_that_do_not_store_are_not_stored(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="answer", messages=HELLO)
    client.chat.completions.create(model="answer", messages=HELLO, store=None)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(answer.id)
    assert ids(client) == []


TOO_MANY = {str(number): "x" for number in range(17)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": TOO_MANY}, "metadata"),
        ({"metadata": "x"}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {"": "x"}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": None}}, "metadata.k"),
        ({"store": "yes"}, "store"),
    ],
)
def test_what_cannot_be_stored_is_refused(client: OpenAI, fields: Mapping[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="answer", messages=HELLO, store=True, extra_body=fields)
    assert refused.value.param == param


def test_the_most_metadata_there_can_be(client: OpenAI) -> None:
    most = {f"{number:x}" * 64: "\N{PILE OF POO}" * 512 for number in range(16)}
    answer = store(client, metadata=most)
    assert client.chat.completions.retrieve(answer.id).metadata == most
    odd = {"\x00": "\x00", "\ud800": "\udfff"}
    body = {"model": "answer", "messages": HELLO, "store": True, "metadata": odd}
    sent = post(client, "/chat/completions", body)
    assert get(client, f"/chat/completions/{sent['id']}")["metadata"] == odd


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 101}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"order": "newest"}, "order"),
        ({"after": "chatcmpl-nobody-gave-this"}, "after"),
        ({"after": "\x00"}, "after"),
        ({f"metadata[{number}]": "x" for number in range(17)}, "metadata"),
    ],
)
def test_a_query_that_cannot_be_answered(client: OpenAI, query: Mapping[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        get(client, "/chat/completions", **query)
    assert refused.value.param == param


def test_changes_that_cannot_be_made(client: OpenAI) -> None:
    answer = store(client, metadata={"k": "v"})
    for body in ({}, {"metadata": TOO_MANY}):
        with pytest.raises(openai.BadRequestError):
            post(client, f"/chat/completions/{answer.id}", body)
    for unknown in ("%00", "x" * 200, "%ed%a0%80", "nobodys"):
        with pytest.raises(openai.NotFoundError):
            get(client, f"/chat/completions/{unknown}")
    with pytest.raises(openai.APIStatusError) as refused:
        client.put(f"/chat/completions/{answer.id}", cast_to=object, body={})
    assert refused.value.status_code == 405
    assert client.chat.completions.retrieve(answer.id).metadata == {"k": "v"}


async def test_of_an_ollama(launch: Launch) -> None:
    async with ScriptedOllama() as ollama:
        app = await launch(backends={"own": {"type": "ollama", "base_url": ollama.root_url}})
        body = {"model": "own/llama3.1:8b", "messages": HELLO, "store": True}
        answer = (await app.call("POST", "/v1/chat/completions", body)).json
        found = (await app.call("GET", f"/v1/chat/completions/{answer['id']}")).json
        assert found["choices"] == answer["choices"]
        streamed = await app.call("POST", "/v1/chat/completions", {**body, "stream": True})
        name = json.loads(streamed.body.partition(b"data: ")[2].partition(b"\n")[0])["id"]
        whole = (await app.call("GET", f"/v1/chat/completions/{name}")).json
        assert whole["choices"][0]["message"]["content"] == answer["choices"][0]["message"]["content"]
        assert whole["usage"] == answer["usage"]


async def test_a_gateway_that_stores_no_content_refuses(launch: Launch) -> None:
    app = await launch(backends={"demo": {"type": "scripted"}}, conversations={"store_content": False})
    refused = await app.call("POST", "/v1/chat/completions", {"model": "echo", "messages": HELLO, "store": True})
    assert (refused.status, refused.json["error"]["param"]) == (400, "store")
    served = await app.call("POST", "/v1/chat/completions", {"model": "echo", "messages": HELLO, "store": False})
    assert served.status == 200


def get(client: OpenAI, path: str, **query: Any) -> Any:
    return client.get(path, cast_to=object, options={"params": query})


def post(client: OpenAI, path: str, body: Any) -> Any:
    return client.post(path, cast_to=object, content=json.dumps(body).encode())
