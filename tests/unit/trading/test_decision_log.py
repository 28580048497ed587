"""Decisions reach the archive once, wherever a crash falls: each store and archive call may be the last."""

from decimal import Decimal

import pytest

from service.records import Decision, DecisionOutcome, PositionSide, Record, ShadowPosition, Signal
from service.trading.decision_log import DecisionLog
from service.trading.positions import position_id_of
from service.trading.shadow import ShadowBook
from tests.samples import signal


class Crash(Exception):
    pass


class Durable:
    """Store and archive that outlive the process and let it die before the call `die_at`, counted from 1."""

    def __init__(self) -> None:
        self.identity = "one"
        self.values: dict[str, str] = {}
        self.decided: list[str] = []
        self.records: dict[str, list[Record]] = {"signals": [], "decisions": []}
        self.positions: set[str] = set()
        self.shadows: list[ShadowPosition] = []
        self.calls = 0
        self.die_at = 0

    def _step(self) -> None:
        self.calls += 1
        if self.calls == self.die_at:
            raise Crash

    async def set_value(self, key, value):
        self._step()
        self.values[key] = value

    async def get_value(self, key):
        return self.values.get(key)

    async def save_signal_decided(self, pairs, shadows):
        self._step()
        self.decided += [signal.signal_id for signal, _ in pairs]
        self.shadows += shadows

    async def decided_since(self, candle_close_ms):
        return set(self.decided)

    async def open_shadows(self):
        return self.shadows

    async def unarchived(self, stream):
        return []

    def count(self, name): ...

    async def position(self, position_id):
        return object() if position_id in self.positions else None

    async def put(self, stream, record):
        self._step()
        self.records[stream].append(record)

    def sequence(self, stream):
        return len(self.records[stream])


def pair(name: str, outcome: DecisionOutcome = DecisionOutcome.REFUSED) -> tuple[Signal, Decision]:
    decision = Decision(
        signal_id=name,
        symbol="AUSDT",
        position_side=PositionSide.LONG,
        outcome=outcome,
        reason="",
        detail="",
        rank=1,
        cycle=1,
        decided_ms=2,
        quantity=Decimal(1),
    )
    return signal(name, close_ms=1), decision


async def log_of(durable: Durable) -> DecisionLog:
    """A new process's log, with the shadows that the store knows."""
    shadows = ShadowBook(durable, durable, durable, fee_fraction=0.0, life_hours=96, max_shadows=100)
    await shadows.restore()
    return DecisionLog(durable, durable, shadows)


def followed(durable: Durable) -> list[str]:
    return sorted({shadow.signal_id for shadow in durable.shadows})


async def keep_each(durable: Durable, *groups: list[tuple[Signal, Decision]]) -> None:
    for pairs in groups:
        await (await log_of(durable)).keep(pairs)


def recorded(durable: Durable, stream: str) -> list[str]:
    return [record.signal_id for record in durable.records[stream]]


@pytest.mark.parametrize("die_at", range(1, 8))
async def test_a_group_is_recorded_once_wherever_the_process_dies(die_at: int):
    durable = Durable()
    durable.die_at = die_at
    with pytest.raises(Crash):
        await keep_each(durable, [pair("a"), pair("b")], [pair("c")])
    durable.die_at = 0
    again = await log_of(durable)
    await again.recover()
    if die_at > 1:  # before the first call nothing was decided: the next cycle decides
        assert recorded(durable, "decisions") == recorded(durable, "signals") == ["a", "b"]
        assert durable.decided == followed(durable) == ["a", "b"]
    assert await again.recover() == []


@pytest.mark.parametrize("die_at", range(1, 6))
async def test_a_recovery_that_dies_is_finished_by_the_next(die_at: int):
    durable = Durable()
    durable.die_at = 3
    with pytest.raises(Crash):
        await (await log_of(durable)).keep([pair("a"), pair("b")])
    durable.calls, durable.die_at = 0, die_at
    try:
        await (await log_of(durable)).recover()
    except Crash:
        durable.die_at = 0
        await (await log_of(durable)).recover()
    assert recorded(durable, "decisions") == recorded(durable, "signals") == ["a", "b"]


@pytest.mark.parametrize(("entered", "names"), [(True, ["a"]), (False, [])])
async def test_an_entry_under_way_was_decided_only_if_it_was_written_down(entered: bool, names: list[str]):
    durable = Durable()
    await (await log_of(durable)).begin(pair("a", DecisionOutcome.ACCEPTED))
    if entered:
        durable.positions.add(position_id_of("a"))
    finished = await (await log_of(durable)).recover()
    assert [signal.signal_id for signal, _ in finished] == names
    assert recorded(durable, "decisions") == durable.decided == names


@pytest.mark.parametrize("die_at", range(2, 7))
async def test_a_group_that_was_cut_short_is_finished_by_the_same_run(die_at: int):
    durable = Durable()
    durable.die_at = die_at
    log = await log_of(durable)
    with pytest.raises(Crash):
        await log.keep([pair("a"), pair("b")])
    assert [signal.signal_id for signal, _ in await log.resume()] == ["a", "b"]
    await log.keep([pair("c")])
    assert recorded(durable, "decisions") == recorded(durable, "signals") == ["a", "b", "c"]
    assert durable.decided == followed(durable) == ["a", "b", "c"]
    assert await log.resume() == []


async def test_an_entry_that_was_cut_short_counts_as_decided_in_the_same_run():
    durable = Durable()
    log = await log_of(durable)
    await log.begin(pair("a", DecisionOutcome.ACCEPTED))
    durable.positions.add(position_id_of("a"))
    assert [signal.signal_id for signal, _ in await log.resume()] == ["a"]
    assert [shadow.traded for shadow in durable.shadows] == [True]


async def test_what_was_kept_long_ago_is_not_followed_again():
    durable = Durable()
    await (await log_of(durable)).keep([pair("a")])
    durable.shadows.clear()  # closed since, and archived
    assert await (await log_of(durable)).recover() == []
    assert durable.shadows == []


@pytest.mark.parametrize("die_at", range(1, 7))
@pytest.mark.parametrize("held", [0, 1, 9])
async def test_who_takes_over_with_another_archive_records_the_whole_group_in_it(held: int, die_at: int):
    """However many records that archive holds, and wherever the recovery dies."""
    durable = Durable()
    durable.die_at = 3
    with pytest.raises(Crash):
        await (await log_of(durable)).keep([pair("a"), pair("b")])
    durable.identity = "two"
    old = [pair(f"old {number}") for number in range(held)]
    durable.records = {"signals": [s for s, _ in old], "decisions": [d for _, d in old]}
    durable.calls, durable.die_at = 0, die_at
    try:
        await (await log_of(durable)).recover()
    except Crash:
        durable.die_at = 0
        await (await log_of(durable)).recover()
    assert recorded(durable, "decisions")[held:] == recorded(durable, "signals")[held:] == ["a", "b"]
    assert durable.decided == ["a", "b"]
