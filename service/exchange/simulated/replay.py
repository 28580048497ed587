"""A market of recorded candles: a directory of `<SYMBOL>-<timeframe>.parquet` or `.csv` files.

Columns ts (open time, ms UTC), open, high, low, close, volume (base). The finest of 5m, 15m, 30m and 1h is
taken for each symbol, longer candles are bridged to 5m. Non-ASCII symbols may be spelt by code points, as in
`U5E01U5B89USDT-15m.parquet`. A missing candle inside a file is a flat one without volume, as on the venue;
anything else that is wrong with a file is refused, never repaired.
"""

import csv
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import SettingsInvalid
from service.exchange.simulated import contracts
from service.exchange.simulated.bridge import bridge
from service.exchange.simulated.contracts import Grid
from service.exchange.simulated.path import Floats, Ints, candle_keys, symbol_keys
from service.exchange.simulated.tape import CANDLE_MS, DAY_CANDLES, DAY_MS, HOUR_MS, Block, Funding, Tape
from service.records import TIMEFRAME_MS

PREFERRED = ("5m", "15m", "30m", "1h")
HISTORY_MS = 200 * HOUR_MS
KEPT_MS = 90 * DAY_MS
OLDER_MS = 365 * DAY_MS  # how long a symbol is said to be listed when its record begins with the directory's
COLUMNS = ("ts", "open", "high", "low", "close", "volume")

_FILE = re.compile(r"(?P<symbol>.+)-(?P<timeframe>\d+[mhd])\.(?P<format>parquet|csv)")
_CODE_POINT = re.compile(r"U([0-9A-F]{4,5})")
_SPELT = re.compile(r"^(?:U[0-9A-F]{4,5})+")


class CandlesInvalid(SettingsInvalid, ValueError):
    """A recorded file cannot be replayed: the message names the file, the row and what to do."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One file's candles, checked: open times int64[m] on the timeframe's grid, values float64[5, m]."""

    symbol: str
    span_ms: int
    opens_ms: Ints
    values: Floats

    def clipped(self, first_ms: int, stop_ms: int) -> "Recording":
        """The candles that open in [first_ms, stop_ms)."""
        first, stop = np.searchsorted(self.opens_ms, (first_ms, stop_ms))
        return Recording(self.symbol, self.span_ms, self.opens_ms[first:stop], self.values[:, first:stop])

    @property
    def end_ms(self) -> int:
        """The first moment after its last candle."""
        return int(self.opens_ms[-1]) + self.span_ms

    def quote_volume(self, first_ms: int, stop_ms: int) -> float:
        """Turnover of the candles that open in [first_ms, stop_ms), by their closes."""
        first, stop = np.searchsorted(self.opens_ms, (first_ms, stop_ms))
        return float((self.values[3, first:stop] * self.values[4, first:stop]).sum())


class Recorded:
    """Days of recorded candles: prices int32[4, n, t] in ticks, volume int64[n, t]; t starts with a day."""

    def __init__(self, first_day: int, prices: NDArray[np.int32], volume: Ints) -> None:
        self._first_day = first_day
        self._prices = prices
        self._volume = volume

    def block(self, day: int) -> Block | None:
        first = (day - self._first_day) * DAY_CANDLES
        if not 0 <= first < self._volume.shape[1]:
            return None
        stop = first + DAY_CANDLES
        return Block(self._prices[:, :, first:stop], self._volume[:, first:stop])


