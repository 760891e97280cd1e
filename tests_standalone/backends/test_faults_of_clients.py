"""A client that goes must not take others along: their bytes leave in one turn of the loop with its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct

from tests_standalone.backends.faulty import DONE, END, SSE, Rig, delta, event, finish, framed
from tests_standalone.backends.raw_upstream import Peer
from tests_standalone.system.http import chat, request_bytes

STREAMS = 20


async def test_a_reset_in_the_turn_in_which_all_streams_have_news_silences_nobody(rig: Rig) -> None:
    peers: list[Peer] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(SSE + b"".join(framed(event(delta(text))) for text in ("", "one")))
        peers.append(peer)
        await peer.gone()

    def send(data: bytes) -> None:
        for peer in peers:
            peer.send(data)

    async with rig.first(script):
        clients = [await asyncio.open_connection("127.0.0.1", rig.gateway.port) for _ in range(STREAMS)]
        for _, writer in clients:
            body = chat(rig.alone(), stream=True)
            writer.write(request_bytes("POST", "/v1/chat/completions", {"connection": None}, body))
        for reader, _ in clients:
            await reader.readuntil(b'"one"')
        for number in range(3):  # until each takes the shortest way
            send(framed(event(delta(f"round {number}"))))
            for reader, _ in clients:
                await reader.readuntil(b'"round %d"' % number)
        os.kill(rig.gateway.pid, signal.SIGSTOP)
        await asyncio.sleep(0.2)
        _reset(clients[0][1])
        await asyncio.sleep(0.1)
        send(framed(event(delta("three"))))
        await asyncio.sleep(0.1)
        os.kill(rig.gateway.pid, signal.SIGCONT)
        for reader, _ in clients[1:]:
            await reader.readuntil(b'"three"')
        send(framed(event(delta("four"))))
        for reader, _ in clients[1:]:
            await reader.readuntil(b'"four"')
        send(framed(finish() + DONE) + END)
        for reader, writer in clients[1:]:
            await reader.readuntil(END)
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
