"""Bans are written down when they come, also when the store is away at first."""

import asyncio
from pathlib import Path

from service.errors import StoreUnavailable
from service.store import bans
from service.store.bans import keeping_bans
from service.store.sqlite import open_sqlite


async def test_a_ban_is_known_to_the_next_run(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store, keeping_bans(store) as kept:
        kept.add("h", 5_000)
        kept.add("h", 4_000)
        assert kept.until_ms("h") == 5_000
        assert kept.until_ms("other") == 0
    async with open_sqlite(tmp_path / "s") as store, keeping_bans(store) as kept:
        assert kept.until_ms("h") == 5_000


async def test_a_store_that_is_away_gets_it_later(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bans, "RETRY_S", 0.01)
    async with open_sqlite(tmp_path / "s") as store:
        real, refused = store.save_ban, asyncio.Event()

        async def away(host: str, until_ms: int) -> None:
            refused.set()
            raise StoreUnavailable("away")

        store.save_ban = away
        async with keeping_bans(store) as kept:
            kept.add("h", 5_000)
            await refused.wait()
            store.save_ban = real
            while not await store.bans():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await store.bans() == {"h": 5_000}
