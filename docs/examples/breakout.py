"""A strategy of one's own: trade the close beyond the range of the last candles.

perpd run --config mine.toml, where mine.toml says

    [strategy]
    name = "docs/examples/breakout.py:Breakout"
    options = { candles = 20 }
"""

from service.analysis.indicators import average_true_range
from service.errors import SettingsInvalid
from service.records import PositionSide
from service.strategies.base import MarketView, SignalDraft


class Breakout:
    """Long above the highest high of the last 15m candles, short below the lowest low."""

    name = "breakout"
    timeframes = ("5m", "15m")

    def __init__(self, options: dict[str, float]) -> None:
        if unknown := set(options) - {"candles"}:
            raise SettingsInvalid(f"strategy.options: unknown {', '.join(sorted(unknown))}; allowed: candles")
        self.range_candles = int(options.get("candles", 20))
        self.candles = max(self.range_candles + 1, 30)

    def analyse(self, view: MarketView) -> SignalDraft | None:
        fifteen, five = view.candles("15m"), view.candles("5m")
        before = slice(-self.range_candles - 1, -1)
        top, bottom = float(fifteen.high[before].max()), float(fifteen.low[before].min())
        entry = float(five.close[-1])
        atr = float(average_true_range(five.high, five.low, five.close)[-1])
        if atr <= 0.0 or bottom <= entry <= top:
            return None
        side = PositionSide.LONG if entry > top else PositionSide.SHORT
        beyond = (entry - top if entry > top else bottom - entry) / atr
        return SignalDraft(
            position_side=side,
            entry=entry,
            stop=entry - side.sign * 2.0 * atr,
            target=entry + side.sign * 4.0 * atr,
            atr=atr,
            confidence=min(0.5 + 0.1 * beyond, 1.0),
            scores={"beyond": min(beyond / 5.0, 1.0)},
            features={"beyond": beyond, "side": float(side.sign)},
        )
