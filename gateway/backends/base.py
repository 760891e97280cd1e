"""What the core asks of an upstream. A backend translates only: policy, limits, prices and history live elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.wire.chat import ChatRequest, Chunk, Completion


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as a backend lists it. `created` is in Unix seconds."""

    id: str
    created: int | None = None
    owned_by: str | None = None


class ChunkStream(Protocol):
    """A running answer. Reading is what drives it: who does not read, pauses the upstream."""

    @property
    def complete(self) -> bool:
        """Did the upstream send its end mark?"""

    async def read(self) -> Sequence[Chunk]:
        """The chunks that came with the next read, at least one; none at the end. Raises UpstreamError."""

    async def close(self) -> None:
        """Gives the connection back if the answer was read to its end, else breaks it off; a waiting `read` ends.

        May be called from another task, and again.
        """


class Backend(Protocol):
    """One upstream that answers chat requests. All methods raise UpstreamError or one of its kinds."""

    name: str

    async def models(self) -> Sequence[ModelInfo]:
        """What the upstream says it has. May take long; never called while a client waits for a list."""

    async def complete(self, request: ChatRequest) -> Completion:
        """One whole reply. `request.model` is the upstream's name of the model."""

    async def stream(self, request: ChatRequest) -> ChunkStream:
        """Returns once the upstream has accepted the request (status 200), before its first chunk."""

    async def aclose(self) -> None:
        """Breaks off what runs and gives connections back."""
