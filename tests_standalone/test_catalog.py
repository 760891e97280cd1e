"""A name in, routes out; a list from memory whatever the upstreams do."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from gateway import catalog as catalogs
from gateway.backends.base import ModelInfo
from gateway.backends.scripted import ScriptedBackend
from gateway.catalog import CREATED, Catalog, Model, Provider, Route
from gateway.errors import ModelNotFound, NeverSent, NotFound, UpstreamError
from gateway.price_table import PriceTable
from gateway.pricing import Price
from gateway.wire.operation import CHAT, EMBEDDINGS, SPEECH
from tests_standalone.conftest import eventually

PRICE = Price(1, 2)


class Listing(ScriptedBackend):
    """A backend that lists models as it is told; it hangs while it is told nothing."""

    def __init__(self, name: str, *answers: Sequence[str] | Exception) -> None:
        super().__init__(name)
        self.asked = 0
        self.closed = False
        self._answers: asyncio.Queue[Sequence[str] | Exception] = asyncio.Queue()
        for answer in answers:
            self.answer(answer)

    def answer(self, names: Sequence[str] | Exception) -> None:
        self._answers.put_nowait(names)

    async def models(self) -> Sequence[ModelInfo]:
        self.asked += 1
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return [ModelInfo(name, 1_700_000_000, "somebody") for name in answer]

    async def aclose(self) -> None:
        self.closed = True


class Embedding(ScriptedBackend):
    """A backend that does more than chat."""

    operations = frozenset({CHAT, EMBEDDINGS})

    async def operate(self, request: object) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def running(providers: Mapping[str, Provider], *models: Model, **options: Any) -> AsyncIterator[Catalog]:
    catalog = Catalog(providers, models, **options)
    catalog.start()
    try:
        yield catalog
    finally:
        await catalog.aclose()


def fixed(name: str, *models: str, **options: Any) -> Provider:
    """A backend whose models the settings name; it is never asked."""
    found = Provider(ScriptedBackend(name), static=True, **options)
    found.listed = {model: ModelInfo(model) for model in models}
    return found


def model(name: str, *routes: Route, fallbacks: Sequence[str] = ()) -> Model:
    return Model(name, routes, fallbacks)


def places(found: Model) -> list[tuple[str, str]]:
    return [(route.backend.name, route.upstream_model) for route in found.routes]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for first answers that do not come waits for ever."""
    monkeypatch.setattr(catalogs, "FIRST_ANSWER_SECONDS", 3600)


# Names


ONE = fixed("one", "listed", "both", "one/inner", "two/outer", prices={"listed": PRICE})
TWO = fixed("two", "both", "gpt-4o")
CONFIGURED = [
    model("gpt-4o", ONE.route("real-4o", PRICE)),
    model("fast", ONE.route("a", weight=3), TWO.route("b"), fallbacks=["gpt-4o"]),
    model("listed-too", TWO.route("c")),
]
ALIASES = {"quick": "fast", "both": "listed-too"}


@pytest.mark.parametrize(
    ("name", "found", "routes"),
    [
        ("gpt-4o", "gpt-4o", [("one", "real-4o")]),
        ("fast", "fast", [("one", "a"), ("two", "b")]),
        ("quick", "fast", [("one", "a"), ("two", "b")]),
        ("both", "listed-too", [("two", "c")]),
        ("listed", "listed", [("one", "listed")]),
        ("two/both", "two/both", [("two", "both")]),
        ("one/anything:8b", "one/anything:8b", [("one", "anything:8b")]),
        ("two/org/model", "two/org/model", [("two", "org/model")]),
        ("one/inner", "one/inner", [("one", "one/inner")]),
        ("two/outer", "two/outer", [("one", "two/outer")]),
        (None, "gpt-4o", [("one", "real-4o")]),
        ("", "gpt-4o", [("one", "real-4o")]),
    ],
    ids=[
        "configured", "several routes", "alias", "alias before list", "listed", "outright", "outright, not listed",
        "outright with slashes", "listed with its prefix", "listed before outright", "none", "empty",
    ],
)  # fmt: skip
async def test_a_name_leads_to_its_routes(name: str | None, found: str, routes: list[tuple[str, str]]) -> None:
    async with running({"one": ONE, "two": TWO}, *CONFIGURED, aliases=ALIASES) as catalog:
        resolved = await catalog.resolve(name)
    assert resolved.name == found
    assert places(resolved) == routes