def replay(
    directory: Path,
    *,
    seed: int,
    symbols: int,
    from_ms: int | None,
    until_ms: int | None,
    funding: Path | None = None,
) -> Tape:
    """The `symbols` most liquid recorded markets of `directory`, traded from `from_ms` until `until_ms`.

    Without `from_ms` trading starts once there are 200 hours of history. Liquidity is turnover before the
    start. At most 90 days of history are kept.
    Raises: SettingsInvalid: no usable files, or nothing recorded in the window. CandlesInvalid: a bad file.
    """
    with closing(ParquetReader()) as parquet:
        recordings = [read_candles(path, parquet) for path in _chosen(directory).values()]
    first_ms = min(int(r.opens_ms[0]) for r in recordings)
    last_ms = max(r.end_ms for r in recordings)
    start_ms = first_ms + HISTORY_MS if from_ms is None else from_ms
    end_ms = min(last_ms if until_ms is None else until_ms, last_ms) // CANDLE_MS * CANDLE_MS
    if not first_ms <= start_ms < end_ms:
        raise SettingsInvalid(
            f"replay window: {_utc(start_ms)} to {_utc(end_ms)} found, {directory} holds {_utc(first_ms)} to "
            f"{_utc(last_ms)}: choose --from and --until inside it, the first 200 hours are history"
        )
    chosen = _most_liquid(recordings, symbols, start_ms, end_ms)
    names = tuple(recording.symbol for recording in chosen)
    grids = tuple(infer_grid(recording.values) for recording in chosen)
    history_ms = max(first_ms, (start_ms - KEPT_MS) // DAY_MS * DAY_MS)
    kept = [recording.clipped(history_ms, end_ms) for recording in chosen]
    turnover = [_daily_turnover(recording, start_ms, end_ms) for recording in chosen]
    return Tape(
        _filled(kept, grids, seed, history_ms, end_ms),
        seed=seed,
        symbols=names,
        grids=grids,
        instruments=tuple(
            contracts.instrument(
                recording.symbol,
                grid,
                _price_at(recording, start_ms),
                daily,
                _onboard_ms(recording, recordings),
            )
            for recording, grid, daily in zip(chosen, grids, turnover, strict=True)
        ),
        brackets={name: contracts.brackets(daily) for name, daily in zip(names, turnover, strict=True)},
        funding=read_funding(funding, names),
        history_ms=history_ms,
        start_ms=start_ms,
        end_ms=end_ms,
    )


def symbol_of(stem: str) -> str:
    """The symbol a file name spells: leading `U5E01` groups are code points, all else is itself."""
    spelt = _SPELT.match(stem)
    if spelt is None:
        return stem
    decoded = "".join(chr(int(point, 16)) for point in _CODE_POINT.findall(spelt.group()))
    # U0041 and the like would be ordinary letters, which nobody spells out: that is the name itself.
    return stem if decoded.isascii() or not decoded.isprintable() else decoded + stem[spelt.end() :]


def _chosen(directory: Path) -> dict[str, Path]:
    """The file with the finest usable candles of each symbol, by symbol."""
    if not directory.is_dir():
        raise SettingsInvalid(
            f"replay directory {directory}: not a directory; give one of <SYMBOL>-<tf> files"
        )
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(directory.iterdir()):
        name = _FILE.fullmatch(path.name)
        if name is None or name["timeframe"] not in PREFERRED:
            continue
        symbol, order = symbol_of(name["symbol"]), PREFERRED.index(name["timeframe"])
        if symbol not in found or order < found[symbol][0]:
            found[symbol] = order, path
    if not found:
        raise SettingsInvalid(
            f"replay directory {directory}: no candle files found; expected <SYMBOL>-<timeframe>.parquet "
            f"or .csv with timeframe one of {', '.join(PREFERRED)}"
        )
    return {symbol: path for symbol, (_, path) in sorted(found.items())}


class ParquetReader:
    """Reads columns of Parquet files as float64 over one connection, opened by the first file."""

    def __init__(self) -> None:
        self._connection: Any = None

    def read(self, path: Path) -> Floats:
        """float64[6, m], NaN where a cell is missing. Raises CandlesInvalid: no Parquet, no such column."""
        import duckdb  # 40 MB that a generated market or CSV files do not need

        if self._connection is None:
            self._connection = duckdb.connect()
        columns = ", ".join(f"{column}::DOUBLE AS {column}" for column in COLUMNS)
        try:
            found = self._connection.execute(
                f"SELECT {columns} FROM read_parquet(?)", [str(path)]
            ).fetchnumpy()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise CandlesInvalid(f"{path}: {reason}; it must hold the columns {','.join(COLUMNS)}") from error
        return np.stack([np.ma.filled(found[column], np.nan) for column in COLUMNS])

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def read_candles(path: Path, parquet: ParquetReader) -> Recording:
    """Read and check one file. Raises CandlesInvalid naming the first bad row (1 is the first candle)."""
    name = _FILE.fullmatch(path.name)
    if name is None:
        raise CandlesInvalid(f"{path}: name it <SYMBOL>-<timeframe>.parquet or .csv")
    table = _read_csv(path) if path.suffix == ".csv" else parquet.read(path)
    span_ms = TIMEFRAME_MS[name["timeframe"]]
    if not table.shape[1]:
        raise CandlesInvalid(f"{path}: no rows found; remove the file or record it again")
    _check(path, table, span_ms)
    return Recording(symbol_of(name["symbol"]), span_ms, table[0].astype(np.int64), table[1:])


def _read_csv(path: Path) -> Floats:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise CandlesInvalid(
                f"{path}: no column {missing[0]} found; the header must name {','.join(COLUMNS)}"
            )
        values: list[list[float]] = []
        for number, row in enumerate(rows, 1):
            try:
                values.append([float(row[column]) for column in COLUMNS])
            except (TypeError, ValueError):
                raise CandlesInvalid(f"{path}: row {number}: not six numbers; correct or remove it") from None
    return np.array(values, dtype=np.float64).reshape(-1, len(COLUMNS)).T


def _check(path: Path, table: Floats, span_ms: int) -> None:
    """Refuse the first row that no venue could have published."""
    ts, open_, high, low, close, volume = table
    after = np.diff(ts, prepend=ts[0] - span_ms)
    with np.errstate(invalid="ignore"):
        faults = (
            ("a missing or infinite value", ~np.isfinite(table).all(axis=0)),
            (f"ts not a multiple of {span_ms} ms", ts % span_ms != 0),
            ("ts a duplicate of the row before", after == 0),
            ("ts before the row before, rows must be in order", after < 0),
            (
                "a price that is not positive",
                np.minimum(np.minimum(open_, close), np.minimum(low, high)) <= 0,
            ),
            ("high below open, low or close", high < np.maximum(np.maximum(open_, close), low)),
            ("low above open or close", low > np.minimum(open_, close)),
            ("a negative volume", volume < 0),
        )
    bad = [(int(np.argmax(where)), what) for what, where in faults if where.any()]
    if bad:
        row, what = min(bad, key=lambda fault: fault[0])
        raise CandlesInvalid(f"{path}: row {row + 1}: {what} (ts {ts[row]:.0f}); correct or remove the row")


def infer_grid(values: Floats) -> Grid:
    """The coarsest decimal grid that holds every price and volume exactly, as far as integers carry."""
    prices, volume = values[:4], values[4]
    price_decimals = _decimals(prices, 8)
    while prices.max() * 10.0**price_decimals >= 2**31:
        price_decimals -= 1
    quantity_decimals = _decimals(volume, 8)
    # A day of quote volume, in ticks x lots, must fit 63 bits.
    busiest = float((prices[1] * volume).max()) * DAY_CANDLES
    while quantity_decimals and busiest * 10.0 ** (price_decimals + quantity_decimals) >= 2**62:
        quantity_decimals -= 1
    return Grid(max(price_decimals, 0), quantity_decimals)


def _decimals(values: Floats, most: int) -> int:
    """The fewest decimals, up to `most`, that write every value exactly."""
    for decimals in range(most):
        scale = 10.0**decimals
        if (np.rint(values * scale) / scale == values).all():
            return decimals
    return most


def _most_liquid(recordings: list[Recording], count: int, start_ms: int, end_ms: int) -> list[Recording]:
    """The most traded symbols that have data in the window, by turnover before it, then within it."""
    there = [r for r in recordings if r.end_ms > start_ms and r.opens_ms[0] < end_ms]
    if not there:
        raise SettingsInvalid(f"replay: no symbol has candles between {_utc(start_ms)} and {_utc(end_ms)}")
    return sorted(there, key=lambda r: (-_daily_turnover(r, start_ms, end_ms), r.symbol))[:count]


def _daily_turnover(recording: Recording, start_ms: int, end_ms: int) -> float:
    """Quote turnover per day before the start; of the window where there was nothing before it."""
    first_ms = int(recording.opens_ms[0])
    if first_ms < start_ms:
        return recording.quote_volume(first_ms, start_ms) * DAY_MS / (start_ms - first_ms)
    return recording.quote_volume(start_ms, end_ms) * DAY_MS / (end_ms - first_ms)


def _price_at(recording: Recording, at_ms: int) -> float:
    index = int(np.searchsorted(recording.opens_ms, at_ms)) - 1
    return float(recording.values[3, max(index, 0)])


def _onboard_ms(recording: Recording, recordings: list[Recording]) -> int:
    """A record that begins later than others of its timeframe shows a listing, else the listing is older."""
    begin = int(recording.opens_ms[0])
    earliest = min(int(r.opens_ms[0]) for r in recordings if r.span_ms == recording.span_ms)
    return begin - OLDER_MS if begin <= earliest + DAY_MS else begin


def _filled(
    chosen: list[Recording], grids: tuple[Grid, ...], seed: int, first_ms: int, end_ms: int
) -> Recorded:
    """All chosen recordings as 5m candles on one time axis of whole UTC days."""
    first_day, stop_day = first_ms // DAY_MS, -(-end_ms // DAY_MS)
    count = (stop_day - first_day) * DAY_CANDLES
    prices = np.zeros((4, len(chosen), count), np.int32)
    volume = np.zeros((len(chosen), count), np.int64)
    keys = symbol_keys(seed, tuple(recording.symbol for recording in chosen))
    for index, (recording, grid) in enumerate(zip(chosen, grids, strict=True)):
        numbers, rows = _contiguous(recording, grid)
        ratio = recording.span_ms // CANDLE_MS
        if ratio > 1:
            rows = bridge(candle_keys(keys[index], numbers * recording.span_ms), rows, ratio)
        begin = int(numbers[0]) * ratio - first_day * DAY_CANDLES
        kept = min(rows.shape[1], count - begin)
        prices[:, index, begin : begin + kept] = rows[:4, :kept]
        volume[index, begin : begin + kept] = rows[4, :kept]
    return Recorded(first_day, prices, volume)


def _contiguous(recording: Recording, grid: Grid) -> tuple[Ints, Ints]:
    """Candle numbers int64[m] without gaps and int64[5, m] on the grid; a missing one is flat, untraded."""
    ticks = np.maximum(np.rint(recording.values[:4] * 10.0**grid.price_decimals), 1.0)
    lots = np.rint(recording.values[4] * 10.0**grid.quantity_decimals)
    recorded = np.concatenate([ticks, lots[None]]).astype(np.int64)
    given = recording.opens_ms // recording.span_ms
    numbers = np.arange(given[0], given[-1] + 1)
    source = np.searchsorted(given, numbers, side="right") - 1
    rows = recorded[:, source]
    missing = given[source] != numbers
    rows[:4, missing] = rows[3, missing]
    rows[4, missing] = 0
    return numbers, rows


def read_funding(path: Path | None, symbols: tuple[str, ...]) -> Funding:
    """Recorded funding rates of a Parquet or CSV file (symbol, ts, rate), 8 h where a symbol has none.

    Times are rounded to the hour: venues report them with a few milliseconds of jitter. An interval is the
    most common distance between two settlements. Raises SettingsInvalid: the file cannot be read.
    """
    recorded: dict[tuple[int, int], float] = {}
    intervals = [8 * HOUR_MS] * len(symbols)
    if path is None:
        return Funding(tuple(intervals), recorded)
    hours: dict[int, list[int]] = {}
    index = {symbol: i for i, symbol in enumerate(symbols)}
    for symbol, ts, rate in _funding_rows(path):
        if symbol in index:
            hour = (ts + HOUR_MS // 2) // HOUR_MS
            recorded[index[symbol], hour] = rate
            hours.setdefault(index[symbol], []).append(hour)
    for i, at in hours.items():
        distances = np.diff(np.unique(at))
        distances = distances[(distances >= 1) & (distances <= 8)]
        if len(distances):
            values, counts = np.unique(distances, return_counts=True)
            intervals[i] = int(values[counts.argmax()]) * HOUR_MS
    return Funding(tuple(intervals), recorded)


def _funding_rows(path: Path) -> list[tuple[str, int, float]]:
    import duckdb

    reader = "read_csv" if path.suffix == ".csv" else "read_parquet"
    query = f"SELECT symbol::VARCHAR, ts::BIGINT, rate::DOUBLE FROM {reader}(?) ORDER BY symbol, ts"
    try:
        with duckdb.connect() as connection:
            return [
                (str(s), int(t), float(r)) for s, t, r in connection.execute(query, [str(path)]).fetchall()
            ]
    except (duckdb.Error, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsInvalid(f"funding file {path}: {reason}; it must hold symbol, ts, rate") from error


def _utc(at_ms: int) -> str:
    return str(np.datetime64(at_ms, "ms").astype("datetime64[m]"))
