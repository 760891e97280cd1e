"""The benchmark counts right: known values, processes that use what they are told to, servers that fail on purpose."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import course, report, samples
from benchmarks.contestants import Running
from benchmarks.course import Mock, measured
from benchmarks.load import Job
from benchmarks.processes import cpu_seconds, resident_bytes, tree
from benchmarks.report import GOALS, factor, figure, markdown
from benchmarks.stats import Spread, median, percentile, spread

RESULTS = Path(report.__file__).parent / "results"
BURN = """
import time
held = b"x" * 50_000_000
while time.process_time() < 0.3:
    pass
print("burnt", flush=True)
input()
"""


@pytest.fixture
def mock() -> Iterator[Mock]:
    with course.upstream() as running:
        yield running


def job(port: int, kind: Any = "json", **changes: Any) -> Job:
    asked = samples.request(port, "sk-any", stream=kind == "stream").decode()
    least, events = len(samples.completion()), samples.CHUNKS + 1
    given = Job(port, kind, asked, 4, 0.4, least, events, warm_up=0.1, ramp=0.1, finish=True)
    return replace(given, **changes)


# Figures


def test_a_spread_is_that_of_its_values_in_any_order() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(5, 3.0, 3.0, 4.6, 4.96, pytest.approx(4.996), 5.0)


def test_no_values_have_no_spread() -> None:
    assert spread([]) == Spread(0)


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([0.0, 10.0], 0.9) == 9.0


@pytest.mark.parametrize(("values", "middle"), [([7.0], 7.0), ([1.0, 2.0], 1.5), ([9.0, 1.0, 2.0], 2.0)])
def test_median(values: list[float], middle: float) -> None:
    assert median(values) == middle


def test_cpu_time_and_memory_are_those_of_a_whole_tree() -> None:
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"

        assert len(tree([process.pid])) == 2
        assert cpu_seconds([process.pid]) >= 0.28
        assert resident_bytes([process.pid]) > 50_000_000
        process.communicate(b"\n")


def test_the_cpu_time_of_a_child_that_has_ended_is_not_lost() -> None:
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}], input=b'\\n')\ninput()"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"
        while len(tree([process.pid])) > 1:
            pass

        assert cpu_seconds([process.pid]) >= 0.28
        process.communicate(b"\n")


# The mock upstream and the load generator


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


def test_answers_are_counted_and_timed(mock: Mock) -> None:
    found = measured(job(mock.port, watched={"self": [mock.pid]}))

    assert found["errors"] == {}
    assert found["ended"] == found["latency"]["count"] > 0
    assert found["latency"]["largest"] > samples.ANSWER_SECONDS
    assert found["resident"]["self"] > 0


def test_streams_are_counted_by_their_chunks(mock: Mock) -> None:
    found = measured(job(mock.port, "stream"))

    assert found["errors"] == {}
    assert found["done"] > 0
    assert found["gap"]["count"] > 0


def test_an_answer_that_is_too_short_is_an_error(mock: Mock) -> None:
    found = measured(job(mock.port, least=100_000))

    assert found["done"] == 0
    assert set(found["errors"]) == {"short answer"}


def test_a_stream_with_too_few_chunks_is_an_error(mock: Mock) -> None:
    found = measured(job(mock.port, "stream", events=1000))

    assert set(found["errors"]) == {"stream with missing chunks"}


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A server that gives this to every connection, and then closes it."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


CUT = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n"
NO_END_MARK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n"
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("kind", "reply", "error"),
    [
        ("json", REFUSED, "status 429"),
        ("json", b"", "connection lost"),
        ("stream", REFUSED, "status 429"),
        ("stream", CUT, "connection lost"),
        ("stream", NO_END_MARK, "stream without its end mark"),
    ],
)
def test_what_fails_is_told(kind: str, reply: bytes, error: str) -> None:
    with answering(reply) as port:
        found = measured(job(port, kind, connections=1))

    assert set(found["errors"]) == {error}
    assert found["ended"] == 0


def test_a_contestant_runs_the_whole_course(mock: Mock) -> None:
    class Nothing:
        name = title = "nothing"

        def missing(self) -> None:
            return None

        @contextmanager
        def running(self, upstream: int) -> Iterator[Running]:
            yield Running(upstream, processes={"self": [mock.pid]}, start=lambda: 0.5)

    plan = course.Plan(connections=(8,), streams=2, held=(), seconds=0.3, warm_up=0.1, rounds=1, starts=1)
    said: list[str] = []
    found = course.run(Nothing(), mock, plan, said.append)

    assert found["start_seconds"] == 0.5
    assert found["answers"]["8"]["cpu_us"].keys() == {"self", "upstream"}
    assert found["streams"]["2"]["gap"]["p50"] > 0
    assert len(said) == 3


# The report


@pytest.mark.parametrize(
    ("value", "must", "said"),
    [(300.0, 200.0, "1.50x"), (0.0, 0.0, "met"), (2.0, 0.0, "NOT met"), (None, 200.0, ""), (5.0, None, "")],
)
def test_a_factor_to_what_must_be(value: float | None, must: float | None, said: str) -> None:
    assert factor(value, must) == said


def test_what_is_added_is_the_difference_to_direct() -> None:
    goal = next(goal for goal in GOALS if goal.what.startswith("added p50"))
    direct, ours = ({"answers": {"1": {"latency": {"p50": seconds}}}} for seconds in (0.020, 0.0215))

    assert figure(goal, ours, direct) == pytest.approx(1.5)
    assert figure(goal, direct, direct) is None


def test_the_stored_report_is_the_one_that_its_figures_make() -> None:
    stored = json.loads((RESULTS / "latest.json").read_text())

    assert markdown(stored) == (RESULTS / "latest.md").read_text()