@pytest.mark.parametrize("name", ["unknown", "three/x", "one/", "/x", "GPT-4o", "gpt-4o ", "fas", "quick/x", "*", "%"])
async def test_a_name_nobody_has(name: str) -> None:
    async with running({"one": ONE, "two": TWO}, *CONFIGURED, aliases=ALIASES) as catalog:
        with pytest.raises(ModelNotFound) as caught:
            await catalog.resolve(name)
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
        with pytest.raises(ModelNotFound):
            catalog.describe(name)


@pytest.mark.parametrize("name", ["unknown", "three/x", "GPT-4o"])
async def test_the_default_backend_takes_what_nobody_has(name: str) -> None:
    async with running({"one": ONE, "two": TWO}, *CONFIGURED, default_backend="two") as catalog:
        assert places(await catalog.resolve(name)) == [("two", name)]
        assert places(await catalog.resolve("gpt-4o")) == [("one", "real-4o")]


@pytest.mark.parametrize(
    ("models", "options", "default"),
    [
        (CONFIGURED, {"default_model": "fast"}, "fast"),
        (CONFIGURED, {"default_model": "two/gpt-4o"}, "two/gpt-4o"),
        (CONFIGURED, {}, "gpt-4o"),
        ([], {}, "listed"),
    ],
    ids=["named", "named outright", "the first configured one", "the first listed one"],
)
async def test_the_default_model(models: list[Model], options: dict[str, Any], default: str) -> None:
    async with running({"one": ONE, "two": TWO}, *models, **options) as catalog:
        assert (await catalog.resolve(None)).name == default


async def test_no_model_at_all() -> None:
    async with running({}) as catalog:
        with pytest.raises(ModelNotFound):
            await catalog.resolve(None)
        assert catalog.listed() == []


# Prices and policies


@pytest.mark.parametrize(
    ("options", "price", "route_policy", "expected"),
    [
        ({}, None, None, (None, "cancel")),
        ({}, PRICE, None, (PRICE, "drain")),
        ({"prices": {"m": PRICE}}, None, None, (PRICE, "drain")),
        ({"prices": {"m": PRICE}}, Price(7, 8), None, (Price(7, 8), "drain")),
        ({"prices": {"other": PRICE}}, None, None, (None, "cancel")),
        ({"free": True}, None, None, (Price(0, 0), "drain")),
        ({"on_disconnect": "cancel"}, PRICE, None, (PRICE, "cancel")),
        ({"on_disconnect": "drain"}, None, None, (None, "drain")),
        ({"on_disconnect": "drain"}, PRICE, "cancel", (PRICE, "cancel")),
    ],
)
def test_the_price_and_the_policy_of_a_route(
    options: dict[str, Any], price: Price | None, route_policy: Any, expected: tuple[Price | None, str]
) -> None:
    route = fixed("b", **options).route("m", price, on_disconnect=route_policy)
    assert (route.price, route.on_disconnect) == expected


def test_the_window_of_a_model_is_what_the_settings_say_else_the_smallest_of_its_routes() -> None:
    def routes(*windows: int | None) -> list[Route]:
        return [replace(ONE.route("m"), context_window=window) for window in windows]

    assert Model("m", routes(None)).context_window is None
    assert Model("m", routes(8000, None, 4000)).context_window == 4000
    assert Model("m", routes(8000, 4000), window=9000).context_window == 9000


def test_the_window_of_a_route_is_its_backends_else_in_the_table() -> None:
    provider = fixed("b", vendor="openai", table=PriceTable.load())
    assert provider.route("gpt-4o").context_window == 128_000
    assert provider.route("nobody-knows-me").context_window is None
    provider.context_window = 2048
    assert provider.route("gpt-4o").context_window == 2048


