"""The market in the venue's own shapes: numbers as text on each symbol's grid, rows for REST and streams.

Stated assumptions: the best bid and ask lie half the spread to each side of the last price, and hold
a fixed notional; a candle's taker buys lean towards the side it closed on; a trade is worth
AVERAGE_TRADE_QUOTE.
"""

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from service.exchange.simulated.tape import Tape
from service.records import TIMEFRAME_MS, Instrument

MARK_DIGITS = 8
QUOTE_DIGITS = 4
AVERAGE_TRADE_QUOTE = 500.0
BEST_LEVEL_QUOTE = 20_000.0
DAY_MS = 86_400_000


def digits_of(step: Decimal) -> int:
    """Digits after the point that a multiple of `step` needs."""
    exponent = step.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


class Notation:
    """How one symbol writes prices and quantities."""

    __slots__ = ("instrument", "price_digits", "quantity_digits", "symbol", "tick")

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.symbol = instrument.symbol
        self.tick = float(instrument.tick_size)
        self.price_digits = digits_of(instrument.tick_size)
        self.quantity_digits = digits_of(instrument.step_size)

    def price(self, value: float) -> str:
        return f"{value:.{self.price_digits}f}"

    def quantity(self, value: float) -> str:
        return f"{value:.{self.quantity_digits}f}"

    def level_quantity(self, price: float, notional: float = BEST_LEVEL_QUOTE) -> str:
        """The quantity worth `notional`, at least the smallest the symbol trades."""
        return self.quantity(max(notional / price, float(self.instrument.min_quantity)))


class Book:
    """Best bid and ask around the last price."""

    __slots__ = ("ask", "bid")

    def __init__(self, grid: Notation, last: float, spread_bps: float) -> None:
        half = last * spread_bps / 20_000
        # The tiny shift keeps a price that is on the grid there, whatever float made of the division.
        self.bid = max(math.floor((last - half) / grid.tick + 1e-6), 1) * grid.tick
        self.ask = max(math.ceil((last + half) / grid.tick - 1e-6) * grid.tick, self.bid + grid.tick)


