"""Samples that tests share: an instrument, a signal, a fill and a position with unremarkable values."""

from decimal import Decimal

import msgspec

from service.records import Fill, Instrument, Position, PositionSide, Side, Signal

INSTRUMENT = Instrument(
    symbol="AUSDT",
    base_asset="A",
    quote_asset="USDT",
    contract_type="PERPETUAL",
    status="TRADING",
    onboard_ms=0,
    delivery_ms=4_133_404_800_000,
    tick_size=Decimal("0.1"),
    step_size=Decimal("0.001"),
    market_step_size=Decimal("0.001"),
    min_price=Decimal(1),
    max_price=Decimal(1_000_000),
    min_quantity=Decimal("0.001"),
    max_quantity=Decimal(1000),
    market_min_quantity=Decimal("0.001"),
    market_max_quantity=Decimal(500),
    min_notional=Decimal(5),
    multiplier_up=Decimal("1.05"),
    multiplier_down=Decimal("0.95"),
)
FILL = Fill(
    trade_id="1",
    client_order_id="pp-1",
    venue_order_id="9",
    symbol="AUSDT",
    side=Side.BUY,
    price=Decimal(100),
    quantity=Decimal(1),
    fee=Decimal("0.05"),
    fee_asset="USDT",
    realised_pnl=Decimal(0),
    maker=False,
    filled_ms=5,
)
POSITION = Position(
    position_id="p1",
    signal_id="s1",
    symbol="AUSDT",
    position_side=PositionSide.LONG,
    quantity=Decimal(1),
    entry_price=Decimal(100),
    stop=Decimal(99),
    target=Decimal(102),
    leverage=3,
    margin=Decimal(33),
    opened_ms=5,
)


def instrument(symbol: str = "AUSDT", **changes: object) -> Instrument:
    base = symbol.removesuffix("USDT")
    return msgspec.structs.replace(INSTRUMENT, **({"symbol": symbol, "base_asset": base} | changes))


def signal(
    name: str = "s1",
    symbol: str = "AUSDT",
    side: PositionSide = PositionSide.LONG,
    close_ms: int = 0,
    **changes: object,
) -> Signal:
    """A signal at 100 that risks 1 to win 2."""
    sample = Signal(
        signal_id=name,
        strategy="s",
        symbol=symbol,
        position_side=side,
        candle_close_ms=close_ms,
        entry=100.0,
        stop=100.0 - side.sign,
        target=100.0 + 2 * side.sign,
        atr=0.5,
        confidence=0.6,
        scores={},
        features={},
    )
    return msgspec.structs.replace(sample, **changes)