async def test_what_a_backend_refuses_goes_with_each_of_its_routes() -> None:
    provider = fixed("b", "m", refuse=frozenset({"chat_template"}))
    async with running({"b": provider}, default_backend="b") as catalog:
        for name in ("m", "b/m", "unknown"):
            assert (await catalog.resolve(name)).routes[0].refuse == {"chat_template"}


# The order of attempts


async def test_routes_are_tried_once_each_then_the_fallbacks() -> None:
    async with running({"one": ONE, "two": TWO}, *CONFIGURED, aliases=ALIASES) as catalog:
        tried = [(name, route.backend.name, route.upstream_model) for name, route in catalog.attempts(CONFIGURED[1])]
    assert sorted(tried[:2]) == [("fast", "one", "a"), ("fast", "two", "b")]
    assert tried[2:] == [("gpt-4o", "one", "real-4o")]


@pytest.mark.parametrize(
    ("fallbacks", "tried"),
    [
        (["quick"], [("m", "x"), ("quick", "a"), ("quick", "b")]),
        (["listed", "two/anything"], [("m", "x"), ("listed", "listed"), ("two/anything", "anything")]),
        (["gone", "listed"], [("m", "x"), ("listed", "listed")]),
        (["m"], [("m", "x"), ("m", "x")]),
    ],
    ids=["an alias", "listed and outright", "one that is gone", "itself"],
)
async def test_what_a_fallback_may_be(fallbacks: list[str], tried: list[tuple[str, str]]) -> None:
    own = model("m", ONE.route("x"), fallbacks=fallbacks)
    models = [own, CONFIGURED[0], model("fast", ONE.route("a"), TWO.route("b"))]
    async with running({"one": ONE, "two": TWO}, *models, aliases=ALIASES) as catalog:
        found = [(name, route.upstream_model) for name, route in catalog.attempts(own)]
    assert sorted(found[1:]) == sorted(tried[1:])
    assert found[0] == tried[0]


async def test_weights_decide_which_route_is_first() -> None:
    found = model("m", ONE.route("often", weight=9), ONE.route("seldom", weight=1))
    async with running({"one": ONE}, found) as catalog:
        first = Counter(catalog.attempts(found)[0][1].upstream_model for _ in range(2000))
    assert 1600 < first["often"] < 1960


OPERATOR = Provider(Embedding("operator"), static=True)


async def test_only_routes_that_can_do_it_are_tried() -> None:
    found = model("m", ONE.route("x"), OPERATOR.route("y"), fallbacks=["spare"])
    spare = model("spare", ONE.route("z"), OPERATOR.route("z"))
    async with running({"one": ONE, "operator": OPERATOR}, found, spare) as catalog:
        assert [route.upstream_model for _, route in catalog.attempts(found, EMBEDDINGS)] == ["y", "z"]
        assert len(catalog.attempts(found)) == 4


async def test_an_operation_that_no_route_can_do() -> None:
    found = model("m", ONE.route("x"), OPERATOR.route("y"))
    async with running({"one": ONE, "operator": OPERATOR}, found) as catalog:
        with pytest.raises(NotFound, match="The model 'm' has no backend that answers /v1/audio/speech") as caught:
            catalog.attempts(found, SPEECH)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "not_found", "model")


def cooling(retry_after: float = 30) -> UpstreamError:
    failure = UpstreamError("Too much.", status=429, upstream_status=429)
    failure.retry_after = retry_after
    return failure


async def test_routes_that_cool_down_come_after_all_others_the_first_to_recover_first() -> None:
    provider = fixed("b")
    spare = model("spare", provider.route("c"), provider.route("d"))
    found = model("m", provider.route("a", weight=1000), provider.route("b", weight=1000), fallbacks=["spare"])
    found.routes[0].health.failed(cooling(50))
    found.routes[1].health.failed(cooling(40))
    spare.routes[0].health.failed(cooling(30))
    async with running({"b": provider}, found, spare) as catalog:
        orders = [[(name, route.upstream_model) for name, route in catalog.attempts(found)] for _ in range(20)]
    assert orders == [[("spare", "d"), ("spare", "c"), ("m", "b"), ("m", "a")]] * 20


