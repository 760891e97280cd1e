"""Calls that are not chat: embeddings, moderations, pictures, sound. Kept as the bytes that came.

The body is JSON or a form (`multipart/form-data`). Read is what the gateway acts on, `model` and `stream`; changed is
the model's name, and all other bytes stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gateway.errors import BadRequest
from gateway.wire import splice
from gateway.wire.body import read_object
from gateway.wire.form import Form
from gateway.wire.jsontext import dumps

CHAT = "chat/completions"
COMPLETIONS = "completions"
EMBEDDINGS = "embeddings"
MODERATIONS = "moderations"
IMAGES = frozenset({"images/generations", "images/edits", "images/variations"})
SPEECH = "audio/speech"
TRANSCRIPTS = frozenset({"audio/transcriptions", "audio/translations"})
OPERATIONS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, MODERATIONS, SPEECH, *IMAGES, *TRANSCRIPTS})
"""All that OpenAI's API knows, by the path behind its base URL."""


_JSON, _EVENTS, _UNNAMED = "application/json", "text/event-stream", "application/octet-stream"
_REPLIES = {
    EMBEDDINGS: (_JSON,),
    MODERATIONS: (_JSON,),
    SPEECH: ("audio/", _UNNAMED, _EVENTS),
    **dict.fromkeys(IMAGES, (_JSON, _EVENTS)),
    **dict.fromkeys(TRANSCRIPTS, (_JSON, _EVENTS, "text/", "application/x-subrip", _UNNAMED)),
}


def is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def may_answer(operation: str, content_type: str) -> bool:
    """Is the operation answered in that type? The page of a login or of a proxy is no answer, whatever its status."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        return False
    return kind.endswith("+json") or any(
        kind == known or (known.endswith("/") and kind.startswith(known)) for known in _REPLIES.get(operation, ())
    )


@dataclass(frozen=True, slots=True)
class OperationRequest:
    """A request to one of the operations. `data` are the members of its JSON object, or the texts of its form."""

    operation: str
    content_type: str
    raw: bytes
    data: Mapping[str, Any]
    form: Form | None = None

    @classmethod
    def parse(cls, operation: str, content_type: str, raw: bytes) -> OperationRequest:
        """Raises BadRequest."""
        if content_type.partition(";")[0].strip().lower() == "multipart/form-data":
            form = Form.parse(content_type, raw)
            models = [part for part in form.parts if part.name.casefold() == "model"]
            if any(part.filename is not None for part in models):
                raise BadRequest("'model' must be a text, not a file.", param="model", code="invalid_type")
            if len(models) > 1 or any(part.name != "model" for part in models):
                raise BadRequest("The form must name one 'model', in small letters.", param="model")
            request = cls(operation, content_type, raw, form.texts, form)
        else:
            request = cls(operation, content_type, raw, read_object(raw))
        model = request.data.get("model")
        if model is not None and not isinstance(model, str):
            raise BadRequest("'model' must be a string.", param="model", code="invalid_type")
        return request

    @property
    def model(self) -> str | None:
        model: str | None = self.data.get("model")
        return model or None

    @property
    def stream(self) -> bool:
        if self.data.get("stream_format") == "sse":  # how speech asks for events
            return True
        return self.data.get("stream") in ((True,) if self.form is None else ("true", "True", "1"))

    def with_model(self, name: str) -> OperationRequest:
        """The same request for the model of that name."""
        data = {**self.data, "model": name}
        if self.form is not None:
            form = self.form.with_text("model", name)
            return replace(self, raw=form.raw, data=data, form=form)
        return replace(self, raw=splice.edit(self.raw, self.data, {"model": dumps(name)}), data=data)
