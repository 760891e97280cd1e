"""The README's own examples, run as they stand there."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

from tests_standalone.support.gateway import ROOT
from tests_standalone.system.conftest import Start


async def test_the_sdk_examples_work_without_a_key_on_the_built_in_model(start: Start) -> None:
    gateway = await start({})
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    code = "\n".join(blocks).replace("http://127.0.0.1:8000/v1", gateway.base_url)
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Hello from the other side"), done.stderr
    assert len(blocks[0].splitlines()) <= 12
    talks = gateway.query("SELECT title, message_count, total_tokens_output FROM conversations_view ORDER BY number")
    assert [tuple(row.values()) for row in talks] == [("Hello from the other side", 2, 5), ("My name is Ada.", 4, 8)]
    table = await asyncio.to_thread(gateway.run, "usage", "--by", "model")
    assert re.search(r"^echo +3 +21 +13 +0\.000000000", table.stdout, re.MULTILINE), table.stdout
