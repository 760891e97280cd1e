"""Upstreams that break, F62 to F89 of the list of faults: what a client sees, and what stands in the books.

F62 refused                       test_f62_*
F63 DNS failure                   test_f63_*; test_client_dial.py: TestNames
F64 connecting hangs              test_f64_*; test_client_dial.py: TestAddresses
F66 hangs before headers          test_f66_*
F67 hangs in the middle           test_f67_*; test_responses.py: pings meanwhile
F68 one byte at a time            test_f68_*
F69 reset, early end              test_f69_*; test_client_reply.py: test_cut_short, at every place
F71 invalid JSON chunk            test_faults_in_streams.py: test_f71_*
F72 UTF-8 split                   test_faults_in_streams.py: test_f72_*
F73 surrogates split              test_faults_in_streams.py: test_f73_*
F74 endless line                  test_faults_in_streams.py: test_f74_*
F76 5xx before the first token    test_f76_*
F77 redirect                      test_f77_*
F78 a page, JSON for a stream     test_f78_*
F79 gzip                          test_faults_in_streams.py: test_f79_*; test_client_inflate.py
F81 two ends, data after it       test_faults_in_streams.py: test_f81_*
F82 usage missing, repeated       test_faults_in_streams.py: test_f82_*
F83 error in the stream           test_faults_in_streams.py: test_f83_*
F84 rules of SSE                  test_faults_in_streams.py: test_f84_*; wire/test_sse.py, cut at every byte
F86 early replies, 1xx            test_f86_*; test_client_protocol.py: TestEarlyReplies
F87 idle connection closed        test_f87_*; test_client.py: TestHungUp
F88 headers and trailers          test_f88_*; test_client_reply.py: TestBroken
F89 wrong length                  test_f89_*; test_client_reply.py: test_bytes_after_the_reply
"""

from __future__ import annotations

import asyncio
import json

import pytest

from tests_standalone.backends.faulty import (
    DONE,
    END,
    SSE,
    USAGE,
    Rig,
    answer_well,
    completion,
    delta,
    event,
    failed_midway,
    finish,
    framed,
    replying,
    whole,
)
from tests_standalone.backends.raw_upstream import Peer, deaf
from tests_standalone.system.http import Answer

COST = (USAGE["prompt_tokens"] * 2.0 + USAGE["completion_tokens"] * 8.0) / 1e6
KINDS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def is_good(answer: Answer) -> bool:
    return answer.status == 200 and answer.clean_end and b"good" in answer.body


async def fell_back(rig: Rig, answer: Answer, *, cost: float | None) -> None:
    """The second upstream answered; the first attempt has a row of its own, which nobody pays."""
    assert is_good(answer)
    first, second = await rig.rows(answer)
    assert (first.backend, first.status, first.charged, first.cost) == ("first", "error", False, cost)
    assert (second.backend, second.status, second.charged, second.cost) == ("second", "ok", True, pytest.approx(COST))


async def refused(rig: Rig, answer: Answer, status: int, code: str) -> None:
    """Nobody answered: an error before the status, and only rows that nobody pays."""
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    assert answer.headers["x-should-retry"] == "false"
    assert all(not row.charged and row.status == "error" for row in await rig.rows(answer))


@KINDS
async def test_f62_refused(rig: Rig, stream: bool) -> None:
    async with rig.second():
        await fell_back(rig, await rig.chat(rig.model(), stream=stream), cost=0)
    answer = await rig.chat(rig.alone(), stream=stream)
    await refused(rig, answer, 502, "upstream_error")
    assert all(row.cost == 0 and row.milliseconds < 1000 for row in await rig.rows(answer))


@KINDS
async def test_f63_dns_failure(rig: Rig, stream: bool) -> None:
    async with rig.second():
        answer = await rig.chat(f"nowhere{int(stream)}", stream=stream)
    assert is_good(answer)
    *failed, good = await rig.rows(answer)
    assert {(row.backend, row.charged, row.cost) for row in failed} == {("nowhere", False, 0)}
    assert (good.backend, good.charged) == ("second", True)
    alone = await rig.chat(f"nowhere/{int(stream)}", stream=stream)
    await refused(rig, alone, 502, "upstream_error")
    assert all(row.cost == 0 and row.milliseconds < 1000 for row in await rig.rows(alone))


