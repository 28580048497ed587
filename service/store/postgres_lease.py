"""The lease as a row in PostgreSQL, valid by the database's clock and so across hosts."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import structlog

from service.clock import boot_s
from service.errors import DataDirectoryUnusable, LeaseHeld, LeaseLost
from service.store.lease import RENEWALS, TimedLease
from service.store.postgres_link import Connection, Link

log = structlog.get_logger("store.lease")

POLL_S = 0.5

MAKE = "insert into lease values ('perpd', 0, '', '-infinity') on conflict do nothing"
TAKE = """
update lease set epoch = epoch + 1, holder = $1, expires = clock_timestamp() + make_interval(secs => $2)
where name = 'perpd' and expires <= clock_timestamp() returning epoch"""
RENEW = """
update lease set expires = clock_timestamp() + make_interval(secs => $2)
where name = 'perpd' and epoch = $1 returning 1"""
RELEASE = "update lease set expires = clock_timestamp() where name = 'perpd' and epoch = $1"
HOLDER = "select holder from lease where name = 'perpd'"


def own_name() -> str:
    """Who we are to another perpd: the host, which in a container is its id, and the process."""
    return f"{socket.gethostname()} pid {os.getpid()}"


@asynccontextmanager
async def holding_lease(
    link: Link,
    lease_s: float,
    *,
    standing_by: Callable[[str], AbstractAsyncContextManager[None]] | None,
) -> AsyncIterator[TimedLease]:
    """Hold the lease while the block runs, and give it back at its end.

    Args: standing_by: entered, with the holder's name, while another holds it; None does not wait.
    Raises: LeaseHeld: another holds it and nobody shall wait; LeaseLost, into the block: it was taken over.
    """
    lease = await _take(link, lease_s, standing_by)
    try:
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(_keep(link, lease), name="store.lease")
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
            lease.lose("the lease was given back")
            await _give_back(link, lease)


async def _take(
    link: Link, lease_s: float, standing_by: Callable[[str], AbstractAsyncContextManager[None]] | None
) -> TimedLease:
    async with AsyncExitStack() as stack:
        waiting = False
        while True:
            lease, holder = await _try(link, lease_s, patient=waiting)
            if lease is not None:
                log.info("lease taken", epoch=lease.epoch, database=link.where, lease_s=lease_s)
                return lease
            if standing_by is None:
                raise LeaseHeld(f"{link.where}: {holder} trades on it")
            if not waiting:
                waiting = True
                log.info("standing by: another perpd trades this account", holder=holder, lease_s=lease_s)
                await stack.enter_async_context(standing_by(holder))
            await asyncio.sleep(min(POLL_S, lease_s / RENEWALS))


async def _try(link: Link, lease_s: float, *, patient: bool) -> tuple[TimedLease | None, str]:
    """The lease, or who holds it. One who stands by waits for a database that went away."""
    asked_s = boot_s()

    async def take(db: Connection) -> tuple[int | None, str]:
        await db.execute(MAKE)  # apart: of two that insert and update in one statement, one may fail
        epoch = await db.fetchval(TAKE, own_name(), lease_s)
        return epoch, "" if epoch is not None else str(await db.fetchval(HOLDER))

    try:
        epoch, holder = await link.run(take)
    except DataDirectoryUnusable as error:
        if not patient:
            raise
        log.warning("standing by, the database does not answer", error=str(error))
        return None, ""
    return (TimedLease(int(epoch), lease_s, asked_s), "") if epoch is not None else (None, holder)


async def _keep(link: Link, lease: TimedLease) -> None:
    """Renew until cancelled. A database that is away is tried again: whoever takes over needs it too."""
    failing = False
    while True:
        await asyncio.sleep(lease.lease_s / RENEWALS)
        asked_s = boot_s()
        try:
            renewed = await link.run(lambda db: db.fetchval(RENEW, lease.epoch, lease.lease_s))
        except DataDirectoryUnusable as error:
            if not failing:
                log.warning("lease not renewed", error=str(error), sending=lease.may_send() or "goes on")
            failing = True
            continue
        if renewed is None:
            holder = await link.run(lambda db: db.fetchval(HOLDER))
            lease.lose(f"{holder} took the lease over")
            raise LeaseLost(
                f"{link.where}: {holder} took the lease over; this perpd sends nothing more and ends"
            )
        lease.renewed(asked_s)
        if failing:
            log.info("lease renewed again", epoch=lease.epoch)
        failing = False


async def _give_back(link: Link, lease: TimedLease) -> None:
    """At once, so that one who stands by need not wait; without an answer it runs out by itself."""
    try:
        await link.run(lambda db: db.execute(RELEASE, lease.epoch))
    except DataDirectoryUnusable as error:
        log.warning("lease not given back, it runs out by itself", error=str(error), lease_s=lease.lease_s)