async def test_the_last_route_is_tried_though_it_cools() -> None:
    found = model("m", fixed("b").route("a"))
    found.routes[0].health.failed(cooling())
    async with running({}, found) as catalog:
        assert [name for name, _ in catalog.attempts(found)] == ["m"]


async def test_a_route_that_has_recovered_is_drawn_by_its_weight_again() -> None:
    provider = fixed("b")
    found = model("m", provider.route("often", weight=99), provider.route("seldom", weight=1))
    async with running({"b": provider}, found) as catalog:
        found.routes[0].health.failed(cooling())
        assert {catalog.attempts(found)[0][1].upstream_model for _ in range(50)} == {"seldom"}
        found.routes[0].health.answered()
        first = Counter(catalog.attempts(found)[0][1].upstream_model for _ in range(1000))
    assert first["often"] > 900


# Health


async def test_all_names_of_an_upstream_model_share_its_health() -> None:
    provider = fixed("b", "m")
    async with running({"b": provider}, model("mine", provider.route("m")), default_backend="b") as catalog:
        (configured,), (listed,), (outright,) = [(await catalog.resolve(name)).routes for name in ("mine", "m", "b/m")]
        configured.health.failed(cooling())
        assert listed.health.cooling
        assert outright.health.cooling
        assert not (await catalog.resolve("other")).routes[0].health.cooling


async def test_names_that_clients_make_up_are_forgotten_those_of_the_settings_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalogs, "MOST_HEALTHS", 3)
    provider = fixed("b")
    async with running({"b": provider}, model("mine", provider.route("m")), default_backend="b") as catalog:
        (mine,) = (await catalog.resolve("mine")).routes
        for number in range(10):
            await catalog.resolve(f"made-up-{number}")
        assert list(provider.health) == ["m", "made-up-7", "made-up-8", "made-up-9"]
        assert (await catalog.resolve("b/m")).routes[0].health is mine.health


async def test_a_name_as_long_as_a_body_is_nobodys_and_kept_nowhere() -> None:
    provider = fixed("b")
    async with running({"b": provider}, default_backend="b") as catalog:
        for name in ("x" * 501, "b/" + "x" * 499):
            with pytest.raises(ModelNotFound, match="at most 500 characters"):
                await catalog.resolve(name)
            with pytest.raises(ModelNotFound):
                catalog.describe(name)
        assert not provider.health
        assert (await catalog.resolve("x" * 500)).name == "x" * 500


async def test_the_status_of_a_backend() -> None:
    backend = Listing("up")
    provider = Provider(backend)
    async with running({"up": provider}) as catalog:
        assert provider.status == "unknown"
        backend.answer(["a", "b"])
        await eventually(lambda: _has(catalog, "a"))
        assert provider.status == "ok"
        a, b = provider.route("a").health, provider.route("b").health
        a.failed(cooling())
        assert provider.status == "cooling", "b was never used"
        b.answered()
        assert provider.status == "ok"
        b.failed(cooling())
        assert provider.status == "cooling"
        a.answered()
        assert provider.status == "ok"


async def test_a_backend_that_does_not_list_its_models_is_failing() -> None:
    provider = Provider(Listing("up", UpstreamError("The upstream failed.")))
    async with running({"up": provider}) as catalog:
        await eventually(lambda: _is(provider, "failing"))
        assert catalog.health == "down"


async def test_the_health_of_all_backends() -> None:
    failing = Provider(Listing("up", UpstreamError("The upstream failed.")))
    async with running({"up": failing, "one": ONE}) as catalog:
        assert catalog.health == "ok"
        await eventually(lambda: _is(failing, "failing"))
        assert catalog.health == "degraded"
        assert {provider.backend.name for provider in catalog.providers} == {"up", "one"}


