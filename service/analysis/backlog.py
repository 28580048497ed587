"""Who comes first when time is short, so that nobody is left out for ever. Pure."""

from collections.abc import Sequence, Set

PATIENCE_CYCLES = 3


class Backlog:
    """Remembers how many cycles running each symbol was shed.

    Order: symbols with open positions; those shed in `PATIENCE_CYCLES` or more cycles running, longest
    first; the others as they come, which is by liquidity. Where the time is never enough for the market,
    the liquid part is analysed in three of four cycles and the rest in the fourth.
    """

    def __init__(self) -> None:
        self._shed: dict[str, int] = {}

    def ordered(self, due: Sequence[int], symbols: Sequence[str], first: Set[str]) -> list[int]:
        """Indices in the order of their analysis. Args: due: indices into symbols, the most liquid first."""
        if not first and not self._shed:
            return list(due)

        def rank(index: int) -> tuple[bool, int]:
            waited = self._shed.get(symbols[index], 0)
            return symbols[index] not in first, -waited if waited >= PATIENCE_CYCLES else 0

        return sorted(due, key=rank)

    def note(self, shed: Sequence[str]) -> None:
        """A cycle is over: these were shed, all others were not."""
        self._shed = {symbol: self._shed.get(symbol, 0) + 1 for symbol in shed}
