"""What the executor does about each kind of refusal, against an in-memory venue."""

from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from service.clock import WallClock
from service.errors import (
    OrderOutcomeUnknown,
    OrderRejected,
    VenueCredentials,
    VenueError,
    VenueUnavailable,
)
from service.records import (
    CloseReason,
    Instrument,
    OrderPurpose,
    OrderType,
    Position,
    PositionSide,
    RefusalReason,
    Side,
)
from service.trading.closing import exit_limit
from service.trading.ranking import Refused
from tests.integration.trading_desk import (
    RULES,
    Desk,
    Venue,
    approved,
    desk_at,
    opened,
    quiet,
    refusal,
    signal,
)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async def rules(symbol: str) -> Instrument:
        return RULES

    async with desk_at(tmp_path, Venue(), rules=rules) as opened:
        yield opened


def sent(desk: Desk, purpose: OrderPurpose) -> list[OrderType]:
    return [request.type for request in desk.venue.sent if request.purpose is purpose]


@pytest.mark.parametrize("code", [-2010, -2019, -2027, -2028, -4028, -4161, -4131, -9999])
async def test_an_entry_that_is_refused_is_left_and_not_repeated(desk: Desk, code: int):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("no", code=code)]}
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.ORDER_REJECTED
    assert len(desk.venue.sent) == 1
    assert isinstance(await desk.executor.open(signal("s2"), approved()), Position)


@pytest.mark.parametrize("code", [-1111, -4003, -4004, -4005, -4014, -4023, -4164])
async def test_an_entry_off_the_grid_is_fitted_to_the_rules_as_they_are_now_once(desk: Desk, code: int):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("no", code=code)]}
    position = await desk.executor.open(signal(), approved())
    assert isinstance(position, Position)
    entries = [request for request in desk.venue.sent if request.purpose is OrderPurpose.ENTRY]
    assert [request.quantity for request in entries] == [Decimal(2), Decimal("1.5")]
    assert len({request.client_order_id for request in entries}) == 2
    assert await desk.store.order(entries[1].client_order_id) is not None
    await quiet(desk)
    assert await desk.equal()


async def test_an_exit_that_was_not_sent_is_not_called_refused(desk: Desk):
    """In an outage nobody refuses anything: the words are those of what happened."""
    position = await opened(desk)
    away = VenueUnavailable("new order: the venue was not reached: ClientConnectorError: no route")
    desk.venue.before = {OrderPurpose.EXIT: [away, OrderRejected("no", code=-2010)]}
    with capture_logs() as logs:
        assert not await desk.executor.close(position, CloseReason.EXIT)
        assert not await desk.executor.close(position, CloseReason.EXIT)
    first, second, third, fourth = [line for line in logs if line["event"].startswith(("order ", "exit "))]
    assert [line["event"] for line in (first, second)] == ["order not sent", "exit not sent"]
    assert (first["error"], second["detail"]) == (str(away), str(away))
    assert "code" not in first | second
    assert [line["event"] for line in (third, fourth)] == ["order refused", "exit refused"]
    assert (third["code"], fourth["detail"]) == (-2010, "-2010: no")


async def test_an_entry_off_the_grid_twice_is_refused(desk: Desk):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("no", code=-4023)] * 2}
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.ORDER_REJECTED
    assert len(desk.venue.sent) == 2
    assert desk.executor.held_symbols() == frozenset()


async def test_a_fitted_entry_that_is_below_the_venues_minimum_is_not_sent(desk: Desk):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("no", code=-4004)]}
    small = msgspec.structs.replace(approved(), quantity=Decimal(1))
    answer = await desk.executor.open(signal(), small)
    assert isinstance(answer, Refused)
    assert "at least 1.5" in answer.detail
    assert len(desk.venue.sent) == 1


