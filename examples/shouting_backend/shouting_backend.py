"""`type: shouting`: answers what was said, louder. Options: `{mark: "!!"}`."""

import time

from gateway.backends.base import ModelInfo
from gateway.wire.chat import Chunk, Completion, text_of
from gateway.wire.jsontext import dumps


def build(name, settings, transport):
    """Called once for each worker. `transport` is there for backends that call others over HTTP."""
    return ShoutingBackend(name, settings.options.get("mark", "!"))


class ShoutingBackend:
    def __init__(self, name, mark):
        self.name, self.mark = name, mark

    async def models(self):
        return [ModelInfo("shout")]

    async def complete(self, request):
        message = {"role": "assistant", "content": self.answer(request)}
        data = self.head(request) | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return Completion(dumps(data), data)

    async def stream(self, request):
        deltas = [{"content": word + " "} for word in self.answer(request).split()]
        return Words([self.head(request) | {"choices": [{"index": 0, "delta": delta}]} for delta in deltas])

    def answer(self, request):
        return text_of(request.messages[-1].get("content")).upper() + self.mark

    def head(self, request):
        return {
            "id": "chatcmpl-shout",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request.model,
        }

    async def aclose(self):
        pass


class Words:
    complete = False

    def __init__(self, chunks):
        self.chunks = chunks

    async def read(self):
        self.complete = not self.chunks
        return [Chunk(data=self.chunks.pop(0))] if self.chunks else []

    async def close(self):
        pass
