"""What the mock upstream answers."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from benchmarks import samples
from benchmarks.course import Mock


def ask(port: int, body: dict[str, Any]) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    answer = connection.getresponse().read()
    connection.close()
    return answer


def test_the_upstream_answers(mock: Mock) -> None:
    answer = json.loads(ask(mock.port, {"model": samples.MODEL}))

    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == samples.WORDS


@pytest.mark.parametrize("with_usage", [False, True])
def test_the_upstream_streams(mock: Mock, with_usage: bool) -> None:
    told = {"stream_options": {"include_usage": True}} if with_usage else {}
    answer = ask(mock.port, {"model": samples.MODEL, "stream": True, **told})
    events = answer.decode().removesuffix("\n\n").split("\n\n")

    assert events.pop() == "data: [DONE]"
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    usages = [chunk["usage"] for chunk in found if "usage" in chunk]
    assert len([chunk for chunk in found if chunk["choices"]]) == samples.CHUNKS
    assert found[samples.CHUNKS - 1]["choices"][0]["finish_reason"] == "stop"
    assert [usage for usage in usages if usage] == ([found[-1]["usage"]] if with_usage else [])
