"""Longer candles from 5m ones, against the venue's own."""

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.market.rollup import bucket_open_ms, completes, roll_up, summed_volume

RECORDED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "candles"
HOUR = 3_600_000


def five_minutes(number: int, low: float = 1.0, high: float = 9.0):
    return (HOUR + number * 300_000, 3.0 + number, high, low, 4.0 + number, 0.1)


def test_three_candles_make_fifteen_minutes():
    rows = [five_minutes(0, low=2.0), five_minutes(1, low=0.5), five_minutes(2, high=11.0)]
    assert roll_up(rows, "15m") == (HOUR, 3.0, 11.0, 0.5, 6.0, 0.3)


def test_twelve_candles_make_an_hour():
    assert roll_up([five_minutes(n) for n in range(12)], "1h") == (HOUR, 3.0, 9.0, 1.0, 15.0, 1.2)


@pytest.mark.parametrize("numbers", [[], [0, 1], [1, 2, 3], [0, 2, 3], [0, 1, 2, 3], [2, 1, 0], [0, 1, 1]])
def test_an_incomplete_or_unaligned_run_makes_nothing(numbers):
    assert roll_up([five_minutes(n) for n in numbers], "15m") is None


def test_a_candle_knows_which_longer_ones_it_completes():
    assert [n for n in range(12) if completes(five_minutes(n)[0], "15m")] == [2, 5, 8, 11]
    assert [n for n in range(12) if completes(five_minutes(n)[0], "1h")] == [11]
    assert bucket_open_ms(five_minutes(7)[0], "15m") == five_minutes(6)[0]


@given(
    st.integers(0, 8).flatmap(
        lambda places: st.lists(
            st.integers(0, 10**15 - 1).map(lambda n: Decimal(n).scaleb(-places)), min_size=1, max_size=12
        )
    )
)
def test_summed_volume_is_the_float_of_the_decimal_sum(volumes):
    assert summed_volume([float(v) for v in volumes]) == float(sum(volumes))


def test_recorded_candles_roll_up_to_the_venues_own():
    folder = RECORDED / "BINANCE_USDM_2025-10"
    if not folder.is_dir():
        pytest.skip("recorded candles are not beside the checkout")
    duckdb = pytest.importorskip("duckdb")
    compared = 0
    pairs = [p for p in sorted(folder.glob("*-5m.parquet")) if _sibling(p).exists()]
    assert pairs
    for path in pairs[::6]:
        own = {row[0]: row for row in _read(duckdb, _sibling(path))}
        rows = _read(duckdb, path)
        at = next(i for i, row in enumerate(rows) if row[0] % 900_000 == 0)
        for i in range(at, len(rows) - 2, 3):
            if (venue := own.get(rows[i][0])) is not None:
                assert roll_up(rows[i : i + 3], "15m") == venue, path.name
                compared += 1
    assert compared > 10_000


def _sibling(path: Path) -> Path:
    return path.with_name(path.name.replace("-5m", "-15m"))


def _read(duckdb, path: Path):
    with duckdb.connect() as connection:
        return connection.execute(
            "select ts, open, high, low, close, volume from read_parquet(?) order by ts", [str(path)]
        ).fetchall()
