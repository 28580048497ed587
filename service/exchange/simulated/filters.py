"""The symbol's filters: what a price and a quantity may be. Each refusal has the venue's code."""

from decimal import Decimal

from service.exchange.simulated.faults import fault
from service.records import Bracket, Instrument

ZERO = Decimal(0)


def checked_price(instrument: Instrument, price: Decimal) -> Decimal:
    """PRICE_FILTER. Returns the price with the tick's decimals."""
    tick = instrument.tick_size
    if price <= 0:
        raise fault(-4001)
    if price > instrument.max_price > 0:
        raise fault(-4002)
    if price < instrument.min_price:
        raise fault(-4013)
    if _decimals(price) > _places(tick):
        raise fault(-1111)
    if price % tick:
        raise fault(-4014)
    return price.quantize(tick) if _places(tick) else price


def checked_quantity(instrument: Instrument, quantity: Decimal, *, market: bool) -> Decimal:
    """LOT_SIZE, and MARKET_LOT_SIZE for orders that execute at market."""
    step = instrument.market_step_size if market else instrument.step_size
    least = instrument.market_min_quantity if market else instrument.min_quantity
    most = instrument.market_max_quantity if market else instrument.max_quantity
    if quantity <= 0:
        raise fault(-4003)
    if _decimals(quantity) > _places(instrument.step_size):
        raise fault(-1111)
    if quantity < least:
        raise fault(-4004)
    if quantity > most:
        raise fault(-4005)
    if step and quantity % step:
        raise fault(-4023)
    return quantity.quantize(instrument.step_size) if _places(instrument.step_size) else quantity


def check_notional(instrument: Instrument, notional: Decimal) -> None:
    """MIN_NOTIONAL; the caller exempts what only reduces."""
    if notional < instrument.min_notional:
        raise fault(-4164, notional=format(instrument.min_notional.normalize(), "f"))


def check_limit_percent(instrument: Instrument, buy: bool, price: Decimal, mark: Decimal) -> None:
    """PERCENT_PRICE of limit prices, against the mark price."""
    highest = mark * instrument.multiplier_up
    lowest = mark * instrument.multiplier_down
    if buy and instrument.multiplier_up > 0 and price > highest:
        raise fault(-4016, limit=format(on_tick(instrument, highest, up=False), "f"))
    if not buy and price < lowest:
        raise fault(-4024, limit=format(on_tick(instrument, lowest, up=True), "f"))


def check_market_percent(instrument: Instrument, buy: bool, price: Decimal, mark: Decimal) -> None:
    """PERCENT_PRICE of the price a market order would get."""
    if buy and instrument.multiplier_up > 0 and price > mark * instrument.multiplier_up:
        raise fault(-4131)
    if not buy and price < mark * instrument.multiplier_down:
        raise fault(-4131)


def on_tick(instrument: Instrument, price: Decimal, *, up: bool) -> Decimal:
    """The nearest price on the grid at or above (`up`), or at or below; never less than one tick."""
    tick = instrument.tick_size
    steps = price // tick
    if up and steps * tick < price:
        steps += 1
    return max(steps, Decimal(1)) * tick


def on_step(instrument: Instrument, quantity: Decimal) -> Decimal:
    """The largest tradable quantity not above `quantity`."""
    return quantity // instrument.step_size * instrument.step_size


def notional_cap(brackets: tuple[Bracket, ...], leverage: int) -> Decimal:
    """The largest notional that may be held at this leverage."""
    return max((row.notional_cap for row in brackets if row.max_leverage >= leverage), default=ZERO)


def _places(grid: Decimal) -> int:
    exponent = grid.as_tuple().exponent
    return max(-exponent, 0) if isinstance(exponent, int) else 0


def _decimals(number: Decimal) -> int:
    return _places(number.normalize())
