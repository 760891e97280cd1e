"""Settings by example: this file and this environment in, these values or these complaints out."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gateway.backends.vendors import CallIds, Quirks, quirks_of
from gateway.config import DatabaseSettings, PriceSettings, Settings, load_settings, mask_url
from gateway.errors import ConfigError
from tests_standalone.backends.certificates import Certificates

SHIPPED = Path(__file__).parent.parent / "config.yaml"
LOCAL = "backends: {local: {type: openai, base_url: 'http://127.0.0.1:9/v1'}}\n"
SECRET = "sk-veryverysecret"
DEFAULTS = {"temperature": 0.2, "stop": ["a"], "x": {"y": None}}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str = "", environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    Path("config.yaml").write_text(text, encoding="utf-8")
    return load_settings(None, environ or {}, flags)


def problems(
    text: str = "", environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, environ, flags)
    assert all("\n" not in line and re.match(r"\S+: \S", line) for line in caught.value.problems)
    assert caught.value.__cause__ is None
    return caught.value.problems


def problem(text: str = "", environ: Mapping[str, str] | None = None) -> str:
    (line,) = problems(text, environ)
    return line


def at(settings: Settings, path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


# The file


def test_a_missing_default_file_means_all_defaults() -> None:
    settings = load_settings(None, {})
    assert (settings.server.host, settings.server.port, settings.server.workers) == ("127.0.0.1", 8000, 1)
    assert settings.server.cors_origins == ("*",)
    assert settings.database.url == "sqlite:///data/gateway.db"
    assert settings.storage.url == "data/files"
    assert settings.limits.requests_per_minute == 600
    assert settings.files.max_text_chars == 200_000
    assert settings.stream_responses
    assert settings.max_input_length is None


@pytest.mark.parametrize("environ", [{}, {"GATEWAY_CONFIG": "missing.yaml"}])
def test_a_missing_file_that_was_named_is_a_mistake(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file"):
        load_settings(None if environ else "missing.yaml", environ)


def test_the_file_is_the_named_one_else_that_of_the_environment() -> None:
    Path("a.yaml").write_text("server: {port: 1}", encoding="utf-8")
    Path("b.yaml").write_text("server: {port: 2}", encoding="utf-8")
    assert load_settings("a.yaml", {"GATEWAY_CONFIG": "b.yaml"}).server.port == 1
    assert load_settings(None, {"GATEWAY_CONFIG": "b.yaml"}).server.port == 2
    assert load_settings(None, {"GATEWAY_CONFIG": ""}).server.port == 8000


@pytest.mark.parametrize("text", ["", "# nothing\n", "server:\nbackends:\nmodels:\nlimits:\n", "backends: {}"])
def test_empty_files_and_sections_mean_defaults(text: str) -> None:
    assert load(text).model_dump(exclude={"notes"}) == load_settings(None, {}).model_dump(exclude={"notes"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server: {port: 1", "config.yaml: line 1, column 17: this is not valid YAML"),
        ("- a\n- b\n", "config.yaml: must hold settings as `key: value`"),
        ("!odd {}", "config: has a YAML tag"),
        ("just text", "config.yaml: must hold settings as `key: value`"),
        ("server: {port: 1, port: 2}", "server.port: given twice, in lines 1 and 1"),
        ("server: {port: 1}\nauth: {mode: keys}\nserver: {host: h}", "server: given twice, in lines 1 and 3"),
        ("server: {? [a] : 1}", "server: has a list or mapping as a key in line 1"),
        ("server: &a {host: *a}", "server.host: holds itself"),
        ("auth: {admin_key: !!binary aGk=}", "auth.admin_key: has a YAML tag"),
        ("--- {}\n--- {}\n", "config.yaml: line 2, column 1: this is not valid YAML"),
        ("server: " + "[" * 5000, "config.yaml: this is not valid YAML"),
    ],
)
def test_what_is_no_yaml_mapping_is_one_line(text: str, expected: str) -> None:
    assert problem(text).startswith(expected)


def test_unreadable_files_are_mistakes() -> None:
    Path("folder").mkdir()
    with pytest.raises(ConfigError, match="folder: cannot be read: Is a directory"):
        load_settings("folder", {})
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_settings("binary.yaml", {})


def test_scalars_are_those_of_yaml_1_2() -> None:
    settings = load(
        "conversations: {threading: off}\ndatabase: {auto_migrate: no}\n"
        "server: {name: on, version: '1.10', port: 08000}\ndefault_model: 2024-11-20"
    )
    assert settings.conversations.threading == "off"
    assert not settings.database.auto_migrate
    assert (settings.server.name, settings.server.version, settings.server.port) == ("on", "1.10", 8000)
    assert settings.default_model == "2024-11-20"


def test_merge_keys_work() -> None:
    text = LOCAL + "models:\n  a: &a {backend: local, price: {input: 1}}\n  b: {<<: *a, model: other}\n"
    assert load(text).models["b"].model_dump(exclude_none=True, exclude_unset=True) == {
        "backend": "local",
        "price": {"input": Decimal(1)},
        "model": "other",
    }


# Unknown keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server: {prot: 1}", "server.prot: unknown setting; did you mean server.port?"),
        ("sever: {port: 1}", "sever: unknown setting; did you mean server?"),
        ("port: 1", "port: unknown setting; did you mean server.port?"),
        ("rate_limit: 1", "rate_limit: unknown setting; did you mean rate_limit_per_minute?"),
        ("notes: [a]", "notes: unknown setting; did you mean models?"),
        ("prices: {a: {input: 1}}", "prices: unknown setting; did you mean pricing?"),
        ("pricing: {input: 1}", "pricing.input: unknown setting; did you mean pricing.input_per_1k?"),
        (
            LOCAL + "models: {a: {routes: [{backend: local, wieght: 1}]}}",
            "models.a.routes.0.wieght: unknown setting; did you mean models.a.routes.0.weight?",
        ),
        (
            "backends: {b: {type: openai, base_url: 'http://h', timeouts: {idel: 1}}}",
            "backends.b.timeouts.idel: unknown setting; did you mean backends.b.timeouts.idle?",
        ),
        (
            "backends: {b: {type: scripted, scripts: {s: {replay: x}}}}",
            "backends.b.scripts.s.replay: unknown setting; did you mean backends.b.scripts.s.reply?",
        ),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(text: str, expected: str) -> None:
    assert problem(text) == expected


def test_every_mistake_is_reported_at_once() -> None:
    text = """
    server: {prot: 1, port: 70000, workers: zero, cors_origins: 5}
    auth: {mode: never}
    database: {auto_migrate: perhaps, url: "mysql://h/db"}
    backends:
      a: {type: openai, timeouts: {connect: 0}}
      b: {type: smoke}
      c: {type: scripted, base_url: "http://h"}
      d: {}
    models:
      x: {backend: nobody, price: {input: -1}}
      y: {backend: a, routes: [{backend: b, weight: 0}]}
      z: {fallbacks: [nothing], aliases: [x]}
      w: {backend: d, routes: 5}
    default_backend: aa
    files: 3
    """
    assert {line.split(": ")[0]: line.split(": ", 1)[1] for line in problems(text)} == {
        "server.prot": "unknown setting; did you mean server.port?",
        "server.port": "must be at most 65535",
        "server.workers": "must be a whole number",
        "server.cors_origins": "must be a list",
        "auth.mode": "must be 'auto', 'keys' or 'open'",
        "database.auto_migrate": "must be true or false",
        "database.url": "must begin with sqlite:///, postgresql:// or postgres://",
        "backends.a.timeouts.connect": "must be more than 0",
        "backends.a.base_url": "is missing; type openai needs it",
        "backends.b.type": "unknown type; known types: openai, azure, ollama, scripted",
        "backends.c.base_url": "does not belong to type scripted; remove it",
        "backends.d.type": "is missing; add it",
        "models.x.price.input": "must be from 0 to 1000000 USD per million tokens",
        "models.x.backend": "no such backend; did you mean d?",
        "models.y.routes.0.weight": "must be more than 0",
        "models.y.routes": "cannot be given together with backend; keep one",
        "models.z": "needs a backend or routes; add one",
        "models.z.fallbacks.0": "no such model; did you mean z?",
        "models.z.aliases.0": "is the name of another model or alias; choose another",
        "models.w.routes": "must be a list",
        "default_backend": "no such backend; did you mean a?",
        "files": "must be a mapping of settings",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server: {port: -1}", "server.port: must be at least 0"),
        ("server: {port: true}", "server.port: must be a number"),
        ("server: {port: 80.5}", "server.port: must be a whole number"),
        ("server: {port: }", "server.port: must be a whole number"),
        ("server: {workers: 0}", "server.workers: must be at least 1"),
        ("server: {max_body_mb: .inf}", "server.max_body_mb: must be a number"),
        ("server: {max_body_mb: 1e999}", "server.max_body_mb: must be a number"),
        ("server: {host: 'http://h'}", "server.host: must be a host name or address"),
        ("server: {version: 1.10}", "server.version: must be text; put it in quotes"),
        ("server: {metrics: everybody}", "server.metrics: must be 'admin' or 'open'"),
        ("server: {cors_origins: [chat.example.com]}", "server.cors_origins: must hold"),
        ("server: {trusted_proxies: [proxy]}", "server.trusted_proxies: must hold IP addresses"),
        ("server: {allowed_hosts: ['https://h']}", "server.allowed_hosts: must hold host names"),
        ("server: {cors_origins: }", "server.cors_origins: must be a list"),
        ("server: {cors_origins: '[a'}", "server.cors_origins: must be a list: [a, b] or a, b"),
        ("conversations: {system_prompt_file: no.txt}", "conversations.system_prompt_file: no such file"),
        ("conversations: {busy: later}", "conversations.busy: must be 'reject' or 'wait'"),
        ("conversations: {header: 'X Chat'}", "conversations.header: must be the name of a header"),
        ("conversations: {header: Authorization}", "conversations.header: must not name a header that carries"),
        ("conversations: {store_content: perhaps}", "conversations.store_content: must be true or false"),
        ("conversations: {retention_days: 0}", "conversations.retention_days: must be at least 1"),
        ("conversations: {deleted_days: -1}", "conversations.deleted_days: must be at least 0"),
        ("conversations: {session_idle_minutes: 0}", "conversations.session_idle_minutes: must be at least 1"),
        ("limits: {requests_per_minute: 0}", "limits.requests_per_minute: must be at least 1"),
        ("storage: {url: 'gs://bucket'}", "storage.url: must be a folder"),
        ("storage: {url: 's3://'}", "storage.url: must be a folder"),
        ("storage: {url: 's3://key:secret@bucket'}", "storage.url: must be a folder"),
        ("storage: {url: 's3://b', endpoint: minio:9000}", "storage.endpoint: must be an http:// or https://"),
    ],
)
def test_values_have_bounds(text: str, expected: str) -> None:
    assert problem(text).startswith(expected)


# Variables


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${A}", "one"),
        ("'${A}'", "one"),
        ("${A}-${B}/${A}", "one-two/one"),
        ("${NONE:-fallback}", "fallback"),
        ("${EMPTY:-fallback}", "fallback"),
        ("${NONE:-}x", "x"),
        ("${EMPTY}x", "x"),
        ("'${NONE:-a b: c}'", "a b: c"),
        ("$${A}", "${A}"),
        ("$$${A}", "$${A}"),
        ("$A $", "$A $"),
        ("${EVIL}", "x, port: 1}\nserver: {port: 2"),
        ("${AGAIN}", "${A}"),
    ],
)
def test_variables_are_put_into_texts(written: str, expected: str) -> None:
    environ = {
        "A": "one",
        "B": "two",
        "EMPTY": "",
        "EVIL": "x, port: 1}\nserver: {port: 2",
        "AGAIN": "${A}",
    }
    assert load(f"server:\n  name: {written}\n", environ).server.name == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auth: {admin_key: '${NONE}'}", "auth.admin_key: the environment variable NONE is not set; set it or write"),
        ("server: {allowed_hosts: [a, '${NONE}']}", "server.allowed_hosts.1: the environment variable NONE is not set"),
        ("server: {name: '${9}'}", "server.name: `${` begins ${NAME} or ${NAME:-default}; write $${"),
        ("server: {name: '${A:-${B}}'}", "server.name: `${` begins"),
        ("server: {name: '${A'}", "server.name: `${` begins"),
        (
            "backends: {b: {type: openai, base_url: '${NONE}'}}",
            "backends.b.base_url: the environment variable NONE is not set",
        ),
    ],
)
def test_unset_and_malformed_variables_are_mistakes(text: str, expected: str) -> None:
    assert problem(text, {"A": "x"}).startswith(expected)


def test_texts_from_the_environment_become_what_the_field_holds() -> None:
    text = """
    server: {port: "${P}", drain_seconds: "${S}", allowed_hosts: "${H}", trusted_proxies: "${L}", cors_origins: "${E}"}
    database: {auto_migrate: "${NO}", pool_size: " 7 "}
    limits: {requests_per_minute: "${E}", burst: "${NULL}", max_parallel: "3"}
    default_model: "${E}"
    max_input_length: "${E}"
    """
    environ = {"P": "9000", "S": "2.5", "H": "A.example, b.example", "L": '["10.0.0.0/8", "::1"]', "E": ""}
    settings = load(text, environ | {"NO": "off", "NULL": "null"})
    assert (settings.server.port, settings.server.drain_seconds) == (9000, 2.5)
    assert settings.server.allowed_hosts == ("a.example", "b.example")
    assert settings.server.trusted_proxies == ("10.0.0.0/8", "::1")
    assert settings.server.cors_origins == ()
    assert (settings.database.auto_migrate, settings.database.pool_size) == (False, 7)
    assert settings.limits.model_dump(include={"requests_per_minute", "burst", "max_parallel"}) == {
        "requests_per_minute": None,
        "burst": None,
        "max_parallel": 3,
    }
    assert settings.default_model is None
    assert settings.max_input_length is None


# The environment and flags


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("GATEWAY__SERVER__PORT", "9", "server.port", 9),
        ("gateway__Server__pOrT", "9", "server.port", 9),
        ("GATEWAY__LIMITS__BURST", "", "limits.burst", None),
        ("GATEWAY__SERVER__CORS_ORIGINS", "https://a.example/,https://b.example", "server.cors_origins", None),
        ("GATEWAY__STREAM_RESPONSES", "false", "stream_responses", False),
        ("GATEWAY__CONVERSATIONS__THREADING", "OFF", "conversations.threading", "off"),
        ("GATEWAY__BACKENDS__MYLOCAL__BASE_URL", "http://h/", "backends.MyLocal.base_url", "http://h"),
        ("GATEWAY__BACKENDS__MyLocal__TIMEOUTS__IDLE", "3", "backends.MyLocal.timeouts.idle", 3),
        ("GATEWAY__BACKENDS__MYLOCAL__MODELS", '["a", "b"]', "backends.MyLocal.models", ("a", "b")),
        ("GATEWAY__MODELS__GPT-4O__PRICE__INPUT", "0.075", "models.gpt-4o.price.input", Decimal("0.075")),
        ("GATEWAY__MODELS__GPT_4O__MODEL", "x", "models.gpt-4o.model", "x"),
        ("GATEWAY__MODELS__GPT-4O__ALIASES", "q, r", "models.gpt-4o.aliases", ("q", "r")),
        ("GATEWAY__MODELS__NEW__BACKEND", "MyLocal", "models.new.backend", "MyLocal"),
        ("GATEWAY__AUTH__ADMIN_KEY", "${HOME}", "auth.admin_key", None),
    ],
)
def test_any_setting_can_come_from_the_environment(name: str, value: str, path: str, expected: Any) -> None:
    text = "backends: {MyLocal: {type: openai, base_url: 'http://x'}}\nmodels: {gpt-4o: {backend: MyLocal}}"
    found = at(load(text, {name: value}), path)
    if name.endswith("ORIGINS"):
        expected = ("https://a.example", "https://b.example")
    if name.endswith("ADMIN_KEY"):
        found, expected = found.get_secret_value(), "${HOME}"
    assert found == expected


def test_a_whole_backend_and_its_model_can_come_from_the_environment() -> None:
    settings = load(
        "",
        {
            "GATEWAY__BACKENDS__LOCAL__TYPE": "openai",
            "GATEWAY__BACKENDS__LOCAL__BASE_URL": "http://127.0.0.1:1/v1",
            "GATEWAY__BACKENDS__LOCAL__HEADERS__X-Team": "search",
            "GATEWAY__MODELS__FAST__ROUTES": "[{backend: local, weight: '2'}, {backend: local, model: b}]",
            "OPENAI_API_KEY": SECRET,
        },
    )
    assert list(settings.backends) == ["local"]
    assert settings.backends["local"].headers["x-team"].get_secret_value() == "search"
    assert [(route.model, route.weight) for route in settings.models["fast"].routes] == [(None, 2), ("b", 1)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "GATEWAY__SERVER__PROT",
            "server.prot: unknown setting in the environment, GATEWAY__SERVER__PROT; "
            "did you mean GATEWAY__SERVER__PORT?",
        ),
        (
            "GATEWAY__SEVER__PORT",
            "sever: unknown setting in the environment, GATEWAY__SEVER__PORT; did you mean GATEWAY__SERVER?",
        ),
        (
            "GATEWAY__PORT",
            "port: unknown setting in the environment, GATEWAY__PORT; did you mean GATEWAY__SERVER__PORT?",
        ),
        (
            "GATEWAY__MODEL",
            "model: unknown setting in the environment, GATEWAY__MODEL; did you mean GATEWAY__DEFAULT_MODEL?",
        ),
        (
            "GATEWAY__BACKENDS__X__KEY",
            "backends.x.key: unknown setting in the environment, GATEWAY__BACKENDS__X__KEY; "
            "did you mean GATEWAY__BACKENDS__X__API_KEY?",
        ),
        (
            "GATEWAY__SERVER__PORT__NUMBER",
            "server.port.number: unknown setting in the environment, GATEWAY__SERVER__PORT__NUMBER; "
            "did you mean GATEWAY__SERVER__PORT?",
        ),
        ("GATEWAY__SERVER", "server: GATEWAY__SERVER names a whole section; name one of its settings"),
        ("GATEWAY__BACKENDS__X", "backends.x: GATEWAY__BACKENDS__X names a whole section; name one of its settings"),
    ],
)
def test_unknown_environment_names_are_mistakes(name: str, expected: str) -> None:
    assert problem("", {name: SECRET}) == expected


def test_a_mistake_says_which_variable_it_came_from() -> None:
    assert problem("", {"GATEWAY_PORT": "many"}) == "server.port: must be a whole number (from GATEWAY_PORT)"
    assert problem("", {"DATABASE_URL": "oracle://h"}).endswith("(from DATABASE_URL)")
    assert problem("rate_limit_per_minute: few").endswith("(from rate_limit_per_minute)")


def test_flags_beat_the_environment_which_beats_the_file_which_beats_the_seeds() -> None:
    layers: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("", {"APP_NAME": "seed"}, {}),
        ("server: {name: file}", {}, {}),
        ("", {"GATEWAY__SERVER__NAME": "environment"}, {}),
        ("", {}, {"server.name": "flag"}),
    ]
    text, environ = "", dict[str, str]()
    seen = [load().server.name]
    for more, names, flags in layers:
        text, environ = text + more, environ | names
        seen.append(load(text, environ, flags).server.name)
    assert seen == ["gateway", "seed", "file", "environment", "flag"]


def test_short_names_beat_the_file_and_flags_beat_them() -> None:
    text = "server: {host: a, port: 1, workers: 2}"
    environ = {"GATEWAY_HOST": "b", "GATEWAY_PORT": "3", "GATEWAY_WORKERS": "4", "GATEWAY__SERVER__PORT": "5"}
    server = load(text, environ, {"server.port": 6, "server.host": None}).server
    assert (server.host, server.port, server.workers) == ("b", 6, 4)
    assert load(text, environ).server.port == 3
    assert load(text, {"GATEWAY_PORT": ""}).server.port == 1


def test_the_address_of_a_kubernetes_service_is_no_port() -> None:
    settings = load("", {"GATEWAY_PORT": "tcp://10.0.0.1:80"})
    assert settings.server.port == 8000
    assert any(note.startswith("GATEWAY_PORT is ignored") for note in settings.notes)


def test_an_unknown_flag_is_a_mistake() -> None:
    assert problems("", {}, {"server.prot": 1}) == ["server.prot: unknown setting; did you mean server.port?"]


def test_the_admin_key_comes_from_its_own_name_unless_the_file_sets_it() -> None:
    environ = {"GATEWAY_ADMIN_KEY": " sk-env\n"}
    assert load("", environ).auth.admin_key.get_secret_value() == "sk-env"
    assert load("auth: {admin_key: sk-file}", environ).auth.admin_key.get_secret_value() == "sk-file"
    assert load("auth: {admin_key: }", environ).auth.admin_key.get_secret_value() == ""


# Backends


def test_backends_without_mistakes() -> None:
    backend = load(
        """
        backends:
          b:
            type: openai
            base_url: https://h.example/v1/
            api_key: "${KEY}"
            on_disconnect: drain
            headers: {X-Team: search}
            refuse: []
            models: a, b
            timeouts: {connect: 1, total: 60}
        """,
        {"KEY": "sk-1\n"},
    ).backends["b"]
    assert (backend.type, backend.base_url, backend.on_disconnect) == ("openai", "https://h.example/v1", "drain")
    assert backend.api_key.get_secret_value() == "sk-1"
    assert (backend.refuse, backend.models) == ((), ("a", "b"))
    assert backend.timeouts.model_dump() == {"connect": 1, "first_byte": 600, "idle": 120, "total": 60}


def test_what_a_backend_has_when_it_says_nothing() -> None:
    backend = load(LOCAL).backends["local"]
    assert backend.refuse == ("chat_template", "logits_processors", "kv_transfer_params")
    assert (backend.on_disconnect, backend.ca_file, backend.models, backend.headers) == (None, None, (), {})
    assert (backend.client_cert, backend.client_key) == (None, None)
    assert backend.timeouts.total is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{base_url: 'http://h'}", "backends.b.type: is missing; add it"),
        ("{type: opnai, base_url: 'http://h'}", "backends.b.type: unknown type; known types: openai, azure, ollama"),
        ("{type: openai}", "backends.b.base_url: is missing; type openai needs it"),
        ("{type: openai, base_url: ''}", "backends.b.base_url: is missing; type openai needs it"),
        ("{type: openai, base_url: h.example}", "backends.b.base_url: must be an http:// or https:// address"),
        ("{type: openai, base_url: 'ftp://h'}", "backends.b.base_url: must be an http:// or https:// address"),
        ("{type: openai, base_url: 'http://'}", "backends.b.base_url: must be an http:// or https:// address"),
        ("{type: openai, base_url: 'http://h:x/'}", "backends.b.base_url: must be an http:// or https:// address"),
        ("{type: openai, base_url: 'http://h/?k=1'}", "backends.b.base_url: must be an http:// or https:// address"),
        ("{type: openai, base_url: 'http://h', scripts: {}}", "backends.b.scripts: does not belong to type openai"),
        ("{type: scripted, api_key: x}", "backends.b.api_key: does not belong to type scripted; remove it"),
        ("{type: openai, base_url: 'http://h', api_key: a b}", "backends.b.api_key: must be one word"),
        ("{type: openai, base_url: 'http://h', headers: {a b: c}}", "backends.b.headers: must have names"),
        (
            '{type: openai, base_url: "http://h", headers: {a: "x\\ny"}}',
            "backends.b.headers: must have values of one line",
        ),
        ("{type: openai, base_url: 'http://h', ca_file: no.pem}", "backends.b.ca_file: no such file"),
        ("{type: openai, base_url: 'http://h', client_cert: no.pem}", "backends.b.client_cert: no such file"),
        ("{type: openai, base_url: 'http://h', client_key: config.yaml}", "backends.b.client_key: belongs to a"),
        ("{type: openai, base_url: 'http://h', ca_file: config.yaml}", "backends.b.ca_file: holds no certificates"),
        ("{type: openai, base_url: 'http://h', client_cert: config.yaml}", "backends.b.client_cert: must hold a cert"),
        (
            "{type: openai, base_url: 'http://h', on_disconnect: stop}",
            "backends.b.on_disconnect: must be 'drain' or 'cancel'",
        ),
        ("5", "backends.b: must be a mapping of settings"),
    ],
)
def test_backends_with_mistakes(entry: str, expected: str) -> None:
    assert problem(f"backends: {{b: {entry}}}").startswith(expected)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def test_certificates_of_a_backend(certificates: Certificates) -> None:
    def told(**files: str) -> str:
        text = "".join(f", {key}: '{file}'" for key, file in files.items())
        entry = f"backends: {{b: {{type: openai, base_url: 'https://h'{text}}}}}"
        try:
            load(entry)
        except ConfigError as failure:
            return "; ".join(failure.problems)
        return ""

    cert, key = certificates.client
    assert told(ca_file=certificates.ca, client_cert=cert, client_key=key) == ""
    assert told(client_cert=certificates.together()) == ""
    wrong = "must hold a certificate that fits client_key, or both in one file, as PEM and without a pass phrase"
    for other in ({}, {"client_key": certificates.server[1]}, {"client_key": certificates.locked()[1]}):
        assert told(client_cert=cert, **other) == f"backends.b.client_cert: {wrong}"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("http://proxy.example:3128", "http://proxy.example:3128"),
        ("http://ann:p%40ss@[::1]:3128/", "http://ann:p%40ss@[::1]:3128"),
        ("", None),
        ("null", None),
    ],
)
def test_the_proxy_on_the_way_to_upstreams(written: str, kept: str | None) -> None:
    assert load("{}", {"GATEWAY__SERVER__UPSTREAM_PROXY": written}).server.upstream_proxy == kept


@pytest.mark.parametrize(
    "written",
    ["proxy:3128", "http://proxy", "https://proxy:3128", "socks5://proxy:1080", "http://proxy:3128/path", "http://:3128",
     "http://proxy:0", "http://proxy:x", "http://ann:a?b@proxy:3128", "http://ann:secré@proxy:3128"],
)  # fmt: skip
def test_what_is_no_proxy(written: str) -> None:
    assert problem(f"server: {{upstream_proxy: '{written}'}}").startswith(
        "server.upstream_proxy: must look like http://host:3128 or http://user:password@host:3128"
    )


def test_the_password_of_a_proxy_is_not_shown() -> None:
    settings = load("server: {upstream_proxy: 'http://ann:s3cret@proxy.example:3128'}")
    for shown in (settings.describe(), repr(settings), str(settings.server)):
        assert "s3cret" not in shown
        assert "proxy.example:3128" in shown


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "drop: [stop, stream_options.include_obfuscation]",
            Quirks(drop=("stop", "stream_options.include_obfuscation")),
        ),
        ("drop: []", Quirks(drop=())),
        ("drop: 'stop, user'", Quirks(drop=("stop", "user"))),
        ("drop: null", Quirks()),
        ("rename: {seed: random_seed}", Quirks(rename={"seed": "random_seed"})),
        ("defaults: {temperature: 0.2, stop: [a], x: {y: null}}", Quirks(defaults=DEFAULTS)),
        ("roles: {developer: system}", Quirks(roles={"developer": "system"})),
        (
            "tool_call_ids: {alphabet: alphanumeric, length: 9}",
            Quirks(tool_call_ids=CallIds("alphanumeric", length=9)),
        ),
        ("tool_call_ids: {max_length: '40'}", Quirks(tool_call_ids=CallIds(max_length=40))),
        ("tool_call_ids: {}", Quirks(tool_call_ids=CallIds())),
        ("tool_call_reasoning: Fill", Quirks(tool_call_reasoning="fill")),
        ("message_fields: [role, content]", Quirks(message_fields=("role", "content"))),
        ("flatten: [system]", Quirks(flatten=("system",))),
        ("usage_in_stream: 'false'", Quirks(usage_in_stream=False)),
        ("most_choices: 1", Quirks(most_choices=1)),
        (
            "by_model: {'grok-4*': {drop: [stop]}, '*': }",
            Quirks(by_model={"grok-4*": Quirks(drop=("stop",)), "*": Quirks()}),
        ),
    ],
)
def test_peculiarities(written: str, expected: Quirks) -> None:
    backend = load(f"backends: {{b: {{type: openai, base_url: 'http://h', {written}}}}}").backends["b"]
    assert backend.quirks == expected
    again = load(f"backends: {{b: {{type: azure, base_url: 'http://h', vendor: none, {written}}}}}").backends["b"]
    assert again.quirks == expected


def test_peculiarities_written_here_replace_those_of_the_vendor_one_by_one() -> None:
    text = "backends: {b: {type: openai, base_url: 'https://api.mistral.ai/v1', drop: [], roles: {tool: user}}}"
    assert load(text).backends["b"].quirks == replace(quirks_of("mistral"), drop=(), roles={"tool": "user"})


@pytest.mark.parametrize(
    ("entry", "vendor"),
    [
        ("type: openai, base_url: 'https://api.x.ai/v1'", "x-ai"),
        ("type: openai, base_url: 'https://api.x.ai/v1', vendor: none", None),
        ("type: openai, base_url: 'http://10.0.0.1/v1'", None),
        ("type: openai, base_url: 'http://10.0.0.1/v1', vendor: groq", "groq"),
        ("type: azure, base_url: 'https://proxy.example.com'", "azure"),
        ("type: azure, base_url: 'https://x.openai.azure.com', vendor: none", None),
        ("type: ollama", None),
        ("type: scripted", None),
    ],
)
def test_vendors(entry: str, vendor: str | None) -> None:
    backend = load(f"backends: {{b: {{{entry}}}}}").backends["b"]
    assert backend.vendor_name == vendor
    assert backend.quirks == quirks_of(vendor)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("DROP", "stop, user", Quirks(drop=("stop", "user"))),
        ("DROP", '["stop"]', Quirks(drop=("stop",))),
        ("DROP", "[]", Quirks(drop=())),
        ("DROP", "", Quirks()),
        ("RENAME__SEED", "random_seed", Quirks(rename={"seed": "random_seed"})),
        ("DEFAULTS__TEMPERATURE", "0.2", Quirks(defaults={"temperature": 0.2})),
        ("DEFAULTS__STOP", '["a", 1]', Quirks(defaults={"stop": ["a", 1]})),
        ("DEFAULTS__USER", "a: b: c", Quirks(defaults={"user": "a: b: c"})),
        ("DEFAULTS__STORE", "false", Quirks(defaults={"store": False})),
        ("TOOL_CALL_IDS__LENGTH", "9", Quirks(tool_call_ids=CallIds(length=9))),
        ("USAGE_IN_STREAM", "no", Quirks(usage_in_stream=False)),
        ("BY_MODEL__O1*__DROP", "stop", Quirks(by_model={"o1*": Quirks(drop=("stop",))})),
    ],
)
def test_peculiarities_from_the_environment(name: str, value: str, expected: Quirks) -> None:
    assert load(LOCAL, {f"GATEWAY__BACKENDS__LOCAL__{name}": value}).backends["local"].quirks == expected


FIELD_NAMES = "must hold names like"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("dorp: [a]", "dorp: unknown setting; did you mean backends.b.drop?"),
        ("drop: 5", "drop: must be a list"),
        ("drop: [model]", f"drop: {FIELD_NAMES} logprobs"),
        ("drop: [a..b]", f"drop: {FIELD_NAMES} logprobs"),
        ("drop: [a b]", f"drop: {FIELD_NAMES} logprobs"),
        ("rename: {messages: prompt}", f"rename: {FIELD_NAMES} seed"),
        ("rename: {a: b, b: c}", "rename: must not rename a field to one that is renamed itself"),
        ("rename: {a: 1}", "rename.a: must be text; put it in quotes"),
        ("rename: [a]", "rename: must be a mapping"),
        ("defaults: {stream: true}", "defaults: must not hold model, messages or stream"),
        ("defaults: {a: 1e999}", "defaults: must hold numbers that JSON has"),
        ("tool_call_ids: {length: 5}", "tool_call_ids.length: must be at least 6"),
        ("tool_call_ids: {length: 9, max_length: 9}", "tool_call_ids: must have length, which is exact, or max_length"),
        ("tool_call_ids: {alphabet: hex}", "tool_call_ids.alphabet: must be 'any', 'word' or 'alphanumeric'"),
        (
            "tool_call_ids: {lenght: 9}",
            "tool_call_ids.lenght: unknown setting; did you mean backends.b.tool_call_ids.length?",
        ),
        ("tool_call_reasoning: keep", "tool_call_reasoning: must be 'pass', 'fill' or 'strip'"),
        ("most_choices: 0", "most_choices: must be at least 1"),
        ("by_model: {a: {drop: [stream]}}", f"by_model.a.drop: {FIELD_NAMES} logprobs"),
        (
            "by_model: {a: {by_model: {}}}",
            "by_model.a.by_model: unknown setting; did you mean backends.b.by_model.a.",
        ),
        ("vendor: mistrall", "vendor: no such vendor; did you mean mistral?"),
        ("api_version: '2024-10-21'", "api_version: does not belong to type openai; remove it"),
        ("num_ctx: 1", "num_ctx: does not belong to type openai; remove it"),
    ],
)
def test_peculiarities_with_mistakes(written: str, expected: str) -> None:
    line = problem(f"backends: {{b: {{type: openai, base_url: 'http://h', {written}}}}}")
    assert line.startswith(f"backends.b.{expected}")


@pytest.mark.parametrize(
    ("written", "expected"),
    [("'2024-10-21'", "2024-10-21"), ("2025-01-01-preview", "2025-01-01-preview"), ("v1", None)],
)
def test_azure(written: str, expected: str | None) -> None:
    text = f"backends: {{b: {{type: azure, base_url: 'https://x.openai.azure.com/', api_version: {written}}}}}"
    backend = load(text).backends["b"]
    assert (backend.base_url, backend.api_version) == ("https://x.openai.azure.com", expected)


def test_ollama() -> None:
    text = "backends: {b: {type: ollama, base_url: '${URL:-}', keep_alive: 5m, num_ctx: 8192, options: {num_gpu: 99}}}"
    backend = load(text).backends["b"]
    assert (backend.base_url, backend.keep_alive, backend.num_ctx) == ("http://127.0.0.1:11434", "5m", 8192)
    assert backend.options == {"num_gpu": 99}
    environ = {"URL": "http://h:1/", "GATEWAY__BACKENDS__B__OPTIONS__TOP_K": "3"}
    moved = load(text, environ).backends["b"]
    assert (moved.base_url, moved.options) == ("http://h:1", {"num_gpu": 99, "top_k": 3})


@pytest.mark.parametrize(
    ("written", "expected"),
    [("5", 5), ("'300'", 300), ("-1", -1), ("1.5", 1.5), ("24h", "24h"), ("1h30m", "1h30m"), ("''", None), ("0", 0)],
)
def test_how_long_ollama_keeps_a_model(written: str, expected: float | str | None) -> None:
    assert load(f"backends: {{b: {{type: ollama, keep_alive: {written}}}}}").backends["b"].keep_alive == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("type: azure", "base_url: is missing; type azure needs it"),
        ("type: azure, base_url: 'https://h', api_version: 2024", "api_version: must be text"),
        ("type: azure, base_url: 'https://h', api_version: latest", "api_version: must look like 2024-10-21"),
        ("type: azure, base_url: 'https://h/openai/v1'", "base_url: must end before the part of the path"),
        ("type: azure, base_url: 'https://h/openai/deployments/d'", "base_url: must end before the part of the path"),
        ("type: ollama, base_url: 'http://h:1/v1'", "base_url: must end before the part of the path"),
        ("type: ollama, keep_alive: soon", "keep_alive: must be seconds, or a text like 5m or 24h"),
        ("type: ollama, keep_alive: true", "keep_alive: must be a number"),
        ("type: ollama, num_ctx: 0", "num_ctx: must be at least 1"),
        ("type: ollama, drop: [stop]", "drop: does not belong to type ollama; remove it"),
        ("type: scripted, vendor: groq", "vendor: does not belong to type scripted; remove it"),
    ],
)
def test_other_types_with_mistakes(entry: str, expected: str) -> None:
    assert problem(f"backends: {{b: {{{entry}}}}}").startswith(f"backends.b.{expected}")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds the type `odd`; its module does not exist."""
    folder = tmp_path / "site" / "odd_backend-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-backend\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[gateway.backends]\nodd = no_such_module:make\n")
    monkeypatch.syspath_prepend(folder.parent)


