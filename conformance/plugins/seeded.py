"""A plugin for openai-python's tests of stored completions: the ids that they name are there before each case.

They are written into the gateway's database: over HTTP nobody chooses an id. `after` is what lists are told to begin
after: a completion in the one, a message in the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3

import pytest

USER = "default"  # the one that a gateway without keys serves
IDS = ("completion_id", "after")


@pytest.fixture(autouse=True)
def seeded() -> None:
    with contextlib.closing(sqlite3.connect(os.environ["GATEWAY_DATABASE"], timeout=30)) as database:
        for number, completion_id in enumerate(IDS):
            database.execute(
                """INSERT INTO stored_completions (pk, id, user_id, created_at, model, metadata, completion, messages)
                VALUES (?, ?, ?, 0, 'model', '{}', ?, ?) ON CONFLICT DO NOTHING""",
                (f"s_{number}", completion_id, USER, _completion(completion_id), _messages()),
            )
        database.commit()


def _completion(completion_id: str) -> str:
    message = {"role": "assistant", "content": "Hello", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    name = {"id": completion_id, "object": "chat.completion", "created": 0, "model": "model"}
    return json.dumps({**name, "choices": [choice]})


def _messages() -> str:
    rows = (
        {"id": place, "role": "assistant", "content": "Hello", "content_parts": None} for place in ("after", "last")
    )
    return json.dumps([*rows])
