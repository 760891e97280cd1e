"""What the scripted upstream answers to all that is not chat: OpenAI's shapes, with contents that can be foretold.

A token is a word, as in chat. An embedding of a text is `vector(text)`: eight floats that any 32-bit float holds. A
picture is `PICTURE`, its usage 10 tokens of text and 4 for each file in, 100 out. Speech is `SOUND`, many times over. A
transcript is the name and the size of the file; it costs 7 tokens of sound in.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from tests_standalone.support.upstream_answer import CREATED, Usage
from tests_standalone.support.upstream_scripts import Json

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
SOUND = bytes(range(256)) * 64
_PATH = re.compile(r"/(completions|embeddings|moderations|images/\w+|audio/\w+)$")


@dataclass(frozen=True)
class OperationAnswer:
    content_type: str
    body: bytes
    usage: Usage | None = None


def operation_of(path: str) -> str | None:
    """`/v1/audio/speech` is `audio/speech`. Chat is none."""
    found = None if path.rstrip("/").endswith("/chat/completions") else _PATH.search(path.rstrip("/"))
    return found[1] if found else None


def fields_of(content_type: str, body: bytes) -> Json:
    """The members of a JSON body, or the fields of a form; a file is `{"filename", "size"}`. Raises ValueError."""
    if not content_type.startswith("multipart/form-data"):
        fields: Json = json.loads(body)
        return fields
    message = BytesParser(policy=HTTP).parsebytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + body)
    if message.defects:
        raise ValueError(f"the form is broken: {message.defects}")
    found: Json = {}
    for part in message.iter_parts():
        payload: bytes = part.get_payload(decode=True)  # type: ignore[assignment] # of a part that is not multipart
        name = str(part.get_param("name", header="content-disposition"))
        filename = part.get_filename()
        found[name] = payload.decode() if filename is None else {"filename": filename, "size": len(payload)}
    return found


def answer(operation: str, fields: Json) -> OperationAnswer:
    return _ANSWERS[operation.partition("/")[0] if operation.startswith("images") else operation](fields)


def vector(text: str, dimensions: int = 8) -> list[float]:
    return [(len(text) + index) / 8 for index in range(dimensions)]


def _json(value: Json, usage: Usage | None = None) -> OperationAnswer:
    return OperationAnswer("application/json", json.dumps(value, indent=2).encode(), usage)


def _events(events: list[Json], *, done: bool, usage: Usage | None = None) -> OperationAnswer:
    data = [json.dumps(event, separators=(",", ":")) for event in events] + ["[DONE]"] * done
    return OperationAnswer("text/event-stream", "".join(f"data: {each}\n\n" for each in data).encode(), usage)


def _texts(value: Any) -> list[str]:
    """An `input` or a `prompt`: texts; tokens count as words."""
    if isinstance(value, str):
        return [value]
    if all(isinstance(item, int) for item in value):
        return [" ".join(map(str, value))]
    return [text for item in value for text in _texts(item)]


def _completions(fields: Json) -> OperationAnswer:
    prompts = _texts(fields.get("prompt") or "")
    words = re.findall(r"\S+\s*", " ".join(prompts)) or ["nothing"]
    asked = sum(len(prompt.split()) for prompt in prompts)
    usage = {"prompt_tokens": asked, "completion_tokens": len(words), "total_tokens": asked + len(words)}
    head = {"id": "cmpl-1", "object": "text_completion", "created": CREATED, "model": fields.get("model")}
    told = Usage.from_openai(usage)

    def choice(text: str, reason: str | None) -> Json:
        return {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}

    if not fields.get("stream"):
        return _json({**head, "choices": [choice("".join(words), "stop")], "usage": usage}, told)
    chunks = [{**head, "choices": [choice(word, None)]} for word in words] + [{**head, "choices": [choice("", "stop")]}]
    if (fields.get("stream_options") or {}).get("include_usage"):
        chunks = [{**chunk, "usage": None} for chunk in chunks] + [{**head, "choices": [], "usage": usage}]
    return _events(chunks, done=True, usage=told)


def _embeddings(fields: Json) -> OperationAnswer:
    texts = _texts(fields["input"])
    vectors = [vector(text, fields.get("dimensions") or 8) for text in texts]
    packed = [base64.b64encode(struct.pack(f"<{len(each)}f", *each)).decode() for each in vectors]
    found: list[Any] = packed if fields.get("encoding_format") == "base64" else vectors
    data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(found)]
    tokens = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"object": "list", "data": data, "model": fields["model"], "usage": usage}, Usage(tokens, 0))


def _moderations(fields: Json) -> OperationAnswer:
    results = [
        {"flagged": "bad" in text, "categories": {"violence": "bad" in text}} for text in _texts(fields["input"])
    ]
    return _json({"id": "modr-1", "model": fields.get("model", "omni-moderation-latest"), "results": results})


def _images(fields: Json) -> OperationAnswer:
    files = sum(isinstance(value, dict) for value in fields.values())
    picture = base64.b64encode(PICTURE).decode()
    details = {"text_tokens": 10, "image_tokens": 4 * files}
    asked = 10 + 4 * files
    usage = {
        "input_tokens": asked, "output_tokens": 100, "total_tokens": asked + 100, "input_tokens_details": details
    }  # fmt: skip
    if fields.get("stream") in (True, "true"):
        partial = {"type": "image_generation.partial_image", "b64_json": picture, "partial_image_index": 0}
        last = {"type": "image_generation.completed", "b64_json": picture, "usage": usage}
        return _events([partial, last], done=False, usage=Usage(asked, 100))
    return _json({"created": CREATED, "data": [{"b64_json": picture}], "usage": usage}, Usage(asked, 100))


def _speech(fields: Json) -> OperationAnswer:
    if fields.get("stream_format") == "sse":
        usage = {"input_tokens": len(fields["input"].split()), "output_tokens": 50, "total_tokens": 50}
        delta = {"type": "speech.audio.delta", "audio": base64.b64encode(SOUND).decode()}
        return _events([delta, {"type": "speech.audio.done", "usage": usage}], done=False)
    return OperationAnswer("audio/mpeg", SOUND)


def _transcript(fields: Json) -> OperationAnswer:
    file = fields["file"]
    text = f"{file['filename']} has {file['size']} bytes"
    usage = {
        "type": "tokens", "input_tokens": 7, "output_tokens": 4, "total_tokens": 11,
        "input_token_details": {"text_tokens": 0, "audio_tokens": 7},
    }  # fmt: skip
    if fields.get("response_format") in ("text", "srt", "vtt"):
        return OperationAnswer("text/plain; charset=utf-8", text.encode() + b"\n")
    if fields.get("stream") == "true":
        words = [{"type": "transcript.text.delta", "delta": word + " "} for word in text.split()]
        return _events([*words, {"type": "transcript.text.done", "text": text, "usage": usage}], done=True)
    return _json({"text": text, "usage": usage}, Usage(7, 4))


_ANSWERS = {
    "completions": _completions,
    "embeddings": _embeddings,
    "moderations": _moderations,
    "images": _images,
    "audio/speech": _speech,
    "audio/transcriptions": _transcript,
    "audio/translations": _transcript,
}
