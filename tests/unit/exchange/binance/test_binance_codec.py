"""Decoding of the venue's JSON: made-up payloads for the odd cases, recorded ones for the real shapes."""

import gzip
import itertools
import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import VenueMalformed
from service.exchange.binance import codec
from service.records import OrderStatus, OrderType, Side

PAYLOADS = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "payloads"
STEP_MS = 300_000
NOW_MS = 1_700_000_100_000  # on the 5m grid


def payload(name: str) -> bytes:
    path = PAYLOADS / name
    if not path.exists():
        pytest.skip(f"recorded payload {name} is not beside the checkout")
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def kline(open_ms: int, **changes: object) -> list[object]:
    row = {"open": "10", "high": "12", "low": "9", "close": "11", "volume": "100"} | changes
    return [open_ms, *row.values(), open_ms + STEP_MS - 1, "1000", 5, "50", "500", "0"]


def candles(*rows: object, now_ms: int = NOW_MS) -> list[tuple[int, float, float, float, float, float]]:
    return codec.closed_candles(json.dumps(rows).encode(), "5m", now_ms)


def test_the_open_candle_is_dropped_and_the_closed_one_is_kept():
    start = NOW_MS - STEP_MS
    assert candles(kline(start), kline(NOW_MS)) == [(start, 10.0, 12.0, 9.0, 11.0, 100.0)]


def test_a_candle_is_closed_in_the_millisecond_after_its_close_time():
    assert candles(kline(NOW_MS), now_ms=NOW_MS + STEP_MS - 1) == []
    assert len(candles(kline(NOW_MS), now_ms=NOW_MS + STEP_MS)) == 1


def test_candles_out_of_order_and_repeated_come_back_sorted_and_once():
    times = [NOW_MS - n * STEP_MS for n in (1, 3, 2, 3)]
    assert [row[0] for row in candles(*map(kline, times))] == sorted(set(times))


@pytest.mark.parametrize(
    "row",
    [
        kline(NOW_MS - STEP_MS + 1),
        kline(NOW_MS - STEP_MS, high="8"),
        kline(NOW_MS - STEP_MS, low="10.5"),
        kline(NOW_MS - STEP_MS, open="NaN"),
        kline(NOW_MS - STEP_MS, close="nan"),
        kline(NOW_MS - STEP_MS, high="Infinity"),
        kline(NOW_MS - STEP_MS, low="-1"),
        kline(NOW_MS - STEP_MS, volume="-5"),
        kline(NOW_MS - STEP_MS, volume="NaN"),
        kline(NOW_MS - STEP_MS, open="ten"),
        kline(NOW_MS - STEP_MS)[:4],
        ["x"],
        {"open": 1},
        None,
    ],
)
def test_a_malformed_candle_is_dropped_and_its_neighbours_stay(row: object):
    good = kline(NOW_MS - 2 * STEP_MS)
    assert [found[0] for found in candles(good, row)] == [NOW_MS - 2 * STEP_MS]


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b"null", b'[["a"]]', b"[1", b"\xff\xfe", b'[["\xff"]]']
)
def test_an_answer_without_a_usable_candle_is_malformed(body: bytes):
    with pytest.raises(VenueMalformed):
        codec.closed_candles(body, "5m", NOW_MS)


def test_no_candles_is_an_answer_too():
    assert candles() == []


@given(st.lists(st.integers(min_value=1, max_value=300), max_size=50))
def test_whatever_the_order_candles_are_strictly_increasing_and_on_the_grid(steps: list[int]):
    times = [row[0] for row in candles(*(kline(NOW_MS - n * STEP_MS) for n in steps))]
    assert times == sorted(set(times))
    assert all(time % STEP_MS == 0 for time in times)


def test_a_recorded_klines_answer_is_decoded_whole():
    rows = codec.closed_candles(payload("keyus/fapi_klines_BTCUSDT_1d.json"), "1d", 2_000_000_000_000)
    assert len(rows) == len(json.loads(payload("keyus/fapi_klines_BTCUSDT_1d.json")))
    assert rows[0] == (1750118400000, 106750.10, 107727.40, 103300.00, 104508.00, 226051.863)


