"""Attempts at upstreams: which route comes next, and whether it may. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.catalog import Route
from gateway.errors import GatewayError, UpstreamError, UpstreamUnreachable
from gateway.wire.chat import ChatRequest
from gateway.wire.operation import OperationRequest

_AGAIN = frozenset({500, 502, 503, 529})
_CLIENTS_OWN = frozenset({400, 404, 409, 413, 415, 422})


def follower(plan: Sequence[tuple[str, Route]], number: int) -> Route | None:
    return plan[number][1] if number < len(plan) else None


def may_follow(failure: UpstreamError, route: Route, follower: Route) -> bool:
    if isinstance(failure, UpstreamUnreachable) or failure.upstream_status in _AGAIN:
        return True
    return follower is not route and failure.upstream_status not in _CLIENTS_OWN


def refused(failure: GatewayError) -> bool:
    """Did the upstream say no, or hear nothing of it? Then nothing was used."""
    return isinstance(failure, UpstreamUnreachable) or failure.upstream_status is not None


def names_others(request: ChatRequest | OperationRequest) -> bool:
    """Might an upstream that reads a doubled key in its own way find another model in it?"""
    if isinstance(request, OperationRequest) and request.form is not None:
        return False  # it cannot be named twice there
    return request.model is not None and (request.raw.count(b'"model"') > 1 or request.raw.find(b"\\u006") >= 0)