@pytest.mark.parametrize(
    "error",
    [
        *(OrderRejected("reduce only", code=code) for code in (-4105, -4106, -4107, -4189, -4400, -4401)),
        OrderRejected("hedge mode", code=-4061),
        VenueCredentials("no permission", code=-2015),
        VenueCredentials("signature", code=-1022),
    ],
)
async def test_a_refusal_that_would_meet_every_entry_ends_entries(desk: Desk, error: VenueError):
    await desk.executor.open(signal("s0", "BUSDT"), approved())
    desk.venue.before = {OrderPurpose.ENTRY: [error]}
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.ORDER_REJECTED
    sent_before = len(desk.venue.sent)
    assert refusal(await desk.executor.open(signal("s2", "CUSDT"), approved())) is RefusalReason.ENTRIES_OFF
    assert len(desk.venue.sent) == sent_before
    assert desk.counts.counts["trading.entries_barred"] == 1


@pytest.mark.parametrize("purpose", list(OrderPurpose))
async def test_a_client_id_that_is_taken_is_asked_for_and_not_sent_again(desk: Desk, purpose: OrderPurpose):
    """The answer of the first send was lost and its repetition by the network was refused."""
    place = desk.venue.place

    async def twice(request):
        await place(request)
        if request.purpose is purpose:
            raise OrderOutcomeUnknown("duplicate", code=-4116)
        return desk.venue.orders[request.client_order_id]

    desk.venue.place = twice
    position = await desk.executor.open(signal(), approved())
    assert isinstance(position, Position)
    await quiet(desk)
    if purpose is OrderPurpose.EXIT:
        await desk.executor.close(desk.executor.positions()[0], CloseReason.EXIT)
        assert desk.venue.held == {}
    else:
        assert desk.executor.unprotected() == []
    assert len(sent(desk, purpose)) == 1


@pytest.mark.parametrize("code", [-2021, -4142])
async def test_a_stop_beyond_the_price_closes_at_once(desk: Desk, code: int):
    desk.venue.before = {OrderPurpose.STOP: [OrderRejected("would trigger", code=code)]}
    await desk.executor.open(signal(), approved())
    assert (await desk.closed()).close_reason == "stop"
    assert sent(desk, OrderPurpose.EXIT) == [OrderType.MARKET]


@pytest.mark.parametrize("code", [-1111, -4014])
async def test_a_stop_off_the_grid_is_placed_on_the_ticks_of_now(desk: Desk, code: int):
    off = msgspec.structs.replace(approved(), stop=Decimal("98.8"))
    desk.venue.before = {OrderPurpose.STOP: [OrderRejected("tick", code=code)]}
    await desk.executor.open(signal(), off)
    await quiet(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert stop.trigger_price == Decimal("99.0")
    [position] = desk.executor.positions()
    assert position.stop == Decimal("99.0")


@pytest.mark.parametrize("code", [-2025, -4045])
async def test_too_many_orders_are_made_room_for(desk: Desk, code: int):
    await opened(desk)
    desk.venue.reachable = False
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "by-hand")
    await desk.closed()
    desk.venue.reachable = True
    assert len(await desk.venue.open_orders()) == 2
    desk.venue.before = {OrderPurpose.STOP: [OrderRejected("too many", code=code)] * 2}
    await desk.executor.open(signal("s2", "BUSDT"), approved())
    await quiet(desk)
    assert {order.symbol for order in await desk.venue.open_orders()} == {"BUSDT"}
    assert desk.executor.unprotected() == []


@pytest.mark.parametrize("code", [-2022, -4118])
async def test_an_exit_with_nothing_to_reduce_looks_at_the_position(desk: Desk, code: int):
    position = await opened(desk)
    desk.venue.before = {OrderPurpose.EXIT: [OrderRejected("nothing", code=code)]}
    desk.executor.reconcile_wanted.clear()
    assert not await desk.executor.close(position, CloseReason.EXIT)
    assert desk.executor.reconcile_wanted.is_set()


async def test_an_exit_that_may_not_go_to_market_goes_as_a_limit(desk: Desk):
    position = await opened(desk)
    desk.venue.before = {OrderPurpose.EXIT: [OrderRejected("PERCENT_PRICE", code=-4131)]}
    assert await desk.executor.close(position, CloseReason.EXIT)
    assert sent(desk, OrderPurpose.EXIT) == [OrderType.MARKET, OrderType.LIMIT]
    request = desk.venue.sent[-1]
    assert (request.price, request.time_in_force, request.reduce_only) == (Decimal("99.0"), "IOC", True)


