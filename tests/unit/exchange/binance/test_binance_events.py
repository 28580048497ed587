"""The private stream: recorded messages, and the order in which the venue may send them."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from service.exchange.binance.events import UserEvents
from service.records import Adjustment, Fill, Order, OrderStatus, OrderType

RECORDED = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "payloads" / "nautilus_trader"
HOUR_MS = 3_600_000


@pytest.fixture
def events() -> UserEvents:
    return UserEvents(lambda: None)


def recorded(name: str) -> bytes:
    path = RECORDED / name
    if not path.exists():
        pytest.skip(f"recorded payload {name} is not beside the checkout")
    return path.read_bytes()


def order_event(**changes: object) -> bytes:
    part: dict[str, object] = {
        "s": "BTCUSDT", "c": "stop-1", "S": "SELL", "o": "MARKET", "q": "2", "x": "TRADE", "X": "FILLED",
        "i": 500, "l": "2", "z": "2", "L": "99", "T": 5, "ap": "99", "n": "0.1", "N": "USDT", "t": 7,
        "rp": "-1", "ot": "MARKET",
    } | changes  # fmt: skip
    return json.dumps({"e": "ORDER_TRADE_UPDATE", "E": 5, "T": 5, "o": part}).encode()


def algo_event(status: str, **changes: object) -> bytes:
    part: dict[str, object] = {
        "caid": "stop-1", "aid": 900, "s": "BTCUSDT", "S": "SELL", "o": "STOP_MARKET", "X": status,
        "q": "2", "ai": "", "tp": "99.5",
    } | changes  # fmt: skip
    return json.dumps({"e": "ALGO_UPDATE", "E": 5, "T": 5, "o": part}).encode()


def account_event(reason: str, at_ms: int, **changes: object) -> bytes:
    part = {"m": reason, "B": [{"a": "USDT", "bc": "-1.5"}], "P": []} | changes
    return json.dumps({"e": "ACCOUNT_UPDATE", "E": at_ms, "T": at_ms, "a": part}).encode()


@pytest.mark.parametrize("reason", ["DEPOSIT", "WITHDRAW"])
def test_a_transfer_is_no_event_and_sends_for_the_history(reason: str):
    told: list[str] = []
    events = UserEvents(lambda: None, on_transfer=lambda: told.append(reason))
    assert events.decode(account_event("FUNDING_FEE", 8 * HOUR_MS)) == []
    assert told == []
    assert events.decode(account_event(reason, 5)) == []
    assert told == [reason]


def test_a_trade_gives_its_fill_before_the_order_it_filled(events: UserEvents):
    fill, order = events.decode(order_event(c="entry-1"))
    assert isinstance(fill, Fill)
    assert isinstance(order, Order)
    assert (fill.trade_id, fill.price, fill.quantity, fill.fee) == ("7", 99, 2, Decimal("0.1"))
    assert (order.status, order.average_price) == (OrderStatus.FILLED, 99)


def test_a_triggered_order_keeps_our_id_whatever_the_venue_calls_it(events: UserEvents):
    events.decode(algo_event("NEW"))
    events.decode(algo_event("TRIGGERED", ai="500"))
    fill, order = events.decode(order_event(c="venue-made-up"))
    assert isinstance(order, Order)
    assert (fill.client_order_id, order.client_order_id) == ("stop-1", "stop-1")
    assert (order.venue_order_id, order.type) == ("900", OrderType.STOP_MARKET)


def test_fills_that_come_before_the_trigger_are_repeated_under_our_id(events: UserEvents):
    events.decode(algo_event("NEW"))
    events.decode(order_event(c="venue-made-up"))
    claimed = events.decode(algo_event("TRIGGERED", ai="500"))
    assert isinstance(claimed[0], Fill)
    assert (claimed[0].client_order_id, claimed[0].trade_id) == ("stop-1", "7")


def test_a_trigger_reported_after_the_fill_does_not_reopen_the_order(events: UserEvents):
    events.decode(algo_event("NEW"))
    events.decode(order_event())
    assert events.decode(algo_event("TRIGGERED", ai="500")) == []


def test_a_finished_conditional_order_without_a_fill_was_cancelled(events: UserEvents):
    (order,) = events.decode(algo_event("FINISHED", ai="500", aq="0", ap="0"))
    assert isinstance(order, Order)
    assert order.status is OrderStatus.CANCELLED


def test_a_conditional_order_refused_at_the_trigger_says_why(events: UserEvents):
    (order,) = events.decode(algo_event("REJECTED", rm="Margin is insufficient"))
    assert isinstance(order, Order)
    assert (order.status, order.reason) == (OrderStatus.REJECTED, "Margin is insufficient")


def test_funding_is_an_adjustment_of_its_symbol(events: UserEvents):
    (adjustment,) = events.decode(account_event("FUNDING_FEE", 8 * HOUR_MS + 30, S="ETHUSDT"))
    assert isinstance(adjustment, Adjustment)
    assert (adjustment.kind, adjustment.symbol, adjustment.amount) == ("funding", "ETHUSDT", Decimal("-1.5"))


@pytest.mark.parametrize(
    "body",
    [
        account_event("FUNDING_FEE", 8 * HOUR_MS),  # whose? the income history knows
        account_event("FUNDING_FEE", 8 * HOUR_MS + 1_000_000, S="A"),  # when? likewise
        account_event("ORDER", 8 * HOUR_MS),
        json.dumps({"e": "TRADE_LITE", "s": "BTCUSDT"}).encode(),
        json.dumps({"e": "SOMETHING_NEW", "o": {"x": 1}, "a": 5}).encode(),
        b"{}",
    ],
)
def test_what_is_no_event_of_ours_is_passed_over(events: UserEvents, body: bytes):
    assert list(events.decode(body)) == []


def test_an_expired_key_is_reported():
    calls: list[int] = []
    assert list(UserEvents(lambda: calls.append(1)).decode(b'{"e":"listenKeyExpired","E":1}')) == []
    assert calls == [1]


def test_a_liquidation_is_an_order_and_a_fill_under_the_venues_id(events: UserEvents):
    fill, order = events.decode(recorded("rs_user_data_json__order_update_calculated.json"))
    assert isinstance(fill, Fill)
    assert fill.client_order_id == order.client_order_id == "autoclose-1234567890"
    assert fill.quantity == Decimal("0.014")


def test_a_liquidation_without_quantity_is_no_fill(events: UserEvents):
    found = events.decode(recorded("py_ws_futures_order_update_liquidation_zero_qty.json"))
    assert [type(each) for each in found] == [Order]


def test_a_status_we_do_not_know_is_judged_by_what_is_filled(events: UserEvents):
    _, order = events.decode(recorded("rs_user_data_json__order_update_insurance.json"))
    assert isinstance(order, Order)
    assert order.status is OrderStatus.FILLED


@pytest.mark.skipif(not RECORDED.exists(), reason="recorded payloads are not beside the checkout")
@pytest.mark.parametrize(
    "path", sorted(RECORDED.glob("*_update*.json")), ids=lambda path: path.name.removesuffix(".json")
)
def test_each_recorded_private_message_decodes(events: UserEvents, path: Path):
    for event in events.decode(path.read_bytes()):
        assert event


def test_a_change_of_a_symbols_settings_is_told_whoever_made_it():
    told: list[tuple[str, int]] = []
    events = UserEvents(lambda: None, on_setting=lambda symbol, leverage: told.append((symbol, leverage)))
    config = {"e": "ACCOUNT_CONFIG_UPDATE", "E": 1, "T": 1, "ac": {"s": "BTCUSDT", "l": 20}}
    assert events.decode(json.dumps(config).encode()) == ()
    multi = {"e": "ACCOUNT_CONFIG_UPDATE", "E": 1, "T": 1, "ai": {"j": True}}
    assert events.decode(json.dumps(multi).encode()) == ()
    margin = account_event("MARGIN_TYPE_CHANGE", 5, B=[], P=[{"s": "ETHUSDT", "pa": "0"}])
    assert events.decode(margin) == []
    assert told == [("BTCUSDT", 20), ("ETHUSDT", 0)]
