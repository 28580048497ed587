"""A strategy that looks at nothing: what a cycle costs with it is the cost of handing out the work."""

from typing import ClassVar

from service.strategies.base import MarketView, SignalDraft


class Nothing:
    """Needs what the founding strategy needs and never has a signal."""

    name: ClassVar[str] = "nothing"
    timeframes: ClassVar[tuple[str, ...]] = ("5m", "15m", "1h")
    candles: ClassVar[int] = 101

    def __init__(self, options: dict[str, float]) -> None:
        """Has no options."""

    def analyse(self, view: MarketView) -> SignalDraft | None:
        return None