@pytest.mark.usefixtures("plugin")
def test_types_of_plugins() -> None:
    text = f"""
    backends:
      b:
        type: odd
        base_url: "http://h"
        api_key: {SECRET}
        vendor: openai
        models: [m]
        options:
          region: eu
          auth: {{client_secret: {SECRET}, tokens: [{SECRET}], url: "http://u:{SECRET}@h", max_tokens: 5}}
    """
    settings = load(text)
    assert settings.backends["b"].options["auth"]["client_secret"] == SECRET
    assert SECRET not in settings.describe() + repr(settings)
    assert yaml.safe_load(settings.describe())["backends"]["b"]["options"] == {
        "region": "eu",
        "auth": {"client_secret": "*" * 10, "tokens": ["*" * 10], "url": f"http://{'*' * 10}@h", "max_tokens": 5},
    }


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("type: ood", "type: unknown type; known types: openai, azure, ollama, scripted, odd"),
        ("type: odd, scripts: {}", "scripts: does not belong to type odd; remove it"),
        ("type: odd, drop: [a]", "drop: does not belong to type odd; remove it"),
    ],
)
def test_types_of_plugins_with_mistakes(entry: str, expected: str) -> None:
    assert problem(f"backends: {{b: {{{entry}}}}}") == f"backends.b.{expected}"


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("", {}, True),
        ("backends: {}", {}, True),
        ("", {"OPENAI_API_KEY": SECRET}, True),
        ("", {"OPENAI_API_KEY": SECRET, "GATEWAY__BACKENDS__OPENAI__ON_DISCONNECT": "cancel"}, True),
        (LOCAL, {}, False),
        ("backends: {b: {type: openai, base_url: 'http://h', api_key: ''}}", {}, False),
        ("", {"GATEWAY__BACKENDS__B__TYPE": "scripted"}, False),
    ],
)
def test_ollama_is_looked_for_when_nobody_wrote_a_backend(text: str, environ: dict[str, str], expected: bool) -> None:
    settings = load(text, environ)
    assert settings.probe_ollama is expected
    assert "probe_ollama" not in settings.describe()