# Prices that are looked up

BIG = {"id": "big", "equals": ["big"], "price": {"input": 1_000_000, "output": 2_000_000}}
TABLE = PriceTable({"made_on": "2026-01-01", "source": "a test", "vendors": {"acme": {"models": [BIG]}}})


@pytest.mark.parametrize(
    ("options", "name", "known"),
    [
        ({"vendor": "acme"}, "big", True),
        ({"vendor": "acme"}, "small", False),
        ({"vendor": "nobody"}, "big", False),
        ({"vendor": None}, "big", False),
        ({"vendor": "acme", "table": None}, "big", False),
    ],
)
def test_a_price_that_the_settings_do_not_say_is_looked_up(options: dict[str, Any], name: str, known: bool) -> None:
    route = fixed("b", **{"table": TABLE, **options}).route(name)
    assert (route.price is not None) is known
    assert route.price is None or route.price.at(0) == Price(1_000_000, 2_000_000)
    assert route.on_disconnect == ("drain" if known else "cancel")


@pytest.mark.parametrize(
    ("options", "given", "price"),
    [({"prices": {"big": PRICE}}, None, PRICE), ({}, Price(7, 8), Price(7, 8)), ({"free": True}, None, Price(0, 0))],
)
def test_what_the_settings_say_comes_before_it(options: dict[str, Any], given: Price | None, price: Price) -> None:
    assert fixed("b", vendor="acme", table=TABLE, **options).route("big", given).price == price


def test_looked_up_prices_are_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogs, "MOST_PRICES", 3)
    provider = fixed("b", vendor="acme", table=TABLE)
    found = provider.route("big").price
    assert provider.route("big").price is found
    for number in range(10):
        assert provider.route(f"made-up-{number}").price is None
        assert len(provider.looked_up) <= 3
    assert provider.route("big").price is not None


# Lists


async def test_all_names_are_listed_once_configured_ones_first() -> None:
    async with running({"one": ONE, "two": TWO}, *CONFIGURED, aliases=ALIASES) as catalog:
        listed = catalog.listed()
    assert [info.id for info in listed] == [
        "gpt-4o", "fast", "listed-too", "quick", "both", "listed", "one/inner", "two/outer",
    ]  # fmt: skip
    assert {info.created for info in listed} == {CREATED}
    assert [info.owned_by for info in listed] == ["one", "one", "two", "one", "two", "one", "one", "one"]


@pytest.mark.parametrize(
    ("name", "owner"), [("gpt-4o", "one"), ("quick", "one"), ("listed", "one"), ("two/org/x:8b", "two")]
)
async def test_one_name_is_described(name: str, owner: str) -> None:
    async with running({"one": ONE, "two": TWO}, *CONFIGURED, aliases=ALIASES) as catalog:
        assert catalog.describe(name) == ModelInfo(name, CREATED, owner)


async def test_what_a_backend_says_of_a_model_is_kept() -> None:
    async with running({"up": Provider(Listing("up", ["m"]))}) as catalog:
        await catalog.resolve("m")
        assert catalog.listed() == [ModelInfo("m", 1_700_000_000, "somebody")]


async def test_the_list_never_waits_for_an_upstream_that_hangs() -> None:
    hanging = Listing("hanging")
    providers = {"hanging": Provider(hanging), "up": Provider(Listing("up", ["m"]))}
    async with running(providers, model("own", ONE.route("x"))) as catalog:
        assert [info.id for info in catalog.listed()] == ["own"]
        await eventually(lambda: _has(catalog, "m"))
        assert [info.id for info in catalog.listed()] == ["own", "m"]
        assert places(await catalog.resolve("own")) == [("one", "x")]
        assert places(await catalog.resolve("m")) == [("up", "m")]
        assert places(await catalog.resolve("hanging/x")) == [("hanging", "x")]
        with pytest.raises(ModelNotFound):
            catalog.describe("unknown")


