"""One request and its answer on a real connection: which writes it takes, how it is framed, who hears of its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest
from uvicorn.server import ServerState

from gateway.server_cycle import GatewayCycle
from gateway.server_protocol import GatewayProtocol
from gateway.serving import server_config

App = Callable[[Any, Any, Any], Awaitable[None]]

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
START = {"type": "http.response.start", "status": 200, "headers": []}


class Recorder:
    """A transport that remembers what was written to it."""

    def __init__(self, transport: asyncio.Transport, writes: list[bytes]) -> None:
        self._transport = transport
        self._writes = writes

    def write(self, data: bytes) -> None:
        self._writes.append(data)
        self._transport.write(data)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        pieces = list(pieces)
        self._writes += pieces
        self._transport.writelines(pieces)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection:
    """A client's, to a server of its own. `writes` is what the server wrote, write by write."""

    def __init__(self, port: int, writes: list[bytes]) -> None:
        self.writes = writes
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setblocking(False)
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def read_until(self, end: bytes) -> bytes:
        got = b""
        while not got.endswith(end):
            piece = await self._loop.sock_recv(self.sock, 65536)
            assert piece, f"ended before {end!r}: {got!r}"
            got += piece
        return got

    async def read_all(self) -> bytes:
        got = b""
        while piece := await self._loop.sock_recv(self.sock, 65536):
            got += piece
        return got

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@contextlib.asynccontextmanager
async def connected(app: App) -> AsyncIterator[Connection]:
    writes: list[bytes] = []

    class Protocol(GatewayProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(Recorder(transport, writes))  # type: ignore[arg-type]  # it acts like one

    config = server_config(app)  # type: ignore[arg-type]  # ours takes any scope
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Protocol(config, state, {}), "127.0.0.1", 0)
    client = Connection(server.sockets[0].getsockname()[1], writes)
    try:
        yield client
    finally:
        client.sock.close()
        server.close()
        for open_ in list(state.connections):
            open_.transport.abort()  # type: ignore[union-attr]  # none of them is a websocket
        await asyncio.gather(*state.tasks)


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def says(*messages: dict[str, Any]) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


LENGTH_5 = (b"content-length", b"5")


