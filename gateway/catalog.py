"""Public model names, and which backend serves them under which name at what price.

A name is looked up in this order: the configured models and their aliases; the backends that list it (asked in the
background, kept in memory); `backend/model`, which names it outright; `default_backend`, which takes what nobody lists.
Asking for the list never waits for an upstream; only a name that nobody knows waits, once, for the first answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gateway.backends.base import Backend, ModelInfo, operations_of
from gateway.errors import ModelNotFound, NeverSent, NotFound, UpstreamError
from gateway.health import RouteHealth
from gateway.price_table import PriceTable
from gateway.pricing import Price, Priced
from gateway.wire.operation import CHAT

log = logging.getLogger("gateway.catalog")

OnDisconnect = Literal["drain", "cancel"]
REFRESH_SECONDS = 300
RETRY_SECONDS = (1, 2, 5, 15)
FIRST_ANSWER_SECONDS = 5
MOST_HEALTHS = 1000
MOST_PRICES = 2000
LONGEST_NAME = 500
CREATED = 1_767_225_600
"""For models whose upstream says no date: 2026-01-01, so that all workers say the same."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way to serve a model. `price` None: nobody knows it. `context_window`: likewise, in tokens."""

    backend: Backend
    upstream_model: str
    price: Priced | None = None
    weight: int = 1
    on_disconnect: OnDisconnect = "cancel"
    refuse: frozenset[str] = frozenset()
    health: RouteHealth = field(default_factory=RouteHealth, compare=False)
    context_window: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A public name: its routes, and the names that are tried when all of them fail. `max_output_tokens`: of an answer
    that nobody limits, at most. `window`: what the settings say of its context window."""

    name: str
    routes: Sequence[Route]
    fallbacks: Sequence[str] = ()
    max_output_tokens: int | None = None
    window: int | None = None

    @property
    def context_window(self) -> int | None:
        """Tokens that a call and its answer may have together on whichever route takes it; None: nobody knows."""
        if self.window is not None:
            return self.window
        return min((route.context_window for route in self.routes if route.context_window is not None), default=None)


@dataclass(slots=True)
class Provider:
    """A backend with what its settings say for all its models. `prices` by its own model names; what they do not say is
    looked up in `table`, where `vendor` names whose prices these are.

    `context_window`: of all its models, where its settings fix it.

    `listed` are the models it has; if `static`, the settings say so and it is never asked. `configured` are those that
    routes of the settings lead to: their health is never forgotten.
    """

    backend: Backend
    on_disconnect: OnDisconnect | None = None
    refuse: frozenset[str] = frozenset()
    static: bool = False
    prices: Mapping[str, Priced] = field(default_factory=dict)
    free: bool = False
    vendor: str | None = None
    table: PriceTable | None = None
    context_window: int | None = None
    listed: Mapping[str, ModelInfo] = field(default_factory=dict)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    failing: bool = False
    health: OrderedDict[str, RouteHealth] = field(default_factory=OrderedDict)
    configured: set[str] = field(default_factory=set)
    looked_up: dict[str, tuple[Priced | None, int | None]] = field(default_factory=dict)

    @property
    def status(self) -> Literal["ok", "cooling", "failing", "unknown"]:
        """`failing`: it does not list its models. `cooling`: all routes that were used lately cool down."""
        if self.failing:
            return "failing"
        if not self.asked.is_set():
            return "unknown"
        used = [health for health in self.health.values() if health.calls]
        return "cooling" if used and all(health.cooling for health in used) else "ok"

    def route(
        self, model: str, price: Priced | None = None, weight: int = 1, on_disconnect: OnDisconnect | None = None
    ) -> Route:
        found, window = self._looked_up(model)
        known = price or self.prices.get(model) or (Price(0, 0) if self.free else found)
        policy = on_disconnect or self.on_disconnect or ("cancel" if known is None else "drain")
        window = self.context_window or window
        return Route(self.backend, model, known, weight, policy, self.refuse, self._health_of(model), window)

    def _looked_up(self, model: str) -> tuple[Priced | None, int | None]:
        """What the table says: the price, and the context window."""
        if self.table is None or self.vendor is None:
            return None, None
        if model not in self.looked_up:
            if len(self.looked_up) >= MOST_PRICES:
                self.looked_up.clear()
            table, vendor = self.table, self.vendor
            self.looked_up[model] = table.find(vendor, model), table.context_window(vendor, model)
        return self.looked_up[model]

    def _health_of(self, model: str) -> RouteHealth:
        """One for each upstream model, whatever names lead to it; of the names that clients make up, the latest."""
        found = self.health.pop(model, None) or RouteHealth()
        self.health[model] = found
        if len(self.health) > MOST_HEALTHS + len(self.configured):
            del self.health[next(name for name in self.health if name not in self.configured)]
        return found


class Catalog:
    """Built once from the configuration; `start` keeps the lists of the backends fresh."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        models: Sequence[Model] = (),
        aliases: Mapping[str, str] | None = None,
        *,
        default_model: str | None = None,
        default_backend: str | None = None,
    ) -> None:
        self._providers = dict(providers)
        for route in (route for model in models for route in model.routes):
            if route.backend.name in self._providers:
                self._providers[route.backend.name].configured.add(route.upstream_model)
        self._models = {model.name: model for model in models}
        self._aliases = dict(aliases or {})
        self._default_model = default_model
        self._default_backend = default_backend
        self._tasks: list[asyncio.Task[None]] = []
        self._waited = False

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._keep_asking(provider)) for provider in self._providers.values()]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for provider in self._providers.values():
            await provider.backend.aclose()

    async def resolve(self, name: str | None) -> Model:
        """The model of that name, or the default one. Raises ModelNotFound."""
        name = name or self.default_model
        if name is None:
            raise ModelNotFound("No model is configured. Add a backend to config.yaml.", param="model")
        if len(name) > LONGEST_NAME:
            raise ModelNotFound(f"A model name has at most {LONGEST_NAME} characters.")
        found = self._known(name)
        if found is None and not self._waited and any(not one.asked.is_set() for one in self._providers.values()):
            await self._first_answers()
            found = self._known(name)
        if found is None and self._default_backend in self._providers:
            found = Model(name, [self._providers[self._default_backend].route(name)])
        if found is None:
            raise ModelNotFound(
                f"The model '{name}' does not exist here. GET /v1/models lists those that do.", param=None
            )
        return found

    def configured(self, name: str | None) -> Model | None:
        """What `resolve` gives for a name that the configuration has, an alias of one too. None: ask `resolve`."""
        return None if name is None else self._models.get(self._aliases.get(name, name))

    def routes(self, model: Model) -> Iterable[Route]:
        """All that may serve it, its fallbacks' among them, in no order."""
        return self._all_routes(model) if model.fallbacks else model.routes

    def _all_routes(self, model: Model) -> Iterator[Route]:
        for name in (model.name, *model.fallbacks):
            candidate = model if name == model.name else self._known(name)
            yield from candidate.routes if candidate is not None else ()

    def attempts(self, model: Model, operation: str = CHAT) -> list[tuple[str, Route]]:
        """Routes that can do it in the order to try them: by weight at random, then those of the fallbacks; those that
        cool down after all others, the first to recover first. Raises NotFound if none can."""
        routes = model.routes
        if len(routes) == 1 and not model.fallbacks and operation in operations_of(routes[0].backend):
            return [(model.name, routes[0])]
        order: list[tuple[str, Route]] = []
        for name in (model.name, *model.fallbacks):
            candidate = model if name == model.name else self._known(name)
            rest = list(candidate.routes) if candidate is not None else []
            rest = [route for route in rest if operation in operations_of(route.backend)]
            while len(rest) > 1:
                route = random.choices(rest, [item.weight for item in rest])[0]
                rest.remove(route)
                order.append((name, route))
            order += [(name, route) for route in rest]
        if not order:
            raise NotFound(f"The model '{model.name}' has no backend that answers /v1/{operation}.", param="model")
        if len(order) > 1 and any(route.health.cooling for _, route in order):
            order.sort(key=lambda attempt: attempt[1].health.cooling_until if attempt[1].health.cooling else 0.0)
        return order

    @property
    def providers(self) -> Sequence[Provider]:
        return tuple(self._providers.values())

    def listed(self) -> list[ModelInfo]:
        """Every name that can be asked for, configured ones first."""
        found: dict[str, ModelInfo] = {}
        for model in self._models.values():
            found[model.name] = ModelInfo(model.name, CREATED, model.routes[0].backend.name)
        for alias, name in self._aliases.items():
            found.setdefault(alias, ModelInfo(alias, CREATED, self._models[name].routes[0].backend.name))
        for provider in self._providers.values():
            for info in provider.listed.values():
                owner = info.owned_by or provider.backend.name
                found.setdefault(info.id, ModelInfo(info.id, info.created or CREATED, owner))
        return list(found.values())

    def describe(self, name: str) -> ModelInfo:
        """One model for `GET /models/{id}`. Raises ModelNotFound; never waits for an upstream."""
        for info in self.listed():
            if info.id == name:
                return info
        found = self._known(name)
        if found is None:
            raise ModelNotFound(f"The model '{name}' does not exist here. GET /v1/models lists those that do.")
        return ModelInfo(name, CREATED, found.routes[0].backend.name)

    @property
    def health(self) -> Literal["ok", "degraded", "down"]:
        """Of the backends, by whether they last answered when asked for their models."""
        failing = [provider.failing for provider in self._providers.values()]
        return "ok" if not any(failing) else "down" if all(failing) else "degraded"

    @property
    def default_model(self) -> str | None:
        if self._default_model is not None:
            return self._default_model
        return next(iter(self._models), None) or next((info.id for info in self.listed()), None)

    def _known(self, name: str) -> Model | None:
        configured = self.configured(name)
        if configured is not None:
            return configured
        for provider in self._providers.values():
            if name in provider.listed:
                return Model(name, [provider.route(name)])
        backend, slash, rest = name.partition("/") if len(name) <= LONGEST_NAME else ("", "", "")
        if slash and rest and backend in self._providers:
            return Model(name, [self._providers[backend].route(rest)])
        return None

    async def _first_answers(self) -> None:
        waiting = [provider.asked.wait() for provider in self._providers.values()]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*waiting), FIRST_ANSWER_SECONDS)
        self._waited = True

    async def _keep_asking(self, provider: Provider) -> None:
        if provider.static:
            provider.asked.set()
            return
        failures = 0
        while True:
            pause: float = REFRESH_SECONDS
            try:
                provider.listed = {info.id: info for info in await provider.backend.models()}
            except NeverSent:  # so a client says that its caller was cancelled
                return
            except UpstreamError as failure:
                log.warning("%s does not list its models: %s", provider.backend.name, failure.log or failure.message)
                provider.failing = True
                pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
                failures += 1
            except Exception:
                log.exception("%s: asking for its models failed", provider.backend.name)
            else:
                failures = 0
                provider.failing = False
                log.info("%s lists %d models", provider.backend.name, len(provider.listed))
            provider.asked.set()
            await asyncio.sleep(pause * random.uniform(0.9, 1.1))