async def test_an_unknown_name_waits_for_the_first_answers(patient: None) -> None:
    backend = Listing("up")
    async with running({"up": Provider(backend)}) as catalog:
        waiting = asyncio.create_task(catalog.resolve("m"))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        backend.answer(["m"])
        assert places(await asyncio.wait_for(waiting, 10)) == [("up", "m")]


@pytest.mark.parametrize(("default", "found"), [("up", True), (None, False)])
async def test_it_waits_only_once_for_an_upstream_that_hangs(
    default: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "FIRST_ANSWER_SECONDS", 0.01)
    async with running({"up": Provider(Listing("up"))}, default_backend=default) as catalog:
        for _ in range(3):
            try:
                assert places(await asyncio.wait_for(catalog.resolve("m"), 10)) == [("up", "m")]
                assert found
            except ModelNotFound:
                assert not found
            monkeypatch.setattr(catalogs, "FIRST_ANSWER_SECONDS", 3600)


async def test_a_backend_that_cannot_list_is_no_reason_to_wait(patient: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    failing = Listing("failing", UpstreamError("The upstream failed.", log="status 404"))
    async with running({"failing": Provider(failing), "one": ONE}, default_backend="failing") as catalog:
        assert places(await catalog.resolve("listed")) == [("one", "listed")]
        assert places(await asyncio.wait_for(catalog.resolve("m"), 10)) == [("failing", "m")]
    assert "failing does not list its models: status 404" in caplog.text


async def test_a_backend_is_asked_again_soon_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogs, "RETRY_SECONDS", (0.001, 0.002))
    backend = Listing("up", *[UpstreamError("The upstream failed.")] * 5, ["m"])
    async with running({"up": Provider(backend)}) as catalog:
        await eventually(lambda: _has(catalog, "m"))
        assert backend.asked == 6


async def test_the_last_list_stays_while_a_backend_fails_and_a_new_one_replaces_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalogs, "RETRY_SECONDS", (0.001,))
    monkeypatch.setattr(catalogs, "REFRESH_SECONDS", 0.001)
    backend = Listing("up", ["a", "b"])
    async with running({"up": Provider(backend)}) as catalog:
        await eventually(lambda: _has(catalog, "a"))
        backend.answer(UpstreamError("The upstream failed."))
        await eventually(lambda: _asked(backend, 3))
        assert await _has(catalog, "a")
        backend.answer(["b", "c"])
        await eventually(lambda: _has(catalog, "c"))
        assert not await _has(catalog, "a")


async def test_a_mistake_of_ours_while_asking_does_not_end_the_asking(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalogs, "REFRESH_SECONDS", 0.001)
    backend = Listing("up", ValueError("nobody thought of this"), ["m"])
    async with running({"up": Provider(backend)}) as catalog:
        await eventually(lambda: _has(catalog, "m"))
    assert "nobody thought of this" in caplog.text


async def test_closing_ends_the_asking_and_closes_the_backends() -> None:
    backend = Listing("up")
    async with running({"up": Provider(backend)}):
        await eventually(lambda: _asked(backend, 1))
    assert backend.closed


async def test_closing_ends_the_asking_that_has_no_connection_yet() -> None:
    class Connecting(ScriptedBackend):
        """Its connection is never made; it says so when it is cancelled."""

        async def models(self) -> Sequence[ModelInfo]:
            try:
                return await asyncio.Event().wait()  # type: ignore[return-value] # it never returns
            except asyncio.CancelledError:
                raise NeverSent("The call was ended before it was sent.") from None

    catalog = Catalog({"up": Provider(Connecting("up"))})
    catalog.start()
    await asyncio.sleep(0.01)
    await asyncio.wait_for(catalog.aclose(), 10)


async def _has(catalog: Catalog, name: str) -> bool:
    return name in [info.id for info in catalog.listed()]


async def _asked(backend: Listing, times: int) -> bool:
    return backend.asked >= times


async def _is(provider: Provider, status: str) -> bool:
    return provider.status == status