def test_a_limit_exit_stays_within_the_venues_bounds():
    assert exit_limit(Decimal("100.3"), PositionSide.LONG, RULES) == Decimal("99.5")
    assert exit_limit(Decimal("100.3"), PositionSide.SHORT, RULES) == Decimal("101.0")


async def test_a_cancel_of_an_order_that_ended_asks_how(desk: Desk):
    position = await opened(desk)
    stop = desk.venue.orders[position.stop_order_id]
    desk.venue.silent = True
    desk.venue.trigger(OrderPurpose.STOP, "99")
    desk.venue.silent = False
    assert await desk.executor.cancel(stop)
    assert (await desk.closed()).close_reason == "stop"
    assert await desk.equal()


async def test_an_order_that_is_denied_is_found_by_its_executions(desk: Desk):
    """By client id, then what rests, then what was executed, then what is held."""
    desk.venue.time_ms = WallClock().now_ms()
    desk.venue.silent = True
    desk.venue.forgetful = True
    desk.venue.lose = {OrderPurpose.ENTRY: 1, OrderPurpose.STOP: 1}
    position = await desk.executor.open(signal(), approved())
    assert isinstance(position, Position)
    assert sent(desk, OrderPurpose.ENTRY) == [OrderType.MARKET]
    await quiet(desk)
    assert position.entry_price == 100
    assert await desk.equal()


def taking_at_most(venue: Venue, most: str, code: int, step: str = "0.5") -> None:
    """The venue refuses larger market exits, and those off the step."""
    place = venue.place

    async def limited(request):
        if request.purpose is OrderPurpose.EXIT and (
            request.quantity > Decimal(most) or request.quantity % Decimal(step)
        ):
            venue.sent.append(request)
            raise OrderRejected("quantity", code=code)
        return await place(request)

    venue.place = limited


@pytest.mark.parametrize("code", [-4005, -4003, -1111])
async def test_an_exit_above_the_largest_market_order_is_closed_in_parts(tmp_path: Path, code: int):
    async def rules(symbol: str) -> Instrument:
        return msgspec.structs.replace(
            RULES,
            step_size=Decimal("0.5"),
            market_step_size=Decimal("0.5"),
            market_max_quantity=Decimal("0.75"),
        )

    async with desk_at(tmp_path, Venue(), rules=rules) as desk:
        position = await opened(desk)
        taking_at_most(desk.venue, "0.75", code)
        assert await desk.executor.close(position, CloseReason.EXIT)
        await quiet(desk)
        exits = [r.quantity for r in desk.venue.sent if r.purpose is OrderPurpose.EXIT]
        assert exits == [Decimal(2), *[Decimal("0.5")] * 4]
        assert desk.venue.held == {}
        assert await desk.venue.open_orders() == []
        assert await desk.equal()


async def test_an_exit_that_no_rule_explains_stays_refused(desk: Desk):
    position = await opened(desk)
    desk.venue.before = {OrderPurpose.EXIT: [OrderRejected("quantity", code=-4003)]}
    half = msgspec.structs.replace(RULES, step_size=Decimal("0.5"), market_step_size=Decimal("0.5"))

    async def fits(symbol: str) -> Instrument:
        return half

    desk.executor._closer._rules = fits
    assert not await desk.executor.close(position, CloseReason.EXIT)
    assert len(sent(desk, OrderPurpose.EXIT)) == 1


@pytest.mark.parametrize("purpose", [OrderPurpose.ENTRY, OrderPurpose.STOP])
async def test_an_order_at_the_wrong_endpoint_is_counted_and_an_alarm(desk: Desk, purpose: OrderPurpose):
    desk.venue.before = {purpose: [OrderRejected("not supported here", code=-4120)]}
    with capture_logs() as told:
        await desk.executor.open(signal(), approved())
        await quiet(desk)
    assert desk.counts.counts["trading.orders_misrouted"] == 1
    assert [e["log_level"] for e in told if "wrong endpoint" in e["event"]] == ["error"]
