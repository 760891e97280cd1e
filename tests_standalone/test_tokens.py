"""Counts by example: these messages in, this many tokens out. The judge is tiktoken, built as it builds itself."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import lzma
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gateway import tokens
from gateway.tokens import RANK_FILES, TokenCounter
from gateway.wire.chat import Usage
from tests_standalone.support.gateway import ROOT, clean_environment

DATA = ROOT / "gateway" / "data"
MODELS = {"cl100k_base": "gpt-4", "o200k_base": "gpt-4o"}
TEXT = "Grüße, 世界! 👩‍💻 don't"  # 20 characters: 5 tokens estimated; each encoding has another count


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


def raw_file(name: str) -> bytes:
    return lzma.decompress((DATA / f"{name}.tiktoken.xz").read_bytes())


@pytest.fixture(scope="module")
def pinned() -> dict[str, str]:
    """The digests that tiktoken asks for; filled by `encodings`."""
    return {}


@pytest.fixture(scope="module")
def encodings(pinned: dict[str, str]) -> Iterator[dict[str, tiktoken.Encoding]]:
    """tiktoken's own recipes, with our files where it would go to the network."""

    def load(url: str, expected_hash: str) -> dict[bytes, int]:
        name = url.rpartition("/")[2].removesuffix(".tiktoken")
        pinned[name] = expected_hash
        return {b64decode(token): int(rank) for token, rank in map(bytes.split, raw_file(name).splitlines())}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", load)
        yield {name: tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]()) for name in MODELS}


@pytest.fixture(scope="module")
def counter() -> Iterator[TokenCounter]:
    shared = TokenCounter()
    yield shared
    shared.close()


class TestTheFiles:
    @pytest.mark.usefixtures("encodings")
    def test_they_are_the_ones_that_tiktoken_pins(self, pinned: dict[str, str]) -> None:
        ours = {name: hashlib.sha256(raw_file(name)).hexdigest() for name in MODELS}
        assert ours == pinned == {name: known.sha256 for name, known in RANK_FILES.items()}

    def test_they_are_split_by_the_same_pattern(self, encodings: dict[str, tiktoken.Encoding]) -> None:
        assert {name: known.pattern for name, known in RANK_FILES.items()} == {
            name: encoding._pat_str for name, encoding in encodings.items()
        }

    def test_they_can_be_packed_anew(self, tmp_path: Path) -> None:
        raw = tmp_path / "any name"
        raw.write_bytes(raw_file("cl100k_base"))
        assert self._pack(raw, tmp_path).returncode == 0
        assert lzma.decompress((tmp_path / "cl100k_base.tiktoken.xz").read_bytes()) == raw.read_bytes()

    def test_what_is_no_rank_file_is_not_packed(self, tmp_path: Path) -> None:
        wrong = tmp_path / "cl100k_base.tiktoken"
        wrong.write_bytes(raw_file("cl100k_base")[:-1])
        done = self._pack(wrong, tmp_path)
        assert done.returncode == 1
        assert "none of cl100k_base, o200k_base" in done.stderr
        assert list(tmp_path.iterdir()) == [wrong]

    @staticmethod
    def _pack(file: Path, into: Path) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "scripts" / "fetch_rank_files.py")
        command = [sys.executable, script, str(file), "--into", str(into)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "cl100k", "o200k"),
        [
            ("", 0, 0),
            ("hello world", 2, 2),
            ("a" * 16, 2, 2),
            ("<|endoftext|>", 7, 7),
            ("\ud83d", 1, 1),
            ("\ud83d\udc4d", 3, 1),
            (TEXT, 17, 12),
        ],
    )
    async def test_known_counts(self, counter: TokenCounter, text: str, cl100k: int, o200k: int) -> None:
        assert await counter.text("gpt-4", [text]) == cl100k
        assert await counter.text("gpt-4o", [text]) == o200k

    async def test_texts_are_counted_one_by_one(self, counter: TokenCounter) -> None:
        assert await counter.text("gpt-4", ["hello world"]) == 2
        assert await counter.text("gpt-4", ["hello wo", "rld"]) == 4
        assert await counter.text("gpt-4", []) == 0

    @settings(deadline=None)
    @given(text=st.text(st.characters()), name=st.sampled_from(sorted(MODELS)))
    def test_any_text_has_tiktokens_own_count(
        self, counter: TokenCounter, encodings: dict[str, tiktoken.Encoding], text: str, name: str
    ) -> None:
        expected = len(encodings[name].encode_ordinary(text))
        assert asyncio.run(counter.text(MODELS[name], [text])) == expected

    @settings(deadline=None, max_examples=80)
    @given(
        words=st.lists(st.text(st.sampled_from("aZé1/'._\n漢́👩") | st.characters(), max_size=4), min_size=60),
        gaps=st.lists(st.integers(1, 4), min_size=1, max_size=7),
        name=st.sampled_from(sorted(MODELS)),
    )
    def test_slices_do_not_change_the_count(
        self,
        counter: TokenCounter,
        encodings: dict[str, tiktoken.Encoding],
        words: list[str],
        gaps: list[int],
        name: str,
    ) -> None:
        """Where a space follows something else now and then."""
        text = "".join(f"{word}x" + " " * gap for word, gap in zip(words, itertools.cycle(gaps), strict=False))
        expected = len(encodings[name].encode_ordinary(text))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokens, "SLICE", 64)
            assert asyncio.run(counter.text(MODELS[name], [text])) == expected


