"""Orders on the book: types, times in force, filters, refusals, and the order of events."""

import re
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.exchange.simulated.account import ACCOUNT_HISTORY_LENGTH, HISTORY_LENGTH, Account
from service.exchange.simulated.engine import Assumptions, Engine
from service.exchange.simulated.faults import VenueFault
from service.exchange.simulated.orders import Income
from service.records import Bracket
from tests.samples import instrument

D = Decimal
SYMBOL = "BTCUSDT"
T0 = 1_760_000_400_000
QUIET = Assumptions(
    maker_fee_fraction=D("0.0002"),
    taker_fee_fraction=D("0.0005"),
    spread_bps=D(0),
    slippage_bps_per_million=D(0),
)


RULES = instrument(SYMBOL, tick_size=D("0.10"), market_max_quantity=D(120))
BRACKETS = (
    Bracket(
        notional_floor=D(0),
        notional_cap=D(50_000),
        max_leverage=50,
        maintenance_margin_fraction=D("0.01"),
        maintenance_amount=D(0),
    ),
    Bracket(
        notional_floor=D(50_000),
        notional_cap=D(1_000_000),
        max_leverage=20,
        maintenance_margin_fraction=D("0.025"),
        maintenance_amount=D(750),
    ),
)


def engine(assumptions: Assumptions = QUIET, deposit: str = "10000") -> Engine:
    venue = Engine(
        [RULES],
        {SYMBOL: BRACKETS},
        assumptions,
        now_ms=T0,
        funding_interval_ms=lambda _: 28_800_000,
        funding_rate=lambda _, __: 0.0001,
    )
    venue.open_account("a", D(deposit))
    move(venue, "100")
    return venue


def move(venue: Engine, price: str, mark: str | None = None, at_ms: int = T0) -> None:
    venue.on_prices(at_ms, {SYMBOL: D(price)}, {SYMBOL: D(mark or price)})


def order(venue: Engine, side: str, quantity: str, **more: str) -> dict[str, object]:
    params = {"symbol": SYMBOL, "side": side, "type": "MARKET", "quantity": quantity, **more}
    return venue.new_order("a", params, T0)


def limit(venue: Engine, side: str, quantity: str, price: str, tif: str = "GTC", **more: str):
    return order(venue, side, quantity, type="LIMIT", price=price, timeInForce=tif, **more)


def refused(code: int):
    return pytest.raises(VenueFault, match=rf"^{code} ")


def held(venue: Engine) -> Decimal:
    return sum((D(row["positionAmt"]) for row in venue.position_risk_v3("a", {}, T0)), D(0))


def kinds(venue: Engine) -> list[str]:
    """Events in order, as their type and what they report."""
    told = []
    for _, event in venue.take_events():
        details = event.get("o", {})
        told.append(" ".join(filter(None, (event["e"], details.get("x"), details.get("X")))))
    return told


def status(venue: Engine, client_id: str) -> str:
    asked = {"symbol": SYMBOL, "origClientOrderId": client_id}
    return venue.query_order("a", asked, T0)["status"]


def test_a_market_order_tells_new_then_account_then_trade():
    venue = engine()
    venue.take_events()
    answer = order(venue, "BUY", "0.5", newClientOrderId="one")
    assert kinds(venue) == [
        "ORDER_TRADE_UPDATE NEW NEW",
        "ACCOUNT_UPDATE",
        "ORDER_TRADE_UPDATE TRADE FILLED",
    ]
    assert answer["status"] == "NEW"
    assert "avgPrice" not in answer
    assert "cumQuote" not in answer
    assert status(venue, "one") == "FILLED"


def test_a_result_response_states_what_was_executed():
    answer = order(engine(), "BUY", "0.5", newOrderRespType="RESULT")
    assert (answer["status"], answer["executedQty"]) == ("FILLED", "0.500")


def test_a_market_order_pays_half_the_spread_and_slippage_by_notional_on_the_tick():
    costly = Assumptions(D("0.0002"), D("0.0005"), D(20), D(10_000))
    venue = engine(costly)
    order(venue, "BUY", "50", newClientOrderId="b")  # ask 100.10; 5,005 quote cost 50.05 bps
    asked = {"symbol": SYMBOL, "origClientOrderId": "b"}
    assert D(venue.query_order("a", asked, T0)["avgPrice"]) == D("100.7")  # 100.601 rounded up


def test_prices_given_as_a_book_replace_the_derived_ones():
    venue = engine()
    venue.set_book(SYMBOL, D("99.5"), D("100.5"))
    order(venue, "BUY", "1")
    assert venue.user_trades("a", {"symbol": SYMBOL}, T0)[0]["price"] in ("100.5", "100.50")


