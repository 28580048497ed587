"""Recorded candles as a market, from files made here and from real ones where they are present."""

from decimal import Decimal
from pathlib import Path

import duckdb
import numpy as np
import pytest

from service.errors import SettingsInvalid
from service.exchange.simulated.contracts import Grid
from service.exchange.simulated.replay import CandlesInvalid, infer_grid, replay, symbol_of

DATA = Path(__file__).resolve().parents[4].parent / "shared" / "data"
CRASH = DATA / "candles" / "BINANCE_USDM_2025-10"
needs_data = pytest.mark.skipif(
    not CRASH.is_dir(), reason="the recorded candles (../shared/data) are not here"
)

HOUR = 3_600_000
DAY = 24 * HOUR
FIRST = 1_700_006_400_000  # 2023-11-15T00:00Z


def at(text: str) -> int:
    return int(np.datetime64(text, "ms").astype(np.int64))


def rows_of(count: int, span_ms: int, first: int = FIRST, volume: float = 10.5) -> list[list[float]]:
    """Valid candles that rise and fall by turns."""
    rows = []
    price = 100.0
    for i in range(count):
        close = round(price + (0.5 if i % 3 else -0.9), 2)
        high, low = round(max(price, close) + 0.25, 2), round(min(price, close) - 0.25, 2)
        rows.append([first + i * span_ms, price, high, low, close, volume])
        price = close
    return rows


def write_csv(path: Path, rows: list[list[float]]) -> Path:
    path.write_text("ts,open,high,low,close,volume\n" + "".join(f"{','.join(map(str, r))}\n" for r in rows))
    return path


def run(directory: Path, **options):
    settings = {"seed": 1, "symbols": 10, "from_ms": None, "until_ms": None} | options
    return replay(directory, **settings)


def test_a_csv_directory_is_served_as_recorded(tmp_path):
    rows = rows_of(3_000, 300_000)
    write_csv(tmp_path / "AAAUSDT-5m.csv", rows)
    tape = run(tmp_path)
    assert tape.start_ms == FIRST + 200 * HOUR
    assert tape.end_ms == FIRST + 3_000 * 300_000
    served = tape.candles(0, "5m", 0, tape.end_ms, tape.end_ms)
    assert served[:, :6].tolist() == rows
    assert tape.instruments[0].tick_size == Decimal("0.01")
    assert tape.instruments[0].step_size == Decimal("0.1")


