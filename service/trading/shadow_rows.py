"""Open shadow positions as rows of numbers: 88 bytes each, where a record with its texts takes 700.

Thousands of records that live for hours would also keep the pages of the signals they came from, and the
garbage collector would look at each. What a row does not hold follows from it: a signal's id from its
strategy, symbol, time and side. Ids that are made otherwise are kept as they are.
"""

from array import array
from collections.abc import Callable

from service.records import PositionSide, ShadowPosition

NUMBERS = (
    "entry",
    "stop",
    "target",
    "opened_ms",
    "checked_ms",
    "favourable_excursion",
    "adverse_excursion",
    "funding_fraction",
    "traded",
)
"""Fields kept as they are, in this order; times are exact in a float64 for 285,000 years."""

OF_THE_END = ("closed_ms", "exit_price", "close_reason", "outcome_r", "pnl_fraction", "resolution")
"""Fields an open shadow has at their defaults."""

_OPENED, _CHECKED = NUMBERS.index("opened_ms"), NUMBERS.index("checked_ms")
_SIDE, _STRATEGY = len(NUMBERS), len(NUMBERS) + 1
_WIDTH = len(NUMBERS) + 2


MOST_STRATEGIES = 100
"""Beyond these ids are kept as they are: an id may bear a new name in a strategy's place each time."""

_NONE: "array[float]" = array("d")


class ShadowRows:
    """Open shadows by symbol, oldest first. Records go in and come out equal."""

    def __init__(self) -> None:
        self._rows: dict[str, array[float]] = {}
        self._strategies: list[str] = []
        self._other_ids: dict[int, tuple[str, str]] = {}  # -1, -2, ... in place of a strategy's number
        self._next_other = -1
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def symbols(self) -> frozenset[str]:
        return frozenset(self._rows)

    def of(self, symbol: str) -> list[ShadowPosition]:
        rows = self._rows.get(symbol, ())
        return [self._record(symbol, rows[at : at + _WIDTH]) for at in range(0, len(rows), _WIDTH)]

    def holds(self, shadow: ShadowPosition) -> bool:
        """Whether one of this position id is there."""
        rows = self._rows.get(shadow.symbol)
        if rows is None:
            return False
        strategy = self._strategy(shadow)
        if strategy is None:
            ids = (self._other_ids.get(int(number)) for number in rows[_STRATEGY::_WIDTH])
            return any(pair is not None and pair[0] == shadow.position_id for pair in ids)
        if strategy not in self._strategies:
            return False
        wanted = (shadow.opened_ms, shadow.position_side.sign, self._strategies.index(strategy))
        return wanted in zip(rows[_OPENED::_WIDTH], rows[_SIDE::_WIDTH], rows[_STRATEGY::_WIDTH], strict=True)

    def add(self, shadow: ShadowPosition) -> None:
        """Put one in, as the newest of its symbol; it must not be there. Raises ValueError: it is closed."""
        if shadow.closed_ms:
            raise ValueError(f"{shadow.position_id} is closed")
        row = (*_numbers(shadow), shadow.position_side.sign, self._number(shadow))
        self._rows.setdefault(shadow.symbol, array("d")).extend(row)
        self._count += 1

    def change(self, symbol: str, step: Callable[[ShadowPosition], ShadowPosition]) -> None:
        """Put what `step` makes of each of a symbol's shadows in its place; what it closes leaves.

        Nothing is changed when `step` raises. It must keep the fields that follow from others.
        """
        shadows = self.of(symbol)
        changed = [step(shadow) for shadow in shadows]
        rows, end = self._rows.get(symbol, _NONE), 0
        for at, before, after in zip(range(0, len(rows), _WIDTH), shadows, changed, strict=True):
            if after.closed_ms:
                self._other_ids.pop(int(rows[at + _STRATEGY]), None)
                continue
            if after is not before:
                rows[at : at + _SIDE] = array("d", _numbers(after))
            if end != at:
                rows[end : end + _WIDTH] = rows[at : at + _WIDTH]
            end += _WIDTH
        self._count -= (len(rows) - end) // _WIDTH
        del rows[end:]
        if not rows:
            self._rows.pop(symbol, None)

    def checked_ms(self, symbol: str) -> int:
        """The earliest `checked_ms` of a symbol; 0 when it has none."""
        return int(min(self._rows.get(symbol, _NONE)[_CHECKED::_WIDTH], default=0.0))

    def opened_ms(self, symbol: str) -> int:
        """The earliest `opened_ms` of a symbol; 0 when it has none."""
        return int(min(self._rows.get(symbol, _NONE)[_OPENED::_WIDTH], default=0.0))

    def _number(self, shadow: ShadowPosition) -> int:
        """What stands for the shadow's ids."""
        strategy = self._strategy(shadow)
        if strategy is None:
            number, self._next_other = self._next_other, self._next_other - 1
            self._other_ids[number] = (shadow.position_id, shadow.signal_id)
            return number
        if strategy not in self._strategies:
            self._strategies.append(strategy)
        return self._strategies.index(strategy)

    def _record(self, symbol: str, row: "array[float] | tuple[float, ...]") -> ShadowPosition:
        entry, stop, target, opened, checked, best, worst, funding, traded, sign, number = row
        opened_ms = int(opened)
        side = PositionSide.LONG if sign > 0 else PositionSide.SHORT
        if number < 0:
            position_id, signal_id = self._other_ids[int(number)]
        else:
            signal_id = f"{self._strategies[int(number)]}:{symbol}:{opened_ms}:{side.value}"
            position_id = f"shadow:{signal_id}"
        return ShadowPosition(
            position_id=position_id,
            signal_id=signal_id,
            symbol=symbol,
            position_side=side,
            entry=entry,
            stop=stop,
            target=target,
            opened_ms=opened_ms,
            checked_ms=int(checked),
            favourable_excursion=best,
            adverse_excursion=worst,
            funding_fraction=funding,
            traded=bool(traded),
        )

    def _strategy(self, shadow: ShadowPosition) -> str | None:
        """The strategy in the signal's id; None when the ids are kept: not made of the shadow's fields, or
        those of one strategy too many."""
        signal_id = shadow.signal_id
        end = f":{shadow.symbol}:{shadow.opened_ms}:{shadow.position_side.value}"
        if not signal_id.endswith(end) or shadow.position_id != f"shadow:{signal_id}":
            return None
        strategy = signal_id.removesuffix(end)
        return strategy if self._has_place(strategy) else None

    def _has_place(self, strategy: str) -> bool:
        return len(self._strategies) < MOST_STRATEGIES or strategy in self._strategies


def _numbers(shadow: ShadowPosition) -> tuple[float, ...]:
    """The fields of NUMBERS, in their order."""
    return (
        shadow.entry,
        shadow.stop,
        shadow.target,
        shadow.opened_ms,
        shadow.checked_ms,
        shadow.favourable_excursion,
        shadow.adverse_excursion,
        shadow.funding_fraction,
        shadow.traded,
    )