@KINDS
async def test_f64_connecting_hangs(rig: Rig, stream: bool) -> None:
    with deaf(port=rig.first_port):
        async with rig.second():
            await fell_back(rig, await rig.chat(rig.model(), stream=stream), cost=0)
        await refused(rig, await rig.chat(rig.alone(), stream=stream), 502, "upstream_error")


@KINDS
async def test_f66_hangs_before_headers(rig: Rig, stream: bool) -> None:
    """What it did with the request nobody knows: its row has no cost, not the cost 0."""
    async with rig.first(replying(b"")) as first:
        async with rig.second():
            await fell_back(rig, await rig.chat(rig.model(), stream=stream), cost=None)
        answer = await rig.chat(rig.alone(), stream=stream)
    await refused(rig, answer, 504, "upstream_timeout")
    (row,) = await rig.rows(answer)
    assert (row.charged, row.cost, row.counted_by) == (False, None, "gateway")
    assert len(first.peers) == 2, "each was asked once: it may have begun to work"


async def test_f67_hangs_in_the_middle(rig: Rig) -> None:
    async with rig.first(replying(SSE + framed(event(delta("so far"))))):
        answer = await rig.stream(rig.model())
    assert failed_midway(answer, "so far")["code"] == "upstream_timeout"
    (row,) = await rig.rows(answer)
    assert (row.status, row.charged, row.counted_by) == ("error", True, "gateway")
    assert row.tokens[1] > 0
    assert row.cost
    assert await rig.stored(answer) == ("so far", "error")


async def test_f68_one_byte_at_a_time(rig: Rig) -> None:
    """Slower than any limit on silence in total, never silent for that long."""
    text = "slowly but surely"
    stream = event(delta(text)) + finish() + DONE
    pieces = [framed(stream[n : n + 1]) for n in range(len(stream))]
    before = rig.resident()
    async with rig.first(replying(SSE, *pieces, END, pause=0.004)):
        answer = await rig.stream(rig.alone())
        assert answer.clean_end
        assert answer.events[0]["choices"][0]["delta"]["content"] == text
        (row,) = await rig.rows(answer)
        assert (row.status, row.tokens) == ("ok", (3, 2))
        assert row.milliseconds > 1000
        late = await rig.stream("hurried")
        assert (late.status, late.json["error"]["code"]) == (504, "upstream_timeout")
    assert rig.resident() - before < 4 << 20


@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize("where", [b"", b"ff\r\ndata: {", framed(b"data: {")], ids=["between", "chunk", "event"])
async def test_f69_ends_inside(rig: Rig, where: bytes, end: str) -> None:
    async with rig.first(replying(SSE + framed(event(delta("so far"))) + where, end=end)) as first:
        answer = await rig.stream(rig.model())
        assert len(first.peers) == 1
    assert failed_midway(answer, "so far")["code"] == "upstream_error"
    (row,) = await rig.rows(answer)
    assert (row.status, row.charged, row.counted_by) == ("error", True, "gateway")
    assert row.tokens[1] > 0
    assert await rig.stored(answer) == ("so far", "error")


@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_f69_ends_inside_a_whole_reply(rig: Rig, end: str) -> None:
    async with rig.first(replying(whole(completion("cut"))[:-9], end=end)), rig.second():
        await fell_back(rig, await rig.chat(rig.model()), cost=None)


@KINDS
@pytest.mark.parametrize("status", [500, 502, 503, 529])
async def test_f76_a_failure_before_the_first_token(rig: Rig, status: int, stream: bool) -> None:
    error = whole(b'{"error":{"message":"down"}}', "application/json", f"{status} Oh")
    async with rig.first(replying(error)) as first:
        async with rig.second():
            await fell_back(rig, await rig.chat(rig.model(), stream=stream), cost=0)
        answer = await rig.chat(rig.alone(), stream=stream)
        await refused(rig, answer, 503 if status in (503, 529) else 502, "upstream_error")
        assert len(await rig.rows(answer)) == 2, "one more try"
        assert len(first.peers) == 1, "each of the three on the same connection"