@pytest.mark.parametrize(("timeframe", "span_ms"), [("15m", 900_000), ("30m", 1_800_000), ("1h", 3_600_000)])
def test_longer_candles_are_bridged_and_aggregate_back(tmp_path, timeframe, span_ms):
    rows = rows_of(250 * HOUR // span_ms, span_ms)
    write_csv(tmp_path / f"AAAUSDT-{timeframe}.csv", rows)
    tape = run(tmp_path)
    assert tape.candles(0, timeframe, 0, tape.end_ms, tape.end_ms)[:, :6].tolist() == rows
    assert len(tape.candles(0, "5m", 0, tape.end_ms, tape.end_ms)) == len(rows) * span_ms // 300_000


def test_parquet_and_csv_give_the_same_market_and_5m_is_preferred(tmp_path):
    for kind in ("csv", "parquet"):
        (tmp_path / kind).mkdir()
    source = write_csv(tmp_path / "csv" / "AAAUSDT-5m.csv", rows_of(3_000, 300_000))
    write_csv(tmp_path / "csv" / "AAAUSDT-1h.csv", rows_of(300, HOUR))
    target = tmp_path / "parquet" / "AAAUSDT-5m.parquet"
    duckdb.sql(f"COPY (FROM read_csv('{source}')) TO '{target}' (FORMAT parquet)")
    one, two = run(tmp_path / "csv"), run(tmp_path / "parquet")
    assert one.day(one.start_ms).tobytes() == two.day(two.start_ms).tobytes()
    assert one.instruments == two.instruments


def test_the_most_traded_symbols_before_the_start_are_taken(tmp_path):
    for name, volume in (("LOWUSDT", 1.0), ("HIGHUSDT", 9.0), ("MIDUSDT", 5.0)):
        write_csv(tmp_path / f"{name}-1h.csv", rows_of(300, HOUR, volume=volume))
    write_csv(tmp_path / "GONEUSDT-1h.csv", rows_of(100, HOUR, volume=99.0))
    assert run(tmp_path, symbols=2).symbols == ("HIGHUSDT", "MIDUSDT")


def test_a_symbol_listed_inside_the_window_has_no_price_before(tmp_path):
    write_csv(tmp_path / "OLDUSDT-5m.csv", rows_of(3_000, 300_000))
    listed = FIRST + 220 * HOUR
    write_csv(tmp_path / "NEWUSDT-5m.csv", rows_of(300, 300_000, first=listed))
    tape = run(tmp_path)
    new = tape.symbols.index("NEWUSDT")
    assert np.isnan(tape.last_prices(listed - 1)[new])
    assert np.isnan(tape.forming("1h", listed - 1)[new, 1:]).all()
    assert tape.forming("1h", listed)[new, 1:6].tolist() == [100.0, 100.0, 100.0, 100.0, 0.0]
    assert np.isfinite(tape.last_prices(listed + 15_000)[new])
    assert np.isfinite(tape.mark_prices(listed + 15_000)[new])
    assert tape.instruments[new].onboard_ms == listed
    assert tape.instruments[1 - new].onboard_ms < FIRST
    assert len(tape.candles(new, "5m", 0, listed + 1, listed + 1)) == 1


def test_a_candle_missing_from_a_file_is_flat_and_untraded(tmp_path):
    rows = rows_of(3_000, 300_000)
    gone = rows.pop(40)
    write_csv(tmp_path / "AAAUSDT-5m.csv", rows)
    (candle,) = run(tmp_path).candles(0, "5m", gone[0], gone[0], FIRST + DAY)
    assert candle.tolist() == [gone[0], *[rows[39][4]] * 4, 0.0, 0.0]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda rows: rows.insert(7, rows[6]), "row 8: ts a duplicate"),
        (lambda rows: rows.insert(3, rows.pop(9)), "row 5: ts before the row before"),
        (lambda rows: rows[4].__setitem__(2, 1.0), "row 5: high below"),
        (lambda rows: rows[4].__setitem__(3, 1e6), "row 5: high below"),
        (lambda rows: rows[0].__setitem__(3, rows[0][2]), "row 1: low above"),
        (lambda rows: rows[2].__setitem__(4, "nan"), "row 3: a missing or infinite value"),
        (lambda rows: rows[2].__setitem__(4, ""), "row 3: not six numbers"),
        (lambda rows: rows[2].__setitem__(5, -1.0), "row 3: a negative volume"),
        (lambda rows: rows[2].__setitem__(3, 0.0), "row 3: a price that is not positive"),
        (lambda rows: rows[2].__setitem__(0, rows[2][0] + 1), "row 3: ts not a multiple"),
        (lambda rows: rows.clear(), "no rows found"),
    ],
)
def test_a_spoilt_file_is_refused_by_name_and_row(tmp_path, spoil, what):
    rows = rows_of(20, 300_000)
    spoil(rows)
    path = write_csv(tmp_path / "BADUSDT-5m.csv", rows)
    with pytest.raises(CandlesInvalid) as refusal:
        run(tmp_path)
    assert str(path) in str(refusal.value)
    assert what in str(refusal.value)


