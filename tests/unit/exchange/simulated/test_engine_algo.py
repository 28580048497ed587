"""Conditional orders: what triggers them, what they become, and what is told about it."""

from decimal import Decimal

import pytest

from service.exchange.simulated.engine import Assumptions, Engine
from service.exchange.simulated.faults import VenueFault
from service.records import Bracket
from tests.samples import instrument

D = Decimal
SYMBOL = "BTCUSDT"
T0 = 1_760_000_400_000


def engine(deposit: str = "10000") -> Engine:
    rules = instrument(SYMBOL)
    bracket = Bracket(
        notional_floor=D(0),
        notional_cap=D(1_000_000),
        max_leverage=50,
        maintenance_margin_fraction=D("0.01"),
        maintenance_amount=D(0),
    )
    venue = Engine(
        [rules],
        {SYMBOL: (bracket,)},
        Assumptions(D("0.0002"), D("0.0005"), D(0), D(0)),
        now_ms=T0,
        funding_interval_ms=lambda _: 28_800_000,
        funding_rate=lambda _, __: 0.0,
    )
    venue.open_account("a", D(deposit))
    move(venue, "100")
    return venue


def move(venue: Engine, price: str, mark: str | None = None) -> None:
    venue.on_prices(T0, {SYMBOL: D(price)}, {SYMBOL: D(mark or price)})


def market(venue: Engine, side: str, quantity: str, **more: str):
    params = {"symbol": SYMBOL, "side": side, "type": "MARKET", "quantity": quantity, **more}
    return venue.new_order("a", params, T0)


def algo(venue: Engine, side: str, kind: str, trigger: str = "", **more: str):
    params = {"algoType": "CONDITIONAL", "symbol": SYMBOL, "side": side, "type": kind}
    return venue.new_algo_order("a", {**params, "triggerPrice": trigger, **more}, T0)


def view(venue: Engine, client_id: str):
    return venue.query_algo_order("a", {"clientAlgoId": client_id}, T0)


def held(venue: Engine) -> Decimal:
    return sum((D(row["positionAmt"]) for row in venue.position_risk_v3("a", {}, T0)), D(0))


def last_price(venue: Engine) -> Decimal:
    return D(venue.user_trades("a", {"symbol": SYMBOL}, T0)[-1]["price"])


def refused(code: int):
    return pytest.raises(VenueFault, match=rf"^{code} ")


def test_a_triggered_stop_tells_its_whole_story_in_order():
    venue = engine()
    market(venue, "BUY", "1")
    algo(venue, "SELL", "STOP_MARKET", "95", closePosition="true", clientAlgoId="stop-1")
    venue.take_events()
    move(venue, "94.5")
    told = venue.take_events()
    shape = [(e["e"], e.get("o", {}).get("X", "")) for _, e in told]
    assert shape == [
        ("ALGO_UPDATE", "TRIGGERING"),
        ("ALGO_UPDATE", "TRIGGERED"),
        ("ORDER_TRADE_UPDATE", "NEW"),
        ("ACCOUNT_UPDATE", ""),
        ("ORDER_TRADE_UPDATE", "FILLED"),
        ("ALGO_UPDATE", "FINISHED"),
    ]
    fill = told[4][1]["o"]
    assert fill["c"] == "stop-1"
    assert told[1][1]["o"]["ai"] == str(fill["i"])
    assert (told[5][1]["o"]["ap"], D(told[5][1]["o"]["aq"])) == ("94.5", D(1))
    assert view(venue, "stop-1")["actualOrderId"] == str(fill["i"])
    assert held(venue) == 0


def test_a_gap_through_the_stop_fills_at_the_new_price():
    venue = engine()
    market(venue, "BUY", "1")
    algo(venue, "SELL", "STOP_MARKET", "95", closePosition="true")
    move(venue, "70")
    assert last_price(venue) == 70


@pytest.mark.parametrize(
    ("side", "kind", "trigger", "before", "at"),
    [
        ("SELL", "STOP_MARKET", "95", "95.1", "95"),
        ("BUY", "STOP_MARKET", "105", "104.9", "105"),
        ("SELL", "TAKE_PROFIT_MARKET", "105", "104.9", "105"),
        ("BUY", "TAKE_PROFIT_MARKET", "95", "95.1", "95"),
    ],
)
def test_a_trigger_acts_when_its_price_is_reached_from_its_side(
    side: str, kind: str, trigger: str, before: str, at: str
):
    venue = engine()
    algo(venue, side, kind, trigger, quantity="1")
    move(venue, before)
    assert held(venue) == 0
    move(venue, at)
    assert abs(held(venue)) == 1


