"""How a simulated daemon comes to its state: of its own, or shared under the lease."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.simulation.database import FencedStore, SharedDatabase, SharedLeaseRow, SimulatedLink
from service.store.holding import Holding, holding_lease
from service.store.lease import LocalLease
from service.store.opening import State

if TYPE_CHECKING:
    from service.simulation.daemon import Life

POLL_S = 10.0  # of one who stands by; twice a second would cost as much as trading does


@asynccontextmanager
async def own_state(life: "Life") -> AsyncIterator[State]:
    """The lock on the data directory is the lease."""
    store = life.disk.store()
    yield State(store, LocalLease(await store.next_epoch()))


class SharedState:
    """The state of both daemons, opened as `open_state` opens PostgreSQL's. Args: host: this one's name."""

    def __init__(self, database: SharedDatabase, host: str) -> None:
        self._database = database
        self._host = host

    @asynccontextmanager
    async def open(self, life: "Life") -> AsyncIterator[State]:
        database, run = self._database, life.settings.run
        link = SimulatedLink(database, life.process, self._host)
        lease_link = SimulatedLink(database, life.process, self._host)
        holding = Holding(
            SharedLeaseRow(database, lease_link),
            run.lease_s,
            name=life.process.name,
            now_s=lambda: database.world.now_s,
            poll_s=POLL_S,
        )
        try:
            await link.open(run.database_wait_s)
            async with holding_lease(holding, standing_by=life.standing_by) as lease:
                yield State(FencedStore(database, link, lease.epoch), lease)
        finally:
            await lease_link.close()
            await link.close()