def test_a_file_without_a_column_or_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "BADUSDT-5m.csv").write_text("ts,open\n1,2\n")
    with pytest.raises(CandlesInvalid, match="no column high"):
        run(tmp_path)
    (tmp_path / "BADUSDT-5m.csv").unlink()
    (tmp_path / "BADUSDT-5m.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(CandlesInvalid, match=r"BADUSDT-5m\.parquet"):
        run(tmp_path)


def test_a_directory_without_candles_or_a_window_without_data_is_refused(tmp_path):
    with pytest.raises(SettingsInvalid, match="not a directory"):
        run(tmp_path / "absent")
    with pytest.raises(SettingsInvalid, match="no candle files"):
        run(tmp_path)
    write_csv(tmp_path / "AAAUSDT-5m.csv", rows_of(100, 300_000))
    with pytest.raises(SettingsInvalid, match="replay window"):
        run(tmp_path)
    assert run(tmp_path, from_ms=FIRST + HOUR).start_ms == FIRST + HOUR


def test_recorded_funding_is_served_with_its_spacing(tmp_path):
    write_csv(tmp_path / "AAAUSDT-5m.csv", rows_of(3_000, 300_000))
    funding = tmp_path / "funding.csv"
    hours = range(0, 240, 4)
    funding.write_text(
        "symbol,ts,rate\n" + "".join(f"AAAUSDT,{FIRST + h * HOUR + 7},{h / 1e6}\n" for h in hours)
    )
    tape = run(tmp_path, funding=funding)
    assert tape.funding_interval_ms(0) == 4 * HOUR
    assert tape.funding_rate(0, FIRST + 8 * HOUR) == 8 / 1e6
    assert abs(run(tmp_path).funding_rate(0, FIRST + 8 * HOUR)) <= 0.0075
    with pytest.raises(SettingsInvalid, match="absent"):
        run(tmp_path, funding=tmp_path / "absent.parquet")


def test_names_spelt_by_code_points_are_read():
    assert symbol_of("U5E01U5B89U4EBAU751FUSDT") == "币安人生USDT"
    assert symbol_of("UNIUSDT") == "UNIUSDT"
    assert symbol_of("1000PEPEUSDT") == "1000PEPEUSDT"


def test_the_grid_is_the_coarsest_that_holds_all_values():
    values = np.array([[1.25, 2.5], [1.5, 3.0], [1.0, 2.0], [1.3, 2.75], [10.0, 7.125]])
    assert infer_grid(values) == Grid(2, 3)


@needs_data
def test_the_crash_of_october_2025_is_replayed_as_recorded():
    tape = replay(CRASH, seed=1, symbols=400, from_ms=at("2025-10-10T12:00"), until_ms=None)
    assert "币安人生USDT" in tape.symbols
    assert len(tape.symbols) > 250
    bridged = 0
    for symbol in ("BTCUSDT", "币安人生USDT", "ALPINEUSDT", "DOTUSDT", "TRUMPUSDT"):
        stem = symbol if symbol.isascii() else "U5E01U5B89U4EBAU751FUSDT"
        timeframe = "5m" if (CRASH / f"{stem}-5m.parquet").exists() else "15m"
        bridged += timeframe == "15m"
        day = "2025-10-22" if not symbol.isascii() else "2025-10-10"
        begin, now = at(f"{day}T20:00"), at(f"{day}T23:00")
        file = CRASH / f"{stem}-{timeframe}.parquet"
        query = f"SELECT ts, open, high, low, close, volume FROM '{file}' WHERE ts >= {begin} AND ts < {now}"
        recorded = [list(row) for row in duckdb.sql(query).fetchall()]
        served = tape.candles(tape.symbols.index(symbol), timeframe, begin, now - 1, now)
        assert len(recorded) >= 12
        assert served[:, :6].tolist() == recorded
    assert bridged >= 2
    steps = [tape.last_prices(at("2025-10-10T21:15") + k * 15_000) for k in range(60)]
    low = np.fmin.reduce(steps, axis=0)
    assert np.nanmedian(low / tape.last_prices(at("2025-10-10T20:00"))) < 0.75


@needs_data
def test_recorded_rates_are_paid_in_the_replayed_window():
    tape = replay(
        CRASH,
        seed=1,
        symbols=3,
        from_ms=at("2025-10-10T12:00"),
        until_ms=None,
        funding=DATA / "funding" / "BINANCE_USDM_2019-2026.parquet",
    )
    query = (
        f"SELECT rate FROM '{DATA}/funding/BINANCE_USDM_2019-2026.parquet' WHERE symbol = 'BTCUSDT' "
        f"AND abs(ts - {at('2025-10-10T16:00')}) < 60000"
    )
    ((rate,),) = duckdb.sql(query).fetchall()
    assert tape.funding_rate(tape.symbols.index("BTCUSDT"), at("2025-10-10T16:00")) == rate