async def test_f76_none_after_the_first_token(rig: Rig) -> None:
    broken = SSE + framed(event(delta("one"))) + framed(event(b'{"error":{"message":"down","code":503}}')) + END
    async with rig.first(replying(broken)), rig.second() as second:
        answer = await rig.stream(rig.model())
        assert second.peers == []
    assert failed_midway(answer, "one")["message"] == "down"
    assert len(await rig.rows(answer)) == 1


@KINDS
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_f77_redirects_are_not_followed(rig: Rig, status: int, stream: bool) -> None:
    async with rig.second() as second:
        place = f"location: http://127.0.0.1:{second.port}/v1/chat/completions"
        async with rig.first(replying(whole(b"", "text/plain", f"{status} Go", place))):
            answer = await rig.chat(rig.alone(), stream=stream)
        assert second.peers == []
    assert answer.status == 502
    assert "location" not in answer.headers
    assert all(not row.charged for row in await rig.rows(answer))


@KINDS
@pytest.mark.parametrize("kind", ["text/html", "application/json"])
async def test_f78_a_page_is_no_answer(rig: Rig, kind: str, stream: bool) -> None:
    page = b"<html><h1>Welcome, sk-upstream-secret!</h1></html>"
    async with rig.first(replying(whole(page, kind))):
        answer = await rig.chat(rig.alone(), stream=stream)
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")
    for shown in (answer.body.decode(), rig.gateway.logs()):
        assert "Welcome" not in shown
        assert "sk-upstream-secret" not in shown


async def test_f78_json_where_a_stream_was_asked_for(rig: Rig) -> None:
    async with rig.first(replying(whole(completion("whole")))):
        answer = await rig.stream(rig.alone())
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")


@pytest.mark.parametrize("size", [10, 8 << 20], ids=["small", "large"])
async def test_f86_a_reply_before_the_body_was_sent(rig: Rig, size: int) -> None:
    """It never reads the body; the client gets its words, and neither side waits for the other."""

    async def script(peer: Peer) -> None:
        await peer.request_head()
        body = b'{"error":{"message":"not so long","type":"invalid_request_error"}}'
        peer.send(whole(body, "application/json", "413 Too Large"))
        await asyncio.Event().wait()

    async with rig.first(script):
        answer = await rig.chat(rig.alone(), x="y" * size)
    assert (answer.status, answer.json["error"]["message"]) == (413, "not so long")


@KINDS
async def test_f86_informative_replies_are_passed_over(rig: Rig, stream: bool) -> None:
    informed = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n"
    good = SSE + framed(event(delta("good")) + finish() + DONE) + END if stream else whole(completion("good"))
    async with rig.first(replying(*[bytes([byte]) for byte in informed], good)):
        answer = await rig.chat(rig.alone(), stream=stream)
    assert is_good(answer)
    assert "link" not in answer.headers


