"""What the core asks of an upstream. A backend translates only: policy, limits, prices and history live elsewhere.

Every backend answers chat. What else it can do it says by being an `Operator` (embeddings, pictures, sound, the older
completions) or `Loadable` (it holds models in memory, and can be told to).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from gateway.wire.chat import ChatRequest, Chunk, Completion
from gateway.wire.lane import FindLane
from gateway.wire.operation import CHAT, OperationRequest


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


class PushingStream(ChunkStream, Protocol):
    """One that can also hand over its chunks while the socket is being read."""

    async def push(
        self,
        take: Callable[[Sequence[Chunk]], bool],
        take_events: Callable[[bytes], bool | None],
        find_lane: FindLane | None = None,
    ) -> None:
        """Returns when one of them says False and raises what they raise, or UpstreamError; the rest, the end too, is
        left to `read`.

        What may be whole events in OpenAI's shape, as it came, is offered to `take_events` first. None: it does not
        know these, and has done nothing; they are decoded then, for `take`. `find_lane` may be asked for a lane, which
        takes reads as they are (`wire.lane`)."""


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


class OperationReply(Protocol):
    """An answer to an operation, in OpenAI's shape: JSON, events, text or sound."""

    content_type: str

    async def read(self) -> bytes:
        """The next bytes of the body, as they come; empty at its end. Raises UpstreamError."""

    async def close(self) -> None:
        """As of a ChunkStream."""


@runtime_checkable
class Operator(Protocol):
    """A backend that does more than chat."""

    @property
    def operations(self) -> frozenset[str]:
        """Some of `wire.operation.OPERATIONS`. With `completions` among them, `complete` and `stream` also take a
        CompletionRequest and answer in its shape."""

    async def operate(self, request: OperationRequest) -> OperationReply:
        """Returns once the upstream has accepted the request. Raises UpstreamError, and BadRequest for what it can
        never do."""


def operations_of(backend: Backend) -> frozenset[str]:
    """Asked on every call, so not by `isinstance`, which looks at every member of a protocol."""
    found: frozenset[str] = getattr(backend, "operations", _CHAT_ALONE)
    return found


_CHAT_ALONE = frozenset({CHAT})


@dataclass(frozen=True, slots=True)
class LoadState:
    """A model that lies in memory. `expires_at` in Unix milliseconds; None: nobody said."""

    state: Literal["loaded", "loading", "unloaded"]
    expires_at: int | None = None
    memory_bytes: int | None = None
    context_length: int | None = None


@runtime_checkable
class Loadable(Protocol):
    """A backend that holds models in memory. All methods raise UpstreamError."""

    async def load(self, model: str) -> LoadState:
        """Returns when it is loaded, which may take minutes."""

    async def unload(self, model: str) -> LoadState: ...

    async def load_states(self) -> Mapping[str, LoadState]:
        """Those that are loaded now."""
