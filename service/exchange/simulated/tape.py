"""The market of the simulated exchange: what each symbol's price was at any moment of market time.

A source gives 5m candles in whole ticks and lot steps; everything else follows from them. Each 5m candle is
walked in twenty steps of 15 s (`path.py`); shorter timeframes aggregate steps, longer ones aggregate 5m
candles, all in integers, so any two timeframes agree exactly.

Assumptions: a step trades at its 5m candle's typical price (mean of open, high, low, close) as far as quote
volume goes; the mark price is the mean of the last four steps; a missing 5m candle is a symbol not listed.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.exchange.simulated.contracts import Grid
from service.exchange.simulated.path import Floats, Ints, candle_keys, symbol_keys, uniforms, walk
from service.records import TIMEFRAME_MS, Bracket, Instrument

STEP_MS = 15_000
CANDLE_MS = 300_000
STEPS = CANDLE_MS // STEP_MS
DAY_MS = 86_400_000
DAY_CANDLES = DAY_MS // CANDLE_MS
HOUR_MS = 3_600_000
FUNDING_LIMIT = 0.0075
MARK_STEPS = 4

OPEN, HIGH, LOW, CLOSE = range(4)


@dataclass(frozen=True, slots=True)
class Block:
    """One UTC day of 5m candles of all symbols. An open of 0 means not listed."""

    prices: NDArray[np.int32]  # [4, n, 288] open, high, low, close in ticks
    volume: Ints  # [n, 288] in lot steps


class Source(Protocol):
    """Gives the days of a market, always the same day for the same number."""

    def block(self, day: int) -> Block | None:
        """The day `day` (days since the Unix epoch), or None where there is none (any more)."""
        ...


@dataclass(frozen=True, slots=True)
class Funding:
    """Funding of each symbol: the interval, and recorded rates by (symbol index, settlement hour)."""

    interval_ms: tuple[int, ...]
    recorded: dict[tuple[int, int], float]


@dataclass(frozen=True, slots=True)
class _Paths:
    """The steps of one 5m candle of all symbols: int64[21, n], row s is the state after s steps."""

    prices: Ints
    high: Ints
    low: Ints
    traded: Ints
    typical: Ints  # [n]
    listed: NDArray[np.bool_]  # [n]


@dataclass(frozen=True, slots=True)
class _Sum:
    """Aggregated candles of all symbols, int64[n] each; `some` is where there is at least one candle."""

    open: Ints
    high: Ints
    low: Ints
    close: Ints
    volume: Ints
    quote: Ints
    some: NDArray[np.bool_]


class Tape:
    """Prices of `symbols` from `history_ms` to `end_ms`; the market's clock starts at `start_ms`.

    Every answer is a function of its arguments alone. Returned arrays may be shared: they are read-only.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        symbols: tuple[str, ...],
        grids: tuple[Grid, ...],
        instruments: tuple[Instrument, ...],
        brackets: dict[str, tuple[Bracket, ...]],
        funding: Funding,
        history_ms: int,
        start_ms: int,
        end_ms: int,
    ) -> None:
        self.symbols = symbols
        self.instruments = instruments
        self.brackets = brackets
        self.history_ms = history_ms
        self.start_ms = start_ms
        self.end_ms = end_ms
        self._source = source
        self._funding = funding
        self._keys = symbol_keys(seed, symbols)
        self._price_scale = np.array([10.0**grid.price_decimals for grid in grids])
        self._volume_scale = np.array([10.0**grid.quantity_decimals for grid in grids])
        self._paths: OrderedDict[int, _Paths] = OrderedDict()
        self._sums: OrderedDict[tuple[int, int], _Sum] = OrderedDict()
        self._views: OrderedDict[tuple[str, int], Floats] = OrderedDict()

    def last_prices(self, at_ms: int) -> Floats:
        """float64[n]: the close of the newest completed step, NaN where not listed."""
        return self._view("last", at_ms // STEP_MS, self._last_prices)

    def mark_prices(self, at_ms: int) -> Floats:
        """float64[n]: the mean of the last four steps to 8 decimals, NaN where not listed."""
        return self._view("mark", at_ms // STEP_MS, self._mark_prices)

    def forming(self, timeframe: str, at_ms: int) -> Floats:
        """float64[n, 7]: open_ms, o, h, l, c, base and quote volume of the candle that holds `at_ms`.

        Rows of symbols not listed are NaN but for open_ms. At its first instant a candle is its open.
        """
        at_ms = min(at_ms, self.end_ms - 1)
        span_ms = TIMEFRAME_MS[timeframe]
        begin = at_ms - at_ms % span_ms
        if span_ms < CANDLE_MS:
            total = self._steps_sum(begin // STEP_MS, at_ms // STEP_MS)
        else:
            candle = at_ms // CANDLE_MS
            total = _joined(self._closed_sum(begin // CANDLE_MS, candle), self._partial(at_ms // STEP_MS))
        result = np.empty((len(self.symbols), 7))
        result[:, 0] = begin
        result[:, 1:5] = self._prices(np.stack([total.open, total.high, total.low, total.close], axis=1))
        result[:, 5] = total.volume / self._volume_scale
        result[:, 6] = total.quote / (self._price_scale * self._volume_scale)
        result[~total.some, 1:] = np.nan
        return result

    def day(self, at_ms: int) -> Floats:
        """float64[n, 6]: open, high, low, last, base and quote volume of the last 24 h.

        The window is 288 closed 5m candles and the forming one.
        """
        at_ms = min(at_ms, self.end_ms - 1)
        candle = at_ms // CANDLE_MS
        total = _joined(self._closed_sum(candle - DAY_CANDLES, candle), self._partial(at_ms // STEP_MS))
        result = np.empty((len(self.symbols), 6))
        result[:, 0:4] = self._prices(np.stack([total.open, total.high, total.low, total.close], axis=1))
        result[:, 4] = total.volume / self._volume_scale
        result[:, 5] = total.quote / (self._price_scale * self._volume_scale)
        result[~total.some] = np.nan
        return result

    def candles(self, index: int, timeframe: str, start_ms: int, end_ms: int, now_ms: int) -> Floats:
        """Candles of one symbol that open within [start_ms, end_ms] and not after now_ms, oldest first.

        Returns: float64[m, 7] as `forming`; the last row is the forming candle when the span reaches now.
        """
        span_ms = TIMEFRAME_MS[timeframe]
        now_ms = min(now_ms, self.end_ms)
        first = -(-max(start_ms, self.history_ms) // span_ms) * span_ms
        last = min(end_ms, now_ms) // span_ms * span_ms
        if last < first:
            return np.empty((0, 7))
        cut = now_ms < last + span_ms
        read = self._small_candles if span_ms < CANDLE_MS else self._base_candles
        opens_ms, rows, quote = read(index, first, min(last + span_ms, now_ms), cut)
        return self._aggregated(index, opens_ms, rows, quote, span_ms)

    def funding_interval_ms(self, index: int) -> int:
        """Time between two funding payments of one symbol, a whole number of hours."""
        return self._funding.interval_ms[index]

    def funding_rate(self, index: int, settle_ms: int) -> float:
        """The rate (a fraction) settled at `settle_ms`: recorded, else from the last move and the seed."""
        recorded = self._funding.recorded.get((index, (settle_ms + HOUR_MS // 2) // HOUR_MS))
        if recorded is not None:
            return recorded
        interval = self._funding.interval_ms[index]
        candle = min(settle_ms, self.end_ms) // CANDLE_MS
        closes = self._rows(index, candle - interval // CANDLE_MS, candle)[1][CLOSE]
        moved = float(closes[-1] / closes[0] - 1) if len(closes) else 0.0
        noise = float(uniforms(candle_keys(self._keys[index : index + 1], settle_ms), 1)[0, 0]) - 0.5
        rate = 0.0001 + 0.01 * moved + 0.0001 * noise
        return round(min(max(rate * interval / (8 * HOUR_MS), -FUNDING_LIMIT), FUNDING_LIMIT), 8)

    # Steps of all symbols

    def _view(self, name: str, step: int, make: "_Maker") -> Floats:
        found = self._views.get((name, step))
        if found is None:
            found = make(step)
            found.flags.writeable = False
            self._views[name, step] = found
            if len(self._views) > 16:
                self._views.popitem(last=False)
        return found

    def _last_prices(self, step: int) -> Floats:
        prices: Floats = self._prices(self._step_ticks(step)[:, None])[:, 0]
        return prices

    def _mark_prices(self, step: int) -> Floats:
        ticks = np.stack([self._step_ticks(step - back) for back in range(MARK_STEPS)])
        listed = np.count_nonzero(ticks, axis=0)
        with np.errstate(invalid="ignore"):
            mean = ticks.sum(axis=0) / listed / self._price_scale
        mean[ticks[0] == 0] = np.nan
        rounded: Floats = np.round(mean, 8)
        return rounded

    def _step_ticks(self, step: int) -> Ints:
        """int64[n]: the price after all steps before `step` (absolute number); 0 where not listed."""
        candle, done = divmod(min(step, self.end_ms // STEP_MS), STEPS)
        ticks: Ints = self._path(candle).prices[done] if done else self._path(candle - 1).prices[STEPS]
        return ticks

    def _path(self, candle: int) -> _Paths:
        found = self._paths.get(candle)
        if found is None:
            found = self._paths[candle] = self._walked(candle)
            if len(self._paths) > 8:
                self._paths.popitem(last=False)
        return found

    def _walked(self, candle: int) -> _Paths:
        day, column = divmod(candle, DAY_CANDLES)
        block = self._source.block(day)
        if block is None or candle * CANDLE_MS >= self.end_ms:
            prices, volume = np.zeros((4, len(self.symbols)), np.int64), np.zeros(len(self.symbols), np.int64)
        else:
            prices, volume = block.prices[:, :, column].astype(np.int64), block.volume[:, column]
        keys = candle_keys(self._keys, candle * CANDLE_MS)
        open_, high, low, close = prices
        steps, traded = walk(keys, open_, high, low, close, volume, STEPS)
        ticks = np.ascontiguousarray(steps.T)
        return _Paths(
            prices=ticks,
            high=np.maximum.accumulate(ticks, axis=0),
            low=np.minimum.accumulate(ticks, axis=0),
            traded=np.ascontiguousarray(traded.T),
            typical=_typical(prices),
            listed=open_ > 0,
        )

    def _partial(self, step: int) -> _Sum:
        """The 5m candle that holds the absolute step, after the steps before it."""
        candle, done = divmod(step, STEPS)
        path = self._path(candle)
        traded = path.traded[done]
        return _Sum(
            open=path.prices[0],
            high=path.high[done],
            low=path.low[done],
            close=path.prices[done],
            volume=traded,
            quote=traded * path.typical,
            some=path.listed,
        )

    def _closed_sum(self, first: int, stop: int) -> _Sum:
        """5m candles `first` to `stop` (exclusive) of all symbols in one."""
        found = self._sums.get((first, stop))
        if found is None:
            found = self._sums[first, stop] = self._summed(first, stop)
            if len(self._sums) > 32:
                self._sums.popitem(last=False)
        return found

    def _summed(self, first: int, stop: int) -> _Sum:
        none = np.zeros(len(self.symbols), np.int64)
        total = _Sum(none, none, none, none, none, none, none > 0)
        at = first
        while at < stop:
            day, column = divmod(at, DAY_CANDLES)
            until = min(DAY_CANDLES, column + stop - at)
            block = self._source.block(day)
            if block is not None:
                total = _joined(total, _block_sum(block, column, until))
            at += until - column
        return total

    def _steps_sum(self, first: int, stop: int) -> _Sum:
        """Steps `first` to `stop` (exclusive, absolute numbers) of all symbols.

        The opening price of `stop` counts as traded. The span is under 5m: it touches at most two candles.
        """
        candle, done = divmod(stop, STEPS)
        begun = self._path(candle)
        total = _steps_of(begun, max(first - candle * STEPS, 0), done)
        if first < candle * STEPS:
            total = _joined(_steps_of(self._path(candle - 1), first - (candle - 1) * STEPS, STEPS), total)
        return total

    # Candles of one symbol

    def _rows(self, index: int, first: int, stop: int) -> tuple[Ints, Ints]:
        """5m candle numbers int64[m] and int64[5, m] of one symbol, those that are listed."""
        numbers: list[Ints] = [np.empty(0, np.int64)]
        parts: list[Ints] = [np.empty((5, 0), np.int64)]
        at, stop = first, min(stop, self.end_ms // CANDLE_MS)
        while at < stop:
            day, column = divmod(at, DAY_CANDLES)
            until = min(DAY_CANDLES, column + stop - at)
            block = self._source.block(day)
            if block is not None:
                part = np.concatenate(
                    [block.prices[:, index, column:until], block.volume[None, index, column:until]],
                    dtype=np.int64,
                )
                listed = part[OPEN] > 0
                numbers.append(np.arange(at, at + until - column, dtype=np.int64)[listed])
                parts.append(part[:, listed])
            at += until - column
        return np.concatenate(numbers), np.concatenate(parts, axis=1)

    def _base_candles(self, index: int, first_ms: int, stop_ms: int, cut: bool) -> tuple[Ints, Ints, Ints]:
        """Open times int64[m], int64[5, m] and quote volume int64[m] of 5m candles from `first_ms`.

        With `cut` the last one is the candle that holds `stop_ms`, after the steps before it.
        """
        candle = stop_ms // CANDLE_MS
        numbers, rows = self._rows(index, first_ms // CANDLE_MS, candle)
        quote = rows[4] * _typical(rows[:4])
        if cut:
            tail_numbers, tail = self._rows(index, candle, candle + 1)
            open_, high, low, close, volume = tail
            keys = candle_keys(self._keys[index], tail_numbers * CANDLE_MS)
            path, traded = walk(keys, open_, high, low, close, volume, STEPS)
            done = stop_ms % CANDLE_MS // STEP_MS
            seen = path[:, : done + 1]
            row = np.stack([seen[:, 0], seen.max(axis=1), seen.min(axis=1), seen[:, -1], traded[:, done]])
            numbers = np.concatenate([numbers, tail_numbers])
            rows = np.concatenate([rows, row], axis=1)
            quote = np.concatenate([quote, traded[:, done] * _typical(tail[:4])])
        return numbers * CANDLE_MS, rows, quote

    def _small_candles(self, index: int, first_ms: int, stop_ms: int, cut: bool) -> tuple[Ints, Ints, Ints]:
        """The same of single steps; the cut one, which holds `stop_ms`, is at its opening price."""
        numbers, rows = self._rows(index, first_ms // CANDLE_MS, stop_ms // CANDLE_MS + 1)
        open_, high, low, close, volume = rows
        keys = candle_keys(self._keys[index], numbers * CANDLE_MS)
        prices, traded = walk(keys, open_, high, low, close, volume, STEPS)
        opens, closes = prices[:, :-1].reshape(-1), prices[:, 1:].reshape(-1)
        lots = np.diff(traded, axis=1).reshape(-1)
        number = (numbers[:, None] * STEPS + np.arange(STEPS)).reshape(-1)
        stop = stop_ms // STEP_MS
        if cut:
            begun = number == stop
            closes, lots = np.where(begun, opens, closes), np.where(begun, 0, lots)
        quote = lots * np.repeat(_typical(rows[:4]), STEPS)
        wanted = (number >= first_ms // STEP_MS) & (number < stop + cut)
        steps = np.stack([opens, np.maximum(opens, closes), np.minimum(opens, closes), closes, lots])
        return number[wanted] * STEP_MS, steps[:, wanted], quote[wanted]

    def _aggregated(self, index: int, opens_ms: Ints, rows: Ints, quote: Ints, span_ms: int) -> Floats:
        if not len(opens_ms):
            return np.empty((0, 7))
        group = opens_ms // span_ms
        starts = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
        ends = np.append(starts[1:], len(group)) - 1
        price, lot = self._price_scale[index], self._volume_scale[index]
        return np.stack(
            [
                (group[starts] * span_ms).astype(np.float64),
                rows[OPEN][starts] / price,
                np.maximum.reduceat(rows[HIGH], starts) / price,
                np.minimum.reduceat(rows[LOW], starts) / price,
                rows[CLOSE][ends] / price,
                np.add.reduceat(rows[4], starts) / lot,
                np.add.reduceat(quote, starts) / (price * lot),
            ],
            axis=1,
        )

    def _prices(self, ticks: Ints) -> Floats:
        """Ticks int64[n, k] as prices; NaN where 0. Dividing by a power of ten gives the nearest float."""
        prices: Floats = ticks / self._price_scale[:, None]
        prices[ticks == 0] = np.nan
        return prices


class _Maker(Protocol):
    def __call__(self, step: int, /) -> Floats: ...


def _typical(prices: NDArray[np.int64]) -> Ints:
    """Mean of open, high, low, close in whole ticks, int64[...] from int64[4, ...]."""
    total: Ints = prices.sum(axis=0)
    return (total + 2) // 4


def _joined(earlier: _Sum, later: _Sum) -> _Sum:
    """Two neighbouring spans as one, symbol by symbol."""
    both = earlier.some & later.some
    if not earlier.some.any():
        return later
    return _Sum(
        open=np.where(earlier.some, earlier.open, later.open),
        high=np.maximum(earlier.high, later.high),
        low=np.where(both, np.minimum(earlier.low, later.low), np.where(later.some, later.low, earlier.low)),
        close=np.where(later.some, later.close, earlier.close),
        volume=earlier.volume + later.volume,
        quote=earlier.quote + later.quote,
        some=earlier.some | later.some,
    )


def _block_sum(block: Block, column: int, until: int) -> _Sum:
    """Columns `column` to `until` of a day as one span."""
    prices = block.prices[:, :, column:until].astype(np.int64)
    volume = block.volume[:, column:until]
    listed = prices[OPEN] > 0
    rows = np.arange(listed.shape[0])
    first = listed.argmax(axis=1)
    last = listed.shape[1] - 1 - listed[:, ::-1].argmax(axis=1)
    some = listed.any(axis=1)
    low = np.where(listed, prices[LOW], np.iinfo(np.int64).max).min(axis=1)
    return _Sum(
        open=prices[OPEN][rows, first],
        high=prices[HIGH].max(axis=1),
        low=np.where(some, low, 0),
        close=prices[CLOSE][rows, last],
        volume=volume.sum(axis=1),
        quote=(volume * _typical(prices)).sum(axis=1),
        some=some,
    )


def _steps_of(path: _Paths, first: int, stop: int) -> _Sum:
    """Steps `first` to `stop` (exclusive) of one 5m candle; with none, the price at which `first` begins."""
    seen = path.prices[first : stop + 1]
    volume = path.traded[stop] - path.traded[first]
    return _Sum(
        open=seen[0],
        high=seen.max(axis=0),
        low=seen.min(axis=0),
        close=seen[-1],
        volume=volume,
        quote=volume * path.typical,
        some=path.listed,
    )
