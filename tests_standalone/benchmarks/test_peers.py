"""Gateways of others as contestants. None of them is installed here: a small program stands for them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.installs import NotInstalled
from benchmarks.peers import Peer, Place

PROGRAM = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.headers["x-upstream"] == sys.argv[2] else 500)
        self.end_headers()
        self.wfile.write(b"{}")

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def peer(folder: Path, program: str = PROGRAM) -> Peer:
    return Peer(
        "any",
        "any peer",
        "1.0",
        lambda: folder,
        lambda place: [sys.executable, "-c", program, str(place.port), str(place.upstream)],
        headers=lambda place: {"x-upstream": str(place.upstream)},
    )


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_peer_answers_can_be_started_again_and_is_gone_at_the_end(tmp_path: Path) -> None:
    with peer(tmp_path).running(1234) as running:
        first = running.processes["self"][0]
        assert running.headers == {"x-upstream": "1234"}
        assert running.start is not None
        assert running.start() > 0
        second = running.processes["self"][0]

        assert not is_there(first)
        assert is_there(second)
    assert not is_there(second)


def test_a_peer_that_ends_is_a_failure_and_its_last_words_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="ended, or gave no answer"), peer(tmp_path, "exit('why')").running(1234):
        pass

    assert "why" in capsys.readouterr().err


def test_a_peer_that_cannot_be_installed_is_missing(tmp_path: Path) -> None:
    def install() -> Path:
        raise NotInstalled("any is not installed: its installation failed")

    missing = Peer("any", "any peer", "1.0", install, lambda place: [])

    assert missing.missing() == "any is not installed: its installation failed"
    assert peer(tmp_path).missing() is None


def test_every_peer_is_told_where_the_upstream_is(tmp_path: Path) -> None:
    place = Place(Path("/installed"), tmp_path, 8001, 9001)
    told = {}
    for one in peers.peers():
        assert isinstance(one, Peer)
        one.prepare(place)
        files = "".join(file.read_text() for file in tmp_path.iterdir())
        told[one.name] = " ".join([*one.command(place), *one.headers(place).values(), files])
        assert "8001" in " ".join(one.command(place))

    assert all("http://127.0.0.1:9001" in text for text in told.values())
