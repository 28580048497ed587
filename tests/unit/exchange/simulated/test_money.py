"""The books are exact whatever happens, and a restart in the middle changes nothing."""

from decimal import Decimal

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from service.exchange.simulated.engine import Assumptions, Engine
from service.exchange.simulated.faults import VenueFault
from service.records import Bracket
from tests.samples import instrument

D = Decimal
T0 = 1_760_000_400_000
SYMBOLS = ("AAAUSDT", "BBBUSDT")
KEYS = ("one", "two")


def build() -> Engine:
    rules = [
        instrument(
            symbol,
            tick_size=tick,
            step_size=step,
            market_step_size=step,
            min_price=tick,
            max_price=D(10_000),
            min_quantity=step,
            max_quantity=D(1_000_000),
            market_min_quantity=step,
            market_max_quantity=D(100_000),
            multiplier_up=D(2),
            multiplier_down=D("0.5"),
        )
        for symbol, tick, step in ((SYMBOLS[0], D("0.00001"), D("0.00001")), (SYMBOLS[1], D("0.1"), D(1)))
    ]
    bracket = Bracket(
        notional_floor=D(0),
        notional_cap=D(100_000),
        max_leverage=25,
        maintenance_margin_fraction=D("0.02"),
        maintenance_amount=D(0),
    )
    venue = Engine(
        rules,
        dict.fromkeys(SYMBOLS, (bracket,)),
        Assumptions(D("0.000173"), D("0.000457"), D(7), D(300)),
        now_ms=T0,
        funding_interval_ms=lambda symbol: 3_600_000 if symbol == SYMBOLS[0] else 14_400_000,
        funding_rate=lambda symbol, at_ms: (at_ms // 3_600_000 % 7 - 3) * 0.00037,
    )
    for key in KEYS:
        venue.open_account(key, D("1234.56789012"))
    prices = dict.fromkeys(SYMBOLS, D(10))
    venue.on_prices(T0, prices, prices)
    return venue


key = st.sampled_from(KEYS)
symbol = st.sampled_from(SYMBOLS)
side = st.sampled_from(("BUY", "SELL"))
position_side = st.sampled_from(("BOTH",) * 6 + ("LONG", "SHORT"))
price = st.integers(60, 160).map(lambda n: str(D(n) / 10))
fine_price = st.integers(500_000, 2_000_000).map(lambda n: str(D(n) / 100_000))
quantity = st.one_of(
    st.integers(1, 1_500).map(str),
    st.integers(100_000, 90_000_000).map(lambda n: str(D(n) / 100_000)),
)

flag = st.sampled_from(("true", "false"))
order = st.fixed_dictionaries(
    {
        "symbol": symbol,
        "side": side,
        "type": st.just("LIMIT"),
        "timeInForce": st.sampled_from(("GTC", "IOC", "FOK", "GTX")),
        "quantity": quantity,
        "price": st.one_of(price, fine_price),
        "positionSide": position_side,
        "reduceOnly": st.sampled_from(("", "", "true")),
    }
)
market = st.fixed_dictionaries(
    {
        "symbol": symbol,
        "side": side,
        "type": st.just("MARKET"),
        "quantity": quantity,
        "positionSide": position_side,
        "reduceOnly": st.sampled_from(("", "", "true")),
    }
)
algo = st.fixed_dictionaries(
    {
        "algoType": st.just("CONDITIONAL"),
        "symbol": symbol,
        "side": side,
        "type": st.sampled_from(
            ("STOP_MARKET", "TAKE_PROFIT_MARKET", "STOP", "TAKE_PROFIT", "TRAILING_STOP_MARKET")
        ),
        "quantity": quantity,
        "price": price,
        "triggerPrice": price,
        "callbackRate": st.sampled_from(("0.1", "3", "20")),
        "workingType": st.sampled_from(("CONTRACT_PRICE", "MARK_PRICE")),
        "positionSide": position_side,
        "reduceOnly": st.sampled_from(("", "", "true")),
    }
)
close = st.fixed_dictionaries(
    {
        "algoType": st.just("CONDITIONAL"),
        "symbol": symbol,
        "side": side,
        "type": st.sampled_from(("STOP_MARKET", "TAKE_PROFIT_MARKET")),
        "triggerPrice": price,
        "closePosition": st.just("true"),
        "timeInForce": st.sampled_from(("GTC", "GTE_GTC")),
        "positionSide": position_side,
    }
)
moves = st.tuples(
    st.just("move"),
    st.integers(0, 9_000_000),
    st.dictionaries(symbol, fine_price, min_size=1),
    st.dictionaries(symbol, fine_price),
)
step = st.one_of(
    moves,
    moves,
    st.tuples(st.just("new_order"), key, market),
    st.tuples(st.just("new_order"), key, market),
    st.tuples(st.just("new_order"), key, market),
    st.tuples(st.just("new_order"), key, order),
    st.tuples(st.just("new_algo_order"), key, algo),
    st.tuples(st.just("new_algo_order"), key, close),
    st.tuples(st.just("cancel_all"), key, st.fixed_dictionaries({"symbol": symbol})),
    st.tuples(
        st.just("set_leverage"),
        key,
        st.fixed_dictionaries({"symbol": symbol, "leverage": st.integers(1, 25).map(str)}),
    ),
    st.tuples(
        st.just("set_margin_type"),
        key,
        st.fixed_dictionaries({"symbol": symbol, "marginType": st.sampled_from(("ISOLATED", "CROSSED"))}),
    ),
    st.tuples(st.just("set_position_mode"), key, st.fixed_dictionaries({"dualSidePosition": flag})),
)


def play(venue: Engine, steps: list[tuple], started_ms: int) -> tuple[list[object], int]:
    """Everything the venue answers and tells while the steps are played."""
    said: list[object] = []
    now_ms = started_ms
    for name, first, *rest in steps:
        if name == "move":
            now_ms += first
            last, mark = ({s: D(p) for s, p in prices.items()} for prices in rest)
            venue.on_prices(now_ms, last, {**last, **mark})
        else:
            try:
                said.append(getattr(venue, name)(first, fitted(venue, first, rest[0]), now_ms))
            except VenueFault as refusal:
                said.append(refusal.code)
        said.extend(venue.take_events())
    return said, now_ms


def fitted(venue: Engine, account_key: str, params: dict[str, str]) -> dict[str, str]:
    """Mostly fit an order to the account's position mode and the symbol's step, so that more trade."""
    asked = dict(params)
    if asked.get("positionSide") == "BOTH" and venue.position_mode(account_key, {}, 0)["dualSidePosition"]:
        asked["positionSide"] = "LONG" if len(asked["side"]) % 2 else "SHORT"
        asked.pop("reduceOnly", None)
    if asked.get("symbol") == SYMBOLS[1] and "quantity" in asked:
        asked["quantity"] = str(int(D(asked["quantity"])) or 1)
    return asked


def check_books(venue: Engine, now_ms: int) -> None:
    state = venue.state()["accounts"]
    for account_key in KEYS:
        books = {
            name: D(state[account_key][name])
            for name in ("wallet", "deposits", "realised", "fees", "funding")
        }
        assert books["wallet"] == (books["deposits"] + books["realised"] - books["fees"] + books["funding"])
        incomes = venue.income(account_key, {"limit": "1000"}, now_ms)
        assert sum(D(row["income"]) for row in incomes) == books["wallet"]
        trades = [t for s in SYMBOLS for t in venue.user_trades(account_key, {"symbol": s}, now_ms)]
        assert sum(D(t["realizedPnl"]) for t in trades) == books["realised"]
        held = {s: D(0) for s in SYMBOLS}
        for t in trades:
            held[t["symbol"]] += D(t["qty"]) if t["side"] == "BUY" else -D(t["qty"])
        rows = venue.position_risk_v3(account_key, {}, now_ms)
        assert {s: sum(D(r["positionAmt"]) for r in rows if r["symbol"] == s) for s in SYMBOLS} == held
        for row in rows:
            assert row["positionSide"] != "LONG" or D(row["positionAmt"]) >= 0
            assert row["positionSide"] != "SHORT" or D(row["positionAmt"]) <= 0


@settings(max_examples=150, deadline=None)
@given(st.lists(step, max_size=40))
def test_the_wallet_is_deposits_plus_pnl_minus_fees_plus_funding_to_the_last_digit(steps: list[tuple]):
    venue = build()
    _, now_ms = play(venue, steps, T0)
    check_books(venue, now_ms)


@settings(max_examples=100, deadline=None)
@given(st.lists(step, max_size=25), st.lists(step, max_size=25))
def test_a_venue_restored_in_the_middle_has_the_same_future(before: list[tuple], after: list[tuple]):
    venue = build()
    _, now_ms = play(venue, before, T0)
    restored = build()
    restored.restore(msgspec.json.decode(msgspec.json.encode(venue.state())))
    assert restored.state() == venue.state()
    said, _ = play(venue, after, now_ms)
    said_again, _ = play(restored, after, now_ms)
    assert said_again == said
    assert restored.state() == venue.state()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(side, quantity, fine_price), min_size=1, max_size=30))
