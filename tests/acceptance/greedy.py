"""Strategies that take memory, for a daemon to live with. They never signal."""

from service.strategies.base import MarketView


class Leaking:
    """Keeps some memory for ever with each symbol it looks at. Options: kb_a_symbol."""

    name = "leaking"
    timeframes = ("5m",)
    candles = 30

    def __init__(self, options: dict[str, float]) -> None:
        self._bytes = int(options["kb_a_symbol"] * 1024)
        self._kept: list[bytes] = []

    def analyse(self, view: MarketView) -> None:
        self._kept.append(b"x" * self._bytes)


class Hungry:
    """Takes much memory with each symbol and lets go of it. Options: mb."""

    name = "hungry"
    timeframes = ("5m",)
    candles = 30

    def __init__(self, options: dict[str, float]) -> None:
        self._bytes = int(options["mb"] * 1024 * 1024)

    def analyse(self, view: MarketView) -> None:
        len(b"x" * self._bytes)