def test_names_of_backends_hold_no_slash() -> None:
    assert problem("backends: {a/b: {type: scripted}}").startswith("backends.a/b: is no name for a backend")


def test_a_backend_with_an_empty_key_is_off_and_one_without_key_is_on() -> None:
    settings = load(
        """
        backends:
          off: {type: openai, base_url: "http://h", api_key: "${NONE:-}"}
          null: {type: openai, base_url: "http://h", api_key: }
          local: {type: openai, base_url: "http://h"}
        models: {m: {backend: off}}
        default_backend: off
        """
    )
    assert list(settings.backends) == ["local"]
    assert settings.notes == ("backend off is off: its api_key is empty", "backend null is off: its api_key is empty")
    assert settings.models["m"].backend == "off"


def test_scripts() -> None:
    script = (
        load(
            """
        backends:
          demo:
            type: scripted
            scripts:
              plain:
              full: {reply: "", reasoning: "null", delay: 0.1, usage: missing, finish_reason: length, cut_after: 0,
                     tool_calls: [{name: f, arguments: {x: 1, y: true}}, {name: g, arguments: "{}"}]}
              broken: {error_status: 503, error_message: "no", fail_after: "2"}
        """
        )
        .backends["demo"]
        .scripts
    )
    assert script["plain"].reply is None
    assert (script["full"].reply, script["full"].reasoning) == ("", "null")
    assert script["full"].tool_calls[0] == {"name": "f", "arguments": {"x": 1, "y": True}}
    assert (script["broken"].error_status, script["broken"].fail_after) == (503, 2)