def test_a_recorded_exchange_info_gives_instruments_and_limits():
    instruments, limits = codec.exchange_info(payload("cryptofeed/fapi_exchangeInfo_2021-07-21.json"))
    by_symbol = {each.symbol: each for each in instruments}
    assert len(instruments) == 122
    assert by_symbol["BTCUSDT"].tick_size == Decimal("0.01")
    assert by_symbol["BTCUSDT"].step_size == Decimal("0.001")
    assert [(each.kind, each.limit) for each in limits][:1] == [("REQUEST_WEIGHT", 2400)]


def test_a_large_recorded_exchange_info_loses_only_the_symbol_whose_tick_size_is_zero():
    body = payload("alphadogs/fapi_exchangeInfo_2025-12-24_testnet-likely.json.gz")
    instruments, _ = codec.exchange_info(body)
    listed = {each["symbol"] for each in json.loads(body)["symbols"]}
    assert listed - {each.symbol for each in instruments} == {"OPENUSDT"}


def test_a_symbol_without_its_filters_is_dropped_alone():
    def symbol(name: str, tick: str) -> dict[str, object]:
        return {
            "symbol": name,
            "baseAsset": "A",
            "quoteAsset": "USDT",
            "filters": [
                {"filterType": "PRICE_FILTER", "tickSize": tick, "minPrice": "1", "maxPrice": "9"},
                {"filterType": "LOT_SIZE", "stepSize": "0.1", "minQty": "0.1", "maxQty": "9"},
                {"filterType": "SOMETHING_NEW", "limit": {"a": 1}},
            ],
        }

    rows = [symbol("币安人生USDT", "0.01"), symbol("B", "0"), {"symbol": "C"}, 5]
    instruments, limits = codec.exchange_info(json.dumps({"symbols": rows}).encode())
    assert [each.symbol for each in instruments] == ["币安人生USDT"]
    assert limits == []


def test_a_ticker_without_a_price_is_left_out():
    rows = [
        {"symbol": "A", "lastPrice": "1.5", "quoteVolume": "10"},
        {"symbol": "B", "lastPrice": "0", "quoteVolume": "10"},
        {"symbol": "C", "lastPrice": "NaN", "quoteVolume": "10"},
        {"symbol": "D"},
    ]
    assert [each.symbol for each in codec.tickers(json.dumps(rows).encode())] == ["A"]


def test_a_delivery_contract_without_a_funding_rate_has_none():
    rows = [{"symbol": "A", "markPrice": "1.50", "lastFundingRate": "", "nextFundingTime": 0}]
    (mark,) = codec.mark_prices(json.dumps(rows).encode())
    assert (mark.mark_price, mark.funding_rate) == (Decimal("1.50"), 0)


def test_recorded_kline_events_become_candle_updates():
    lines = payload("cryptofeed/fstream_ws_2021-07-22.txt").decode().splitlines()
    messages = [codec.market_message(line.split(" ", 1)[1].encode()) for line in lines if "@kline" in line]
    updates = [codec.candle_update(message.data) for message in messages if message.data]
    assert len(updates) == 67
    assert all(update and update.timeframe == "1m" and update.event_ms for update in updates)


def test_other_recorded_stream_events_decode_to_no_candle():
    lines = payload("cryptofeed/fstream_ws_2021-07-22.txt").decode().splitlines()
    others = [line.split(" ", 1)[1].encode() for line in lines if "@kline" not in line]
    assert len(others) > 1_000
    for body in others:
        message = codec.market_message(body)
        assert message.data is not None
        assert codec.candle_update(message.data) is None


def test_a_recorded_order_is_decoded():
    order = codec.order_view.decode(payload("nautilus_trader/rs_http_json__order_response.json")).record()
    assert (order.client_order_id, order.venue_order_id) == ("testOrder123", "12345678")
    assert (order.side, order.type, order.status) == (Side.BUY, OrderType.LIMIT, OrderStatus.OPEN)
    assert order.quantity == Decimal("0.001")


