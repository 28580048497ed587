"""Margin, leverage, position modes, funding, liquidation, delisting and what the account shows."""

from decimal import Decimal

import msgspec
import pytest

from service.exchange.simulated.engine import Assumptions, Engine
from service.exchange.simulated.faults import VenueFault
from service.records import Bracket
from tests.samples import instrument

D = Decimal
T0 = 1_760_000_400_000
EIGHT_HOURS = 28_800_000
NEXT_FUNDING = (T0 // EIGHT_HOURS + 1) * EIGHT_HOURS
BTC, ETH = "BTCUSDT", "ETHUSDT"


BRACKETS = (
    Bracket(
        notional_floor=D(0),
        notional_cap=D(5_000),
        max_leverage=50,
        maintenance_margin_fraction=D("0.01"),
        maintenance_amount=D(0),
    ),
    Bracket(
        notional_floor=D(5_000),
        notional_cap=D(100_000),
        max_leverage=20,
        maintenance_margin_fraction=D("0.02"),
        maintenance_amount=D(50),
    ),
)


def engine(deposit: str = "1000", taker: str = "0", rate: float = 0.0) -> Engine:
    venue = Engine(
        [instrument(BTC), instrument(ETH)],
        {BTC: BRACKETS, ETH: BRACKETS},
        Assumptions(D(0), D(taker), D(0), D(0)),
        now_ms=T0,
        funding_interval_ms=lambda _: EIGHT_HOURS,
        funding_rate=lambda _, __: rate,
    )
    venue.open_account("a", D(deposit))
    move(venue, "100", BTC)
    move(venue, "100", ETH)
    return venue


def move(venue: Engine, price: str, symbol: str = BTC, at_ms: int = T0) -> None:
    venue.on_prices(at_ms, {symbol: D(price)}, {symbol: D(price)})


def trade(venue: Engine, side: str, quantity: str, symbol: str = BTC, now_ms: int = T0, **more: str):
    params = {"symbol": symbol, "side": side, "type": "MARKET", "quantity": quantity, **more}
    return venue.new_order("a", params, now_ms)


def isolate(venue: Engine, leverage: str) -> None:
    venue.set_margin_type("a", {"symbol": BTC, "marginType": "ISOLATED"}, T0)
    venue.set_leverage("a", {"symbol": BTC, "leverage": leverage}, T0)


def wallet(venue: Engine) -> Decimal:
    return D(venue.account_v3("a", {}, T0)["totalWalletBalance"])


def risk(venue: Engine, symbol: str = BTC):
    return venue.position_risk_v3("a", {"symbol": symbol}, T0)[0]


def refused(code: int):
    return pytest.raises(VenueFault, match=rf"^{code} ")


def test_realised_profit_of_a_partial_exit_is_measured_from_the_average_entry():
    venue = engine("10000")
    trade(venue, "BUY", "1")
    move(venue, "103")
    trade(venue, "BUY", "2")  # 3 for 306
    move(venue, "104")
    trade(venue, "SELL", "1.5")
    assert wallet(venue) == D("10003")
    assert D(risk(venue)["entryPrice"]) == 102


def test_an_order_larger_than_the_position_turns_it_around():
    venue = engine()
    trade(venue, "BUY", "1")
    move(venue, "104")
    trade(venue, "SELL", "3")
    row = risk(venue)
    assert (D(row["positionAmt"]), D(row["entryPrice"]), wallet(venue)) == (D(-2), D(104), D(1004))


def test_hedge_mode_keeps_both_sides_apart_and_neither_turns_around():
    venue = engine()
    venue.set_position_mode("a", {"dualSidePosition": "true"}, T0)
    with refused(-4061):
        trade(venue, "BUY", "1")
    trade(venue, "BUY", "2", positionSide="LONG")
    trade(venue, "SELL", "1", positionSide="SHORT")
    rows = {r["positionSide"]: D(r["positionAmt"]) for r in venue.position_risk_v3("a", {}, T0)}
    assert rows == {"LONG": D(2), "SHORT": D(-1)}
    with refused(-2022):
        trade(venue, "BUY", "2", positionSide="SHORT")
    with refused(-1106):
        trade(venue, "SELL", "1", positionSide="LONG", reduceOnly="true")
    trade(venue, "BUY", "1", positionSide="SHORT")
    assert [r["positionSide"] for r in venue.position_risk_v3("a", {}, T0)] == ["LONG"]


def test_the_position_mode_changes_only_when_nothing_is_open():
    venue = engine()
    with refused(-4059):
        venue.set_position_mode("a", {"dualSidePosition": "false"}, T0)
    trade(venue, "BUY", "1")
    with refused(-4068):
        venue.set_position_mode("a", {"dualSidePosition": "true"}, T0)
    order = {"symbol": BTC, "side": "BUY", "type": "LIMIT", "timeInForce": "GTC"}
    venue.new_order("a", {**order, "quantity": "1", "price": "99"}, T0)
    with refused(-4067):
        venue.set_position_mode("a", {"dualSidePosition": "true"}, T0)
    assert venue.position_mode("a", {}, T0) == {"dualSidePosition": False}


def test_the_margin_type_changes_only_when_nothing_is_open():
    venue = engine()
    with refused(-4046):
        venue.set_margin_type("a", {"symbol": BTC, "marginType": "CROSSED"}, T0)
    trade(venue, "BUY", "1")
    with refused(-4048):
        venue.set_margin_type("a", {"symbol": BTC, "marginType": "ISOLATED"}, T0)
    order = {"symbol": BTC, "side": "BUY", "type": "LIMIT", "timeInForce": "GTC"}
    venue.new_order("a", {**order, "quantity": "1", "price": "99"}, T0)
    with refused(-4047):
        venue.set_margin_type("a", {"symbol": BTC, "marginType": "ISOLATED"}, T0)


def test_multi_assets_mode_excludes_isolated_margin():
    venue = engine()
    with refused(-4171):
        venue.set_multi_assets("a", {"multiAssetsMargin": "false"}, T0)
    venue.set_multi_assets("a", {"multiAssetsMargin": "true"}, T0)
    with refused(-4168):
        venue.set_margin_type("a", {"symbol": BTC, "marginType": "ISOLATED"}, T0)
    venue.set_multi_assets("a", {"multiAssetsMargin": "false"}, T0)
    venue.set_margin_type("a", {"symbol": BTC, "marginType": "ISOLATED"}, T0)
    with refused(-4167):
        venue.set_multi_assets("a", {"multiAssetsMargin": "true"}, T0)


def test_leverage_obeys_the_brackets():
    venue = engine("100000")
    for bad in ("0", "51"):
        with refused(-4028):
            venue.set_leverage("a", {"symbol": BTC, "leverage": bad}, T0)
    answer = venue.set_leverage("a", {"symbol": BTC, "leverage": "50"}, T0)
    assert answer == {"leverage": 50, "maxNotionalValue": "5000", "symbol": BTC}
    with refused(-2027):
        trade(venue, "BUY", "51")
    venue.set_leverage("a", {"symbol": BTC, "leverage": "20"}, T0)
    trade(venue, "BUY", "51")
    with refused(-2027):
        venue.set_leverage("a", {"symbol": BTC, "leverage": "50"}, T0)


def test_leverage_cannot_fall_below_what_the_balance_carries():
    venue = engine("100")
    venue.set_leverage("a", {"symbol": BTC, "leverage": "20"}, T0)
    trade(venue, "BUY", "10")
    with refused(-2028):
        venue.set_leverage("a", {"symbol": BTC, "leverage": "5"}, T0)
    isolated = engine()
    isolate(isolated, "10")
    trade(isolated, "BUY", "1")
    with refused(-4161):
        isolated.set_leverage("a", {"symbol": BTC, "leverage": "5"}, T0)


def test_isolated_margin_leaves_the_cross_balance_and_returns_in_proportion():
    venue = engine()
    isolate(venue, "10")
    trade(venue, "BUY", "10")
    figures = venue.account_v3("a", {}, T0)
    assert D(figures["totalCrossWalletBalance"]) == 900
    trade(venue, "SELL", "4")
    figures = venue.account_v3("a", {}, T0)
    assert (D(figures["totalCrossWalletBalance"]), D(risk(venue)["isolatedWallet"])) == (D(940), D(60))


def test_an_isolated_liquidation_costs_at_most_its_margin():
    venue = engine(taker="0.0005")
    isolate(venue, "10")
    trade(venue, "BUY", "10")  # 100 of margin
    before = wallet(venue)
    venue.take_events()
    move(venue, "50")
    assert before - D(100) <= wallet(venue) < before - D(99)
    assert venue.position_risk_v3("a", {}, T0) == []
    orders = [e["o"] for _, e in venue.take_events() if e["e"] == "ORDER_TRADE_UPDATE"]
    assert [(o["x"], o["X"]) for o in orders] == [("CALCULATED", "FILLED")]
    assert orders[0]["c"].startswith("autoclose-")


def test_liquidation_happens_at_the_price_the_venue_shows_and_pays_the_insurance_fund():
    venue = engine()
    isolate(venue, "10")
    trade(venue, "BUY", "10")
    assert D(risk(venue)["liquidationPrice"]).quantize(D("0.01")) == D("90.91")  # 900 / 9.9
    move(venue, "91")
    assert D(risk(venue)["positionAmt"]) == 10
    move(venue, "90.9")
    assert venue.position_risk_v3("a", {}, T0) == []
    paid = venue.income("a", {"incomeType": "INSURANCE_CLEAR"}, T0)
    assert [D(row["income"]) for row in paid] == [D("-9")]  # all of the margin that was left
    assert wallet(venue) == 900


def test_a_cross_liquidation_cancels_orders_and_closes_the_largest_position_first():
    venue = engine("1000")
    for symbol in (BTC, ETH):
        venue.set_leverage("a", {"symbol": symbol, "leverage": "20"}, T0)
    trade(venue, "BUY", "80", BTC)
    trade(venue, "BUY", "20", ETH)
    order = {"symbol": ETH, "side": "BUY", "type": "LIMIT", "timeInForce": "GTC"}
    venue.new_order("a", {**order, "quantity": "1", "price": "96"}, T0)
    move(venue, "88.6")  # 1000 - 912 is below the maintenance margin
    assert venue.open_orders("a", {}, T0) == []
    assert [row["symbol"] for row in venue.position_risk_v3("a", {}, T0)] in ([ETH], [])
    assert wallet(venue) >= 0


def test_a_cross_account_gapped_through_ends_with_nothing_but_never_with_a_debt():
    venue = engine("1000", taker="0.0005")
    venue.set_leverage("a", {"symbol": BTC, "leverage": "20"}, T0)
    trade(venue, "SELL", "100")
    move(venue, "200")
    assert D(0) <= wallet(venue) < D("12")
    assert venue.watched_symbols() == set()


def test_a_margin_call_comes_once_before_the_liquidation():
    venue = engine("1000")
    venue.set_leverage("a", {"symbol": BTC, "leverage": "20"}, T0)
    trade(venue, "BUY", "80")
    venue.take_events()
    for price in ("88.9", "88.9", "88.8"):
        move(venue, price)
    calls = [e for _, e in venue.take_events() if e["e"] == "MARGIN_CALL"]
    assert len(calls) == 1
    assert (calls[0]["p"][0]["s"], calls[0]["p"][0]["ps"]) == (BTC, "BOTH")


def test_funding_is_paid_by_longs_on_the_mark_notional_at_the_interval():
    venue = engine(rate=0.0001)
    trade(venue, "BUY", "5")
    venue.take_events()
    move(venue, "110", at_ms=NEXT_FUNDING - 1)
    assert wallet(venue) == 1000
    move(venue, "110", at_ms=NEXT_FUNDING)
    assert wallet(venue) == D("999.945")
    told = [e["a"] for _, e in venue.take_events() if e["e"] == "ACCOUNT_UPDATE"]
    assert [(a["m"], a["S"], D(a["B"][0]["bc"])) for a in told] == [("FUNDING_FEE", BTC, D("-0.055"))]
    rows = venue.income("a", {"incomeType": "FUNDING_FEE"}, NEXT_FUNDING)
    assert [(D(r["income"]), r["time"]) for r in rows] == [(D("-0.055"), NEXT_FUNDING)]


def test_every_missed_funding_time_is_settled_and_none_before_the_position():
    venue = engine(rate=0.0001)
    trade(venue, "SELL", "10", now_ms=NEXT_FUNDING)
    move(venue, "100", at_ms=NEXT_FUNDING + 3 * EIGHT_HOURS)
    assert wallet(venue) == D("1000.3")


def test_funding_of_an_isolated_position_changes_its_own_margin():
    venue = engine(rate=0.001)
    isolate(venue, "10")
    trade(venue, "BUY", "10")
    move(venue, "100", at_ms=NEXT_FUNDING)
    assert D(risk(venue)["isolatedWallet"]) == 99


def test_a_delisted_symbol_settles_its_positions_at_the_mark_price_without_a_fee():
    venue = engine(taker="0.001")
    trade(venue, "BUY", "1")
    stop = {"symbol": BTC, "side": "SELL", "type": "STOP_MARKET", "algoType": "CONDITIONAL"}
    venue.new_algo_order("a", {**stop, "triggerPrice": "95", "closePosition": "true"}, T0)
    venue.on_prices(T0, {}, {BTC: D("102")})
    venue.take_events()
    venue.remove_instrument(BTC, T0)
    assert wallet(venue) == D("1001.9")
    assert venue.watched_symbols() == set()
    told = [e["o"]["c"] for _, e in venue.take_events() if e["e"] == "ORDER_TRADE_UPDATE"]
    assert told[0].startswith("settlement_autoclose-")
    with refused(-4108):
        trade(venue, "BUY", "1")


def test_what_the_account_shows_adds_up():
    venue = engine()
    venue.set_leverage("a", {"symbol": BTC, "leverage": "10"}, T0)
    trade(venue, "BUY", "10")
    move(venue, "103")
    order = {"symbol": BTC, "side": "BUY", "type": "LIMIT", "timeInForce": "GTC"}
    venue.new_order("a", {**order, "quantity": "1", "price": "100"}, T0)
    shown = {k: v for k, v in venue.account_v3("a", {}, T0).items() if isinstance(v, str)}
    assert {name: D(value) for name, value in shown.items()} == {
        "totalInitialMargin": D("113"),
        "totalMaintMargin": D("10.3"),
        "totalWalletBalance": D("1000"),
        "totalUnrealizedProfit": D("30"),
        "totalMarginBalance": D("1030"),
        "totalPositionInitialMargin": D("103"),
        "totalOpenOrderInitialMargin": D("10"),
        "totalCrossWalletBalance": D("1000"),
        "totalCrossUnPnl": D("30"),
        "availableBalance": D("917"),
        "maxWithdrawAmount": D("917"),
    }
    assert D(venue.balance_v3("a", {}, T0)[0]["availableBalance"]) == 917


def test_v2_lists_every_symbol_and_v3_only_the_active_ones():
    venue = engine()
    trade(venue, "BUY", "1")
    assert len(venue.account_v2("a", {}, T0)["positions"]) == 2
    assert len(venue.position_risk_v2("a", {}, T0)) == 2
    assert [row["symbol"] for row in venue.account_v3("a", {}, T0)["positions"]] == [BTC]
    row = risk(venue)
    assert "leverage" not in row
    assert venue.symbol_config("a", {"symbol": BTC}, T0)[0]["leverage"] == 20
    assert venue.account_config("a", {}, T0)["dualSidePosition"] is False


def test_every_answer_and_event_is_plain_json():
    venue = engine(rate=0.0001)
    trade(venue, "BUY", "1")
    move(venue, "101", at_ms=NEXT_FUNDING)
    answers = [
        venue.account_v2("a", {}, T0),
        venue.position_risk_v2("a", {}, T0),
        venue.position_risk_v3("a", {}, T0),
        venue.income("a", {}, T0),
        venue.user_trades("a", {"symbol": BTC}, T0),
        venue.all_orders("a", {"symbol": BTC}, T0),
        venue.commission_rate("a", {"symbol": BTC}, T0),
        venue.state(),
        [event for _, event in venue.take_events()],
    ]
    for answer in answers:
        assert not _decimals_in(answer)
        msgspec.json.encode(answer)


def _decimals_in(value: object) -> bool:
    if isinstance(value, dict):
        return any(_decimals_in(v) for v in value.values())
    if isinstance(value, list):
        return any(_decimals_in(v) for v in value)
    return isinstance(value, Decimal | float)
