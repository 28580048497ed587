"""Which closed candle should exist now, and how late it may be. Pure."""

from service.records import TIMEFRAME_MS

WALL_ALLOWANCE_S = 2.0


def newest_closed_ms(now_ms: int, timeframe: str) -> int:
    """Open time of the newest `timeframe` candle that is closed at `now_ms`."""
    step = TIMEFRAME_MS[timeframe]
    return now_ms - now_ms % step - step


def allowance_ms(stale_after_s: float, speed: float) -> int:
    """How much market time a closed candle may take to reach the store.

    `stale_after_s` is market time, but a message travels in wall time: in a market that runs `speed`
    times as fast, two wall seconds are 2 x `speed` market seconds, and that much is always allowed. At
    speed 600 a series therefore counts as fresh while it is up to four 5m candles behind.
    """
    return round(max(stale_after_s, WALL_ALLOWANCE_S * speed) * 1000)


def is_fresh(last_open_ms: int, timeframe: str, *, now_ms: int, allowance_ms: int) -> bool:
    """Whether a series ends with the candle that should have arrived by now."""
    return last_open_ms > 0 and last_open_ms >= newest_closed_ms(now_ms - allowance_ms, timeframe)