@KINDS
async def test_f87_an_idle_connection_that_was_closed_is_replaced(rig: Rig, stream: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        good = SSE + framed(event(delta("good")) + finish() + DONE) + END
        peer.send(good if json.loads(peer.body).get("stream") else whole(completion("good")))

    async with rig.first(script) as first:
        for number in range(5):
            answer = await rig.chat(rig.alone(), stream=stream)
            assert is_good(answer)
            assert len(await rig.rows(answer)) == 1
            assert len(first.peers) == number + 1


@KINDS
async def test_f87_closed_while_the_request_is_on_its_way(rig: Rig, stream: bool) -> None:
    """Nobody knows whether it was read: it is not sent again to the same upstream behind the books."""
    received = []

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(whole(completion("good")))
        received.append((await peer.request())[:4])

    async with rig.first(script) as first:
        assert is_good(await rig.chat(rig.alone()))
        answer = await rig.chat(rig.alone(), stream=stream)
        await refused(rig, answer, 502, "upstream_error")
        assert [row.cost for row in await rig.rows(answer)] == [None]
        assert (received, len(first.peers)) == ([b"POST"], 1)


async def test_f87_a_connection_in_use_is_not_closed(rig: Rig) -> None:
    """However many others come and go meanwhile."""
    more = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        if json.loads(peer.body).get("stream"):
            for _ in range(30):
                peer.send(SSE + framed(event(delta("a"))) if not _ else framed(event(delta("a"))))
                await asyncio.sleep(0.02)
            await more.wait()
            peer.send(framed(finish() + DONE) + END)
            await peer.gone()
        else:
            peer.send(whole(completion("good")))

    async with rig.first(script):
        streaming = asyncio.create_task(rig.stream(rig.alone()))
        for _ in range(20):
            assert is_good(await rig.chat(rig.alone()))
        more.set()
        answer = await streaming
    assert answer.clean_end
    assert answer.events[-1] == "[DONE]"


@KINDS
async def test_f88_a_header_of_100_kilobytes(rig: Rig, stream: bool) -> None:
    async with rig.first(replying(whole(completion("x"), "application/json", "200 OK", "x-big: " + "b" * 100_000))):
        answer = await rig.chat(rig.alone(), stream=stream)
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")


@KINDS
async def test_f88_headers_and_trailers_stay_here(rig: Rig, stream: bool) -> None:
    """Of an upstream's headers the client sees none: not those of the connection, not its cookies, nor its trailers."""
    lines = (
        b"set-cookie: a=1\r\nset-cookie: b=2\r\nx-twice: 1\r\nx-twice: 2\r\nproxy-authenticate: x\r\nkeep-alive: 9\r\n"
    )
    lines += b"server: odd\r\nx-request-id: theirs\r\nopenai-organization: org\r\n"
    kind = b"text/event-stream" if stream else b"application/json"
    body = event(delta("good")) + finish() + DONE if stream else completion("good")
    head = b"HTTP/1.1 200 OK\r\ncontent-type: " + kind + b"\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n"
    async with rig.first(replying(head + lines + b"\r\n" + framed(body) + b"0\r\nx-sum: 1\r\nset-cookie: c=3\r\n\r\n")):
        for _ in range(2):
            answer = await rig.chat(rig.alone(), stream=stream)
            assert is_good(answer)
            foreign = {"set-cookie", "x-twice", "proxy-authenticate", "keep-alive", "server", "trailer", "x-sum"}
            assert not foreign & set(answer.headers)
            assert answer.headers["x-request-id"] != "theirs"
            assert b"x-sum" not in answer.raw_body


async def test_f89_a_body_shorter_than_its_length(rig: Rig) -> None:
    short = whole(completion("short")).replace(b"content-length: ", b"content-length: 1", 1)
    async with rig.first(replying(short, end="fin")) as first:
        for number in range(2):
            answer = await rig.chat(rig.alone())
            assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")
            assert len(first.peers) == number + 1


async def test_f89_a_body_longer_than_its_length(rig: Rig) -> None:
    """Bytes that belong to no reply: they are nobody's, and the connection is not used again."""
    foreign = whole(completion("of somebody else"))
    async with rig.first(replying(whole(completion("good")) + foreign)) as first:
        for number in range(3):
            answer = await rig.chat(rig.alone())
            assert is_good(answer)
            assert len(first.peers) == number + 1


@pytest.mark.parametrize("lengths", ["content-length: 5", "content-length: 5\r\ncontent-length: 6"])
async def test_f89_a_length_that_cannot_be(rig: Rig, lengths: str) -> None:
    reply = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{lengths}\r\n\r\n".encode() + completion("x")
    async with rig.first(replying(reply)) as first:
        for number in range(2):
            answer = await rig.chat(rig.alone())
            assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")
            assert len(first.peers) == number + 1


async def test_service_is_back_at_once_after_all_that(rig: Rig) -> None:
    async with rig.first(answer_well):
        assert is_good(await rig.chat(rig.model()))
        assert is_good(await rig.stream(rig.model()))
