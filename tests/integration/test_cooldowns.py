"""Cooldowns from the venue's news to the store and back: by fills, by reconciliation, on a full disk."""

from decimal import Decimal
from pathlib import Path

import pytest

from service.clock import WallClock
from service.records import CloseReason, OrderPurpose, Position, RefusalReason, Side
from service.trading.cooldowns import MINUTE_MS
from tests.integration.trading_desk import (
    Desk,
    Venue,
    approved,
    desk_at,
    full_disk,
    opened,
    quiet,
    refusal,
    signal,
)

HOUR_MS = 60 * MINUTE_MS


def venue_of(minutes_ago: int = 0) -> Venue:
    venue = Venue()
    venue.time_ms = WallClock().now_ms() - minutes_ago * MINUTE_MS
    return venue


async def cooldowns_after(desk: Desk) -> dict[str, int]:
    await quiet(desk)
    return await desk.store.cooldowns()


async def test_a_stop_bars_its_symbol_and_no_other_over_a_restart(tmp_path: Path):
    venue = venue_of()
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        await opened(desk)
        venue.trigger(OrderPurpose.STOP, "99")
        closed = await desk.closed()
        assert await desk.store.cooldowns() == {"AUSDT": closed.closed_ms + HOUR_MS}
        assert refusal(await desk.executor.open(signal("s2"), approved())) is RefusalReason.COOLDOWN
        assert isinstance(await desk.executor.open(signal("s3", "BUSDT"), approved()), Position)
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        assert list(desk.executor.cooling()) == ["AUSDT"]
        answer = await desk.executor.open(signal("s4"), approved())
        assert refusal(answer) is RefusalReason.COOLDOWN
        assert not [request for request in venue.sent if request.position_id == "s4"]


async def test_a_target_bars_nothing(tmp_path: Path):
    async with desk_at(tmp_path, venue_of(), cooldown_minutes=60.0) as desk:
        await opened(desk)
        desk.venue.trigger(OrderPurpose.TARGET, "102")
        assert (await desk.closed()).close_reason == "target"
        assert await desk.store.cooldowns() == {}
        assert isinstance(await desk.executor.open(signal("s2"), approved()), Position)


async def test_a_stop_that_executed_while_perpd_was_down_counts_from_its_execution(tmp_path: Path):
    venue = venue_of(minutes_ago=50)
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        await opened(desk)
    venue.trigger(OrderPurpose.STOP, "99")
    executed_ms = venue.fills[-1].filled_ms
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        await desk.reconciler.reconcile()
        assert (await desk.closed()).close_reason == "stop"
        assert await desk.store.cooldowns() == {"AUSDT": executed_ms + HOUR_MS}
        assert 9 < desk.executor.cooling()["AUSDT"] <= 10
        assert refusal(await desk.executor.open(signal("s2"), approved())) is RefusalReason.COOLDOWN


async def test_a_software_stop_that_left_before_a_crash_is_booked_as_a_stop_and_bars_its_symbol(
    tmp_path: Path,
):
    venue = venue_of()
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        position = await opened(desk)
        venue.silent, venue.lose, venue.mark = True, {OrderPurpose.EXIT: 1}, Decimal(99)
        venue.forgetful = venue.amnesia = True
        assert not await desk.executor.close(position, CloseReason.STOP)
        assert await desk.store.closed_positions(9) == []
    venue.silent = venue.forgetful = venue.amnesia = False
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        await desk.reconciler.reconcile()
        closed = await desk.closed()
        assert closed.close_reason == "stop"
        assert await desk.store.cooldowns() == {"AUSDT": closed.closed_ms + HOUR_MS}


async def test_an_exit_that_left_before_a_crash_is_booked_as_an_exit_and_bars_nothing(tmp_path: Path):
    venue = venue_of()
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        position = await opened(desk)
        venue.silent = venue.forgetful = venue.amnesia = True
        venue.lose = {OrderPurpose.EXIT: 1}
        assert not await desk.executor.close(position, CloseReason.EXIT)
    venue.silent = venue.forgetful = venue.amnesia = False
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        await desk.reconciler.reconcile()
        assert (await desk.closed()).close_reason == "exit"
        assert await desk.store.cooldowns() == {}


async def test_one_that_was_over_before_the_start_bars_nothing(tmp_path: Path):
    venue = venue_of(minutes_ago=70)
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        await opened(desk)
        venue.trigger(OrderPurpose.STOP, "99")
        await quiet(desk)
        assert isinstance(await desk.executor.open(signal("s2"), approved()), Position)


@pytest.mark.parametrize("client_id", ["autoclose-7", "adl_autoclose"])
async def test_the_venues_own_closing_bars_its_symbol(tmp_path: Path, client_id: str):
    async with desk_at(tmp_path, venue_of(), cooldown_minutes=60.0) as desk:
        await opened(desk)
        desk.venue.silent = True
        desk.venue.trade("AUSDT", Side.SELL, Decimal(2), client_id)
        await desk.reconciler.reconcile()
        closed = await desk.closed()
        assert await desk.store.cooldowns() == {"AUSDT": closed.closed_ms + HOUR_MS}


async def test_a_close_that_gets_its_name_later_begins_it_then(tmp_path: Path):
    """The first word of a stop's execution may not say that it was the stop's."""
    async with desk_at(tmp_path, venue_of(), cooldown_minutes=60.0) as desk:
        position = await opened(desk)
        stop = desk.venue.orders[position.stop_order_id]
        desk.venue.mark = Decimal(99)
        desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "unknown", stop.venue_order_id)
        desk.venue.listener = lambda event: None
        await quiet(desk)
        fill = desk.venue.fills[-1]
        assert await desk.store.cooldowns() == {}
        desk.executor.on_event(type(fill)(**{**_fields(fill), "client_order_id": stop.client_order_id}))
        assert await cooldowns_after(desk) == {"AUSDT": fill.filled_ms + HOUR_MS}
        assert (await desk.closed()).close_reason == "stop"


def _fields(record) -> dict:
    return {name: getattr(record, name) for name in record.__struct_fields__}


async def test_an_end_that_the_disk_refused_takes_its_cooldown_along_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with desk_at(tmp_path, venue_of(), cooldown_minutes=60.0) as desk:
        position = await opened(desk)
        with monkeypatch.context() as full:
            full.setattr(desk.store, "save_position", full_disk)
            await desk.executor.end_position(position.position_id, CloseReason.LIQUIDATION)
            assert list(desk.executor.cooling()) == ["AUSDT"]
        assert await desk.store.cooldowns() == {}
        await desk.executor.store_back()
        closed = await desk.store.position(position.position_id)
        assert closed is not None
        assert await desk.store.cooldowns() == {"AUSDT": closed.closed_ms + HOUR_MS}


async def test_switched_off_it_bars_nothing_whatever_is_kept(tmp_path: Path):
    venue = venue_of()
    async with desk_at(tmp_path, venue, cooldown_minutes=60.0) as desk:
        await opened(desk)
        venue.trigger(OrderPurpose.STOP, "99")
        assert await cooldowns_after(desk)
    async with desk_at(tmp_path, venue, cooldown_minutes=0.0) as desk:
        assert isinstance(await desk.executor.open(signal("s2"), approved()), Position)