def test_a_resting_limit_order_fills_at_its_price_as_maker_when_touched():
    venue = engine()
    limit(venue, "BUY", "1", "99", newClientOrderId="r")
    move(venue, "99.1")
    assert status(venue, "r") == "NEW"
    move(venue, "98")
    trade = venue.user_trades("a", {"symbol": SYMBOL}, T0)[0]
    assert (D(trade["price"]), trade["maker"], D(trade["commission"])) == (D(99), True, D("0.0198"))


def test_a_marketable_limit_order_takes_at_the_market_price():
    venue = engine()
    limit(venue, "BUY", "1", "104")
    trade = venue.user_trades("a", {"symbol": SYMBOL}, T0)[0]
    assert (D(trade["price"]), trade["maker"]) == (D(100), False)


def test_a_limit_order_takes_only_what_the_slippage_leaves_within_its_limit():
    venue = engine(Assumptions(D(0), D(0), D(0), D(10_000)))  # 1 bps for each 100 of notional
    limit(venue, "BUY", "200", "101", newClientOrderId="p")  # room for 100 bps: 10,000 of notional
    view = venue.open_order("a", {"symbol": SYMBOL, "origClientOrderId": "p"}, T0)
    assert (view["status"], D(view["executedQty"])) == ("PARTIALLY_FILLED", D(100))
    move(venue, "100.5")
    assert status(venue, "p") == "FILLED"


def test_ioc_expires_what_it_cannot_take():
    venue = engine()
    venue.take_events()
    limit(venue, "BUY", "1", "99", "IOC", newClientOrderId="i")
    assert status(venue, "i") == "EXPIRED"
    assert kinds(venue) == ["ORDER_TRADE_UPDATE NEW NEW", "ORDER_TRADE_UPDATE EXPIRED EXPIRED"]


def test_fok_is_refused_unless_it_fills_whole():
    venue = engine(Assumptions(D(0), D(0), D(0), D(10_000)))
    with refused(-5021):
        limit(venue, "BUY", "1", "99", "FOK")
    with refused(-5021):
        limit(venue, "BUY", "200", "101", "FOK")
    limit(venue, "BUY", "50", "101", "FOK")
    assert held(venue) == 50


def test_post_only_is_refused_when_it_would_take():
    venue = engine()
    with refused(-5022):
        limit(venue, "BUY", "1", "100", "GTX")
    limit(venue, "BUY", "1", "99.9", "GTX", newClientOrderId="g")
    assert status(venue, "g") == "NEW"


def test_what_a_price_passes_is_executed_in_the_order_of_passing():
    venue = engine()
    limit(venue, "BUY", "1", "96", newClientOrderId="far")
    limit(venue, "BUY", "1", "98", newClientOrderId="near")
    move(venue, "95")
    orders = {t["orderId"]: D(t["price"]) for t in venue.user_trades("a", {"symbol": SYMBOL}, T0)}
    assert list(orders.values()) == [D(98), D(96)]


def test_cancel_removes_an_order_and_a_second_cancel_is_unknown():
    venue = engine()
    limit(venue, "BUY", "1", "99", newClientOrderId="c")
    asked = {"symbol": SYMBOL, "origClientOrderId": "c"}
    assert venue.cancel_order("a", asked, T0)["status"] == "CANCELED"
    with refused(-2011):
        venue.cancel_order("a", asked, T0)
    with refused(-2013):
        venue.query_order("a", {"symbol": SYMBOL, "orderId": "1"}, T0)


def test_reduce_only_needs_a_position_is_cut_to_it_and_never_flips():
    venue = engine()
    with refused(-2022):
        order(venue, "SELL", "1", reduceOnly="true")
    order(venue, "BUY", "1")
    with refused(-2022):
        order(venue, "BUY", "1", reduceOnly="true")
    order(venue, "SELL", "5", reduceOnly="true", newClientOrderId="out")
    assert (held(venue), status(venue, "out")) == (D(0), "FILLED")


def test_resting_reduce_only_orders_expire_when_the_position_is_gone():
    venue = engine()
    order(venue, "BUY", "1")
    limit(venue, "SELL", "1", "104", reduceOnly="true", newClientOrderId="target")
    order(venue, "SELL", "1")
    assert status(venue, "target") == "EXPIRED"


