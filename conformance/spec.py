"""Prints an OpenAPI document for the mock server, made from the SDK's own types. Runs where the SDK is installed.

OpenAI's document is in no package registry, but the SDK's types are generated from it: what a request may hold and
what a reply must hold is taken from there, so that the mock refuses a request that was mangled on its way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import types
from openai.types import (
    audio,
    chat,
    completion_create_params,
    embedding_create_params,
    image_create_variation_params,
    image_edit_params,
    image_generate_params,
    moderation_create_params,
)
from openai.types.audio import speech_create_params, transcription_create_params, translation_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import TypeAdapter

Json = dict[str, Any]

MODEL = "gpt-6-astra"  # the one that the SDK's tests ask for
DONE = "[DONE]"
_HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_741_000_000, "model": MODEL}
_DELTAS = ({"role": "assistant", "content": ""}, {"content": "Hello"}, {"content": " there"})
_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}

CHAT_EVENTS = [
    *({**_HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in _DELTAS),
    {**_HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {**_HEAD, "choices": [], "usage": _USAGE},
    DONE,
]
COMPLETION_EVENTS = [
    {**_HEAD, "object": "text_completion", "choices": [{"index": 0, "text": "Hello", "finish_reason": "stop"}]},
    {**_HEAD, "object": "text_completion", "choices": [], "usage": _USAGE},
    DONE,
]
TRANSCRIPT_EVENTS = [
    {"type": "transcript.text.delta", "delta": "Hello"},
    {"type": "transcript.text.done", "text": "Hello"},
]

SPEECH = '{"foo": "bar"}'  # the sound that the SDK's tests expect


def image_events(kind: str) -> list[Json]:
    return [
        {"type": f"{kind}.partial_image", "b64_json": "aGVsbG8=", "partial_image_index": 0},
        {"type": f"{kind}.completed", "b64_json": "aGVsbG8="},
    ]


@dataclass(frozen=True)
class Operation:
    """One `POST`. `events` are what its stream says; an operation without them does not stream."""

    path: str
    request: Any
    reply: Any
    events: Sequence[Json | str] = ()
    form: bool = False


OPERATIONS = (
    Operation("/chat/completions", chat_create_params.CompletionCreateParams, chat.ChatCompletion, CHAT_EVENTS),
    Operation("/completions", completion_create_params.CompletionCreateParams, types.Completion, COMPLETION_EVENTS),
    Operation("/embeddings", embedding_create_params.EmbeddingCreateParams, types.CreateEmbeddingResponse),
    Operation("/moderations", moderation_create_params.ModerationCreateParams, types.ModerationCreateResponse),
    Operation(
        "/images/generations",
        image_generate_params.ImageGenerateParams,
        types.ImagesResponse,
        image_events("image_generation"),
    ),
    Operation(
        "/images/edits", image_edit_params.ImageEditParams, types.ImagesResponse, image_events("image_edit"), form=True
    ),
    Operation(
        "/images/variations",
        image_create_variation_params.ImageCreateVariationParams,
        types.ImagesResponse,
        form=True,
    ),
    Operation(
        "/audio/transcriptions",
        transcription_create_params.TranscriptionCreateParams,
        audio.Transcription,
        TRANSCRIPT_EVENTS,
        form=True,
    ),
    Operation("/audio/translations", translation_create_params.TranslationCreateParams, audio.Translation, form=True),
    Operation("/audio/speech", speech_create_params.SpeechCreateParams, None),
)


class Document:
    """An OpenAPI document, as far as the mock server reads it."""

    def __init__(self) -> None:
        self._schemas: Json = {}
        self._paths: Json = {}
        self._types = 0

    def add(self, operation: Operation) -> None:
        kind = "multipart/form-data" if operation.form else "application/json"
        body = {"required": True, "content": {kind: {"schema": self._request(operation.request)}}}
        reply = {"200": {"description": "OK", "content": self._reply(operation)}}
        self._paths[operation.path] = {"post": {"requestBody": body, "responses": reply}}

    def add_models(self) -> None:
        listed = [{"id": MODEL, "object": "model", "created": _HEAD["created"], "owned_by": "mock"}]
        content = {"application/json": {"example": {"object": "list", "data": listed}}}
        self._paths["/models"] = {"get": {"responses": {"200": {"description": "OK", "content": content}}}}

    def as_json(self) -> Json:
        return {
            "openapi": "3.1.0",
            "info": {"title": "What the SDK expects", "version": "1"},
            "paths": self._paths,
            "components": {"schemas": self._schemas},
        }

    def _reply(self, operation: Operation) -> Json:
        if operation.reply is None:
            return {"application/octet-stream": {"example": SPEECH}}
        content: Json = {"application/json": {"schema": self._schema(operation.reply)}}
        if operation.events:
            content["text/event-stream"] = {"example": _as_stream(operation.events)}
        return content

    def _request(self, kind: Any) -> Json:
        """One object, where the SDK has a type for requests that stream and one for those that do not."""
        schema = self._schema(kind)
        kinds = [self._schemas[each["$ref"].rpartition("/")[2]] for each in schema.get("anyOf", ())]
        if not kinds:
            return schema
        properties = {name: part for each in kinds for name, part in each["properties"].items()}
        needed = set.intersection(*(set(each["required"]) for each in kinds))
        stream = {"stream": {"type": ["boolean", "null"]}}
        return {"type": "object", "properties": properties | stream, "required": sorted(needed)}

    def _schema(self, kind: Any) -> Json:
        """Definitions are numbered by type: two of the SDK's types may have parts of the same name."""
        self._types += 1
        prefix = f"type{self._types}."
        schema = TypeAdapter(kind).json_schema(ref_template=f"#/components/schemas/{prefix}{{model}}")
        self._schemas |= {prefix + name: part for name, part in schema.pop("$defs", {}).items()}
        return schema


def _as_stream(events: Sequence[Json | str]) -> str:
    """The bytes themselves: what the mock makes of a list does not end as OpenAI's streams do."""
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


def name_types_that_pydantic_knows() -> None:
    """Files and the SDK's own sequence, in the modules of the SDK's types."""
    known = {"SequenceNotStr": Sequence, "FileTypes": bytes}
    for module in [module for name, module in sys.modules.items() if name.startswith("openai.types")]:
        for name in known.keys() & vars(module).keys():
            setattr(module, name, known[name])


def main() -> None:
    name_types_that_pydantic_knows()
    document = Document()
    document.add_models()
    for operation in OPERATIONS:
        document.add(operation)
    json.dump(document.as_json(), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
