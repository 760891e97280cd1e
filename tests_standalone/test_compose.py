"""Settings in, backends and the catalog over them out."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.backends.azure import AzureBackend
from gateway.backends.base import Backend, ModelInfo, operations_of
from gateway.backends.client import HTTPTransport
from gateway.backends.http import HTTPBackend
from gateway.backends.ollama import OllamaBackend
from gateway.backends.scripted import ScriptedBackend
from gateway.backends.transport import Access
from gateway.catalog import CREATED, Catalog
from gateway.compose import _ollama_url, accesses, build_backend, build_catalog, with_local_ollama
from gateway.config import BackendSettings, ServerSettings, Settings, load_settings
from gateway.errors import ConfigError, ModelNotFound
from gateway.pricing import Price
from gateway.wire.chat import ChatRequest
from gateway.wire.operation import CHAT, OPERATIONS
from tests_standalone.backends.certificates import Certificates
from tests_standalone.support.ollama import ScriptedOllama
from tests_standalone.support.upstream import ScriptedUpstream


@pytest.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    found = HTTPTransport()
    yield found
    await found.aclose()


def load(tmp_path: Path, config: dict[str, Any], environ: dict[str, str] | None = None) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return load_settings(str(file), environ or {})


@pytest.fixture
async def catalog_of(tmp_path: Path, transport: HTTPTransport) -> AsyncIterator[Any]:
    """The catalog of a configuration whose backends need not be asked for their models."""
    built = []

    def build(**config: Any) -> Catalog:
        settings = load(tmp_path, config)
        catalog = build_catalog(settings, dict.fromkeys(accesses(settings), transport))
        catalog.start()
        built.append(catalog)
        return catalog

    yield build
    for catalog in built:
        await catalog.aclose()


# Backends by their type

REQUEST = ChatRequest.parse(b'{"model":"answer","messages":[{"role":"user","content":"hello there"}],"logprobs":true}')


@pytest.mark.parametrize(
    ("settings", "kind", "operations"),
    [
        (BackendSettings(type="scripted"), ScriptedBackend, {CHAT}),
        (BackendSettings(type="openai", base_url="http://h/v1"), HTTPBackend, OPERATIONS),
        (BackendSettings(type="azure", base_url="http://h"), AzureBackend, OPERATIONS),
        (BackendSettings(type="ollama"), OllamaBackend, None),
    ],
    ids=["scripted", "openai", "azure", "ollama"],
)
def test_each_type(settings: BackendSettings, kind: type[Backend], operations: Any, transport: HTTPTransport) -> None:
    backend = build_backend("b", settings, transport)
    assert type(backend) is kind
    assert backend.name == "b"
    assert CHAT in operations_of(backend)
    assert operations is None or operations_of(backend) == operations


async def test_key_headers_and_quirks_reach_the_upstream(transport: HTTPTransport) -> None:
    async with ScriptedUpstream() as upstream:
        settings = BackendSettings(
            type="openai", base_url=upstream.base_url, api_key="sk-1", headers={"x-own": "2"}, drop=("logprobs",)
        )
        completion = await build_backend("b", settings, transport).complete(REQUEST)
    (record,) = upstream.tally
    assert completion.data["choices"][0]["message"]["content"] == "You said: hello there"
    assert (record.headers["authorization"], record.headers["x-own"]) == ("Bearer sk-1", "2")
    assert "logprobs" not in record.request


async def test_azure_is_called_by_its_deployments(transport: HTTPTransport) -> None:
    async with ScriptedUpstream() as upstream:
        settings = BackendSettings(type="azure", base_url=upstream.root_url, api_key="k", api_version="2024-10-21")
        await build_backend("b", settings, transport).complete(REQUEST)
    (record,) = upstream.tally
    assert record.path == "/openai/deployments/answer/chat/completions"
    assert record.headers["api-key"] == "k"


async def test_ollama_gets_its_options(transport: HTTPTransport) -> None:
    async with ScriptedOllama() as upstream:
        settings = BackendSettings(
            type="ollama", base_url=upstream.root_url, keep_alive="5m", num_ctx=8192, options={"top_k": 7}
        )
        await build_backend("b", settings, transport).complete(REQUEST.with_model("llama3.1:8b"))
    sent = upstream.tally[-1].request
    assert sent["keep_alive"] == "5m"
    assert sent["options"].items() >= {"num_ctx": 8192, "top_k": 7}.items()


async def test_the_limits_of_time_reach_the_client(transport: HTTPTransport) -> None:
    settings = BackendSettings(type="openai", base_url="http://127.0.0.1:1", timeouts={"connect": 1, "idle": 2})  # type: ignore[arg-type] # as the file has it
    backend = build_backend("b", settings, transport)
    assert isinstance(backend, HTTPBackend)
    assert dataclasses.astuple(backend._timeouts) == (1, 600, 2, None)


async def test_a_scripted_backend_says_what_its_scripts_say(transport: HTTPTransport) -> None:
    script = {"reply": "scripted words", "finish_reason": "length"}
    settings = BackendSettings(type="scripted", scripts={"answer": script})  # type: ignore[dict-item] # as the file has it
    choice = (await build_backend("b", settings, transport).complete(REQUEST)).data["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("scripted words", "length")


# Types from packages of somebody else's


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a module and its entry points, as a package manager lays them out."""

    def install(source: str, **types: str) -> None:
        info = tmp_path / "odd_backends-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-backends\nVersion: 1.0\n")
        points = "".join(f"{name} = {target}\n" for name, target in types.items())
        (info / "entry_points.txt").write_text(f"[gateway.backends]\n{points}")
        (tmp_path / "odd_backends_module.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return install


async def test_a_type_from_a_package_gets_name_settings_and_transport(package: Any, transport: HTTPTransport) -> None:
    package("def make(*given):\n    return given\n", odd="odd_backends_module:make")
    settings = BackendSettings(type="odd", options={"a": 1})
    made: Any = build_backend("b", settings, transport)
    assert made == ("b", settings, transport)


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("def make(*given):\n    raise KeyError('mark')\n", "odd_backends_module:make", "KeyError: 'mark'"),
        ("def make():\n    pass\n", "odd_backends_module:make", "TypeError"),
        ("raise RuntimeError('at import')\n", "odd_backends_module:make", "RuntimeError: at import"),
        ("", "odd_backends_module:make", "AttributeError"),
        ("", "no_such_module:make", "ModuleNotFoundError"),
    ],
    ids=["raises", "takes other arguments", "fails at import", "has no such name", "has no such module"],
)
async def test_a_package_that_cannot_make_its_backend(
    source: str, target: str, why: str, package: Any, transport: HTTPTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(__import__("sys").modules, "odd_backends_module", raising=False)
    package(source, odd=target)
    with pytest.raises(ConfigError) as caught:
        build_backend("b", BackendSettings(type="odd"), transport)
    (problem,) = caught.value.problems
    assert problem.startswith("backends.b: its package cannot make a backend: ")
    assert why in problem


async def test_a_type_that_nobody_has(transport: HTTPTransport) -> None:
    with pytest.raises(ConfigError, match=r"backends\.b\.type: no installed package has the type odd"):
        build_backend("b", BackendSettings(type="odd"), transport)


# The catalog

TWO = {
    "a": {"type": "openai", "base_url": "http://a/v1", "models": ["listed", "both"]},
    "b": {"type": "scripted", "scripts": {"both": {"reply": "hi"}, "scripted": {}}},
}


async def test_models_by_routes_with_fallbacks_and_aliases(catalog_of: Any) -> None:
    catalog = catalog_of(
        backends=TWO,
        models={
            "fast": {
                "routes": [{"backend": "a", "model": "up", "weight": 3, "price": {"input": 1}}, {"backend": "b"}],
                "price": {"input": 2, "output": 4},
                "fallbacks": ["both"],
                "aliases": ["quick"],
                "on_disconnect": "cancel",
            },
            "one": {"backend": "a", "model": "real", "price": {"input": 1, "output": 2}},
        },
    )
    fast = await catalog.resolve("quick")
    assert (fast.name, fast.fallbacks) == ("fast", ("both",))
    assert [(route.backend.name, route.upstream_model, route.weight) for route in fast.routes] == [
        ("a", "up", 3),
        ("b", "fast", 1),
    ]
    assert [route.price.at(0).input for route in fast.routes] == [10**9, 2 * 10**9]
    assert {route.on_disconnect for route in fast.routes} == {"cancel"}
    (one,) = (await catalog.resolve("one")).routes
    assert (one.upstream_model, one.on_disconnect) == ("real", "drain")
    assert (await catalog.resolve(None)).name == "fast"


async def test_models_that_the_settings_list_are_known_without_asking(catalog_of: Any) -> None:
    catalog = catalog_of(backends=TWO)
    assert [info.id for info in catalog.listed()] == ["listed", "both", "scripted"]
    assert {provider.backend.name: provider.static for provider in catalog.providers} == {"a": True, "b": True}


async def test_a_model_whose_backend_is_off_is_gone_with_its_aliases(catalog_of: Any) -> None:
    off = {"type": "openai", "base_url": "http://h", "api_key": "${NONE:-}"}
    catalog = catalog_of(
        backends={**TWO, "off": off},
        models={
            "gone": {"backend": "off", "aliases": ["also-gone"]},
            "half": {"routes": [{"backend": "off"}, {"backend": "a"}]},
        },
    )
    assert [route.backend.name for route in (await catalog.resolve("half")).routes] == ["a"]
    assert [info.id for info in catalog.listed()] == ["half", "listed", "both", "scripted"]


async def test_what_is_scripted_is_free_and_what_a_vendor_sells_is_looked_up(catalog_of: Any) -> None:
    vendor = {"type": "openai", "base_url": "http://h/v1", "vendor": "openai", "models": ["gpt-4o-mini", "unheard-of"]}
    catalog = catalog_of(backends={"b": {"type": "scripted"}, "v": vendor})
    prices = {name: (await catalog.resolve(name)).routes[0].price for name in ("echo", "gpt-4o-mini", "unheard-of")}
    assert prices["echo"] == Price(0, 0)
    assert prices["gpt-4o-mini"].at(1_800_000_000_000).input > 0
    assert prices["unheard-of"] is None


async def test_what_a_backend_refuses(catalog_of: Any) -> None:
    catalog = catalog_of(backends={"a": {**TWO["a"], "refuse": ["seed"]}, "b": TWO["b"]})
    refused = {name: (await catalog.resolve(name)).routes[0].refuse for name in ("listed", "scripted")}
    assert refused == {
        "listed": {"seed"},
        "scripted": {"chat_template", "logits_processors", "kv_transfer_params"},
    }


async def test_the_default_backend_and_model(catalog_of: Any) -> None:
    catalog = catalog_of(backends=TWO, default_backend="b", default_model="both")
    assert (await catalog.resolve("any")).routes[0].backend.name == "b"
    assert (await catalog.resolve(None)).name == "both"


async def test_without_backends_there_is_the_echo(catalog_of: Any) -> None:
    catalog = catalog_of()
    assert catalog.listed() == [ModelInfo("echo", CREATED, "scripted")]
    with pytest.raises(ModelNotFound):
        await catalog.resolve("any")


def test_a_transport_for_each_way_to_reach_backends() -> None:
    plain = BackendSettings(type="openai", base_url="http://h")
    own = plain.model_copy(update={"ca_file": "x.pem", "client_cert": "c.pem", "client_key": "c.key"})
    settings = Settings(backends={"a": plain, "b": own, "c": own})
    assert accesses(settings) == {Access(), Access("x.pem", "c.pem", "c.key")}
    proxy = "http://h:3128"
    behind = settings.model_copy(update={"server": ServerSettings(upstream_proxy=proxy)})
    assert accesses(behind) == {Access(proxy=proxy), Access("x.pem", "c.pem", "c.key", proxy)}
    assert accesses(Settings()) == set()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def test_each_backend_gets_its_own(tmp_path: Path, certificates: Certificates) -> None:
    plain = {"type": "openai", "base_url": "http://h", "models": ["m"]}
    cert, key = certificates.client
    settings = load(
        tmp_path,
        {
            "backends": {
                "a": plain,
                "b": {**plain, "ca_file": certificates.ca, "client_cert": cert, "client_key": key},
            },
            "server": {"upstream_proxy": "http://h:3128"},
        },
    )
    given: dict[Access, Any] = {access: object() for access in accesses(settings)}
    backends: list[Any] = [provider.backend for provider in build_catalog(settings, given).providers]
    found = {backend.name: backend._transport for backend in backends}
    assert found == {
        "a": given[Access(proxy="http://h:3128")],
        "b": given[Access(certificates.ca, cert, key, "http://h:3128")],
    }


# An Ollama that is there


class FakeOllama(BaseHTTPRequestHandler):
    """Says what its server was told to say."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined] # set below
        body: bytes = self.server.body  # type: ignore[attr-defined] # set below
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Quietly."""


@pytest.fixture
def ollama() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeOllama) as server:
        server.asked, server.body = [], json.dumps({"version": "0.12.6"}).encode()  # type: ignore[attr-defined] # for FakeOllama
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}"),
        (" '0.0.0.0:{port}' ", "http://127.0.0.1:{port}"),
        (":{port}", "http://127.0.0.1:{port}"),
        ("http://localhost:{port}/", "http://localhost:{port}"),
        ("http://127.0.0.1:{port}/behind/a/proxy", "http://127.0.0.1:{port}/behind/a/proxy"),
    ],
)
def test_it_is_a_backend_where_nobody_wrote_one(
    host: str, url: str, ollama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host.format(port=ollama.server_port))
    settings = with_local_ollama(load(tmp_path, {}))
    assert {name: (one.type, one.base_url) for name, one in settings.backends.items()} == {
        "ollama": ("ollama", url.format(port=ollama.server_port))
    }
    assert not settings.probe_ollama
    assert not any("echo" in note for note in settings.notes)
    assert ollama.asked == [url.partition("{port}")[2] + "/api/version"]


