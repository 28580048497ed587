"""The venue's rules as one compact table, and rounding to its grids."""

import sys
from collections.abc import Iterator, Sequence
from decimal import ROUND_FLOOR, Decimal

import msgspec

from service.records import Instrument


class InstrumentTable:
    """Rules of every symbol. Equal decimals and words are stored once: 650 symbols share a few dozen.

    `refresh` updates the table in place, so parts may hold on to it; a symbol whose rules did not change
    keeps its very record. Equal numbers are one object, for as long as a symbol listed now has them.
    """

    def __init__(self, instruments: Sequence[Instrument] = ()) -> None:
        self._by_symbol: dict[str, Instrument] = {}
        self._decimals: dict[str, Decimal] = {}
        self.refresh(instruments)

    def refresh(self, instruments: Sequence[Instrument]) -> int:
        """Take over the venue's list; symbols missing from it are forgotten. Returns how many changed."""
        changed = 0
        fresh: dict[str, Instrument] = {}
        for instrument in instruments:
            known = self._by_symbol.get(instrument.symbol)
            if known != instrument:
                known = self._shared(instrument)
                changed += 1
            fresh[known.symbol] = known
        self._by_symbol = fresh
        if changed:
            self._forget_unused()
        return changed

    def get(self, symbol: str) -> Instrument | None:
        return self._by_symbol.get(symbol)

    def __getitem__(self, symbol: str) -> Instrument:
        """Raises KeyError: without the venue's rules there is no trade."""
        return self._by_symbol[symbol]

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._by_symbol

    def __iter__(self) -> Iterator[Instrument]:
        return iter(self._by_symbol.values())

    def __len__(self) -> int:
        return len(self._by_symbol)

    def quantise_price(self, symbol: str, price: Decimal, rounding: str) -> Decimal:
        """Price on the tick grid. `rounding` is one of decimal's ROUND_ constants."""
        return on_grid(price, self[symbol].tick_size, rounding)

    def quantise_quantity(self, symbol: str, quantity: Decimal, market: bool = True) -> Decimal:
        """Quantity on the step grid, never more than asked; 0 when it is less than one step."""
        rules = self[symbol]
        return on_grid(quantity, rules.market_step_size if market else rules.step_size, ROUND_FLOOR)

    def order_problem(
        self,
        symbol: str,
        quantity: Decimal,
        price: Decimal,
        *,
        market: bool = True,
        reduce_only: bool = False,
    ) -> str:
        """Why the venue would refuse the quantity at the price, in words; "" when it would not.

        A reduce-only order is exempt from the minimum notional.
        """
        rules = self[symbol]
        least = rules.market_min_quantity if market else rules.min_quantity
        most = rules.market_max_quantity if market else rules.max_quantity
        if quantity < least or quantity <= 0:
            return f"quantity {quantity} below the minimum {least}"
        if quantity > most:
            return f"quantity {quantity} above the maximum {most}"
        if not reduce_only and quantity * price < rules.min_notional:
            return f"notional {quantity * price} below the minimum {rules.min_notional}"
        return ""

    def _forget_unused(self) -> None:
        """Rules change for months, and each change may bring a number that was never seen."""
        used = (getattr(rules, name) for rules in self for name in rules.__struct_fields__)
        self._decimals = {str(value): value for value in used if isinstance(value, Decimal)}

    def _shared(self, instrument: Instrument) -> Instrument:
        values = {name: getattr(instrument, name) for name in instrument.__struct_fields__}
        return msgspec.structs.replace(instrument, **{k: self._share(v) for k, v in values.items()})

    def _share(self, value: object) -> object:
        if isinstance(value, Decimal):
            return self._decimals.setdefault(str(value), value)
        return sys.intern(value) if isinstance(value, str) else value


def on_grid(value: Decimal, step: Decimal, rounding: str) -> Decimal:
    """The multiple of `step` next to `value`, by one of decimal's ROUND_ constants."""
    return (value / step).to_integral_value(rounding) * step