@pytest.mark.parametrize(
    "calls", ["[{name: f}]", "[{arguments: {}}]", "[{name: f, arguments: [1]}]", "[{name: f, arguments: {}, id: x}]"]
)
def test_scripted_tool_calls_have_a_name_and_arguments(calls: str) -> None:
    line = problem(f"backends: {{b: {{type: scripted, scripts: {{s: {{tool_calls: {calls}}}}}}}}}")
    assert line.startswith("backends.b.scripts.s.tool_calls: must hold calls like {name:")


def test_vendors_whose_key_is_in_the_environment_are_backends() -> None:
    environ = {"OPENAI_API_KEY": SECRET, "DEEPSEEK_API_KEY": "sk-2", "OPENAI_BASE_URL": "http://elsewhere"}
    settings = load("", environ)
    assert {name: backend.base_url for name, backend in settings.backends.items()} == {
        "openai": "https://api.openai.com/v1",
        "deepseek": "https://api.deepseek.com",
    }
    assert settings.backends["openai"].api_key.get_secret_value() == SECRET
    assert settings.backends["deepseek"].on_disconnect == "drain"
    assert settings.notes == ()
    moved = load("", environ | {"DEEPSEEK_BASE_URL": "http://h/", "GATEWAY__BACKENDS__OPENAI__ON_DISCONNECT": "cancel"})
    assert moved.backends["deepseek"].base_url == "http://h"
    assert moved.backends["openai"].on_disconnect == "cancel"