def test_it_joins_the_vendors_whose_keys_are_there(
    ollama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{ollama.server_port}")
    settings = with_local_ollama(load(tmp_path, {}, {"OPENAI_API_KEY": "sk-1"}))
    assert list(settings.backends) == ["openai", "ollama"]


def test_who_wrote_a_backend_is_not_surprised(ollama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{ollama.server_port}")
    settings = load(tmp_path, {"backends": {"b": {"type": "scripted"}}})
    assert with_local_ollama(settings) is settings
    assert ollama.asked == []


@pytest.mark.parametrize("body", [b"", b"<html>hello</html>", b"{}"])
def test_something_else_that_answers_there_is_none(
    body: bytes, ollama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ollama.body = body
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{ollama.server_port}")
    settings = with_local_ollama(load(tmp_path, {}))
    assert [backend.type for backend in settings.backends.values()] == ["scripted"]
    assert any("echo" in note for note in settings.notes)
    assert not settings.probe_ollama


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "a b", "http://a b", "h:99999", "ftp://h", "http://h?x", "[", "a..b:1"]
)
def test_nobody_there_or_no_address(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    settings = with_local_ollama(load(tmp_path, {}))
    assert [backend.type for backend in settings.backends.values()] == ["scripted"]


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("box", "http://box:11434"),
        ("box:1", "http://box:1"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[::]:1", "http://[::1]:1"),
        ("http://box", "http://box"),
        ("https://box/", "https://box"),
        ("https://box:8443/ollama/", "https://box:8443/ollama"),
        ('"box"', "http://box:11434"),
    ],
)
def test_its_address_as_ollama_itself_reads_it(told: str, url: str) -> None:
    assert _ollama_url(told) == url