class Quotes:
    """Rows of one tape. `index` is the symbol's place in the tape's arrays."""

    def __init__(self, tape: Tape, spread_bps: float) -> None:
        self.tape = tape
        self.spread_bps = spread_bps
        self.grids = [Notation(instrument) for instrument in tape.instruments]
        self.index: dict[str, int] = {grid.symbol: i for i, grid in enumerate(self.grids)}
        self._funding: dict[int, tuple[str, int]] = {}

    def prices(self, at_ms: int, symbols: Iterable[str]) -> tuple[dict[str, Decimal], dict[str, Decimal]]:
        """Last and mark prices of those that are listed, exact on the venue's grid."""
        last, mark = self.tape.last_prices(at_ms), self.tape.mark_prices(at_ms)
        lasts: dict[str, Decimal] = {}
        marks: dict[str, Decimal] = {}
        for symbol in symbols:
            i = self.index.get(symbol, -1)
            if i >= 0 and last[i] == last[i]:
                lasts[symbol] = Decimal(self.grids[i].price(last[i]))
                marks[symbol] = Decimal(f"{mark[i]:.{MARK_DIGITS}f}")
        return lasts, marks

    def listed(self, at_ms: int) -> list[int]:
        """Indexes of the symbols that have a price by then."""
        last = self.tape.last_prices(at_ms)
        return [i for i, price in enumerate(last.tolist()) if price == price]

    def candles(self, index: int, timeframe: str, start_ms: int, end_ms: int, now_ms: int) -> list[list[Any]]:
        """Rows of the klines endpoint whose open time is in [start_ms, end_ms], oldest first."""
        grid, length_ms = self.grids[index], TIMEFRAME_MS[timeframe]
        rows = self.tape.candles(index, timeframe, start_ms, end_ms, now_ms).tolist()
        return [kline_row(grid, row, length_ms) for row in rows if start_ms <= row[0] <= end_ms]

    def kline_event(self, index: int, timeframe: str, row: list[float], at_ms: int, closed: bool) -> str:
        """The kline stream's event. `row`: open_ms, open, high, low, close, base and quote volume."""
        grid = self.grids[index]
        open_ms, opened, high, low, close, base, quote = row
        p, q = grid.price_digits, grid.quantity_digits
        taken = taker_fraction(opened, high, low, close)
        first = int(open_ms) // 1_000 * 1_000
        trades = trade_count(quote)
        symbol = grid.symbol
        return (
            f'{{"e":"kline","E":{at_ms},"s":"{symbol}","k":{{"t":{int(open_ms)},'
            f'"T":{int(open_ms) + TIMEFRAME_MS[timeframe] - 1},"s":"{symbol}","i":"{timeframe}","f":{first},'
            f'"L":{first + max(trades - 1, 0)},"o":"{opened:.{p}f}","c":"{close:.{p}f}","h":"{high:.{p}f}",'
            f'"l":"{low:.{p}f}","v":"{base:.{q}f}","n":{trades},"x":{"true" if closed else "false"},'
            f'"q":"{quote:.{QUOTE_DIGITS}f}","V":"{base * taken:.{q}f}",'
            f'"Q":"{quote * taken:.{QUOTE_DIGITS}f}","B":"0"}},"st":1,"ps":"{symbol}"}}'
        )

    def day_rows(self, at_ms: int) -> list[list[float]]:
        """Per symbol: open, high, low, last, base volume, quote volume of 24 hours."""
        rows: list[list[float]] = self.tape.day(at_ms).tolist()
        return rows

    def ticker(self, index: int, row: list[float], at_ms: int) -> dict[str, Any]:
        """ticker/24hr of one symbol."""
        grid = self.grids[index]
        opened, high, low, last, base, quote = row
        trades = trade_count(quote)
        return {
            "symbol": grid.symbol,
            "priceChange": grid.price(last - opened),
            "priceChangePercent": f"{(last / opened - 1) * 100 if opened else 0.0:.3f}",
            "weightedAvgPrice": grid.price(quote / base if base else last),
            "lastPrice": grid.price(last),
            "lastQty": grid.level_quantity(last, AVERAGE_TRADE_QUOTE),
            "openPrice": grid.price(opened),
            "highPrice": grid.price(high),
            "lowPrice": grid.price(low),
            "volume": grid.quantity(base),
            "quoteVolume": f"{quote:.{QUOTE_DIGITS}f}",
            "openTime": at_ms - DAY_MS,
            "closeTime": at_ms,
            "firstId": 1,
            "lastId": max(trades, 1),
            "count": trades,
        }

    def book_ticker(self, index: int, last: float, at_ms: int) -> dict[str, Any]:
        grid, book = self.grids[index], Book(self.grids[index], last, self.spread_bps)
        return {
            "symbol": grid.symbol,
            "bidPrice": grid.price(book.bid),
            "bidQty": grid.level_quantity(book.bid),
            "askPrice": grid.price(book.ask),
            "askQty": grid.level_quantity(book.ask),
            "time": at_ms,
        }

    def depth(self, index: int, last: float, levels: int) -> tuple[list[list[str]], list[list[str]]]:
        """Bids and asks, best first, one tick apart, each deeper level a tenth larger up to tenfold."""
        grid, book = self.grids[index], Book(self.grids[index], last, self.spread_bps)

        def level(price: float, depth: int) -> list[str]:
            notional = BEST_LEVEL_QUOTE * min(1 + depth / 10, 10)
            return [grid.price(price), grid.level_quantity(price, notional)]

        bids = [
            level(book.bid - k * grid.tick, k)
            for k in range(levels)
            if book.bid - k * grid.tick > grid.tick / 2
        ]
        return bids, [level(book.ask + k * grid.tick, k) for k in range(levels)]

    def funding(self, index: int, at_ms: int) -> tuple[str, int]:
        """(rate of the running interval, its settlement time)."""
        interval_ms = self.tape.funding_interval_ms(index)
        settle_ms = (at_ms // interval_ms + 1) * interval_ms
        known = self._funding.get(index)
        if known is None or known[1] != settle_ms:
            known = self._funding[index] = (f"{self.tape.funding_rate(index, settle_ms):.8f}", settle_ms)
        return known

    def premium(self, index: int, mark: float, at_ms: int) -> dict[str, Any]:
        """premiumIndex of one symbol; the index price is the mark price."""
        rate, settle_ms = self.funding(index, at_ms)
        price = f"{mark:.{MARK_DIGITS}f}"
        return {
            "symbol": self.grids[index].symbol,
            "markPrice": price,
            "indexPrice": price,
            "estimatedSettlePrice": price,
            "lastFundingRate": rate,
            "interestRate": "0.00010000",
            "nextFundingTime": settle_ms,
            "time": at_ms,
        }

    def settled(self, index: int, start_ms: int | None, end_ms: int, limit: int) -> list[dict[str, Any]]:
        """fundingRate rows of one symbol, oldest first: from `start_ms` on, or the newest up to `end_ms`."""
        interval_ms = self.tape.funding_interval_ms(index)
        first = -(-max(start_ms or 0, self.tape.history_ms) // interval_ms) * interval_ms
        times = range(first, end_ms + 1, interval_ms)
        times = times[-limit:] if start_ms is None else times[:limit]
        if not times:
            return []
        hours = self.tape.candles(index, "1h", times[0], times[-1], end_ms).tolist()
        price = {int(row[0]): row[1] for row in hours}
        return [
            {
                "symbol": self.grids[index].symbol,
                "fundingTime": at_ms,
                "fundingRate": f"{self.tape.funding_rate(index, at_ms):.8f}",
                "markPrice": f"{price[at_ms]:.{MARK_DIGITS}f}",
            }
            for at_ms in times
            if at_ms in price
        ]


def kline_row(grid: Notation, row: list[float], length_ms: int) -> list[Any]:
    """One row of the klines endpoint: 12 fields, numbers as text."""
    open_ms, opened, high, low, close, base, quote = row
    taken = taker_fraction(opened, high, low, close)
    return [
        int(open_ms),
        grid.price(opened),
        grid.price(high),
        grid.price(low),
        grid.price(close),
        grid.quantity(base),
        int(open_ms) + length_ms - 1,
        f"{quote:.{QUOTE_DIGITS}f}",
        trade_count(quote),
        grid.quantity(base * taken),
        f"{quote * taken:.{QUOTE_DIGITS}f}",
        "0",
    ]


def taker_fraction(opened: float, high: float, low: float, close: float) -> float:
    """Share of the volume bought by takers, 0.25 to 0.75, by where the candle closed in its range."""
    span = high - low
    return 0.5 + 0.25 * (close - opened) / span if span > 0 else 0.5


def trade_count(quote_volume: float) -> int:
    return round(quote_volume / AVERAGE_TRADE_QUOTE)


def exchange_symbol(instrument: Instrument, listed: bool) -> Mapping[str, Any]:
    """One entry of exchangeInfo.symbols."""

    def text(value: Decimal) -> str:
        return f"{value:f}"

    return {
        "symbol": instrument.symbol,
        "pair": instrument.symbol,
        "contractType": instrument.contract_type,
        "deliveryDate": instrument.delivery_ms,
        "onboardDate": instrument.onboard_ms,
        "status": instrument.status if listed else "PENDING_TRADING",
        "maintMarginPercent": "2.5000",
        "requiredMarginPercent": "5.0000",
        "baseAsset": instrument.base_asset,
        "quoteAsset": instrument.quote_asset,
        "marginAsset": instrument.quote_asset,
        "pricePrecision": digits_of(instrument.tick_size),
        "quantityPrecision": digits_of(instrument.step_size),
        "baseAssetPrecision": 8,
        "quotePrecision": 8,
        "underlyingType": "COIN",
        "underlyingSubType": [],
        "triggerProtect": "0.0500",
        "liquidationFee": "0.012500",
        "marketTakeBound": "0.05",
        "maxMoveOrderLimit": 10_000,
        "filters": [
            {
                "filterType": "PRICE_FILTER",
                "minPrice": text(instrument.min_price),
                "maxPrice": text(instrument.max_price),
                "tickSize": text(instrument.tick_size),
            },
            {
                "filterType": "LOT_SIZE",
                "minQty": text(instrument.min_quantity),
                "maxQty": text(instrument.max_quantity),
                "stepSize": text(instrument.step_size),
            },
            {
                "filterType": "MARKET_LOT_SIZE",
                "minQty": text(instrument.market_min_quantity),
                "maxQty": text(instrument.market_max_quantity),
                "stepSize": text(instrument.market_step_size),
            },
            {"filterType": "MAX_NUM_ORDERS", "limit": 200},
            {"filterType": "MIN_NOTIONAL", "notional": text(instrument.min_notional)},
            {
                "filterType": "PERCENT_PRICE",
                "multiplierUp": text(instrument.multiplier_up),
                "multiplierDown": text(instrument.multiplier_down),
                "multiplierDecimal": "4",
            },
            {"filterType": "POSITION_RISK_CONTROL", "positionControlSide": "NONE"},
        ],
        "orderTypes": [
            "LIMIT",
            "MARKET",
            "STOP",
            "STOP_MARKET",
            "TAKE_PROFIT",
            "TAKE_PROFIT_MARKET",
            "TRAILING_STOP_MARKET",
        ],
        "timeInForce": ["GTC", "IOC", "FOK", "GTX", "GTD"],
        "permissionSets": ["GRID", "COPY"],
    }