def test_vendors_are_not_added_to_backends_of_the_file() -> None:
    assert list(load(LOCAL, {"OPENAI_API_KEY": SECRET}).backends) == ["local"]
    file = "backends: {openai: {type: openai, base_url: 'http://h', api_key: x}}"
    assert list(load(file, {"DEEPSEEK_API_KEY": SECRET}).backends) == ["openai"]


def test_the_built_in_echo_answers_when_no_backend_is_usable() -> None:
    settings = load("")
    assert settings.backends["scripted"].type == "scripted"
    assert settings.notes == ("the built-in model `echo` answers, because no backend is configured",)
    settings = load("backends: {b: {type: openai, base_url: 'http://h', api_key: ''}}")
    assert list(settings.backends) == ["scripted"]
    assert settings.notes[-1] == "the built-in model `echo` answers, because every backend is off"


# Models


def test_models_without_mistakes() -> None:
    models = load(
        """
        backends: {local: {type: openai, base_url: "http://127.0.0.1:9/v1"}}
        models:
          gpt-4o: {backend: local, model: other, price: {input: 2.50, cached_input: "0.075", output: 10}}
          fast:
            routes: [{backend: local, model: "llama3.1:8b", weight: 3, price: {input: 0}}]
            fallbacks: gpt-4o
            aliases: [quick]
          slow: {backend: local, fallbacks: [quick, local/anything]}
        """
    ).models
    assert models["gpt-4o"].price == PriceSettings(
        input=Decimal("2.5"), cached_input=Decimal("0.075"), output=Decimal(10)
    )
    assert models["fast"].routes[0].model == "llama3.1:8b"
    assert (models["fast"].fallbacks, models["fast"].aliases) == (("gpt-4o",), ("quick",))
    assert models["slow"].model is None


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("{a: {}}", "models.a: needs a backend or routes; add one"),
        ("{a: }", "models.a: needs a backend or routes; add one"),
        ("{a: {backend: local, routes: [{backend: local}]}}", "models.a.routes: cannot be given together with backend"),
        ("{a: {backend: locl}}", "models.a.backend: no such backend; did you mean local?"),
        ("{a: {routes: [{backend: locl}]}}", "models.a.routes.0.backend: no such backend; did you mean local?"),
        ("{a: {routes: [{model: m}]}}", "models.a.routes.0.backend: is missing; add it"),
        ("{a: {backend: local, fallbacks: [b]}}", "models.a.fallbacks.0: no such model; did you mean a?"),
        ("{a: {backend: local, fallbacks: [a]}}", "models.a.fallbacks.0: is the model itself"),
        ("{a: {backend: local, aliases: [a]}}", "models.a.aliases.0: is the name of another model"),
        ("{a: {backend: local, aliases: [x, x]}}", "models.a.aliases.1: is the name of another model"),
        ("{'a b': {backend: local}}", "models.?: is no name for a model"),
        (
            "{a: {backend: local, price: {inptu: 1}}}",
            "models.a.price.inptu: unknown setting; did you mean models.a.price.input?",
        ),
    ],
)
def test_models_with_mistakes(entries: str, expected: str) -> None:
    assert problem(LOCAL + f"models: {entries}").startswith(expected)


