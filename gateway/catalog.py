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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gateway.backends.base import Backend, ModelInfo
from gateway.errors import ModelNotFound, UpstreamError
from gateway.pricing import Price

log = logging.getLogger("gateway.catalog")

OnDisconnect = Literal["drain", "cancel"]
REFRESH_SECONDS = 300
RETRY_SECONDS = (1, 2, 5, 15)
FIRST_ANSWER_SECONDS = 5
CREATED = 1_767_225_600
"""For models whose upstream says no date: 2026-01-01, so that all workers say the same."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way to serve a model. `price` None: nobody knows it."""

    backend: Backend
    upstream_model: str
    price: Price | None = None
    weight: int = 1
    on_disconnect: OnDisconnect = "cancel"
    refuse: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Model:
    """A public name: its routes, and the names that are tried when all of them fail."""

    name: str
    routes: Sequence[Route]
    fallbacks: Sequence[str] = ()


@dataclass(slots=True)
class Provider:
    """A backend with what its settings say for all its models. `prices` by its own model names.

    `listed` are the models it has; if `static`, the settings say so and it is never asked.
    """

    backend: Backend
    on_disconnect: OnDisconnect | None = None
    refuse: frozenset[str] = frozenset()
    static: bool = False
    prices: Mapping[str, Price] = field(default_factory=dict)
    free: bool = False
    listed: Mapping[str, ModelInfo] = field(default_factory=dict)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    failing: bool = False

    def route(
        self, model: str, price: Price | None = None, weight: int = 1, on_disconnect: OnDisconnect | None = None
    ) -> Route:
        price = price or self.prices.get(model) or (Price(0, 0) if self.free else None)
        policy = on_disconnect or self.on_disconnect or ("cancel" if price is None else "drain")
        return Route(self.backend, model, price, weight, policy, self.refuse)


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

    def routes(self, model: Model) -> Iterator[Route]:
        """All that may serve it, its fallbacks' among them, in no order."""
        for name in (model.name, *model.fallbacks):
            candidate = model if name == model.name else self._known(name)
            yield from candidate.routes if candidate is not None else ()

    def attempts(self, model: Model) -> Iterator[tuple[str, Route]]:
        """Routes in the order to try them: by weight at random, then those of the fallbacks."""
        for name in (model.name, *model.fallbacks):
            candidate = model if name == model.name else self._known(name)
            rest = list(candidate.routes) if candidate is not None else []
            while rest:
                route = random.choices(rest, [item.weight for item in rest])[0]
                rest.remove(route)
                yield name, route

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
        configured = self._models.get(self._aliases.get(name, name))
        if configured is not None:
            return configured
        for provider in self._providers.values():
            if name in provider.listed:
                return Model(name, [provider.route(name)])
        backend, slash, rest = name.partition("/")
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