def test_the_minimum_notional_spares_what_only_reduces():
    venue = engine()
    with refused(-4164):
        order(venue, "BUY", "0.01")
    order(venue, "BUY", "1")
    order(venue, "SELL", "0.01", reduceOnly="true")
    assert held(venue) == D("0.99")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"symbol": ""}, -1102),
        ({"symbol": "NOPEUSDT"}, -1121),
        ({"side": ""}, -1102),
        ({"side": "HOLD"}, -1117),
        ({"type": ""}, -1102),
        ({"type": "OCO"}, -1116),
        ({"type": "STOP_MARKET"}, -4120),
        ({"type": "TRAILING_STOP_MARKET"}, -4120),
        ({"quantity": ""}, -1102),
        ({"quantity": "abc"}, -1100),
        ({"quantity": "NaN"}, -1100),
        ({"quantity": "0"}, -4003),
        ({"quantity": "-1"}, -4003),
        ({"quantity": "0.0001"}, -1111),
        ({"quantity": "1001"}, -4005),
        ({"quantity": "121", "type": "MARKET", "price": "", "timeInForce": ""}, -4005),
        ({"price": ""}, -1102),
        ({"price": "0"}, -4001),
        ({"price": "99.05"}, -4014),
        ({"price": "99.001"}, -1111),
        ({"price": "0.5"}, -4013),
        ({"price": "1000001"}, -4002),
        ({"price": "105.1"}, -4016),
        ({"price": "94.9", "side": "SELL"}, -4024),
        ({"timeInForce": ""}, -1102),
        ({"timeInForce": "GTE_GTC"}, -1115),
        ({"positionSide": "LONG"}, -4061),
        ({"positionSide": "UP"}, -1130),
        ({"newClientOrderId": "x" * 37}, -4015),
        ({"newClientOrderId": "white space"}, -1100),
        ({"reduceOnly": "maybe"}, -1130),
        ({"priceMatch": "QUEUE"}, -1130),
        ({"quantity": "600"}, -2027),
        ({"type": "MARKET"}, -1106),
    ],
)
def test_a_bad_order_is_refused_with_the_venue_code(changes: dict[str, str], code: int):
    venue = engine(deposit="1000000")
    venue.set_leverage("a", {"symbol": SYMBOL, "leverage": "50"}, T0)
    good = {"symbol": SYMBOL, "side": "BUY", "type": "LIMIT", "timeInForce": "GTC"}
    venue.take_events()
    with refused(code):
        venue.new_order("a", {**good, "quantity": "1", "price": "99", **changes}, T0)
    assert venue.take_events() == []
    assert venue.open_orders("a", {}, T0) == []


def test_a_quantity_off_the_step_is_refused():
    venue = engine()
    venue.add_instrument(
        msgspec.structs.replace(RULES, step_size=D("0.005")),
        BRACKETS,
    )
    with refused(-4023):
        limit(venue, "BUY", "1.001", "99")


def test_a_client_order_id_may_not_repeat_among_open_orders():
    venue = engine()
    limit(venue, "BUY", "1", "99", newClientOrderId="same")
    with refused(-4116):
        limit(venue, "BUY", "1", "98", newClientOrderId="same")
    move(venue, "98.5")
    limit(venue, "BUY", "1", "98", newClientOrderId="same")


def test_a_market_order_far_from_the_mark_price_is_refused():
    venue = engine()
    move(venue, "106", mark="100")
    with refused(-4131):
        order(venue, "BUY", "1")


def test_margin_must_cover_the_position_and_its_fee():
    venue = engine(deposit="1000")
    venue.set_leverage("a", {"symbol": SYMBOL, "leverage": "10"}, T0)
    with refused(-2019):
        order(venue, "BUY", "100")  # 1,000 of margin, but nothing left for the fee
    order(venue, "BUY", "99")
    with refused(-2019):
        limit(venue, "BUY", "10", "99")
    order(venue, "SELL", "99")  # an exit needs no margin


def test_open_orders_take_margin_and_the_worse_side_counts():
    venue = engine(deposit="1000")
    venue.set_leverage("a", {"symbol": SYMBOL, "leverage": "10"}, T0)
    limit(venue, "BUY", "60", "99")
    limit(venue, "SELL", "50", "101")
    with refused(-2019):
        limit(venue, "BUY", "60", "98")


def test_a_batch_answers_each_order_by_itself():
    venue = engine()
    good = {"symbol": SYMBOL, "side": "BUY", "type": "MARKET", "quantity": 1, "reduceOnly": False}
    answers = venue.batch_orders("a", [good, {**good, "type": "STOP_MARKET"}], T0)
    assert (answers[0]["status"], answers[1]["code"]) == ("NEW", -4120)
    with refused(-4082):
        venue.batch_orders("a", [good] * 6, T0)


def test_a_batch_cancel_names_orders_by_either_id():
    venue = engine()
    first = limit(venue, "BUY", "1", "99", newClientOrderId="x")
    limit(venue, "BUY", "1", "98", newClientOrderId="y")
    by_id = venue.cancel_batch("a", {"symbol": SYMBOL, "orderIdList": f"[{first['orderId']},5]"}, T0)
    assert (by_id[0]["status"], by_id[1]["code"]) == ("CANCELED", -2011)
    by_name = {"symbol": SYMBOL, "origClientOrderIdList": '["y"]'}
    assert venue.cancel_batch("a", by_name, T0)[0]["status"] == "CANCELED"


