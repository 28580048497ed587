"""The rules of the lease, on a row in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.errors import LeaseHeld, LeaseLost, StoreUnavailable
from service.store.holding import Holding, holding_lease

LEASE_S = 0.06  # renewed every 10 ms


class Row:
    """A keeper without a clock: whoever holds it holds it until it is released or `freed`."""

    where = "a row"

    def __init__(self) -> None:
        self.epoch = 0
        self.name = ""
        self.away = False
        self.renewals = 0
        self.asked_holder = asyncio.Event()

    def _answer(self) -> None:
        if self.away:
            raise StoreUnavailable("away")

    async def take(self, holder: str, lease_s: float) -> tuple[int | None, str]:
        self._answer()
        if self.name:
            return None, self.name
        self.epoch, self.name = self.epoch + 1, holder
        return self.epoch, ""

    async def renew(self, epoch: int, lease_s: float) -> bool:
        self._answer()
        self.renewals += 1
        return epoch == self.epoch

    async def release(self, epoch: int) -> None:
        self._answer()
        if epoch == self.epoch:
            self.name = ""

    async def holder(self) -> str:
        self.asked_holder.set()
        self._answer()
        return self.name


async def test_a_lease_is_renewed_while_it_is_held_and_given_back_after():
    row = Row()
    async with holding_lease(Holding(row, LEASE_S, name="a"), standing_by=None) as lease:
        while row.renewals < 2:
            await asyncio.sleep(0)
            await asyncio.sleep(LEASE_S / 12)
        assert (row.name, lease.epoch) == ("a", 1)
    assert row.name == ""
    assert lease.may_send() == "the lease was given back"


async def test_who_shall_not_wait_is_told_who_trades():
    row = Row()
    await row.take("b", 1.0)
    with pytest.raises(LeaseHeld, match="a row: b trades on it"):
        async with holding_lease(Holding(row, LEASE_S, name="a"), standing_by=None):
            pass


async def test_who_stands_by_takes_over_and_stands_by_no_more():
    row = Row()
    await row.take("b", 1.0)
    told: list[str] = []

    @asynccontextmanager
    async def standing_by(holder: str) -> AsyncIterator[None]:
        told.append(holder)
        row.away = True  # it waits for a database that went away, too
        asyncio.get_running_loop().call_later(LEASE_S / 2, come_back)
        yield
        told.append("trades")

    def come_back() -> None:
        row.away, row.name = False, ""

    async with holding_lease(Holding(row, LEASE_S, name="a"), standing_by=standing_by) as lease:
        assert told == ["b", "trades"]
        assert lease.epoch == 2


async def test_a_deposed_holder_sends_nothing_before_it_asks_who_it_was_and_ends_without_an_answer():
    row = Row()
    refusals: list[str] = []

    async def hold() -> None:
        async with holding_lease(Holding(row, LEASE_S, name="a"), standing_by=None) as lease:
            row.epoch, row.name = 2, "b"
            await row.asked_holder.wait()
            refusals.append(lease.may_send())
            await asyncio.Event().wait()

    holder = row.holder

    async def answers_late() -> str:
        row.asked_holder.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        row.away = True
        return await holder()

    row.holder = answers_late  # type: ignore[method-assign]
    with pytest.raises(LeaseLost, match="another perpd took the lease over"):
        await hold()
    assert refusals == ["another perpd took the lease over"]
    assert row.name == "b", "what is another's is not given back"
