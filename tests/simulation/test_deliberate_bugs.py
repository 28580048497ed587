"""The simulation can fail: with each of these bugs put in, it says so within 200 seeds.

The bugs exist here only, as subclasses and replacements of one method.
"""

from pathlib import Path

import pytest

from service.errors import OrderOutcomeUnknown, OrderRejected
from service.exchange.binance.account import AccountCalls
from service.records import Order
from service.simulation.database import SharedDatabase
from service.simulation.disk import Disk
from service.simulation.host import Host
from service.simulation.lease_faults import LONGEST_CUT_S, LeaseFaults
from service.simulation.run import Simulation, run_seed
from service.simulation.state import own_state
from service.store import rows
from service.store.lease import TimedLease
from service.store.sqlite import SqliteStore, _put_position
from service.trading.cooldowns import Cooldowns
from service.trading.protecting import Protector

SEEDS = 200
HOURS = 2.0


def found(*words: str, kind: type[Simulation] = Simulation) -> str:
    """The first violation, in any seed, that says one of these words."""
    others: list[str] = []
    for seed in range(1, SEEDS + 1):
        for text in run_seed(seed, HOURS, kind=kind).violations:
            if any(word in text for word in words):
                return text
            others.append(f"seed {seed}: {text}")
    pytest.fail(f"not found in {SEEDS} seeds; they said {others[:5]}")


def test_resending_on_a_timeout_is_found(monkeypatch: pytest.MonkeyPatch):
    place = AccountCalls.place

    async def place_twice(self, request):
        try:
            return await place(self, request)
        except OrderOutcomeUnknown:
            return await place(self, request)

    monkeypatch.setattr(AccountCalls, "place", place_twice)
    assert found("became two orders", "executed twice")


def test_forgetting_the_order_on_503_is_found(monkeypatch: pytest.MonkeyPatch):
    place = AccountCalls.place

    async def place_or_forget(self, request):
        try:
            return await place(self, request)
        except OrderOutcomeUnknown as error:
            if error.status != 503:
                raise
            raise OrderRejected(str(error), code=error.code, status=error.status) from None

    monkeypatch.setattr(AccountCalls, "place", place_or_forget)
    assert found("that the venue took was given up")


def test_cancelling_a_stop_before_its_successor_rests_is_found(monkeypatch: pytest.MonkeyPatch):
    move_stop = Protector._move_stop

    async def cancel_first(self, position, stop):
        current = self._books.orders.get(position.stop_order_id)
        if current is not None:
            await self._sender.cancel(current)
        await move_stop(self, position, stop)

    monkeypatch.setattr(Protector, "_move_stop", cancel_first)
    assert found("the only stop of an open position was cancelled")


def test_sending_before_the_id_is_durable_is_found(monkeypatch: pytest.MonkeyPatch):
    async def save_position_only(self, position, order):
        await self._write(lambda db: _put_position(db, position))

    monkeypatch.setattr(SqliteStore, "save_intent", save_position_only)
    assert found("before it was written down")


@pytest.mark.slow(about_s=18)
def test_forgetting_cooldowns_at_a_restart_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Cooldowns, "restore", lambda self, kept, now_ms: None)
    assert found("within its symbol's cooldown")


def test_forgetting_orders_that_have_not_ended_is_found(monkeypatch: pytest.MonkeyPatch):
    outbox_rows = rows.outbox_rows

    def ended_only(records):
        return outbox_rows([r for r in records if not isinstance(r, Order) or r.status.final])

    monkeypatch.setattr(rows, "outbox_rows", ended_only)
    assert found("lacks a state of an order")


class TwoInstances(Simulation):
    """A second daemon on the same account, with a data directory and a host of its own, and no lease."""

    def shares_account(self) -> bool:
        return False

    def set_up(self, directory: Path) -> None:
        super().set_up(directory)
        second = directory / "second"
        second.mkdir()
        self.hosts.append(Host(self, "second", Disk(second), own_state))

    def knows_order(self, client_order_id: str) -> bool:
        return any(host.disk.knows_order(client_order_id) for host in self.hosts)


def test_two_instances_without_a_lease_are_found():
    assert found("became two orders", "executed twice", kind=TwoInstances)


class Shared(Simulation):
    """Two daemons on one account in every seed."""

    def shares_account(self) -> bool:
        return True


def test_a_deposed_one_that_still_sends_is_found(monkeypatch: pytest.MonkeyPatch):
    """It writes before it sends, and the fence stops most: the database is out of its reach here."""

    def cut_off(self, storm: int) -> None:
        leader = self._simulation.leader
        if self._active and leader is not None:
            self._cut((leader,), LONGEST_CUT_S, "database away from one")

    monkeypatch.setattr(LeaseFaults, "_strike", cut_off)
    monkeypatch.setattr(TimedLease, "may_send", lambda self: "")
    assert found("sent without the lease", kind=Shared)


def test_a_deposed_one_that_still_writes_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SharedDatabase, "fence", lambda self, epoch: None)
    assert found("a deposed daemon wrote", kind=Shared)