def test_a_trigger_on_the_mark_price_ignores_the_last_price_and_the_reverse():
    venue = engine()
    market(venue, "BUY", "2")
    algo(venue, "SELL", "STOP_MARKET", "95", quantity="1", workingType="MARK_PRICE", clientAlgoId="m")
    algo(venue, "SELL", "STOP_MARKET", "96", quantity="1", clientAlgoId="l")
    move(venue, "97", mark="94")
    assert (view(venue, "m")["algoStatus"], view(venue, "l")["algoStatus"]) == ("FINISHED", "NEW")
    move(venue, "94", mark="100")
    assert (view(venue, "l")["algoStatus"], last_price(venue)) == ("FINISHED", D(94))


def test_the_nearer_of_stop_and_target_acts_first_and_the_other_rests_as_an_orphan():
    venue = engine()
    market(venue, "BUY", "1")
    algo(venue, "SELL", "STOP_MARKET", "95", closePosition="true", clientAlgoId="s")
    algo(venue, "SELL", "TAKE_PROFIT_MARKET", "105", closePosition="true", clientAlgoId="t")
    move(venue, "105")
    assert (view(venue, "t")["algoStatus"], view(venue, "s")["algoStatus"]) == ("FINISHED", "NEW")
    move(venue, "95")
    assert view(venue, "s")["algoStatus"] == "EXPIRED"
    assert held(venue) == 0


def test_gte_orders_expire_as_soon_as_the_position_is_flat():
    venue = engine()
    with refused(-4509):
        algo(venue, "SELL", "STOP_MARKET", "95", closePosition="true", timeInForce="GTE_GTC")
    market(venue, "BUY", "1")
    algo(venue, "SELL", "STOP_MARKET", "95", closePosition="true", timeInForce="GTE_GTC", clientAlgoId="g")
    market(venue, "SELL", "1")
    assert view(venue, "g")["algoStatus"] == "EXPIRED"


def test_margin_is_checked_at_the_trigger_and_not_before():
    venue = engine(deposit="100")
    algo(venue, "BUY", "STOP_MARKET", "105", quantity="400", clientAlgoId="big")
    move(venue, "106")
    seen = view(venue, "big")
    assert (seen["algoStatus"], seen["actualOrderId"]) == ("REJECTED", "")
    reasons = [e["o"].get("rm") for _, e in venue.take_events() if e["e"] == "ALGO_UPDATE"]
    assert reasons[-1] == "Margin is insufficient."


def test_a_reduce_only_stop_without_a_position_is_rejected_at_the_trigger():
    venue = engine()
    algo(venue, "SELL", "STOP_MARKET", "95", quantity="1", reduceOnly="true", clientAlgoId="r")
    move(venue, "90")
    assert view(venue, "r")["algoStatus"] == "REJECTED"


def test_a_stop_limit_becomes_a_resting_limit_order_and_finishes_with_it():
    venue = engine()
    algo(venue, "SELL", "STOP", "95", quantity="1", price="97", clientAlgoId="sl")
    move(venue, "94")
    assert view(venue, "sl")["algoStatus"] == "TRIGGERED"
    assert venue.open_orders("a", {}, T0)[0]["clientOrderId"] == "sl"
    move(venue, "98")
    seen = view(venue, "sl")
    assert (seen["algoStatus"], D(seen["actualPrice"])) == ("FINISHED", D(97))


def test_a_cancelled_triggered_order_finishes_its_conditional_order_with_nothing_filled():
    venue = engine()
    algo(venue, "SELL", "STOP", "95", quantity="1", price="97", clientAlgoId="sl")
    move(venue, "94")
    venue.cancel_order("a", {"symbol": SYMBOL, "origClientOrderId": "sl"}, T0)
    seen = view(venue, "sl")
    assert (seen["algoStatus"], D(seen["actualQty"])) == ("FINISHED", D(0))


def test_a_trailing_stop_follows_the_best_price_and_triggers_at_its_distance():
    venue = engine()
    market(venue, "BUY", "1")
    algo(venue, "SELL", "TRAILING_STOP_MARKET", quantity="1", callbackRate="5", reduceOnly="true")
    for price in ("104", "120", "114.1"):
        move(venue, price)
        assert held(venue) == 1
    move(venue, "114")
    assert (held(venue), last_price(venue)) == (D(0), D(114))


def test_a_trailing_buy_mirrors_a_trailing_sell():
    venue = engine()
    market(venue, "SELL", "1")
    algo(venue, "BUY", "TRAILING_STOP_MARKET", quantity="1", callbackRate="5", reduceOnly="true")
    for price in ("90", "80", "83.9"):
        move(venue, price)
        assert held(venue) == -1
    move(venue, "84")
    assert held(venue) == 0


def test_a_trailing_stop_waits_for_its_activation_and_tells_of_it():
    venue = engine()
    market(venue, "BUY", "1")
    algo(
        venue,
        "SELL",
        "TRAILING_STOP_MARKET",
        quantity="1",
        callbackRate="1",
        activatePrice="110",
        clientAlgoId="t",
    )
    move(venue, "98")
    assert held(venue) == 1
    move(venue, "110")
    active = [e["o"]["ia"] for _, e in venue.take_events() if e["e"] == "ALGO_UPDATE"]
    assert active == [False, True]
    move(venue, "108.9")
    assert held(venue) == 0