def test_a_position_closed_in_any_pieces_realises_what_was_received_minus_what_was_paid(
    fills: list[tuple[str, str, str]],
):
    venue = build()
    total = D(0)
    for way, amount, level in fills:
        prices = dict.fromkeys(SYMBOLS, D(level))
        venue.on_prices(T0, prices, prices)
        asked = {"symbol": SYMBOLS[0], "side": way, "type": "MARKET", "quantity": amount}
        try:
            venue.new_order("one", asked, T0)
        except VenueFault:
            continue
    for row in venue.position_risk_v3("one", {}, T0):
        way = "SELL" if D(row["positionAmt"]) > 0 else "BUY"
        asked = {"symbol": SYMBOLS[0], "side": way, "type": "MARKET", "reduceOnly": "true"}
        venue.new_order("one", {**asked, "quantity": str(abs(D(row["positionAmt"])))}, T0)
    trades = venue.user_trades("one", {"symbol": SYMBOLS[0], "limit": "1000"}, T0)
    for t in trades:
        total += D(t["quoteQty"]) * (1 if t["side"] == "SELL" else -1)
    realised = sum(D(t["realizedPnl"]) for t in trades)
    assert abs(realised - total) <= D("0.00000001") * len(trades)


def test_a_deposit_is_booked_once_however_often_the_account_is_opened():
    venue = build()
    venue.open_account("one", D(5))
    assert D(venue.balance_v2("one", {}, T0)[0]["balance"]) == D("1234.56789012")


def test_undelivered_events_survive_a_restart():
    venue = build()
    asked = {"symbol": SYMBOLS[1], "side": "BUY", "type": "MARKET", "quantity": "10"}
    venue.new_order("one", asked, T0)
    restored = build()
    restored.restore(venue.state())
    assert restored.take_events() == venue.take_events()