class TestWrites:
    async def test_an_answer_is_one_write(self) -> None:
        async with connected(says(start(LENGTH_5), body(b"hello"))) as client:
            await client.send(GET)
            await client.read_until(b"hello")
            assert client.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"]

    async def test_what_is_sent_together_is_one_write(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(start())
            await send(body(b"a" * 16, more=True))
            await send(body(b"b", more=True))
            await asyncio.sleep(0.01)
            await send(body(b"c"))

        async with connected(app) as client:
            await client.send(GET)
            await client.read_until(b"0\r\n\r\n")
            head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
            assert client.writes == [
                head + b"10\r\naaaaaaaaaaaaaaaa\r\n1\r\nb\r\n",
                b"1\r\nc\r\n0\r\n\r\n",
            ]

    async def test_a_piece_that_is_empty_is_nothing(self) -> None:
        async with connected(says(start(), body(b"a", more=True), body(b"", more=True), body(b""))) as client:
            await client.send(GET)
            assert (await client.read_until(b"0\r\n\r\n")).endswith(b"\r\n\r\n1\r\na\r\n0\r\n\r\n")

    async def test_pieces_passed_on_keep_their_place_between_those_that_are_sent(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            pass_on = scope["extensions"]["gateway.way_out"].pass_on
            await send(start())
            await send(body(b"1", more=True))
            assert pass_on(b"2")
            assert pass_on(b"3")
            await send(body(b"4", more=True))
            await asyncio.sleep(0.01)
            assert pass_on(b"5")
            await send(body(b"6"))

        async with connected(app) as client:
            await client.send(GET)
            got = (await client.read_until(b"0\r\n\r\n")).partition(b"\r\n\r\n")[2]
            assert got == b"".join(b"1\r\n%d\r\n" % number for number in range(1, 7)) + b"0\r\n\r\n"
            assert len(client.writes) == 2

    async def test_who_passes_on_is_told_when_the_client_reads_nothing(self) -> None:
        passed, told = 0, asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal passed
            await send(start())
            while scope["extensions"]["gateway.way_out"].pass_on(b"x" * 65536):
                passed += 65536
                await asyncio.sleep(0)
            told.set()
            await send(body(b"end", more=False))

        async with connected(app) as client:
            await client.send(GET)
            await told.wait()
            got = await client.read_until(b"3\r\nend\r\n0\r\n\r\n")
            assert len(got) > passed > 65536

    async def test_a_filler_asks_a_client_that_ended_its_sending_side_whether_it_listens(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(start())
            await send(body(b"1", more=True))
            scope["extensions"]["gateway.way_out"].filler = b":"
            await half_closed.wait()
            await asyncio.sleep(0.05)
            await send(body(b"2"))

        half_closed = asyncio.Event()
        async with connected(app) as client:
            await client.send(GET)
            await client.read_until(b"1\r\n1\r\n")
            client.sock.shutdown(socket.SHUT_WR)
            half_closed.set()
            assert await client.read_until(b"0\r\n\r\n") == b"1\r\n:\r\n1\r\n2\r\n0\r\n\r\n"

    async def test_nothing_is_passed_on_outside_of_an_answer(self) -> None:
        raised: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            pass_on = scope["extensions"]["gateway.way_out"].pass_on
            for _ in range(2):
                try:
                    pass_on(b"x")
                except RuntimeError as failure:
                    raised.append(str(failure))
                if len(raised) == 1:
                    await send(start(LENGTH_5))
                    await send(body(b"hello"))

        async with connected(app) as client:
            await client.send(GET)
            assert (await client.read_until(b"hello")).count(b"x") == 0
        assert raised == ["A piece of a body was passed on before or after its answer."] * 2

    async def test_a_head_does_not_wait_for_a_body_that_is_late(self) -> None:
        go_on = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(start(LENGTH_5))
            await go_on.wait()
            await send(body(b"hello"))

        async with connected(app) as client:
            await client.send(GET)
            await client.read_until(b"\r\n\r\n")
            go_on.set()
            assert await client.read_until(b"hello") == b"hello"

    async def test_a_long_body_is_not_copied_behind_its_head(self) -> None:
        long = b"x" * 1_000_000
        async with connected(says(start((b"content-length", b"1000000")), body(long))) as client:
            await client.send(GET)
            await client.read_until(long[:100])
            assert client.writes[1] is long

    async def test_a_head_without_its_body_leaves_before_the_connection_ends(self) -> None:
        async with connected(says(start(LENGTH_5))) as client:
            await client.send(GET)
            assert await client.read_all() == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"

    async def test_pipelined_answers_come_in_order(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(start(LENGTH_5))
            await asyncio.sleep(0)
            await send(body(scope["query_string"]))

        async with connected(app) as client:
            await client.send(GET.replace(b"/ ", b"/?first ") + GET.replace(b"/ ", b"/?later "))
            got = await client.read_until(b"later")
            assert got.count(b"HTTP/1.1 200 OK") == 2
            assert got.index(b"first") < got.index(b"later")


class TestFraming:
    @pytest.mark.parametrize(
        ("request_", "messages", "answer"),
        [
            (GET, [start(status=204), body(b"")], b"HTTP/1.1 204 No Content\r\n\r\n"),
            (GET, [start(status=304), body(b"")], b"HTTP/1.1 304 Not Modified\r\n\r\n"),
            (GET.replace(b"GET", b"HEAD"), [start(), body(b"hello")], b"HTTP/1.1 200 OK\r\n\r\n"),
            (
                GET.replace(b"GET", b"HEAD"),
                [start(LENGTH_5), body(b"")],
                b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
            ),
            (
                GET,
                [start((b"Transfer-Encoding", b"chunked")), body(b"a")],
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            ),
        ],
    )
    async def test_a_body_is_framed_as_its_answer_needs(
        self, request_: bytes, messages: list[dict[str, Any]], answer: bytes
    ) -> None:
        async with connected(says(*messages)) as client:
            await client.send(request_)
            assert await client.read_until(answer[-4:]) == answer

    @pytest.mark.parametrize("value", [b"close", b"Close", b"x, CLOSE ,y"])
    async def test_an_application_may_end_the_connection(self, value: bytes) -> None:
        async with connected(says(start(LENGTH_5, (b"Connection", value)), body(b"hello"))) as client:
            await client.send(GET)
            answer = await client.read_all()
            assert answer.count(b"connection:") == 1
            assert answer.endswith(b"hello")

    async def test_http_1_0_has_no_chunks_and_ends_with_the_connection(self) -> None:
        async with connected(says(start(), body(b"a", more=True), body(b"b"))) as client:
            await client.send(b"GET / HTTP/1.0\r\n\r\n")
            assert await client.read_all() == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nab"

    @pytest.mark.parametrize(
        ("messages", "sent"),
        [
            ([body(b"too soon")], b"HTTP/1.1 500 "),
            ([start(), start()], b"HTTP/1.1 200 "),
            ([start(LENGTH_5), body(b"longer")], b"HTTP/1.1 200 "),
            ([start(LENGTH_5), body(b"less")], b"HTTP/1.1 200 "),
            ([start((b"x", b"a\r\ny: b"))], b""),
            ([start((b"x", b"a\r\n\r\nb"))], b""),
            ([start((b"x", b"a\n"))], b""),
            ([start((b"x\r\ny", b"a"))], b""),
            ([start((b"x", b"a\0"))], b""),
            ([start((b"x y", b"a"))], b""),
            ([start((b"x:", b"a"))], b""),
            ([start((b"", b"a"))], b""),
            ([start((b"x", b"a\n"), (b"x", b"b"))], b""),
        ],
    )
    async def test_an_application_that_breaks_the_rules_fails(
        self, messages: list[dict[str, Any]], sent: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with connected(says(*messages)) as client:
            await client.send(GET)
            answer = await client.read_all()
        assert answer[: len(b"HTTP/1.1 200 ")] == sent
        assert "RuntimeError" in caplog.text

    @pytest.mark.parametrize("value", [b"1\r\nx-b: 2", b"1\n", b"1\r", b"\x7f"])
    async def test_a_name_that_was_sound_before_makes_no_value_sound(self, value: bytes) -> None:
        sound = (b"x-a", b"\t1 \xe9")
        async with connected(says(start(LENGTH_5, sound), body(b"hello"))) as client:
            await client.send(GET)
            assert b"\r\nx-a: \t1 \xe9\r\n" in await client.read_until(b"hello")
        async with connected(says(start(LENGTH_5, (b"x-a", value)), body(b"hello"))) as client:
            await client.send(GET)
            assert await client.read_all() == b""

    async def test_the_last_of_several_counts_and_all_are_sent(self) -> None:
        told = [(b"x-%s", b"%b"), (b"content-length", b"4"), (b"x-%s", b"2"), (b"content-length", b"5")]
        async with connected(says(start(*told), body(b"hello"))) as client:
            for _ in range(2):
                await client.send(GET)
                assert await client.read_until(b"hello") == (
                    b"HTTP/1.1 200 OK\r\nx-%s: %b\r\ncontent-length: 4\r\nx-%s: 2\r\ncontent-length: 5\r\n\r\nhello"
                )

    async def test_names_are_sent_in_lower_case_each_time(self) -> None:
        async with connected(says(start((b"Content-Length", b"5"), (b"X-Twice", b"A")), body(b"hello"))) as client:
            for _ in range(2):
                await client.send(GET)
                assert await client.read_until(b"hello") == (
                    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-twice: A\r\n\r\nhello"
                )

    @pytest.mark.parametrize("size", [1, 1023, 1024, 70_000])
    async def test_a_chunk_says_its_size(self, size: int) -> None:
        async with connected(says(start(), body(b"a" * size))) as client:
            await client.send(GET)
            answer = await client.read_until(b"0\r\n\r\n")
        assert answer.partition(b"\r\n\r\n")[2] == b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"a" * size)

    async def test_nothing_may_follow_the_end(self, caplog: pytest.LogCaptureFixture) -> None:
        async with connected(says(start(LENGTH_5), body(b"hello"), body(b"more"))) as client:
            await client.send(GET)
            assert (await client.read_until(b"hello")).endswith(b"\r\n\r\nhello")
            await asyncio.sleep(0)
        assert "after the end" in caplog.text


class TestBody:
    async def test_pieces_that_wait_come_as_one(self) -> None:
        got = []
        first = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await first.wait()
            more = True
            while more:
                message = await receive()
                got.append(message["body"])
                more = message["more_body"]
            await send(start(LENGTH_5))
            await send(body(b"hello"))

        async with connected(app) as client:
            await client.send(
                b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n"
            )
            await asyncio.sleep(0.01)
            first.set()
            await asyncio.sleep(0.01)
            await client.send(b"1\r\nd\r\n0\r\n\r\n")
            await client.read_until(b"hello")
        assert b"".join(got) == b"abcd"
        assert got[0] == b"abc"

    @pytest.mark.parametrize(
        ("request_", "whole"),
        [
            (b"Content-Length: 5\r\n\r\nhello", b"hello"),
            (b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", b"hello"),
            (b"\r\n", b""),
            (b"Content-Length: 5\r\n\r\nhell", None),
            (b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello", None),
        ],
    )
    async def test_what_is_all_there_needs_no_waiting(self, request_: bytes, whole: bytes | None) -> None:
        got: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            got.append(receive.whole_body())
            message = await receive()
            got.append((message["type"], message.get("body"), message.get("more_body")))

        async with connected(app) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: here\r\n" + request_)
            await asyncio.sleep(0.01)
            client.reset()
            while len(got) < 2:
                await asyncio.sleep(0)
        assert got[0] == whole
        assert (got[1] == ("http.disconnect", None, None)) == (whole is not None)
        if whole is None:
            assert got[1][0] == "http.request"

    async def test_a_body_that_was_too_much_to_read_on_is_read_on_behind(self) -> None:
        much = b"a" * 200_000
        got: list[bytes] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            while (whole := receive.whole_body()) is None:
                await asyncio.sleep(0)
                receive.when_gone(lambda: None)  # reads on
            got.append(whole)
            await send(start(LENGTH_5))
            await send(body(b"hello"))

        async with connected(app) as client:
            for _ in range(2):
                await client.send(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 200000\r\n\r\n" + much)
                await client.read_until(b"hello")
        assert got == [much, much]

    async def test_all_who_wait_hear_of_the_end(self) -> None:
        heard: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            heard.extend(message["type"] for message in await asyncio.gather(receive(), receive()))

        async with connected(app) as client:
            await client.send(GET)
            await asyncio.sleep(0.01)
            client.reset()
            while len(heard) < 2:
                await asyncio.sleep(0.01)
        assert heard == ["http.disconnect"] * 2


POSTS = [
    b"POST /a%%20b?c=d HTTP/1.1\r\nHost: here\r\nX-Way: %s\r\nContent-Length: %d\r\n\r\n%s" % (way, len(told), told)
    for way, told in [(b"one", b"a"), (b"one", b"bb"), (b"one", b""), (b"two", b"ccc"), (b"one", b"d" * 100_000)]
    for _ in range(2)
]
AND_GET = [*POSTS, GET, *POSTS]


class TestWhole:
    """An answer in one piece leaves as the two messages of it do."""

    @pytest.mark.parametrize("method", [b"GET", b"HEAD"])
    @pytest.mark.parametrize("version", [b"1.0", b"1.1"])
    @pytest.mark.parametrize(
        ("headers", "content"),
        [
            ([LENGTH_5], b"hello"),
            ([], b"hello"),
            ([], b""),
            ([(b"Content-Length", b"0"), (b"X", b"y")], b""),
            ([LENGTH_5, (b"connection", b"close")], b"hello"),
            ([(b"content-length", b"100000")], b"a" * 100_000),
            ([], b"a" * 100_000),
            ([LENGTH_5], b"four"),
            ([(b"x", b"a\nb")], b"hello"),
        ],
    )
    async def test_it_is_the_same(
        self, method: bytes, version: bytes, headers: list[tuple[bytes, bytes]], content: bytes
    ) -> None:
        async def whole(scope: Any, receive: Any, send: Any) -> None:
            await scope["extensions"]["gateway.way_out"].whole(200, headers, content)

        answers = []
        for app in (says(start(*headers), body(content)), whole):
            async with connected(app) as client:
                await client.send(b"%s / HTTP/%s\r\nHost: here\r\n\r\n" % (method, version))
                client.sock.shutdown(socket.SHUT_WR)
                answers.append(await client.read_all())
        assert answers[0] == answers[1]

    @pytest.mark.parametrize("method", [b"GET", b"HEAD"])
    @pytest.mark.parametrize("version", [b"1.0", b"1.1"])
    @pytest.mark.parametrize("size", [0, 5, 100_000])
    async def test_so_is_the_beginning_of_one(self, method: bytes, version: bytes, size: int) -> None:
        async def beginning(scope: Any, receive: Any, send: Any) -> None:
            await scope["extensions"]["gateway.way_out"].whole(200, [(b"x", b"y")], b"a" * size, True)
            await send(body(b"end"))

        answers = []
        for app in (says(start((b"x", b"y")), body(b"a" * size, more=True), body(b"end")), beginning):
            async with connected(app) as client:
                await client.send(b"%s / HTTP/%s\r\nHost: here\r\n\r\n" % (method, version))
                client.sock.shutdown(socket.SHUT_WR)
                answers.append(await client.read_all())
        assert answers[0] == answers[1]

    async def test_it_leaves_in_one_write(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await scope["extensions"]["gateway.way_out"].whole(200, [LENGTH_5], b"hello")

        async with connected(app) as client:
            await client.send(GET)
            await client.read_until(b"hello")
            assert client.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"]

    async def test_one_that_is_longer_than_it_says_does_not_leave(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await scope["extensions"]["gateway.way_out"].whole(200, [LENGTH_5], b"longer")

        async with connected(app) as client:
            await client.send(GET)
            assert await client.read_all() == b""

    async def test_there_is_no_second_one(self) -> None:
        raised = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await scope["extensions"]["gateway.way_out"].whole(200, [LENGTH_5], b"hello")
            with pytest.raises(RuntimeError, match="out of turn") as caught:
                await scope["extensions"]["gateway.way_out"].whole(200, [LENGTH_5], b"hello")
            raised.append(caught.value)

        async with connected(app) as client:
            await client.send(GET)
            await client.read_until(b"hello")
        assert len(raised) == 1


class TestSameHead:
    """A head that differs from one before in nothing but the length of the body is not parsed again."""

    async def seen(self, *writes: bytes) -> list[tuple[dict[str, Any], bytes, dict[str, Any]]]:
        """The scope, the body and the notes of each request, as the application has them."""
        found = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            out = scope["extensions"]["gateway.way_out"]
            shown = {name: value for name, value in scope.items() if name not in ("extensions", "client", "server")}
            scope["path"] = "/changed"
            scope["state"]["changed"] = True
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message["body"], message["more_body"]
            found.append((shown, body, out.notes))
            await out.whole(200, [LENGTH_5], b"hello")

        async with connected(app) as client:
            for data in writes:
                before = len(found)
                await client.send(data)
                while len(found) < before + data.count(b" HTTP/1.1"):
                    assert (await client.read_until(b"hello")).startswith(
                        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
                    )
        return found

    async def test_it_is_told_as_the_parser_tells_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = await self.seen(*AND_GET)
        monkeypatch.setattr(GatewayProtocol, "heads_to_remember", 0)
        parsed = await self.seen(*AND_GET)
        assert [told[:2] for told in known] == [told[:2] for told in parsed]
        assert len({id(notes) for *_, notes in known}) < len({id(notes) for *_, notes in parsed}) == len(AND_GET)

    async def test_pipelined_ones_too(self) -> None:
        known = await self.seen(POSTS[0], POSTS[0], POSTS[0] + POSTS[2] + POSTS[0], POSTS[2])
        assert [body for _, body, _ in known] == [b"a", b"a", b"a", b"bb", b"a", b"bb"]

    async def test_notes_are_those_of_the_head(self) -> None:
        *_, first, second, third, other = await self.seen(POSTS[0], POSTS[0], POSTS[2], POSTS[4], POSTS[6])
        assert first[2] is second[2] is third[2]
        assert other[2] is not first[2]

    async def test_a_connection_that_is_to_end_ends(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await scope["extensions"]["gateway.way_out"].whole(200, [LENGTH_5], b"hello")

        async with connected(app) as client:
            for _ in range(3):
                await client.send(POSTS[0])
                await client.read_until(b"hello")
            await client.send(POSTS[0].replace(b"X-Way: one", b"Connection: close"))
            assert b"connection: close" in await client.read_all()


class TestWhenGone:
    """Told when, and only when, `receive` would say `http.disconnect` before the answer is complete."""

    @pytest.mark.parametrize("size", [0, 1_000_000])
    @pytest.mark.parametrize("leave", ["reset", "close"])
    async def test_it_is_called_when_the_client_leaves(self, leave: str, size: int) -> None:
        """Whatever the size of the body before: while nobody wants more of it, the connection is not read."""
        waiting, gone = asyncio.Event(), asyncio.Event()
        said: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            while (await receive())["more_body"]:
                pass
            receive.when_gone(gone.set)
            waiting.set()
            await gone.wait()
            said.append((await receive())["type"])

        async with connected(app) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n%b" % (size, b"x" * size))
            await waiting.wait()
            client.reset() if leave == "reset" else client.sock.close()
            await gone.wait()
        assert said == ["http.disconnect"]

    async def test_it_is_called_if_the_client_has_left_before(self) -> None:
        calls: list[str] = []
        over = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            receive.when_gone(lambda: calls.append("gone"))
            assert calls == []  # not from within
            await asyncio.sleep(0)
            over.set()

        async with connected(app) as client:
            await client.send(GET)
            await asyncio.sleep(0.01)
            client.reset()
            await over.wait()
        assert calls == ["gone"]

    @pytest.mark.parametrize("revoked", [True, False])
    async def test_it_is_not_called_once_revoked_or_after_the_answer(self, revoked: bool) -> None:
        calls: list[str] = []
        ended = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            revoke = receive.when_gone(lambda: calls.append("gone"))
            if revoked:
                revoke()
            else:
                await send(start(LENGTH_5))
                await send(body(b"hello"))
            assert (await receive())["type"] == "http.disconnect"
            ended.set()

        async with connected(app) as client:
            await client.send(GET)
            await asyncio.sleep(0.01)
            client.reset()
            await ended.wait()
            await asyncio.sleep(0.01)
        assert calls == []

    async def test_it_is_not_called_for_a_client_that_ended_only_its_sending_side(self) -> None:
        calls: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            receive.when_gone(lambda: calls.append("gone"))
            await asyncio.sleep(0.05)
            await send(start(LENGTH_5))
            await send(body(b"hello"))

        async with connected(app) as client:
            await client.send(GET)
            client.sock.shutdown(socket.SHUT_WR)
            answer = await client.read_all()
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
        assert calls == []


async def test_a_request_leaves_nothing_for_the_collector_of_cycles() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        revoke = receive.when_gone(lambda: None)
        await send(start())
        await asyncio.sleep(0)
        await send(body(b"hello", more=True))
        await send(body(b""))
        revoke()

    async with connected(app) as client:
        gc.disable()
        try:
            for _ in range(3):
                gc.collect()  # what was there before, and the first request
                await client.send(GET)
                await client.read_until(b"0\r\n\r\n")
                await asyncio.sleep(0.01)
            gc.collect()
            for _ in range(20):
                await client.send(GET)
                await client.read_until(b"0\r\n\r\n")
                await asyncio.sleep(0)
            assert gc.collect() < 20
        finally:
            gc.enable()


@pytest.mark.parametrize("leave", ["reset", "close"])
async def test_a_connection_leaves_nothing_of_ours_for_it_either(leave: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gc.collect()
    gc.disable()
    try:
        async with connected(app) as client:
            await client.send(GET)
            await asyncio.sleep(0.01)
            client.reset() if leave == "reset" else client.sock.close()
            while any(task.get_coro().__qualname__ == "GatewayCycle.run_asgi" for task in asyncio.all_tasks()):  # type: ignore[union-attr]  # it has one
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            left = [
                type(found).__name__ for found in gc.get_objects() if isinstance(found, (GatewayProtocol, GatewayCycle))
            ]
    finally:
        gc.enable()
    assert left == []