class TestChats:
    async def test_a_message_costs_four_a_name_one_more_and_the_answers_start_three(
        self, counter: TokenCounter
    ) -> None:
        hello = said("hello world")
        assert await counter.usage("gpt-4", [hello], []) == Usage(4 + 2 + 3, 0)
        assert await counter.usage("gpt-4", [hello, hello], []) == Usage(2 * (4 + 2) + 3, 0)
        assert await counter.usage("gpt-4", [hello | {"name": "hello"}], []) == Usage(4 + 2 + 1 + 1 + 3, 0)
        endless = hello | {"name": "hello" + " hello" * 9999}
        assert await counter.usage("gpt-4", [endless], []) == Usage(4 + 2 + 10_000 + 1 + 3, 0)

    async def test_all_answers_count_without_overhead(self, counter: TokenCounter) -> None:
        answer = {"role": "assistant", "content": "hello world"}
        assert await counter.usage("gpt-4", [said("")], [answer]) == Usage(7, 2)
        assert await counter.usage("gpt-4", [said("")], [answer, answer]) == Usage(7, 4)

    async def test_tool_definitions_count_as_json(self, counter: TokenCounter) -> None:
        tools = [{"type": "function", "function": {"name": "weather"}}]
        length = await counter.text("gpt-4", ['[{"type":"function","function":{"name":"weather"}}]'])
        assert length > 10
        assert await counter.usage("gpt-4", [said("")], [], tools=tools) == Usage(7 + length, 0)
        assert await counter.usage("gpt-4", [said("")], [], tools=[]) == Usage(7, 0)

    @pytest.mark.parametrize(
        ("message", "counted"),
        [
            (said(None), 0),
            ({}, 0),
            (said([{"type": "text", "text": "hello world"}, {"type": "text", "text": "hello"}]), 3),
            (said([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1000}}]), 0),
            (said([{"type": "input_audio", "input_audio": {"data": "A" * 1000}}]), 0),
            (said([{"type": "refusal", "refusal": "hello"}, "x", 7, None]), 1),
            (said("hello", reasoning_content="hello world"), 3),
            (said("hello", reasoning="hello world", refusal="hello"), 4),
            (said("hello", reasoning_content="hello", reasoning="hello"), 2),
            (said("hello", reasoning_content=None, refusal=7), 1),
            (said(None, tool_calls=[]), 0),
            (said(None, tool_calls="x"), 0),
            (said(None, tool_calls=[{"id": "call", "function": {"name": "hello", "arguments": "hello world"}}]), 3),
            (said(None, tool_calls=[{"type": "custom", "custom": {"name": "hello", "input": "hello"}}]), 2),
            (said(None, tool_calls=[{"function": {"name": None}}]), 0),
            (said(None, tool_calls=["hello"]), 3),
            (said(None, function_call={"name": "hello", "arguments": "hello"}), 2),
        ],
    )
    async def test_what_counts(self, counter: TokenCounter, message: dict[str, Any], counted: int) -> None:
        assert await counter.usage("gpt-4", [message], [message]) == Usage(4 + counted + 3, counted)

    @pytest.mark.parametrize("kind", ["short", "long", "many"])
    async def test_on_the_loop_and_in_the_thread_the_count_is_the_same(self, counter: TokenCounter, kind: str) -> None:
        times = {"short": 3, "long": 3000, "many": 1}[kind]
        messages = [said("hello world " * times)] * {"many": 2000}.get(kind, 1)
        expected = len(messages) * (4 + 2 * times + 1) + 3
        assert await counter.usage("gpt-4", messages, []) == Usage(expected, 0)

    _JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    )
    _FIELDS = st.sampled_from(["content", "name", "tool_calls", "function_call", "reasoning", "refusal"])

    @settings(deadline=None)
    @given(st.dictionaries(_FIELDS, _JSON), st.sampled_from(["llama3", "gpt-4"]))
    def test_any_message_can_be_counted(self, counter: TokenCounter, message: dict[str, Any], model: str) -> None:
        counted = asyncio.run(counter.usage(model, [message], [message]))
        assert counted.input_tokens >= counted.output_tokens >= 0


