"""What the clients' checks start from. They run in the client's environment: nothing of the gateway can be imported."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Gateway:
    base_url: str
    api_key: str
    database: str
    upstream_url: str

    def upstream_requests(self) -> list[dict[str, Any]]:
        """The chat requests that the scripted upstream has had since the test began."""
        records = json.loads(self._call("GET", "/__tally"))["requests"]
        return [json.loads(base64.b64decode(record["body"])) for record in records]

    def conversations(self) -> list[list[tuple[str, str]]]:
        """What is stored of each conversation: role and content of its messages."""
        with closing(sqlite3.connect(self.database, timeout=10)) as connection:
            ids = [row[0] for row in connection.execute("SELECT id FROM conversations_view ORDER BY number")]
            ask = "SELECT role, content FROM messages_view WHERE conversation_id = ? ORDER BY seq"
            return [list(connection.execute(ask, [each])) for each in ids]

    def reset(self) -> None:
        self._call("POST", "/__reset")

    def _call(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(self.upstream_url + path, method=method)
        with urllib.request.urlopen(request, timeout=30) as reply:
            read: bytes = reply.read()
            return read


@pytest.fixture
def gateway() -> Gateway:
    names = ("GATEWAY_BASE_URL", "GATEWAY_API_KEY", "GATEWAY_DATABASE", "UPSTREAM_URL")
    found = Gateway(*(os.environ[name] for name in names))
    found.reset()
    return found
