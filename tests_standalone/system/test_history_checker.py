"""The checker of histories finds what it shall find: a small history without a fault, then one kind of damage each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests_standalone.system.history_checker import Conversation, Kept, Log, Message, Read, Said, check

Damage = Callable[[Log, Kept], object]


def _told(number: int, before: Sequence[str], **more: Any) -> Said:
    """Call N answered question N, in the seconds that begin with N."""
    question, answer = f"q/ann/{number} what?", f"a/ann/{number}/{number} this"
    fields: dict[str, Any] = {"status": 200, "conversation": "conv_1", "answer": answer, "complete": True}
    fields |= {"began": float(number), "ended": number + 0.5, "before": tuple(before)}
    return Said(user="ann", question=question, **fields | more)


def _messages(first: int, *numbers: int) -> list[Message]:
    rows = [
        ("user", f"q/ann/{n} what?") if half == 0 else ("assistant", f"a/ann/{n}/{n} this")
        for n in numbers
        for half in (0, 1)
    ]
    return [
        Message(
            seq=first + place, role=role, text=text, is_answer=role == "assistant", tokens=2 * (role == "assistant")
        )
        for place, (role, text) in enumerate(rows)
    ]


def _sound() -> tuple[Log, Kept]:
    """Two turns, a branch after the first one, a question that broke off, one that was refused."""
    first, second, third = _told(1, []), _told(2, []), _told(3, [], conversation="conv_2")
    second.before = third.before = (first.question, first.answer)
    broken = Said(user="ann", question="q/ann/4 what?", began=4.0, ended=4.5, status=200, conversation="conv_2")
    refused = Said(user="ann", question="q/ann/5 what?", began=5.0, ended=5.5, status=409)
    read = Read(user="ann", conversation="conv_1", status=200, texts=[second.answer], answer=second.answer)
    log = Log([first, second, third, broken, refused], [read], {("ann", "ann")})
    log.titles["ann", "conv_1"] = "named"
    log.deleted["ann", "conv_3"] = True
    root = Conversation(pk="c1", id="conv_1", user="ann", message_count=4, title="named", tokens=40)
    root.messages = _messages(1, 1, 2)
    branch = Conversation(pk="c2", id="conv_2", user="ann", parent_pk="c1", parent_seq=2, message_count=5, tokens=30)
    branch.messages = [*_messages(3, 3), Message(seq=5, role="user", text="q/ann/4 what?")]
    gone = Conversation(pk="c3", id="conv_3", user="ann", deleted=True)
    before = [first.question, first.answer]
    prompts = {1: before[:1], 2: [*before, second.question], 3: [*before, third.question]}
    prompts[4] = [*before, third.question, third.answer, broken.question]
    shown = {("ann", one.id): [each.text for each in one.messages] for one in (root,)}
    used = {("ann", "conv_1"): 40, ("ann", "conv_2"): 30}
    return log, Kept([root, branch, gone], used, shown, {"ann": ["conv_1", "conv_2"]}, prompts)


def _of(kept: Kept, place: int) -> list[Message]:
    """The messages of a conversation, to be changed."""
    messages = kept.conversations[place].messages
    assert isinstance(messages, list)
    return messages


def _set(kept: Kept, conversation: int, place: int, **fields: Any) -> None:
    _of(kept, conversation)[place] = dataclasses.replace(_of(kept, conversation)[place], **fields)


def _swapped(log: Log, kept: Kept) -> None:
    texts = [_of(kept, 0)[place].text for place in (1, 3)]
    _set(kept, 0, 1, text=texts[1])
    _set(kept, 0, 3, text=texts[0])


def _twice(log: Log, kept: Kept) -> None:
    """The second turn is stored once more."""
    again = [dataclasses.replace(message, seq=message.seq + 2) for message in _of(kept, 0)[2:]]
    kept.conversations[0].messages = [*_of(kept, 0), *again]
    kept.conversations[0].message_count = 6


def _lost(log: Log, kept: Kept) -> None:
    kept.conversations[0].messages = _of(kept, 0)[:2]
    kept.conversations[0].message_count = 2


def _hole(log: Log, kept: Kept) -> None:
    for place in (2, 3):
        _set(kept, 0, place, seq=place + 2)


def _mixed(log: Log, kept: Kept) -> None:
    """The branch was written behind the tip of its parent instead."""
    root, branch = kept.conversations[:2]
    root.messages = [*_of(kept, 0), *(dataclasses.replace(one, seq=one.seq + 2) for one in _of(kept, 1)[:2])]
    root.message_count, branch.parent_seq = 6, 0
    branch.messages, branch.message_count = [], 0
    log.said[2].conversation = "conv_1"


def _between(log: Log, kept: Kept) -> None:
    """A question of another turn has come between a question and its answer."""
    asked, answer = _of(kept, 0)[2:]
    other = Message(seq=4, role="user", text="q/ann/4 what?")
    kept.conversations[0].messages = [*_of(kept, 0)[:2], asked, other, dataclasses.replace(answer, seq=5)]
    kept.conversations[0].message_count = 5


def _copied(log: Log, kept: Kept) -> None:
    """The third turn was not recognised, and all of it is new."""
    copies = [dataclasses.replace(message, is_answer=False) for message in _of(kept, 0)[:2]]
    kept.conversations[1].messages = [*copies, *_of(kept, 1)]
    kept.conversations[1].parent_pk = kept.conversations[1].parent_seq = None


DAMAGES: dict[str, tuple[str, Damage]] = {
    "answers have changed places": ("interleaved", _swapped),
    "a turn is stored twice": ("double", _twice),
    "a turn is lost": ("missing", _lost),
    "numbers are left out": ("gap", _hole),
    "a number is given twice": ("gap", lambda log, kept: _set(kept, 0, 3, seq=3)),
    "the count is wrong": ("gap", lambda log, kept: setattr(kept.conversations[0], "message_count", 5)),
    "a branch has lost its parent": ("gap", lambda log, kept: setattr(kept.conversations[1], "parent_pk", "c9")),
    "a branch begins too late": ("gap", lambda log, kept: setattr(kept.conversations[1], "parent_seq", 4)),
    "two ways of going on are mixed": ("interleaved", _mixed),
    "a question came between": ("interleaved", _between),
    "a known history is stored again": ("double", _copied),
    "a word is missing": ("changed", lambda log, kept: _set(kept, 0, 3, text="a/ann/2/2")),
    "an answer nobody was asked for": ("invented", lambda log, kept: kept.prompts.pop(2)),
    "an answer to another history": ("interleaved", lambda log, kept: kept.prompts.update({2: ["q/ann/2 what?"]})),
    "told under another name": ("misplaced", lambda log, kept: setattr(log.said[0], "conversation", "conv_2")),
    "turns out of time": ("order", lambda log, kept: setattr(log.said[0], "began", 9.0)),
    "a refused turn was stored": ("leftover", lambda log, kept: _set(kept, 1, 2, text="q/ann/5 what?")),
    "a refused turn was sent on": ("leftover", lambda log, kept: kept.prompts.update({5: ["q/ann/5 what?"]})),
    "words of another user are stored": ("foreign", lambda log, kept: _set(kept, 1, 2, text="q/bob/4 what?")),
    "words of another user are asked": ("foreign", lambda log, kept: kept.prompts[4].insert(0, "a/bob/8/8 x")),
    "words of another user are answered": ("foreign", lambda log, kept: setattr(log.said[3], "answer", "a/bob/8/8 x")),
    "words of another user are shown": ("foreign", lambda log, kept: log.seen.add(("ann", "bob"))),
    "a read came too early": ("missing", lambda log, kept: setattr(log.reads[0], "texts", [])),
    "a read found nothing": ("missing", lambda log, kept: setattr(log.reads[0], "status", 404)),
    "the API shows something else": ("shown", lambda log, kept: kept.shown.update({("ann", "conv_1"): ["x"]})),
    "the list leaves one out": ("shown", lambda log, kept: kept.listed.update({"ann": ["conv_1"]})),
    "the list names one twice": (
        "shown",
        lambda log, kept: kept.listed.update({"ann": ["conv_1", "conv_1", "conv_2"]}),
    ),
    "tokens are missing": ("totals", lambda log, kept: setattr(kept.conversations[0], "tokens", 39)),
    "a call is in no conversation's sum": ("totals", lambda log, kept: kept.used.update({("ann", "conv_4"): 1})),
    "an answer counts too much": ("totals", lambda log, kept: _set(kept, 0, 1, tokens=3)),
    "what was deleted is there": ("managed", lambda log, kept: setattr(kept.conversations[2], "deleted", False)),
    "what was undeleted is not": ("managed", lambda log, kept: log.deleted.update({("ann", "conv_3"): False})),
    "a title is an old one": ("managed", lambda log, kept: setattr(kept.conversations[0], "title", "older")),
}


def test_a_sound_history_has_no_faults() -> None:
    assert check(*_sound()) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str) -> None:
    kind, do = DAMAGES[damage]
    log, kept = _sound()
    do(log, kept)
    assert {fault.partition(":")[0] for fault in check(log, kept)} >= {kind}


def test_a_beginning_is_enough_only_where_a_client_has_left() -> None:
    log, kept = _sound()
    log.said[1].before = (log.said[0].question, "a/ann/1/1")
    kept.prompts[2] = [*log.said[1].before, log.said[1].question]
    assert {fault.partition(":")[0] for fault in check(log, kept)} == {"interleaved"}
    log.said[1].sure = False
    assert check(log, kept) == []
