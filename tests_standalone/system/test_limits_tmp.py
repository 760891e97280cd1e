import asyncio
from tests_standalone.system.conftest import *
from tests_standalone.system.limited import *
from tests_standalone.system.test_limits_money import configured, costing
from tests_standalone.system.http import chat, post_chat
async def test_flip(upstream, start, database_url):
    gateway = await start(configured(upstream, database_url))
    key = await Key.made(gateway, budget="1", period="total")
    for _ in range(5): await key.ask(costing(1000))
    print("FLIP", await book(gateway, key.subject), await charged(gateway))
    for p in ("day", "total", "day"):
        await key.update("--period", p); await asyncio.sleep(1.2)
        await key.ask_at_once(8, costing(5))
        print("FLIP", p, (await book(gateway, key.subject)).spent, await charged(gateway))
async def test_flip_busy(upstream, start, database_url):
    gateway = await start(configured(upstream, database_url))
    key = await Key.made(gateway, budget="1", period="total")
    for _ in range(5): await key.ask(costing(1000))
    t = asyncio.create_task(hammer([gateway], key, costing(5), 6))
    await asyncio.sleep(1)
    await key.update("--period", "day")
    await t
    print("BUSY", (await book(gateway, key.subject)).spent, await charged(gateway))
async def test_first_key(upstream, start, database_url):
    gateway = await start(in_front_of(upstream, database_url, workers=4))
    key = await Key.made(gateway)
    said = [(await key.ask(chat("answer"))).status for _ in range(40)]
    print("FIRST", said)
