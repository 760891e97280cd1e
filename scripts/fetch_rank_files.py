"""Packs tiktoken's rank files for `gateway/data`: `python scripts/fetch_rank_files.py FILE...`

The files are the raw ones, `cl100k_base.tiktoken` and `o200k_base.tiktoken`: tiktoken keeps them in the folder that
TIKTOKEN_CACHE_DIR names (under names of its own), and several packages for Python and Node carry them. Names do not
matter: a file is what its digest says, and tests hold the digests against those that tiktoken itself has pinned.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gateway.tokens import RANK_FILES  # noqa: E402 # the script runs from a checkout, installed or not


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--into", type=Path, default=ROOT / "gateway" / "data", metavar="FOLDER")
    asked = parser.parse_args(arguments)
    for file in asked.files:
        raw = file.read_bytes()
        name = _name(raw)
        if name is None:
            print(f"{file}: this is none of {', '.join(RANK_FILES)}", file=sys.stderr)
            return 1
        packed = asked.into / f"{name}.tiktoken.xz"
        packed.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
        print(f"{packed}: {packed.stat().st_size} bytes")
    return 0


def _name(raw: bytes) -> str | None:
    digest = hashlib.sha256(raw).hexdigest()
    return next((name for name, known in RANK_FILES.items() if known.sha256 == digest), None)


if __name__ == "__main__":
    sys.exit(main())
