"""A seeded market minute by minute, in files, and a venue that moves on only when it is told to.

The files are made in a process of its own, so that the process that trades pays for nothing but what it
reads. Prices, candles and fills are functions of the seed alone: two runs differ in nothing they decide.
"""

import json
import os
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from service.clock import ManualClock
from service.market.rollup import roll_up
from service.ports import CandleRow
from service.records import TIMEFRAME_MS, CandleUpdate, FundingRate, Instrument, MarkPrice, Ticker

META_FILE, HISTORY_FILE, MINUTES_FILE = "market.msgpack", "history.bin", "minutes.bin"
MINUTE_MS, BASE, BASE_MS = 60_000, "5m", TIMEFRAME_MS["5m"]
TIMEFRAMES = ("5m", "15m", "1h")
FUNDING_MS, FUNDING_FRACTION = 8 * 3_600_000, 0.0001
SETTLED_MS = 2_000  # after the minute: the candle that closed with it has arrived
_FIELDS = 6  # open_ms, open, high, low, close, base volume
_PER_SYMBOL = 3 * _FIELDS + 1  # forming candle, the one that closed this minute, the minute's own, mark price


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for the whole market."""

    start_ms: int
    candles: int
    minutes: int
    symbols: list[str]
    instruments: list[Instrument]
    quote_volumes: list[float]


def build(directory: Path, *, symbols: int, candles: int, minutes: int, seed: int) -> None:
    """Write `candles` of each timeframe before the start, and the `minutes` after it."""
    from service.exchange.simulated.generator import generate

    tape = generate(seed, symbols)
    start_ms = tape.start_ms // TIMEFRAME_MS["1h"] * TIMEFRAME_MS["1h"]
    meta = Meta(
        start_ms=start_ms,
        candles=candles,
        minutes=minutes,
        symbols=list(tape.symbols),
        instruments=list(tape.instruments),
        quote_volumes=[float(row[5]) for row in tape.day(start_ms).tolist()],
    )
    (directory / META_FILE).write_bytes(msgspec.msgpack.encode(meta))
    with (directory / HISTORY_FILE).open("wb") as file:
        for timeframe in TIMEFRAMES:
            step = TIMEFRAME_MS[timeframe]
            for index in range(len(tape.symbols)):
                rows = tape.candles(index, timeframe, start_ms - candles * step, start_ms - step, start_ms)
                if len(rows) != candles:
                    raise ValueError(f"{tape.symbols[index]} has {len(rows)} candles of {timeframe}")
                array("d", rows[:, :_FIELDS].ravel().tolist()).tofile(file)
    with (directory / MINUTES_FILE).open("wb") as file:
        for minute in range(1, minutes + 1):
            _write_minute(file, tape, start_ms + minute * MINUTE_MS)


def _write_minute(file: Any, tape: Any, at_ms: int) -> None:
    forming, marks = tape.forming(BASE, at_ms)[:, :_FIELDS].tolist(), tape.mark_prices(at_ms).tolist()
    nothing = [0.0] * _FIELDS
    values = array("d")
    for index in range(len(tape.symbols)):
        closed = nothing
        if at_ms % BASE_MS == 0:
            [closed] = tape.candles(index, BASE, at_ms - BASE_MS, at_ms - BASE_MS, at_ms)[
                :, :_FIELDS
            ].tolist()
        began_ms = at_ms - MINUTE_MS
        [minute] = tape.candles(index, "1m", began_ms, began_ms, at_ms)[:, :_FIELDS].tolist()
        values.extend((*forming[index], *closed, *minute, marks[index]))
    values.tofile(file)


class StepClock(ManualClock):
    """Market time that moves only when told; work is measured on the wall."""

    def monotonic_s(self) -> float:
        return time.monotonic()


class SteppedMarket:
    """See `ports.MarketData`. `step` tells the next minute to whoever streams."""

    def __init__(self, directory: Path) -> None:
        self.meta = msgspec.msgpack.decode((directory / META_FILE).read_bytes(), type=Meta)
        self.clock = StepClock(self.meta.start_ms + SETTLED_MS)
        self.minute = 0
        self._history = os.open(directory / HISTORY_FILE, os.O_RDONLY)
        self._minutes = os.open(directory / MINUTES_FILE, os.O_RDONLY)
        self._listeners: list[Callable[[CandleUpdate], None]] = []

    def close(self) -> None:
        os.close(self._history)
        os.close(self._minutes)

    def step(self) -> None:
        """The next minute begins: what closed with it is told first, then where prices stand."""
        if self.minute == self.meta.minutes:
            raise ValueError(f"the market has {self.minute} minutes")
        self.minute += 1
        at_ms = self.meta.start_ms + self.minute * MINUTE_MS
        self.clock.advance_to(at_ms + SETTLED_MS)
        for symbol, values in zip(self.meta.symbols, self._rows(self.minute), strict=True):
            if values[_FIELDS]:
                self._tell(symbol, values[_FIELDS : 2 * _FIELDS], at_ms, closed=True)
            self._tell(symbol, values[:_FIELDS], at_ms, closed=False)

    def _tell(self, symbol: str, values: Sequence[float], at_ms: int, *, closed: bool) -> None:
        open_ms, open_, high, low, close, volume = values
        update = CandleUpdate(
            symbol=symbol,
            timeframe=BASE,
            open_ms=int(open_ms),
            open=open_,
            high=high,
            low=low,
            close=close,
            volume=volume,
            closed=closed,
            event_ms=at_ms,
        )
        for listener in tuple(self._listeners):
            listener(update)

    def _rows(self, minute: int) -> list[list[float]]:
        width = len(self.meta.symbols) * _PER_SYMBOL
        values = _read(self._minutes, (minute - 1) * width, width)
        return [values[at : at + _PER_SYMBOL] for at in range(0, width, _PER_SYMBOL)]

    async def server_time_ms(self) -> int:
        return self.clock.now_ms()

    async def instruments(self) -> list[Instrument]:
        return list(self.meta.instruments)

    async def tickers(self) -> list[Ticker]:
        """Those of the start: the universe stays the same."""
        pairs = zip(self.meta.symbols, self.meta.quote_volumes, strict=True)
        return [Ticker(symbol=symbol, last_price=1.0, quote_volume=volume) for symbol, volume in pairs]

    async def mark_prices(self) -> list[MarkPrice]:
        next_ms = (self.clock.now_ms() // FUNDING_MS + 1) * FUNDING_MS
        marks = [values[-1] for values in self._rows(max(self.minute, 1))]
        return [
            MarkPrice(
                symbol=symbol,
                mark_price=Decimal(repr(mark)),
                funding_rate=Decimal(repr(FUNDING_FRACTION)),
                next_funding_ms=next_ms,
            )
            for symbol, mark in zip(self.meta.symbols, marks, strict=True)
        ]

    async def funding_rates(self, start_ms: int, end_ms: int) -> list[FundingRate]:
        """Every eight hours the same rate for all."""
        return [
            FundingRate(symbol=symbol, at_ms=at_ms, rate=FUNDING_FRACTION, mark_price=0.0)
            for at_ms in range(-(-start_ms // FUNDING_MS) * FUNDING_MS, end_ms + 1, FUNDING_MS)
            for symbol in self.meta.symbols
        ]

    async def candles(
        self, symbol: str, timeframe: str, *, limit: int, start_ms: int | None = None
    ) -> list[CandleRow]:
        """See the port. Candles of a minute begin with the market."""
        index = self.meta.symbols.index(symbol)
        rows = self._past(index, timeframe) if timeframe in TIMEFRAMES else self._minute_candles(index)
        since = [*self._past(index, BASE), *self._closed(index)] if timeframe != BASE else self._closed(index)
        if timeframe == BASE:
            rows += since
        elif timeframe in TIMEFRAMES:
            step = TIMEFRAME_MS[timeframe]
            for begin_ms in range(self.meta.start_ms, self.clock.now_ms() - step + 1, step):
                parts = [row for row in since if begin_ms <= row[0] < begin_ms + step]
                rolled = roll_up(parts, timeframe)
                rows += [rolled] if rolled is not None else []
        if start_ms is not None:
            return [row for row in rows if row[0] >= start_ms][:limit]
        return rows[-limit:]

    def _past(self, index: int, timeframe: str) -> list[CandleRow]:
        width = self.meta.candles * _FIELDS
        at = (TIMEFRAMES.index(timeframe) * len(self.meta.symbols) + index) * width
        values = _read(self._history, at, width)
        return [_row(values[n : n + _FIELDS]) for n in range(0, width, _FIELDS)]

    def _closed(self, index: int) -> list[CandleRow]:
        """5m candles that closed since the start."""
        return [self._candle(index, minute, _FIELDS) for minute in range(5, self.minute + 1, 5)]

    def _minute_candles(self, index: int) -> list[CandleRow]:
        return [self._candle(index, minute, 2 * _FIELDS) for minute in range(1, self.minute + 1)]

    def _candle(self, index: int, minute: int, within: int) -> CandleRow:
        at = (minute - 1) * len(self.meta.symbols) * _PER_SYMBOL + index * _PER_SYMBOL + within
        return _row(_read(self._minutes, at, _FIELDS))

    @asynccontextmanager
    async def candle_stream(
        self,
        symbols: Sequence[str],
        timeframe: str,
        on_candle: Callable[[CandleUpdate], None],
        on_gap: Callable[[Sequence[str]], None],
    ) -> AsyncIterator[None]:
        """See the port; a stream that is never lost."""
        self._listeners.append(on_candle)
        try:
            yield
        finally:
            self._listeners.remove(on_candle)


def _row(values: Sequence[float]) -> CandleRow:
    open_ms, open_, high, low, close, volume = values
    return int(open_ms), open_, high, low, close, volume


def _read(descriptor: int, at: int, count: int) -> list[float]:
    """`count` numbers from number `at` on."""
    return array("d", os.pread(descriptor, count * 8, at * 8)).tolist()


def _main(spec: dict[str, Any]) -> None:
    build(Path(spec.pop("directory")), **spec)
    print("{}")  # noqa: T201


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