@pytest.mark.parametrize(
    ("written", "exact"),
    [
        ("0.075", "0.075"),
        ("'0.075'", "0.075"),
        ("0.1", "0.1"),
        ("1e-9", "0.000000001"),
        ("3", "3"),
        ("''", None),
        ("1_0.50", "10.5"),
    ],
)
def test_prices_are_exact(written: str, exact: str | None) -> None:
    price = load(LOCAL + f"models: {{a: {{backend: local, price: {{input: {written}}}}}}}").models["a"].price
    assert price is not None
    assert price.input == (None if exact is None else Decimal(exact))


@pytest.mark.parametrize("written", ["-1", ".nan", ".inf", "NaN", "free", "true", "[1]", "0.0000000001", "1e300"])
def test_prices_are_finite_positive_and_short(written: str) -> None:
    assert problem(LOCAL + f"models: {{a: {{backend: local, price: {{input: {written}}}}}}}").startswith(
        "models.a.price.input: must "
    )


# Databases


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("sqlite:///data/x.db", "sqlite:///data/x.db"),
        ("sqlite:///./x.db", "sqlite:///./x.db"),
        ("sqlite:////var/x.db", "sqlite:////var/x.db"),
        ("sqlite+aiosqlite:///x.db", "sqlite:///x.db"),
        ("postgres://u:p@h/db", "postgres://u:p@h/db"),
        ("postgresql://u:p@h:5432/db?sslmode=require", "postgresql://u:p@h:5432/db?sslmode=require"),
        ("postgresql+asyncpg://u:p@h/db", "postgresql://u:p@h/db"),
        ("postgresql:///db?host=/run/postgresql", "postgresql:///db?host=/run/postgresql"),
    ],
)
def test_database_urls(written: str, expected: str) -> None:
    assert load(f"database: {{url: '{written}'}}").database.url == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("sqlite:///:memory:", "must name a file, as the workers share it: sqlite:///data/gateway.db"),
        ("sqlite://", "must name a file"),
        ("sqlite://x.db", "needs three slashes for a relative path and four for an absolute one"),
        ("sqlite:///x.db?timeout=3", "must end after the file's name"),
        ("mysql://h/db", "must begin with sqlite:///, postgresql:// or postgres://"),
        ("postgresql+odd://h/db", "must begin with"),
        ("postgresql://", "must look like postgresql://"),
        ("x.db", "must begin with"),
        ("", "must begin with"),
    ],
)
def test_database_urls_with_mistakes(written: str, expected: str) -> None:
    assert problem(f"database: {{url: '{written}'}}").startswith(f"database.url: {expected}")


# Secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@h:1/db", "postgresql://u:**********@h:1/db"),
        ("postgresql://u:p@s/s@h/db", "postgresql://u:**********@h/db"),
        ("postgresql://h/db?user=u&password=p&x=1", "postgresql://h/db?user=u&password=**********&x=1"),
        ("https://token@h/v1", "https://**********@h/v1"),
        ("http://127.0.0.1:80/v1", "http://127.0.0.1:80/v1"),
        ("sqlite:////var/x.db", "sqlite:////var/x.db"),
        ("plain text", "plain text"),
    ],
)
def test_urls_are_shown_without_passwords(url: str, shown: str) -> None:
    assert mask_url(url) == shown


def test_the_safe_url_of_the_database() -> None:
    assert DatabaseSettings(url="postgres://u:secret@h/db").safe_url == "postgres://u:**********@h/db"


EVERY_SECRET = f"""
auth: {{admin_key: {SECRET}}}
backends:
  b: {{type: openai, base_url: "http://h", api_key: {SECRET}, headers: {{authorization: {SECRET}}}}}
  c: {{type: openai, base_url: "http://h"}}
database: {{url: "postgres://u:{SECRET}@h/db"}}
storage: {{url: s3://bucket, endpoint: "http://h", access_key: {SECRET}, secret_key: {SECRET}}}
"""


def test_an_address_with_a_password_is_a_mistake_that_does_not_show_it() -> None:
    said = problem(f'backends: {{b: {{type: openai, base_url: "http://user:{SECRET}@h"}}}}')
    assert said.startswith("backends.b.base_url: must hold no user and password")
    assert SECRET not in said


def test_secrets_are_not_in_descriptions_and_reprs() -> None:
    settings = load(EVERY_SECRET)
    assert settings.storage.secret_key.get_secret_value() == SECRET
    for shown in (settings.describe(), repr(settings), str(settings), repr(settings.backends), repr(settings.database)):
        assert SECRET not in shown
    described = yaml.safe_load(settings.describe())
    assert described["auth"]["admin_key"] == "**********"
    assert described["backends"]["b"] | {"timeouts": 0, "refuse": 0} == {
        "type": "openai",
        "base_url": "http://h",
        "api_key": "**********",
        "headers": {"authorization": "**********"},
        "timeouts": 0,
        "refuse": 0,
    }
    assert described["backends"]["c"]["api_key"] == ""
    assert described["database"]["url"] == "postgres://u:**********@h/db"
    assert described["storage"]["endpoint"] == "http://h"


@pytest.mark.parametrize(
    "text",
    [
        "auth: {admin_key: [SECRET]}",
        "auth: {admin_key: {SECRET}}",
        "auth: {admin_key: *SECRET}",
        "auth: {admin_key: !SECRET x}",
        "auth: {admin_key: !SECRET!x y}",
        "auth: {admin_key: !!int SECRET}",
        "auth: {admin_key: SECRET: x}",
        "auth: {admin_key: 'SECRET}",
        "auth: SECRET",
        "auth: {mode: SECRET}",
        "SECRET",
        "server: {port: SECRET, host: 'x SECRET', workers: SECRET, cors_origins: 'SECRET'}",
        "server: {trusted_proxies: [SECRET], allowed_hosts: ['/SECRET']}",
        "backends: {b: {type: SECRET}}",
        "backends: {b: {type: openai, base_url: 'http://u:SECRET'}}",
        "backends: {b: {type: openai, base_url: 'SECRET', api_key: 'SECRET SECRET'}}",
        "backends: {b: {type: openai, base_url: 'http://h', drop: [SECRET SECRET], vendor: SECRET, roles: SECRET}}",
        "backends: {b: {type: azure, base_url: 'http://h', api_version: SECRET, options: {token: SECRET}}}",
        "backends: {b: {type: ollama, keep_alive: SECRET, options: SECRET}}",
        "backends: {b: {type: openai, base_url: 'http://h', headers: {Bearer SECRET: x}}}",
        "backends: {b: {type: openai, base_url: 'http://h', headers: {Bearer SECRET: [x]}}}",
        "models: {m: {backend: SECRET, fallbacks: [SECRET], price: {input: SECRET}}}",
        "default_backend: SECRET",
        "database: {url: 'mysql://u:SECRET@h', pool_size: SECRET}",
        "database: {'postgres://u:SECRET@h'}",
        "storage: {url: 'gs://SECRET', endpoint: SECRET}",
        "pricing: SECRET",
        "pricing: {input_per_1k: SECRET}",
        "max_input_length: SECRET",
    ],
)
def test_secrets_are_not_in_complaints(text: str) -> None:
    assert SECRET not in "\n".join(problems(text.replace("SECRET", SECRET)))
    if "{SECRET" not in text:
        key, _, value = text.partition(": ")
        environ = {f"GATEWAY__{key.upper()}": value.replace("SECRET", SECRET)}
        assert SECRET not in "\n".join(problems("", environ))


# The seeds


def test_seed_3_file_keys() -> None:
    settings = load(
        """
        model: gpt-4o
        rate_limit_per_minute: 10
        max_input_length: 10000
        max_file_size_mb: 25
        pricing:
          input_per_1k: 0.0025
          output_per_1k: 0.01
        stream_responses: false
        """
    )
    assert (settings.default_model, settings.limits.requests_per_minute) == ("gpt-4o", 10)
    assert (settings.max_input_length, settings.files.max_mb, settings.stream_responses) == (10000, 25, False)
    assert settings.prices == {"gpt-4o": PriceSettings(input=Decimal("2.5"), output=Decimal(10))}


def test_seed_3_pricing_goes_to_the_entry_of_its_model() -> None:
    pricing = "model: {}\npricing: {{input_per_1k: '0.0000375'}}\nmodels: {{a: {{backend: local, aliases: [b]}}}}\n"
    for name in ("a", "b"):
        settings = load(LOCAL + pricing.format(name))
        assert settings.models["a"].price == PriceSettings(input=Decimal("0.0375"))
        assert settings.prices == {}


def test_seed_3_pricing_is_that_of_the_files_model() -> None:
    text = "model: dear\npricing: {input_per_1k: 1}"
    settings = load(text, {"GATEWAY__DEFAULT_MODEL": "cheap"})
    assert settings.default_model == "cheap"
    assert list(settings.prices) == ["dear"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: a\ndefault_model: a", "default_model: given twice, as model and as default_model; keep default_model"),
        (
            "rate_limit_per_minute: 1\nlimits: {requests_per_minute: 1}",
            "limits.requests_per_minute: given twice, as rate_limit",
        ),
        (
            "max_file_size_mb: 1\nfiles: {max_mb: 1}",
            "files.max_mb: given twice, as max_file_size_mb and as files.max_mb",
        ),
        (
            LOCAL + "model: a\npricing: {input_per_1k: 1}\nmodels: {a: {backend: local, price: {input: 1}}}",
            "models.a.price: given twice, as pricing and as models.a.price",
        ),
        ("pricing: {input_per_1k: 1}", "pricing: is the price of `model`, which is not given; add model: NAME"),
        ("model: a\npricing: {input_per_1k: much}", "pricing.input_per_1k: must be a number of USD"),
        ("model: a\npricing: 1", "pricing: must be a mapping of input_per_1k and output_per_1k"),
    ],
)
def test_seed_keys_with_mistakes(text: str, expected: str) -> None:
    assert problem(text).startswith(expected)


