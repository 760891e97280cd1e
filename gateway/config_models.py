"""What can be said of a model: its routes, its prices, what it holds."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field

from gateway.config_values import Section


class PriceSettings(Section):
    """USD per million tokens; None: nobody said, so what its parent costs. `service_tiers` are factors on all of it;
    without them it holds for every service tier, and with them for the standard one.
    """

    input: Decimal | None = None
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None
    output: Decimal | None = None
    reasoning: Decimal | None = None
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    image_input: Decimal | None = None
    image_output: Decimal | None = None
    service_tiers: dict[str, Annotated[Decimal, Field(ge=0, le=1000)]] = {}


class RouteSettings(Section):
    backend: str
    model: str | None = None
    weight: int = Field(1, gt=0)
    price: PriceSettings | None = None


class ModelSettings(Section):
    """A public name: either one backend or several routes. `model` None: the upstream knows it by the public name."""

    backend: str | None = None
    model: str | None = None
    price: PriceSettings | None = None
    routes: tuple[RouteSettings, ...] = ()
    fallbacks: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    max_output_tokens: int | None = Field(None, ge=1, le=10**9)
    context_window: int | None = Field(None, ge=1, le=10**9)
    on_disconnect: Literal["drain", "cancel"] | None = None