def test_recorded_conditional_orders_are_decoded():
    (view,) = codec.algo_views.decode(payload("nautilus_trader/rs_http_json__open_algo_orders.json"))
    order = view.record()
    assert (order.type, order.status, order.trigger_price) == (
        OrderType.STOP_MARKET,
        OrderStatus.OPEN,
        Decimal("45000.00"),
    )
    assert view.became == ""


def test_the_account_is_one_instant_and_the_second_answer_only_adds_entry_and_liquidation():
    view = codec.account_view.decode(
        json.dumps(
            {
                "totalWalletBalance": "100",
                "totalUnrealizedProfit": "-2",
                "totalMarginBalance": "98",
                "availableBalance": "50",
                "positions": [
                    {
                        "symbol": "BTCUSDT",
                        "positionAmt": "-0.5",
                        "unrealizedProfit": "-2",
                        "notional": "-52",
                        "updateTime": 7,
                    },
                    {"symbol": "ETHUSDT", "positionAmt": "0"},
                ],
            }
        ).encode()
    )
    risk = codec.PositionRisk(
        symbol="BTCUSDT",
        position_amt=Decimal("-0.5"),
        entry_price=Decimal(100),
        liquidation_price=Decimal(150),
    )
    account = codec.account(view, [risk], 99)
    (position,) = account.positions
    assert (account.equity, account.at_ms) == (Decimal(98), 99)
    assert (position.mark_price, position.entry_price, position.liquidation_price) == (104, 100, 150)
    (alone,) = codec.account(view, [], 99).positions
    assert alone.entry_price == 100  # from mark and profit, when the second answer lacks it


def test_trades_and_commissions_are_no_adjustments():
    rows = [
        {"incomeType": "REALIZED_PNL", "income": "5", "asset": "USDT", "time": 1, "tranId": 1, "symbol": "A"},
        {"incomeType": "COMMISSION", "income": "-1", "asset": "USDT", "time": 1, "tranId": 2, "symbol": "A"},
        {"incomeType": "FUNDING_FEE", "income": "-2", "asset": "USDT", "time": 3, "tranId": 3, "symbol": "A"},
        {"incomeType": "TRANSFER", "income": "9", "asset": "USDT", "time": 3, "tranId": 4, "symbol": ""},
        {"incomeType": "INSURANCE_CLEAR", "income": "-3", "asset": "USDT", "time": 4, "tranId": 5},
        {"incomeType": "TRANSFER", "income": "9", "asset": "BNB", "time": 3, "tranId": 6, "symbol": ""},
    ]  # fmt: skip
    page = codec.income_page(json.dumps(rows).encode())
    assert [(each.kind, each.amount) for each in page.adjustments] == [
        ("funding", -2),
        ("deposit", 9),
        ("correction", -3),
    ]
    assert page.rows == 6


def test_funding_has_one_id_whichever_source_names_it():
    hour = 3_600_000
    from_stream = codec.funding_adjustment("A", Decimal(1), 10 * hour + 700)
    from_history = codec.funding_adjustment("A", Decimal(1), 10 * hour - 3)
    next_hour = codec.funding_adjustment("A", Decimal(1), 11 * hour)
    assert from_stream.adjustment_id == from_history.adjustment_id != next_hour.adjustment_id


def test_recorded_leverage_brackets_are_ordered_and_continuous():
    tiers = json.loads(payload("freqtrade/binance_usdm_leverage_tiers.json.gz"))
    rows = [{"symbol": name, "brackets": [tier["info"] for tier in each]} for name, each in tiers.items()]
    decoded = codec.brackets(json.dumps(rows).encode())
    assert len(decoded) == 719
    for brackets in decoded.values():
        for lower, upper in itertools.pairwise(brackets):
            assert lower.notional_cap == upper.notional_floor
            assert lower.max_leverage >= upper.max_leverage