class TestModels:
    @pytest.mark.parametrize(
        ("model", "encoding"),
        [
            ("gpt-4", "cl100k_base"),
            ("gpt-35-turbo", "cl100k_base"),
            ("text-embedding-3-small", "cl100k_base"),
            ("gpt-4o-2024-11-20", "o200k_base"),
            ("gpt-5.1", "o200k_base"),
            ("o3", "o200k_base"),
            ("openai/gpt-4o-mini", "o200k_base"),
            ("openrouter/openai/gpt-4", "cl100k_base"),
            ("gpt-4o:free", "o200k_base"),
            ("ft:gpt-4o:acme::1a2b", "o200k_base"),
            ("ft:gpt-3.5-turbo-0125:acme", "cl100k_base"),
            ("gpt-oss-120b", "o200k_base"),
            ("gpt-oss:20b", "o200k_base"),
            ("llama3", None),
            ("text-davinci-003", None),
            ("", None),
            ("/", None),
        ],
    )
    async def test_families(self, counter: TokenCounter, model: str, encoding: str | None) -> None:
        expected = {"cl100k_base": 17, "o200k_base": 12, None: 5}[encoding]
        assert await counter.text(model, [TEXT]) == expected


class TestTheEstimate:
    @pytest.mark.parametrize(
        ("messages", "answers", "usage"),
        [
            ([], [], Usage()),
            ([said("")], [], Usage()),
            ([said("1")], [said("1")], Usage(1, 1)),
            ([said("1234")], [said("1234")], Usage(1, 1)),
            ([said("12345")], [said("12345")], Usage(2, 2)),
            ([said("12"), said("34")], [said("1234"), said("5678")], Usage(1, 2)),
            ([said("👩‍💻")], [said("123", reasoning="45")], Usage(1, 2)),
            ([said("12345", name="678")], [said("12", tool_calls=["3"])], Usage(2, 2)),
            ([said("\ud83d")], [said("x" * 1_000_001)], Usage(1, 250_001)),
        ],
    )
    async def test_characters_of_all_that_counts_divided_by_four_rounded_up(
        self, counter: TokenCounter, messages: list[dict[str, Any]], answers: list[dict[str, Any]], usage: Usage
    ) -> None:
        assert await counter.usage("llama3", messages, answers) == usage

    async def test_tool_definitions_and_plain_texts(self, counter: TokenCounter) -> None:
        assert await counter.usage("llama3", [said("12")], [], tools=["1234"]) == Usage(3, 0)
        assert await counter.text("llama3", ["12345", "678"]) == 2
        assert await counter.text("llama3", ["12345", "6789"]) == 3


class TestTheLoop:
    async def test_a_million_equal_letters_do_not_stop_it(self, counter: TokenCounter) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        await counter.text("gpt-4o", ["read the file"])
        others = asyncio.create_task(tick())
        counted = await counter.text("gpt-4o", ["a" * 1_000_000])
        others.cancel()
        assert counted == 125_000
        assert ticks > 1_000_000 / tokens.SLICE

    async def test_a_long_text_lets_others_pass(self, counter: TokenCounter) -> None:
        await counter.text("gpt-4o", ["read the file"])
        long = asyncio.create_task(counter.text("gpt-4o", ["hello world " * 200_000]))
        await asyncio.sleep(0)
        assert await counter.text("gpt-4o", ["hello world " * 1000]) == 2001
        assert not long.done()
        assert await long == 400_001

    async def test_many_callers_on_first_use(self) -> None:
        counter = TokenCounter()
        try:
            assert await asyncio.gather(*(counter.text("gpt-4", ["hello world"]) for _ in range(50))) == [2] * 50
        finally:
            counter.close()

    async def test_a_caller_who_gives_up_harms_nobody(self, counter: TokenCounter) -> None:
        long = asyncio.create_task(counter.text("gpt-4o", ["hello world " * 200_000]))
        await asyncio.sleep(0)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert await counter.text("gpt-4o", ["hello world " * 1000]) == 2001

    async def test_who_comes_after_the_end_is_served_too(self) -> None:
        counter = TokenCounter()
        counter.close()
        assert await counter.text("gpt-4", ["hello world"]) == 2
        counter.close()
        assert await counter.text("gpt-4", ["hello world " * 1000]) == 2001
        counter.close()


