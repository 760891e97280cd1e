"""The gateway behind a proxy, with certificates, as its settings say; and what becomes of a proxy that refuses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests_standalone.backends.certificates import Certificates
from tests_standalone.backends.faulty import answer_well
from tests_standalone.backends.raw_proxy import raw_proxy
from tests_standalone.backends.raw_upstream import RawUpstream, raw_upstream
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.system.http import chat, post_chat

REFUSAL = b"HTTP/1.1 407 Who Are You\r\nproxy-authenticate: Basic\r\n\r\n"
ENVIRONMENT = dict.fromkeys(
    ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:1"
)


@pytest.fixture
async def upstream(certificates: Certificates) -> AsyncIterator[RawUpstream]:
    """It speaks TLS, is called elsewhere.test, and wants to see a certificate."""
    async with raw_upstream(answer_well, tls=certificates.context(certificates.elsewhere, ask=True)) as running:
        yield running


def behind(proxy: RawUpstream, certificates: Certificates) -> dict[str, Any]:
    cert, key = certificates.client
    backend = {
        "type": "openai",
        "base_url": "https://elsewhere.test/v1",
        "api_key": "sk-upstream-secret",
        "models": ["m"],
        "ca_file": certificates.ca,
        "client_cert": cert,
        "client_key": key,
    }
    return {
        "backends": {"far": backend},
        "server": {"upstream_proxy": f"http://ann:s3cret-word@127.0.0.1:{proxy.port}"},
    }


async def test_calls_go_through_it_and_to_upstreams_on_this_machine_directly(
    upstream: RawUpstream, certificates: Certificates
) -> None:
    async with raw_upstream(answer_well) as near, raw_proxy(upstream.port) as proxy:
        config = behind(proxy, certificates)
        config["backends"]["near"] = {"type": "openai", "base_url": near.base + "/v1", "models": ["n"]}
        async with GatewayProcess(config, env=ENVIRONMENT) as gateway:
            for model in ("m", "n"):
                for stream in (False, True):
                    answer = await post_chat(gateway.port, chat(model, stream=stream))
                    assert (answer.status, answer.clean_end, b"good" in answer.body) == (200, True, True)
    assert [peer.head.partition(b"\r\n")[0] for peer in proxy.peers] == [b"CONNECT elsewhere.test:443 HTTP/1.1"]
    assert len(near.peers) == 1
    assert b"proxy-authorization" not in near.peers[0].head + upstream.peers[0].head


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_refuses_is_an_upstream_that_cannot_be_reached(
    upstream: RawUpstream, certificates: Certificates, stream: bool
) -> None:
    """Nothing was sent and nobody pays; the log says who refused what, and nobody hears the password."""
    async with raw_proxy(upstream.port, REFUSAL) as proxy, GatewayProcess(behind(proxy, certificates)) as gateway:
        answer = await post_chat(gateway.port, chat("m", stream=stream))
        assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")
        assert answer.json["error"]["message"] == "The upstream could not be reached."
        rows = gateway.query("SELECT status, charged, cost_usd FROM usage_view")
        assert {(row["status"], bool(row["charged"]), row["cost_usd"] or 0) for row in rows} == {("error", False, 0)}
        said = gateway.logs()
    assert f"proxy 127.0.0.1:{proxy.port}" in said
    assert "CONNECT was refused: 407 Who Are You" in said
    for shown in (said, answer.body.decode()):
        assert not any(word in shown for word in ("s3cret-word", "sk-upstream-secret", "Basic"))
    assert upstream.peers == []


async def test_the_settings_are_shown_without_the_password(upstream: RawUpstream, certificates: Certificates) -> None:
    async with raw_proxy(upstream.port) as proxy, GatewayProcess(behind(proxy, certificates)) as gateway:
        shown = gateway.run("check-config").stdout
        assert f"@127.0.0.1:{proxy.port}" in shown
        assert "s3cret-word" not in shown + gateway.logs()
        assert json.dumps(certificates.ca)[1:-1] in shown