def test_a_trigger_that_would_act_at_once_is_refused():
    venue = engine()
    for side, kind, trigger in (
        ("SELL", "STOP_MARKET", "100"),
        ("BUY", "STOP_MARKET", "99"),
        ("SELL", "TAKE_PROFIT_MARKET", "100"),
        ("BUY", "TAKE_PROFIT_MARKET", "101"),
    ):
        with refused(-2021):
            algo(venue, side, kind, trigger, quantity="1")
    with refused(-2021):
        algo(venue, "SELL", "TRAILING_STOP_MARKET", quantity="1", callbackRate="1", activatePrice="99")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"algoType": ""}, -1102),
        ({"algoType": "VP"}, -1130),
        ({"type": "MARKET"}, -1116),
        ({"triggerPrice": ""}, -1102),
        ({"triggerPrice": "0"}, -4006),
        ({"triggerPrice": "95.05"}, -1111),
        ({"quantity": ""}, -1102),
        ({"quantity": "0.001"}, -4164),
        ({"closePosition": "true"}, -1106),
        ({"closePosition": "true", "quantity": "", "type": "STOP", "price": "95"}, -4136),
        ({"closePosition": "true", "quantity": "", "reduceOnly": "true"}, -1106),
        ({"type": "STOP"}, -1102),
        ({"type": "TRAILING_STOP_MARKET"}, -1102),
        ({"type": "TRAILING_STOP_MARKET", "callbackRate": "20.1"}, -2007),
        ({"type": "TRAILING_STOP_MARKET", "callbackRate": "0.05"}, -2007),
        ({"timeInForce": "DAY"}, -1115),
        ({"workingType": "INDEX_PRICE"}, -1130),
        ({"positionSide": "SHORT"}, -4061),
        ({"clientAlgoId": "with space"}, -1100),
    ],
)
def test_a_bad_conditional_order_is_refused_with_the_venue_code(changes: dict[str, str], code: int):
    venue = engine()
    good = {"algoType": "CONDITIONAL", "symbol": SYMBOL, "side": "SELL", "type": "STOP_MARKET"}
    with refused(code):
        venue.new_algo_order("a", {**good, "triggerPrice": "95", "quantity": "1", **changes}, T0)
    assert venue.open_algo_orders("a", {}, T0) == []


def test_a_second_close_position_stop_in_one_direction_is_refused():
    venue = engine()
    algo(venue, "SELL", "STOP_MARKET", "95", closePosition="true")
    with refused(-4130):
        algo(venue, "SELL", "STOP_MARKET", "94", closePosition="true")
    algo(venue, "SELL", "TAKE_PROFIT_MARKET", "105", closePosition="true")
    algo(venue, "BUY", "STOP_MARKET", "105", closePosition="true")


def test_at_most_200_conditional_orders_rest_and_ids_may_not_repeat():
    venue = engine()
    for number in range(200):
        algo(venue, "SELL", "STOP_MARKET", "95", quantity="1", clientAlgoId=f"n{number}")
    with refused(-4116):
        algo(venue, "SELL", "STOP_MARKET", "95", quantity="1", clientAlgoId="n7")
    with refused(-4045):
        algo(venue, "SELL", "STOP_MARKET", "95", quantity="1")


def test_conditional_orders_are_cancelled_one_by_one_or_by_symbol():
    venue = engine()
    first = algo(venue, "SELL", "STOP_MARKET", "95", quantity="1", clientAlgoId="one")
    algo(venue, "SELL", "STOP_MARKET", "94", quantity="1", clientAlgoId="two")
    venue.cancel_algo_order("a", {"algoId": str(first["algoId"])}, T0)
    with refused(-2011):
        venue.cancel_algo_order("a", {"clientAlgoId": "one"}, T0)
    venue.cancel_all_algo("a", {"symbol": SYMBOL}, T0)
    assert venue.open_algo_orders("a", {}, T0) == []
    with refused(-2013):
        venue.query_algo_order("a", {"clientAlgoId": "never"}, T0)
    statuses = [row["algoStatus"] for row in venue.all_algo_orders("a", {"symbol": SYMBOL}, T0)]
    assert statuses == ["CANCELED", "CANCELED"]


def test_in_hedge_mode_a_stop_closes_its_own_side_only():
    venue = engine()
    venue.set_position_mode("a", {"dualSidePosition": "true"}, T0)
    market(venue, "BUY", "2", positionSide="LONG")
    market(venue, "SELL", "1", positionSide="SHORT")
    algo(venue, "SELL", "STOP_MARKET", "95", closePosition="true", positionSide="LONG")
    move(venue, "95")
    assert held(venue) == -1