class TestWhatIsBroken:
    @pytest.fixture
    async def broken(self, tmp_path: Path) -> AsyncIterator[TokenCounter]:
        """With an intact file for o200k_base only."""
        (tmp_path / "o200k_base.tiktoken.xz").write_bytes((DATA / "o200k_base.tiktoken.xz").read_bytes())
        counter = TokenCounter(tmp_path)
        yield counter
        counter.close()

    @pytest.mark.parametrize("kind", ["missing", "empty", "no xz", "cut", "another digest"])
    async def test_a_damaged_file_is_told_once_and_its_models_are_estimated(
        self, broken: TokenCounter, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        file = tmp_path / "cl100k_base.tiktoken.xz"
        whole = (DATA / file.name).read_bytes()
        contents = {"empty": b"", "no xz": b"hello", "cut": whole[:-100], "another digest": lzma.compress(b"IQ== 0\n")}
        if kind != "missing":
            file.write_bytes(contents[kind])
        assert await broken.text("gpt-4", ["hello world"]) == 3
        assert await broken.usage("gpt-4", [said("12345")], [said("1")]) == Usage(2, 1)
        assert [(r.levelno, file.name in r.getMessage()) for r in caplog.records] == [(logging.WARNING, True)]
        assert await broken.text("gpt-4o", ["hello world"]) == 2

    async def test_without_tiktoken_everything_is_estimated(
        self, broken: TokenCounter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for module in [name for name in sys.modules if name.partition(".")[0] == "tiktoken"]:
            monkeypatch.setitem(sys.modules, module, None)
        assert await broken.text("gpt-4o", ["hello world"]) == 3
        assert await broken.text("gpt-4o", ["hello world"]) == 3
        assert ["tiktoken cannot be imported" in record.getMessage() for record in caplog.records] == [True]

    async def test_a_panic_in_tiktoken_costs_no_count(
        self, counter: TokenCounter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A million spaces at once are too much for tiktoken 0.14 (`StackOverflow`); slices keep it from that."""
        spaces = " " * 1_000_000
        in_slices = await counter.text("gpt-4o", [spaces])
        assert in_slices == pytest.approx(1_000_000 / 128, rel=0.02)
        assert caplog.records == []
        monkeypatch.setattr(tokens, "SLICE", 2_000_000)
        at_once = await counter.text("gpt-4o", [spaces])
        assert at_once in (250_000, 7813)  # estimated, or counted by a tiktoken that has overcome it
        assert len(caplog.records) == (at_once == 250_000)


OFFLINE = """
import asyncio, socket, sys
from gateway.tokens import TokenCounter
assert "tiktoken" not in sys.modules

def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__":
        raise RuntimeError(f"{event} {arguments}")
    if event == "socket.__new__" and arguments[1] != socket.AF_UNIX:
        raise RuntimeError(f"a socket: {arguments}")

async def count():
    counter = TokenCounter()
    print(await counter.text("gpt-4", ["hello world"]), await counter.text("gpt-4o", ["hello world"]))
    counter.close()

loop = asyncio.new_event_loop()
sys.addaudithook(refuse)
loop.run_until_complete(count())
loop.close()
"""


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "TMPDIR", "HOME"])
def test_no_network_and_no_shared_cache(tmp_path: Path, variable: str) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**clean_environment(tmp_path), variable: str(folder)}
    command = [sys.executable, "-W", "error", "-c", OFFLINE]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2 2\n", "")
    assert list(folder.iterdir()) == []


class TestInAHurry:
    TEXT = "a" * (4 * tokens.SLICE)  # an eighth of that in tokens, a quarter by estimate

    async def test_from_the_start_all_is_estimated_at_once(self, counter: TokenCounter) -> None:
        counting = counter.text("gpt-4", [self.TEXT], hurried=lambda: True)
        with pytest.raises(StopIteration) as done:  # it waits for nothing, the thread least of all
            counting.send(None)
        assert done.value.value == tokens.SLICE

    async def test_from_the_middle_on_what_is_left_is_estimated(self, counter: TokenCounter) -> None:
        answers = iter([False])
        counted = await counter.text("gpt-4", [self.TEXT], hurried=lambda: next(answers, True))
        assert counted == tokens.SLICE // 8 + 3 * tokens.SLICE // 4

    async def test_a_count_that_takes_too_long_ends_in_the_same_way(
        self, counter: TokenCounter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokens, "MOST_SECONDS", 0)
        message = said(self.TEXT)
        assert await counter.usage("gpt-4", [message], [message]) == Usage(tokens.SLICE, tokens.SLICE)
