"""Holding a lease: taken, renewed, lost or given back, by the same rules wherever its row is kept."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Protocol

import structlog

from service.clock import boot_s
from service.errors import DataDirectoryUnusable, LeaseHeld, LeaseLost
from service.store.lease import RENEWALS, TimedLease

log = structlog.get_logger("store.lease")

POLL_S = 0.5

StandingBy = Callable[[str], AbstractAsyncContextManager[None]]
"""Entered, with the name of whoever trades, while this perpd waits for its turn."""


class LeaseRow(Protocol):
    """One row that says who holds the lease and until when, by the clock of whoever keeps it.

    Each call raises DataDirectoryUnusable where the keeper does not answer; the change may have been made.
    """

    where: str

    async def take(self, holder: str, lease_s: float) -> tuple[int | None, str]:
        """The epoch, one more than the last, if the lease had run out; else None and who holds it."""
        ...

    async def renew(self, epoch: int, lease_s: float) -> bool:
        """Make it last from now on; False when the epoch is no longer this one."""
        ...

    async def release(self, epoch: int) -> None:
        """Let it run out now, unless the epoch is no longer this one."""
        ...

    async def holder(self) -> str: ...


def own_name() -> str:
    """Who we are to another perpd: the host, which in a container is its id, and the process."""
    return f"{socket.gethostname()} pid {os.getpid()}"


class Holding:
    """How one perpd takes and keeps the lease.

    Args: name: its name in the row; now_s: see `TimedLease`; poll_s: how often one who stands by tries.
    """

    def __init__(
        self,
        row: LeaseRow,
        lease_s: float,
        *,
        name: str | None = None,
        now_s: Callable[[], float] = boot_s,
        poll_s: float | None = None,
    ) -> None:
        self._row = row
        self._lease_s = lease_s
        self._name = own_name() if name is None else name
        self._now_s = now_s
        self._poll_s = min(POLL_S, lease_s / RENEWALS) if poll_s is None else poll_s

    async def take(self, standing_by: StandingBy | None) -> TimedLease:
        """Raises LeaseHeld: another holds it and nobody shall wait."""
        async with AsyncExitStack() as stack:
            waiting = False
            while True:
                lease, holder = await self.attempt(patient=waiting)
                if lease is not None:
                    log.info(
                        "lease taken", epoch=lease.epoch, database=self._row.where, lease_s=self._lease_s
                    )
                    return lease
                if standing_by is None:
                    raise LeaseHeld(f"{self._row.where}: {holder} trades on it")
                if not waiting:
                    waiting = True
                    log.info(
                        "standing by: another perpd trades this account",
                        holder=holder,
                        lease_s=self._lease_s,
                    )
                    await stack.enter_async_context(standing_by(holder))
                await asyncio.sleep(self._poll_s)

    async def attempt(self, *, patient: bool) -> tuple[TimedLease | None, str]:
        """The lease, or who holds it. One who stands by waits for a database that went away."""
        asked_s = self._now_s()
        try:
            epoch, holder = await self._row.take(self._name, self._lease_s)
        except DataDirectoryUnusable as error:
            if not patient:
                raise
            log.warning("standing by, the database does not answer", error=str(error))
            return None, ""
        if epoch is None:
            return None, holder
        return TimedLease(epoch, self._lease_s, asked_s, self._now_s), ""

    async def keep(self, lease: TimedLease) -> None:
        """Renew until cancelled. A database that is away is tried again: whoever takes over needs it too.

        Raises: LeaseLost: it was taken over.
        """
        failing = False
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS)
            asked_s = self._now_s()
            try:
                if not await self._row.renew(lease.epoch, self._lease_s):
                    await self._deposed(lease)
            except DataDirectoryUnusable as error:
                if not failing:
                    log.warning("lease not renewed", error=str(error), sending=lease.may_send() or "goes on")
                failing = True
                continue
            lease.renewed(asked_s)
            if failing:
                log.info("lease renewed again", epoch=lease.epoch)
            failing = False

    async def _deposed(self, lease: TimedLease) -> None:
        lease.lose("another perpd took the lease over")  # before asking who, which may take long
        try:
            holder = await self._row.holder()
        except DataDirectoryUnusable:
            holder = "another perpd"
        raise LeaseLost(
            f"{self._row.where}: {holder} took the lease over; this perpd sends nothing more and ends"
        )

    async def give_back(self, lease: TimedLease) -> None:
        """At once, so that one who stands by need not wait; without an answer it runs out by itself."""
        lease.lose("the lease was given back")
        try:
            await self._row.release(lease.epoch)
        except DataDirectoryUnusable as error:
            log.warning(
                "lease not given back, it runs out by itself", error=str(error), lease_s=self._lease_s
            )


@asynccontextmanager
async def holding_lease(holding: Holding, *, standing_by: StandingBy | None) -> AsyncIterator[TimedLease]:
    """Hold the lease while the block runs, and give it back at its end.

    Args: standing_by: entered, with the holder's name, while another holds it; None does not wait.
    Raises: LeaseHeld: another holds it and nobody shall wait; LeaseLost, into the block: it was taken over.
    """
    lease = await holding.take(standing_by)
    try:
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(holding.keep(lease), name="store.lease")
            try:
                yield lease
            finally:
                keeper.cancel()
    except BaseExceptionGroup as group:  # one error stays that error, as callers know it
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
    finally:
        if not lease.lost:
            await holding.give_back(lease)