def test_cancel_all_leaves_conditional_orders_and_other_symbols_alone():
    venue = engine()
    limit(venue, "BUY", "1", "99")
    stop = {"symbol": SYMBOL, "side": "SELL", "type": "STOP_MARKET", "algoType": "CONDITIONAL"}
    venue.new_algo_order("a", {**stop, "triggerPrice": "95", "closePosition": "true"}, T0)
    assert venue.cancel_all("a", {"symbol": SYMBOL}, T0)["code"] == 200
    assert (len(venue.open_orders("a", {}, T0)), len(venue.open_algo_orders("a", {}, T0))) == (0, 1)


def test_the_countdown_cancels_when_it_is_not_renewed():
    venue = engine()
    limit(venue, "BUY", "1", "96")
    venue.countdown_cancel_all("a", {"symbol": SYMBOL, "countdownTime": "1000"}, T0)
    move(venue, "100", at_ms=T0 + 999)
    assert len(venue.open_orders("a", {}, T0)) == 1
    move(venue, "100", at_ms=T0 + 1000)
    assert venue.open_orders("a", {}, T0) == []


def test_a_test_order_is_checked_but_not_placed():
    venue = engine()
    params = {"symbol": SYMBOL, "side": "BUY", "type": "MARKET", "quantity": "1"}
    assert venue.order_test("a", params, T0) == {}
    assert held(venue) == 0
    with refused(-1111):
        venue.order_test("a", {**params, "quantity": "0.00001"}, T0)


def test_all_orders_and_trades_page_by_id_and_time():
    venue = engine()
    ids = [limit(venue, "BUY", "1", str(99 - n))["orderId"] for n in range(4)]
    move(venue, "95")
    listed = venue.all_orders("a", {"orderId": str(ids[1]), "limit": "2"}, T0)
    assert [row["orderId"] for row in listed] == ids[1:3]
    trades = venue.user_trades("a", {"symbol": SYMBOL, "fromId": "3"}, T0)
    assert [row["id"] for row in trades] == [3, 4]
    assert venue.all_orders("a", {"endTime": str(T0 - 1)}, T0) == []


def test_only_symbols_with_something_in_them_are_watched():
    venue = engine()
    assert venue.watched_symbols() == set()
    limit(venue, "BUY", "1", "99", newClientOrderId="w")
    assert venue.watched_symbols() == {SYMBOL}
    venue.cancel_order("a", {"symbol": SYMBOL, "origClientOrderId": "w"}, T0)
    assert venue.watched_symbols() == set()


def test_an_unknown_account_is_refused():
    with refused(-2015):
        engine().balance_v2("nobody", {}, T0)


@given(st.text(min_size=1, max_size=40))
def test_client_order_ids_are_accepted_exactly_when_they_match_the_venue_pattern(client_id: str):
    venue = engine()
    if re.fullmatch(r"[.A-Z:/a-z0-9_-]{1,36}", client_id):
        assert limit(venue, "BUY", "1", "99", newClientOrderId=client_id)["clientOrderId"] == client_id
    else:
        with pytest.raises(VenueFault):
            limit(venue, "BUY", "1", "99", newClientOrderId=client_id)


def test_an_account_keeps_its_newest_history_over_all_symbols():
    account = Account(key="a")
    for number in range(3 * ACCOUNT_HISTORY_LENGTH):
        account.record_income(
            Income(
                tran_id=number,
                kind="COMMISSION",
                symbol=f"S{number % 700}" if number else "",
                amount=D(1),
                trade_id="",
                at_ms=number,
            )
        )
    kept = sorted(income.tran_id for incomes in account.incomes.values() for income in incomes)
    assert kept == list(range(2 * ACCOUNT_HISTORY_LENGTH, 3 * ACCOUNT_HISTORY_LENGTH))
    assert "" not in account.incomes


def test_orders_and_trades_of_a_long_run_do_not_gather():
    venue = engine(deposit="1000000")
    for _ in range(ACCOUNT_HISTORY_LENGTH // 3):
        order(venue, "BUY", "1")
        order(venue, "SELL", "1")
    [saved] = venue.state()["accounts"].values()
    assert len(saved["trades"][SYMBOL]) == len(saved["finished_orders"][SYMBOL]) == HISTORY_LENGTH
    assert sum(map(len, saved["incomes"].values())) == HISTORY_LENGTH + 1  # and the deposit
