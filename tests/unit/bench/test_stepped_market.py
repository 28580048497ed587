"""The market of `perpd bench memory`: it moves when told, and its candles are those of the port."""

import asyncio
from pathlib import Path

import pytest

from service.bench.minutes import BASE_MS, SteppedMarket, build
from service.market.rollup import roll_up
from service.records import CandleUpdate


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("market")
    build(path, symbols=3, candles=20, minutes=16, seed=1)
    return path


async def test_a_minute_tells_what_closed_and_where_prices_stand(directory: Path) -> None:
    market = SteppedMarket(directory)
    told: list[CandleUpdate] = []
    async with market.candle_stream(market.meta.symbols, "5m", told.append, lambda symbols: None):
        for _ in range(5):
            market.step()
    closed = [update for update in told if update.closed]
    assert (len(told), len(closed)) == (5 * 3 + 3, 3)
    assert {update.open_ms for update in closed} == {market.meta.start_ms}
    assert told[-1].open_ms == market.meta.start_ms + BASE_MS
    for update in told:
        assert update.low <= min(update.open, update.close) <= max(update.open, update.close) <= update.high
    market.close()


async def test_candles_are_closed_ordered_and_longer_ones_are_rolled_up(directory: Path) -> None:
    market = SteppedMarket(directory)
    symbol = market.meta.symbols[1]
    for _ in range(16):
        market.step()
    base = await market.candles(symbol, "5m", limit=500)
    assert [row[0] for row in base[-4:]] == [market.meta.start_ms + n * BASE_MS for n in (-1, 0, 1, 2)]
    assert len(base) == 23
    quarter = await market.candles(symbol, "15m", limit=1)
    assert quarter == [roll_up(base[-3:], "15m")]
    since = await market.candles(symbol, "5m", limit=2, start_ms=market.meta.start_ms)
    assert since == base[-3:-1]
    minutes = await market.candles(symbol, "1m", limit=5, start_ms=base[-1][0])
    assert [row[0] for row in minutes] == [base[-1][0] + n * 60_000 for n in range(5)]
    assert (max(row[2] for row in minutes), min(row[3] for row in minutes)) == base[-1][2:4]
    with pytest.raises(ValueError, match="16 minutes"):
        market.step()
    market.close()


async def test_funding_is_settled_every_eight_hours(directory: Path) -> None:
    market = SteppedMarket(directory)
    day_ms = 24 * 3_600_000
    settled = await market.funding_rates(day_ms, 2 * day_ms)
    assert len(settled) == 4 * len(market.meta.symbols)
    assert {rate.at_ms % (8 * 3_600_000) for rate in settled} == {0}
    market.close()


async def test_the_clock_moves_with_the_market_and_wakes_who_slept(directory: Path) -> None:
    market = SteppedMarket(directory)
    sleeping = asyncio.create_task(market.clock.sleep_s(60))
    await asyncio.sleep(0)
    before_ms = market.clock.now_ms()
    market.step()
    await asyncio.wait_for(sleeping, 5)
    assert market.clock.now_ms() - before_ms == 60_000
    market.close()
