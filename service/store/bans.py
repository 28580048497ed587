"""Bans of the venue, kept so that a restart respects them: to ask during one makes it longer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from service.errors import DataDirectoryUnusable
from service.ports import StateStore

log = structlog.get_logger("store.bans")

RETRY_S = 1.0


class Bans:
    """Per host the venue time until which it asked for silence."""

    def __init__(self, store: StateStore, known: dict[str, int]) -> None:
        self._store = store
        self._until_ms = known
        self._unsaved: set[str] = set()
        self._news = asyncio.Event()

    def until_ms(self, host: str) -> int:
        return self._until_ms.get(host, 0)

    def add(self, host: str, until_ms: int) -> None:
        """The host asks for silence; written down in the background."""
        if until_ms > self.until_ms(host):
            self._until_ms[host] = until_ms
            self._unsaved.add(host)
            self._news.set()

    async def run(self) -> None:
        """Write down what is new, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.save()
            except DataDirectoryUnusable as error:
                log.warning("a ban could not be written down yet", error=str(error))
                await asyncio.sleep(RETRY_S)
                self._news.set()

    async def save(self) -> None:
        for host in list(self._unsaved):
            await self._store.save_ban(host, self._until_ms[host])
            self._unsaved.discard(host)


@asynccontextmanager
async def keeping_bans(store: StateStore) -> AsyncIterator[Bans]:
    """Bans of earlier runs, and those of this one written down while the block runs."""
    bans = Bans(store, await store.bans())
    async with asyncio.TaskGroup() as tasks:
        writer = tasks.create_task(bans.run(), name="store.bans")
        try:
            yield bans
        finally:
            writer.cancel()
            try:
                await bans.save()
            except DataDirectoryUnusable as error:
                log.warning("a ban could not be written down", error=str(error))
