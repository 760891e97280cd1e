"""Every failure that a caller can see, and whose fault it is.

    GatewayError
      BadRequest              400  the request cannot be understood or is refused as it stands
        BodyTooLarge          413
        UnsupportedMediaType  415
        Unprocessable         422
      Unauthenticated         401  no key, or one we do not know
      PermissionDenied        403  a known caller asks for more than it may have
      NotFound                404
        ModelNotFound         404
      MethodNotAllowed        405
      Conflict                409  it cannot be as things stand now
      ConversationBusy        409  another turn runs on it: it goes through once that has ended
      RateLimited             429  too much at once: it goes through after a while
      QuotaExceeded           429  the money is spent: waiting a moment does not help
      Unavailable             503  ours: draining, or something we need is down
        DatabaseUnavailable   503
      NotRecorded             503  the answer exists but could not be made durable: repeating costs twice
      UpstreamError           any  the backend answered with an error, or not at all
        UpstreamTimeout       504
        UpstreamUnreachable   502  nothing was sent: safe to try elsewhere
          NeverSent           502  because the call was ended first
        UntrueUsage           502  never raised: it answered, and told token counts that cannot be true

Each class knows its HTTP status and OpenAI's `type` and `code`; each dialect knows the shape of the body.
A message never holds a key, a path of this machine, a class name or a traceback. `log` may say more: it goes
to the log only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

UNSENT = "ended before it was sent"
"""What a CancelledError says (`args`) that ended a call before a byte of it left."""

__all__ = [
    "UNSENT",
    "BadRequest",
    "BodyTooLarge",
    "ConfigError",
    "Conflict",
    "ConversationBusy",
    "DatabaseUnavailable",
    "GatewayError",
    "MethodNotAllowed",
    "ModelNotFound",
    "NeverSent",
    "NotFound",
    "NotRecorded",
    "PermissionDenied",
    "QuotaExceeded",
    "RateLimited",
    "Unauthenticated",
    "Unavailable",
    "Unprocessable",
    "UnsupportedMediaType",
    "UntrueUsage",
    "UpstreamError",
    "UpstreamTimeout",
    "UpstreamUnreachable",
]


class GatewayError(Exception):
    """Base of all failures that are answered with a body of their own."""

    status = 500
    type = "server_error"
    code: str | None = None
    upstream_status: int | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        log: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.headers = dict(headers or {})
        self.log = log


class BadRequest(GatewayError):
    status = 400
    type = "invalid_request_error"


class BodyTooLarge(BadRequest):
    status = 413
    code = "request_too_large"


class UnsupportedMediaType(BadRequest):
    status = 415
    code = "unsupported_media_type"


class Unprocessable(BadRequest):
    status = 422


class Unauthenticated(GatewayError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDenied(GatewayError):
    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class NotFound(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(GatewayError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class ConversationBusy(GatewayError):
    """Another turn runs on the conversation; `retry_after` (seconds) says when to try again. SDKs do so unasked."""

    status = 409
    type = "invalid_request_error"
    code = "conversation_busy"

    def __init__(self, *, retry_after: float) -> None:
        headers = {"retry-after": str(max(1, math.ceil(retry_after))), "retry-after-ms": str(int(retry_after * 1000))}
        super().__init__(
            "Another turn of this conversation is under way. Try again when it has ended.",
            param="conversation_id",
            headers=headers,
        )


class RateLimited(GatewayError):
    """More than the caller may have just now; `retry_after` (seconds) says when it would go through. `type` says what
    there was too much of: `requests` or `tokens`."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        log: str | None = None,
    ) -> None:
        when = {
            "retry-after": str(max(1, math.ceil(retry_after))),
            "retry-after-ms": str(max(1, math.ceil(retry_after * 1000))),
        }
        super().__init__(message, headers={**(headers or {}), **when}, log=log)
        self.retry_after = retry_after
        if type is not None:
            self.type = type


class QuotaExceeded(GatewayError):
    """A budget is spent, or cannot hold the call. OpenAI's clients do not repeat it."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None, log: str | None = None) -> None:
        super().__init__(message, headers={**(headers or {}), "x-should-retry": "false"}, log=log)


class Unavailable(GatewayError):
    """Try again later; `retry_after` (seconds) says when."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float = 2, log: str | None = None) -> None:
        headers = {"retry-after": str(max(1, round(retry_after))), "retry-after-ms": str(int(retry_after * 1000))}
        super().__init__(message, headers=headers, log=log)


class DatabaseUnavailable(Unavailable):
    """The database does not answer in time, or refuses all work (full, read-only, no connection free)."""

    def __init__(self, cause: str, *, retry_after: float = 2) -> None:
        super().__init__(
            "The gateway's database does not answer, so this call was not started. Try again in a moment.",
            retry_after=retry_after,
            log=cause,
        )
        self.cause = cause


class NotRecorded(GatewayError):
    """The upstream was paid and the turn could not be made durable in time."""

    status = 503
    type = "service_unavailable_error"
    code = "not_recorded"

    def __init__(self, log: str | None = None) -> None:
        super().__init__(
            "The answer was produced but could not be recorded, so it is withheld. Repeating the call costs again.",
            headers={"x-should-retry": "false"},
            log=log,
        )


class UpstreamError(GatewayError):
    """A backend failed. `status` is what our client sees; `upstream_status` is what the backend said, if anything."""

    status = 502
    type = "upstream_error"
    code: str | None = "upstream_error"
    retry_after: float | None = None
    """Seconds, if the upstream said when to come back."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        upstream_status: int | None = None,
        headers: Mapping[str, str] | None = None,
        log: str | None = None,
    ) -> None:
        super().__init__(message, param=param, headers=headers, log=log)
        self.status = status
        self.upstream_status = upstream_status
        if type is not None:
            self.type = type
            self.code = code
        elif code is not None:
            self.code = code


class UpstreamTimeout(UpstreamError):
    def __init__(self, message: str, *, log: str | None = None) -> None:
        super().__init__(message, status=504, log=log)
        self.code = "upstream_timeout"


class UpstreamUnreachable(UpstreamError):
    """No connection could be made, so the request is known to be unsent."""


class UntrueUsage(UpstreamError):
    """A count that cannot be true. The call goes on with what was told before, or what we count: told, never raised."""


class NeverSent(UpstreamUnreachable):
    """The call was ended before a byte of it left: there was no call."""


class ConfigError(Exception):
    """The configuration has mistakes. `problems` holds one line each, every line headed by its path."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