S3 = {"S3_BUCKET": "bucket", "S3_ENDPOINT": "https://s3.example", "S3_ACCESS_KEY": "a", "S3_SECRET_KEY": "s"}


@pytest.mark.parametrize("enabled", [{}, {"S3_ENABLED": "true"}])
def test_seed_3_storage(enabled: dict[str, str]) -> None:
    storage = load("", S3 | enabled).storage
    assert (storage.url, storage.endpoint) == ("s3://bucket", "https://s3.example")
    assert (storage.access_key.get_secret_value(), storage.secret_key.get_secret_value()) == ("a", "s")


def test_seed_3_storage_is_weaker_than_the_file() -> None:
    assert load("", S3 | {"S3_ENABLED": "false"}).storage == load().storage
    assert load("storage: {url: folder}", S3).storage.endpoint is None
    mixed = load("storage: {url: s3://other/prefix, access_key: x}", S3).storage
    assert (mixed.url, mixed.endpoint, mixed.access_key.get_secret_value()) == (
        "s3://other/prefix",
        "https://s3.example",
        "x",
    )


def test_switches_are_true_or_false() -> None:
    assert problem("", {"S3_ENABLED": "maybe"}) == "storage.url: S3_ENABLED must be true or false"
    assert problem("", {"DATABASE_ENABLED": "maybe"}) == "database.url: DATABASE_ENABLED must be true or false"
    assert problem("", {"S3_ENABLED": "true"}).startswith("storage.url: S3_ENABLED is true but S3_BUCKET is empty")


def test_seed_databases() -> None:
    url = {"DATABASE_URL": "postgresql://u:p@h/db"}
    assert load("", url).database.url == "postgresql://u:p@h/db"
    assert load("", url | {"DATABASE_ENABLED": "true"}).database.url == "postgresql://u:p@h/db"
    assert load("", url | {"DATABASE_ENABLED": "false"}).database.url == "sqlite:///data/gateway.db"
    assert load("database: {url: sqlite:///f.db}", url).database.url == "sqlite:///f.db"


def test_seed_1_names() -> None:
    server = load("", {"APP_NAME": "Lite", "APP_VERSION": "1.0.0", "DATABASE_URL": "sqlite:///./chat.db"}).server
    assert (server.name, server.version) == ("Lite", "1.0.0")


# The whole


def test_budgets_are_exact_amounts_for_a_period() -> None:
    budgets = load("budgets: {key: {usd: 0.1, period: day}, gateway: {usd: 5000000}}").budgets
    assert budgets.key is not None
    assert budgets.gateway is not None
    assert (budgets.key.nanousd, budgets.key.period) == (100_000_000, "day")
    assert (budgets.gateway.nanousd, budgets.gateway.period) == (5_000_000 * 10**9, "month")
    assert not budgets.allow_unpriced


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("budgets: {key: {usd: 0}}", "budgets.key.usd: must be more than 0"),
        ("budgets: {gateway: {usd: -1}}", "budgets.gateway.usd: must be more than 0 and at most 1000000000 USD"),
        ("budgets: {gateway: {usd: 1e10}}", "budgets.gateway.usd: must be more than 0 and at most 1000000000 USD"),
        ("budgets: {gateway: {usd: 0.0000000001}}", "budgets.gateway.usd: must have at most 9 decimals"),
        ("budgets: {gateway: {usd: much}}", "budgets.gateway.usd: must be a number of USD"),
        ("budgets: {key: {period: day}}", "budgets.key.usd: "),
        ("budgets: {key: {usd: 1, period: week}}", "budgets.key.period: "),
        ("budgets: {keys: {usd: 1}}", "budgets.keys: unknown"),
        ("limits: {token_burst: 0}", "limits.token_burst: must be at least 1"),
        ("models: {a: {backend: b, max_output_tokens: 0}}", "models.a.max_output_tokens: must be at least 1"),
        ("models: {a: {backend: b, context_window: 0}}", "models.a.context_window: must be at least 1"),
    ],
)
def test_limits_and_budgets_that_cannot_be(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as failure:
        load(text)
    assert any(line.startswith(problem) for line in failure.value.problems), failure.value.problems


def test_settings_are_frozen_and_travel_to_workers() -> None:
    settings = load(EVERY_SECRET + "models: {a: {backend: c, price: {input: 0.075}}}")
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ValidationError):
        settings.server.port = 1  # type: ignore[misc]


def test_a_description_can_be_read_again() -> None:
    described = load(
        LOCAL + "models: {a: {backend: local, price: {input: 0.075, output: 3}}}\nlimits: {burst: 5}"
    ).describe()
    assert "input: 0.075" in described
    assert "max_body_mb: 32\n" in described
    again = load(described.replace("api_key: ''", "api_key: x"))
    assert again.describe().replace("**********", "") == described.replace("**********", "")


def test_a_description_of_peculiarities_can_be_read_again() -> None:
    entry = (
        "{type: openai, base_url: 'http://h', api_key: x, drop: [], defaults: {a: {b: 1}}, usage_in_stream: false, "
        "tool_call_ids: {length: 9}, by_model: {'a*': {drop: [stop]}, b: {}}}"
    )
    settings = load(f"backends: {{b: {entry}}}")
    described = settings.describe()
    assert load(described).backends["b"].quirks == settings.backends["b"].quirks
    assert "flatten" not in described


def _uncommented() -> Iterator[str]:
    """The shipped file with its examples switched on."""
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        yield re.sub(r"^# (?=backends:|models:|  )|^  # (?=\w)", lambda match: "" if match[0] == "# " else "  ", line)


def test_the_shipped_file_holds_the_defaults() -> None:
    assert load_settings(str(SHIPPED), {}) == load_settings(None, {})


def test_the_shipped_file_leaves_room_for_the_seeds_names() -> None:
    environ = S3 | {
        "DATABASE_URL": "postgres://u@h/db",
        "APP_NAME": "Lite",
        "APP_VERSION": "2",
        "OPENAI_API_KEY": SECRET,
    }
    assert load_settings(str(SHIPPED), environ) == load_settings(None, environ)
    environ["DATABASE_ENABLED"] = "false"
    assert load_settings(str(SHIPPED), environ).database.url == "sqlite:///data/gateway.db"


def test_the_examples_of_the_shipped_file_work() -> None:
    settings = load("\n".join(_uncommented()), {"OPENAI_API_KEY": "a", "DEEPSEEK_API_KEY": "b", "EXAMPLE_API_KEY": "c"})
    assert list(settings.backends) == ["openai", "deepseek", "ollama", "everything", "local", "demo"]
    assert list(settings.models) == ["gpt-4o", "fast"]


def test_the_shipped_file_names_every_setting() -> None:
    def missing(defaults: Any, written: Any, path: str = "") -> Iterator[str]:
        for name, value in defaults.items():
            if name not in written:
                yield path + name
            elif isinstance(value, dict):
                yield from missing(value, written[name], f"{path}{name}.")

    assert list(missing(yaml.safe_load(Settings().describe()), yaml.safe_load("\n".join(_uncommented())))) == []


def test_importing_the_settings_costs_no_more_than_pydantic_and_yaml() -> None:
    code = "import sys, gateway.config; print({'asyncio', 'tiktoken', 'starlette'} & {*sys.modules})"
    root = str(SHIPPED.parent)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert run.stdout.strip() == "set()"
