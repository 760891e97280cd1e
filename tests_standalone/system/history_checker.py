"""What clients saw against what is kept: nothing seen complete is missing, double, out of its place or another's.

Every question and every answer carries a mark: `q/ann/17` is a question that one of ann's clients asks, `a/ann/17/9`
what the upstream's ninth call said to it. So it can be told of any text whose it is and what it follows. A question may
be asked again (an answer made anew), so it may lie in several conversations; an answer is given once.

`check` returns the faults, in words. Nothing here waits or asks anybody.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MARK = re.compile(r"\b([qa])/([a-z]+)/(\d+)(?:/(\d+)\b)?")


@dataclass(kw_only=True)
class Said:
    """One turn as its client saw it. `before` is what the client takes for the history; None: it does not know."""

    user: str
    question: str
    began: float
    ended: float = 0.0
    status: int | None = None
    conversation: str | None = None
    answer: str = ""
    complete: bool = False
    before: tuple[str, ...] | None = None
    sure: bool = True
    """False: an answer that broke off, or a conversation that was deleted, lies behind it."""


@dataclass(kw_only=True)
class Read:
    """A conversation that was read while nobody else wrote into it. `answer` had been seen complete before."""

    user: str
    conversation: str
    status: int
    texts: Sequence[str]
    answer: str


@dataclass
class Log:
    """What all clients say. `deleted` and `titles`: by user and id, as the last acknowledged change left them."""

    said: list[Said] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)
    """Who was shown a mark of whom."""
    deleted: dict[tuple[str, str], bool] = field(default_factory=dict)
    titles: dict[tuple[str, str], str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Message:
    seq: int
    role: str
    text: str
    is_answer: bool = False
    """It was made by a call, not sent by a client."""
    tokens: int = 0


@dataclass(kw_only=True)
class Conversation:
    pk: str
    id: str
    user: str
    parent_pk: str | None = None
    parent_seq: int | None = None
    message_count: int = 0
    title: str | None = None
    deleted: bool = False
    tokens: int = 0
    messages: Sequence[Message] = ()
    """Its own ones, by seq."""


@dataclass
class Kept:
    """The end. `shown`: what each user's list names and what each conversation reads like. `used`: tokens of the usage
    rows by user and conversation. `prompts`: what the upstream was asked, by the number of the call."""

    conversations: Sequence[Conversation]
    used: dict[tuple[str, str], int]
    shown: dict[tuple[str, str], list[str]]
    listed: dict[str, list[str]]
    prompts: dict[int, list[str]]


def check(log: Log, kept: Kept) -> list[str]:
    history = _History(log, kept)
    checks = (history.order, history.answers, history.complete, history.refused, history.owners, history.reads)
    return [fault for one in (*checks, history.shown, history.totals, history.managed) for fault in one()]


def marks(text: str) -> list[tuple[str, str, int, int | None]]:
    """Kind, user, question and call of each mark in a text."""
    return [(kind, user, int(asked), int(call) if call else None) for kind, user, asked, call in MARK.findall(text)]


def agrees(seen: str, stored: str, *, sure: bool) -> bool:
    """A client that left has seen a beginning."""
    return seen.strip() == stored.strip() or (not sure and stored.startswith(seen.strip()))


class _History:
    def __init__(self, log: Log, kept: Kept) -> None:
        self.log, self.kept = log, kept
        self.by_pk = {one.pk: one for one in kept.conversations}
        self.paths: dict[str, list[Message]] = {}
        self.given: dict[int, list[tuple[Conversation, Message]]] = defaultdict(list)
        self.asked: set[tuple[str, int]] = set()
        self.tried = Counter(marks(said.question)[0][1:3] for said in log.said)
        for one in kept.conversations:
            for message in one.messages:
                for kind, user, asked, call in marks(message.text):
                    if kind == "a" and call is not None and message.is_answer:
                        self.given[call].append((one, message))
                    elif kind == "q":
                        self.asked.add((user, asked))

    def path(self, one: Conversation) -> list[Message]:
        """From the first message on, through the parents."""
        if one.pk not in self.paths:
            parent = self.by_pk.get(one.parent_pk or "")
            shared = (
                [message for message in self.path(parent) if message.seq <= (one.parent_seq or 0)] if parent else []
            )
            self.paths[one.pk] = [*shared, *one.messages]
        return self.paths[one.pk]

    def before(self, one: Conversation, message: Message) -> list[str]:
        return [other.text for other in self.path(one) if other.seq < message.seq]

    def order(self) -> Iterator[str]:
        """No gap and no double in `seq`, parents included; a parent is there."""
        for one in self.kept.conversations:
            if one.parent_pk is not None and one.parent_pk not in self.by_pk:
                yield f"gap: {one.id} has lost its parent"
            seqs = [message.seq for message in self.path(one)]
            if seqs != list(range(1, len(seqs) + 1)):
                yield f"gap: {one.id} counts {seqs}"
            if one.message_count != len(seqs):
                yield f"gap: {one.id} has {len(seqs)} messages and says {one.message_count}"

    def answers(self) -> Iterator[str]:
        """Each answer lies there once, directly after its question, and after what the upstream was asked. Calls that a
        header groups are kept as they come: what the upstream was asked is not all that lies before the answer, and a
        question that is asked again is not stored again."""
        for call, places in self.given.items():
            if len(places) > 1:
                yield f"double: the answer of call {call} lies in {[one.id for one, _ in places]}"
            for one, message in places:
                before, grouped = self.before(one, message), one.id.startswith("group")
                _, user, asked, _ = marks(message.text)[0]
                where = before if grouped and self.tried[user, asked] > 1 else before[-1:]
                if (user, asked) not in _questions(where):
                    yield f"interleaved: in {one.id}, {message.text!r} follows {before[-1:]}"
                prompt = self.kept.prompts.get(call)
                if prompt is None:
                    yield f"invented: nobody was asked for {message.text!r}"
                elif not grouped and not _alike(prompt, before):
                    yield f"interleaved: in {one.id}, {message.text!r} was said to {prompt} and follows {before}"

    def complete(self) -> Iterator[str]:
        """What a client saw complete is there, word for word, where it was told, after what it had said before."""
        last: dict[tuple[str, str], list[tuple[Said, int]]] = defaultdict(list)
        for said in self.log.said:
            if not said.complete:
                continue
            call = next((call for kind, _, _, call in marks(said.answer) if kind == "a"), None)
            places = self.given.get(call or 0, [])
            if not places:
                yield f"missing: {said.user} saw {said.answer!r}"
            for one, message in places:
                if message.text != said.answer:
                    yield f"changed: {said.user} saw {said.answer!r}, kept is {message.text!r}"
                if (one.user, one.id) != (said.user, said.conversation):
                    yield f"misplaced: {said.answer!r} is in {one.user}'s {one.id}, told was {said.conversation}"
                before = self.before(one, message)
                if said.before is not None and not _alike((*said.before, said.question), before, sure=said.sure):
                    yield f"interleaved: {said.answer!r} follows {before}, its client had said {said.before}"
                if said.sure and said.before is not None and self._copies(one, message):
                    yield f"double: {one.id} holds answers again that are in another conversation"
                last[one.pk, said.user].append((said, message.seq))
        for turns in last.values():
            for (early, first), (late, second) in pairwise(sorted(turns, key=lambda turn: turn[1])):
                if late.ended < early.began:
                    yield f"order: {late.answer!r} ended before {early.answer!r} began: {second} and {first}"

    def _copies(self, one: Conversation, answer: Message) -> bool:
        """Did this turn bring answers along, as if nobody knew them?"""
        turn: list[Message] = []
        for message in one.messages:
            if message is answer:
                return any(each.role == "assistant" for each in turn)
            turn = [] if message.is_answer else [*turn, message]
        return False

    def refused(self) -> Iterator[str]:
        """Who was told to come again has left nothing and has cost nothing."""
        prompted = {(user, asked) for texts in self.kept.prompts.values() for _, user, asked, _ in marks(texts[-1])}
        for said in self.log.said:
            number = (said.user, marks(said.question)[0][2])
            if said.status is not None and 400 <= said.status < 500 and self.tried[number] == 1:
                if number in self.asked:
                    yield f"leftover: {said.question!r} was refused with {said.status} and lies there"
                if number in prompted:
                    yield f"leftover: {said.question!r} was refused with {said.status} and was sent on"

    def owners(self) -> Iterator[str]:
        for one in self.kept.conversations:
            if strangers := {user for message in one.messages for _, user, _, _ in marks(message.text)} - {one.user}:
                yield f"foreign: {one.user}'s {one.id} holds words of {strangers}"
        for call, texts in self.kept.prompts.items():
            if len({user for text in texts for _, user, _, _ in marks(text)}) > 1:
                yield f"foreign: call {call} asked {texts}"
        for said in self.log.said:
            if strangers := {user for _, user, _, _ in marks(said.answer)} - {said.user}:
                yield f"foreign: {said.user} was answered with words of {strangers}"
        for user, owner in sorted(self.log.seen):
            if user != owner:
                yield f"foreign: {user} was shown words of {owner}"

    def reads(self) -> Iterator[str]:
        """What was seen complete can be read at once, from whichever worker."""
        for read in self.log.reads:
            if read.status != 200 or read.answer not in read.texts:
                yield f"missing: {read.user} reads {read.conversation} ({read.status}) without {read.answer!r}"

    def shown(self) -> Iterator[str]:
        """The API says the same as the tables."""
        living: dict[str, list[str]] = defaultdict(list)
        for one in self.kept.conversations:
            if one.deleted:
                continue
            living[one.user].append(one.id)
            shown = self.kept.shown.get((one.user, one.id))
            if shown is not None and list(shown) != [message.text for message in self.path(one)]:
                yield f"shown: {one.user}'s {one.id} reads {shown}"
        for user, ids in self.kept.listed.items():
            if sorted(ids) != sorted(living[user]):
                yield f"shown: the list of {user} differs by {set(ids) ^ set(living[user])}, of {len(ids)}"

    def totals(self) -> Iterator[str]:
        """Of each answer its words (the upstream counts them), of each conversation what its calls used."""
        counted: Counter[tuple[str, str]] = Counter()
        for one in self.kept.conversations:
            counted[one.user, one.id] += one.tokens
        for place in counted.keys() | self.kept.used.keys():
            if counted[place] != self.kept.used.get(place, 0):
                yield f"totals: {place} counts {counted[place]} tokens, its calls {self.kept.used.get(place, 0)}"
        whole = {said.answer for said in self.log.said if said.complete}
        for places in self.given.values():
            for one, message in places:
                if message.text in whole and message.tokens != len(message.text.split()):
                    yield f"totals: {message.text!r} in {one.id} counts {message.tokens}"

    def managed(self) -> Iterator[str]:
        living = {(one.user, one.id): one for one in self.kept.conversations if not one.deleted}
        known = {(one.user, one.id) for one in self.kept.conversations}
        for place, deleted in self.log.deleted.items():
            if deleted and place in living and place[1].startswith("conv_"):
                yield f"managed: {place} was deleted and is there"
            elif not deleted and place in known and place not in living:
                yield f"managed: {place} was undeleted and is not there"
        for place, title in self.log.titles.items():
            if place in living and living[place].title != title:
                yield f"managed: {place} was named {title!r} and is called {living[place].title!r}"


def _questions(texts: Sequence[str]) -> list[tuple[str, int]]:
    return [(user, asked) for text in texts for kind, user, asked, _ in marks(text) if kind == "q"]


def _alike(seen: Sequence[str], stored: Sequence[str], *, sure: bool = False) -> bool:
    return len(seen) == len(stored) and all(agrees(a, b, sure=sure) for a, b in zip(seen, stored, strict=True))
