"""What bounds calls and what is kept of them: limits, budgets, conversations."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from pydantic import Field, field_validator

from gateway.config_values import Section

_MOST = 10**12


class LimitSettings(Section):
    """None: no limit. Bursts are sizes of buckets, of requests and of tokens; None: one minute's worth.

    `max_output_tokens`: what a call is taken to produce at most, if neither it nor its model says.
    """

    requests_per_minute: int | None = Field(600, ge=1, le=_MOST)
    tokens_per_minute: int | None = Field(None, ge=1, le=_MOST)
    max_parallel: int | None = Field(None, ge=1, le=_MOST)
    burst: int | None = Field(None, ge=1, le=_MOST)
    token_burst: int | None = Field(None, ge=1, le=_MOST)
    max_output_tokens: int = Field(4096, ge=1, le=10**9)
    store: Literal["auto", "memory", "database"] = "auto"


class Budget(Section):
    """Money that may be spent in each period (UTC)."""

    amounts = frozenset({"usd"})

    usd: Decimal
    period: Literal["day", "month", "total"] = "month"

    @property
    def nanousd(self) -> int:
        return int(self.usd * 10**9)


class BudgetSettings(Section):
    """`key`: of every key that has none of its own, and of the keyless user; `gateway`: of all calls together."""

    key: Budget | None = None
    gateway: Budget | None = None
    allow_unpriced: bool = False


class ConversationSettings(Section):
    """`header`: one more that groups turns. `retention_days` None: kept until somebody deletes them."""

    threading: Literal["auto", "explicit", "off"] = "auto"
    busy: Literal["reject", "wait"] = "reject"
    header: str | None = None
    store_content: bool = True
    retention_days: int | None = Field(None, ge=1, le=36_500)
    deleted_days: int = Field(30, ge=0, le=36_500)
    session_idle_minutes: int = Field(30, ge=1, le=525_600)
    system_prompt_file: str | None = None

    @field_validator("header")
    @classmethod
    def _header(cls, name: str | None) -> str | None:
        if name is not None and re.fullmatch(r"[A-Za-z0-9-]{1,100}", name) is None:
            raise ValueError("must be the name of a header, like X-Chat-Id")
        if name is not None and name.lower() in ("authorization", "x-api-key", "api-key", "cookie"):
            raise ValueError("must not name a header that carries a secret")
        return name
