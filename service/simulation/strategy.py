"""A strategy that signals often and cheaply, so that little time holds many trades.

A pure function of the candles: chance comes from a hash of symbol and close. Stops are near, so that
positions end within the hour.
"""

import zlib

from service.records import PositionSide
from service.strategies.base import MarketView, SignalDraft

EVERY = 4
"""One symbol and candle in so many signals."""


class Restless:
    """See the module."""

    name = "restless"
    timeframes = ("5m",)
    candles = 20

    def __init__(self, options: dict[str, float]) -> None:
        pass

    def analyse(self, view: MarketView) -> SignalDraft | None:
        draw = zlib.crc32(f"{view.symbol} {view.candle_close_ms}".encode())
        if draw % EVERY:
            return None
        side = PositionSide.LONG if draw >> 8 & 1 else PositionSide.SHORT
        entry = float(view.candles("5m").close[-1])
        risk = entry * (0.0015 + 0.0045 * (draw >> 9 & 7) / 7)
        return SignalDraft(
            position_side=side,
            entry=entry,
            stop=entry - side.sign * risk,
            target=entry + side.sign * risk * (1.0 + (draw >> 12 & 3) / 2),
            atr=risk,
            confidence=0.5 + (draw >> 14 & 255) / 512,
            scores={},
            features={},
        )
