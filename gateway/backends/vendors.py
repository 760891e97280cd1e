"""What compatible upstreams want otherwise, by vendor. A table: adding a vendor or a peculiarity is a line here.

Names are those of the price list of the package genai-prices. A vendor is told by the host of its address; whoever is
not in the table (vLLM, llama.cpp, LM Studio and all that has no host of its own) has no peculiarities until the
configuration says so. Here stands only what makes requests fail or go wrong otherwise, each with its evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import urlsplit

NOBODY = "none"
"""The vendor of an upstream that shall be taken as it is, whatever its host."""


@dataclass(frozen=True, slots=True)
class CallIds:
    """The ids of tool calls that an upstream takes. `length` is exact; `word` is letters, digits, `_` and `-`."""

    alphabet: Literal["any", "word", "alphanumeric"] = "any"
    length: int | None = None
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class Quirks:
    """How requests are changed for an upstream. None: nothing is said about it, so they stay as they are.

    `by_model` adds to the others for the models whose name fits the pattern; the first that fits counts.
    """

    drop: tuple[str, ...] | None = None
    rename: Mapping[str, str] | None = None
    defaults: Mapping[str, Any] | None = None
    roles: Mapping[str, str] | None = None
    tool_call_ids: CallIds | None = None
    tool_call_reasoning: Literal["pass", "fill", "strip"] | None = None
    message_fields: tuple[str, ...] | None = None
    flatten: tuple[str, ...] | None = None
    usage_in_stream: bool | None = None
    most_choices: int | None = None
    by_model: Mapping[str, Quirks] | None = None

    def over(self, below: Quirks) -> Quirks:
        """These, and what `below` says where these say nothing."""
        return replace(below, **{name: value for name, value in self._said() if value is not None})

    def for_model(self, model: str) -> Quirks:
        """Those of one model: what `by_model` says of it joined to the rest."""
        patterns = self.by_model or {}
        own = next((quirks for pattern, quirks in patterns.items() if fnmatchcase(model, pattern)), None)
        if own is None:
            return self
        return replace(self, **{name: _joined(getattr(self, name), value) for name, value in own._said()})

    def _said(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def _joined(general: Any, own: Any) -> Any:
    if general is None or own is None:
        return general if own is None else own
    if isinstance(own, Mapping):
        return {**general, **own}
    return (*general, *own) if isinstance(own, tuple) else own


@dataclass(frozen=True, slots=True)
class Vendor:
    """`places` are patterns of hosts, or of a host and the beginning of a path."""

    places: tuple[str, ...]
    quirks: Quirks = Quirks()


_NEEDS_MAX_COMPLETION_TOKENS = Quirks(rename={"max_tokens": "max_completion_tokens"})
_REFUSES_PENALTIES = Quirks(drop=("presence_penalty", "frequency_penalty", "stop"))
_ONLY_SYSTEM = {"developer": "system"}
_SHORT_IDS = CallIds(max_length=40)

_OPENAI = Quirks(
    tool_call_ids=_SHORT_IDS,  # string_above_max_length: vercel/ai #5171, agno #5382
    by_model={"o[0-9]*": _NEEDS_MAX_COMPLETION_TOKENS, "gpt-[5-9]*": _NEEDS_MAX_COMPLETION_TOKENS},
)
_AZURE = Quirks(tool_call_ids=_SHORT_IDS)  # a deployment's name does not tell its model
_DEEPSEEK = Quirks(
    rename={"max_completion_tokens": "max_tokens"},  # ignored without a word: earendil-works/pi #8018
    roles=_ONLY_SYSTEM,  # 400 unknown variant: earendil-works/pi #1048, theia #15144
    tool_call_reasoning="fill",  # opencode #24722
)
_MISTRAL = Quirks(
    # Answers 422 to every field it does not know, in messages too: mistral-go PR #2, openclaude #739, crush #1590
    drop=("user", "store"),
    rename={"max_completion_tokens": "max_tokens", "seed": "random_seed"},
    roles=_ONLY_SYSTEM,
    message_fields=("role", "content", "tool_calls", "tool_call_id", "prefix"),
    tool_call_ids=CallIds("alphanumeric", length=9),  # langchain PR #24668
    usage_in_stream=False,  # sends it unasked; cline #939
)
_GROQ = Quirks(
    message_fields=("role", "content", "tool_calls", "tool_call_id"),  # jan #8136, ServiceStack/llms #17; no `name`
    most_choices=1,
)
_XAI = Quirks(  # 400 even at 0: uni-api #105, langchain PR #38335
    by_model={"*non-reasoning*": Quirks(), "grok-4*": _REFUSES_PENALTIES, "grok-3-mini*": _REFUSES_PENALTIES}
)
_CEREBRAS = Quirks(drop=("messages.reasoning_content",))  # 400: kilocode #10375

VENDORS: Mapping[str, Vendor] = {
    "openai": Vendor(("api.openai.com", "*.api.openai.com"), _OPENAI),
    "azure": Vendor(
        ("*.openai.azure.com", "*.azure-api.net", "*.cognitiveservices.azure.com", "*.services.ai.azure.com"), _AZURE
    ),
    "deepseek": Vendor(("api.deepseek.com",), _DEEPSEEK),
    "mistral": Vendor(("api.mistral.ai",), _MISTRAL),
    "groq": Vendor(("api.groq.com",), _GROQ),
    "x-ai": Vendor(("api.x.ai", "*.api.x.ai"), _XAI),
    "cerebras": Vendor(("api.cerebras.ai",), _CEREBRAS),
    "anthropic": Vendor(("api.anthropic.com",)),
    "arcee": Vendor(("api.arcee.ai",)),
    "avian": Vendor(("api.avian.io",)),
    "aws": Vendor(("bedrock-runtime.*.amazonaws.com",)),
    "baseten": Vendor(("inference.baseten.co",)),
    "cloudflare": Vendor(("api.cloudflare.com",)),
    "cohere": Vendor(("api.cohere.ai", "api.cohere.com")),
    "databricks": Vendor(("*.cloud.databricks.com", "*.azuredatabricks.net", "*.gcp.databricks.com")),
    "doubleword": Vendor(("api.doubleword.ai",)),
    "fireworks": Vendor(("api.fireworks.ai",)),
    "github-copilot": Vendor(("api.githubcopilot.com",)),
    "google": Vendor(("*.googleapis.com",)),
    "huggingface_cerebras": Vendor(("router.huggingface.co/cerebras",)),
    "huggingface_fireworks-ai": Vendor(("router.huggingface.co/fireworks-ai",)),
    "huggingface_groq": Vendor(("router.huggingface.co/groq",)),
    "huggingface_hyperbolic": Vendor(("router.huggingface.co/hyperbolic",)),
    "huggingface_nebius": Vendor(("router.huggingface.co/nebius",)),
    "huggingface_novita": Vendor(("router.huggingface.co/novita",)),
    "huggingface_nscale": Vendor(("router.huggingface.co/nscale",)),
    "huggingface_ovhcloud": Vendor(("router.huggingface.co/ovhcloud",)),
    "huggingface_publicai": Vendor(("router.huggingface.co/publicai",)),
    "huggingface_sambanova": Vendor(("router.huggingface.co/sambanova",)),
    "huggingface_together": Vendor(("router.huggingface.co/together",)),
    "meta": Vendor(("api.meta.ai",)),
    "minimax": Vendor(("api.minimax.com", "api.minimax.io", "api.minimaxi.com")),
    "modal": Vendor(("*.modal.run", "*.modal.direct")),
    "moonshotai": Vendor(("api.moonshot.ai", "api.moonshot.cn")),
    "novita": Vendor(("api.novita.ai",)),
    "openrouter": Vendor(("openrouter.ai", "api.openrouter.ai")),
    "ovhcloud": Vendor(("*.endpoints.kepler.ai.cloud.ovh.net",)),
    "perplexity": Vendor(("api.perplexity.ai",)),
    "together": Vendor(("api.together.xyz", "api.together.ai")),
    "voyageai": Vendor(("api.voyageai.com",)),
    "zai": Vendor(("api.z.ai",)),
    "zhipuai": Vendor(("open.bigmodel.cn",)),
}


def vendor_of(base_url: str | None) -> str | None:
    """The vendor that an address belongs to; None: nobody we know."""
    parts = urlsplit(base_url or "")
    host = (parts.hostname or "").rstrip(".")
    return next(
        (name for name, vendor in VENDORS.items() if any(_is_at(host, parts.path, at) for at in vendor.places)), None
    )


def _is_at(host: str, path: str, place: str) -> bool:
    pattern, slash, beginning = place.partition("/")
    return fnmatchcase(host, pattern) and (not slash or f"{path}/".startswith(f"/{beginning}/"))


def quirks_of(vendor: str | None) -> Quirks:
    """Those of a vendor in the table; none of anybody else."""
    known = VENDORS.get(vendor or NOBODY)
    return known.quirks if known is not None else Quirks()
