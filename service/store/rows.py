"""Records as rows and back: what both dialects keep is the same text, in the same columns."""

import math
from collections.abc import Sequence
from decimal import Decimal

import msgspec
import structlog

from service.records import (
    Adjustment,
    Decision,
    Fill,
    ModelEntry,
    ModelRole,
    Order,
    Position,
    ShadowPosition,
    Signal,
)

log = structlog.get_logger("store.rows")

DAY_MS = 86_400_000
DECIDED_KEPT_MS = 2 * DAY_MS  # a signal is decided within minutes of its candle
SHADOWS_KEPT_MS = 7 * DAY_MS  # closed ones live on in the archive
ENDED_KEPT_MS = 100 * DAY_MS  # orders, fills and positions: longer than the three months the venue tells of
CLOSED_KEPT = 1_000  # newest traded positions that stay whatever their age: sizing looks at past trades
PRUNED_AT_ONCE = 200  # positions in one transaction, so that none is long

TOTALS = ("realised_pnl", "fees", "funding", "deposits", "corrections")

encode = msgspec.json.encode
to_order = msgspec.json.Decoder(Order).decode
to_fill = msgspec.json.Decoder(Fill).decode
to_position = msgspec.json.Decoder(Position).decode
to_shadow = msgspec.json.Decoder(ShadowPosition).decode
to_model = msgspec.json.Decoder(ModelEntry).decode

OrderRow = tuple[str, str, bool, str, str, bool, bytes]
FillRow = tuple[str, str, str, int, bytes]
PositionRow = tuple[str, str, bool, int, bytes]
ShadowRow = tuple[str, int, bytes]


def order_row(order: Order) -> OrderRow:
    return (
        order.client_order_id,
        order.venue_order_id,
        order.type.conditional,
        order.symbol,
        order.position_id,
        order.status.final,
        encode(order),
    )


def fill_row(fill: Fill) -> FillRow:
    return fill.symbol, fill.trade_id, fill.client_order_id, fill.filled_ms, encode(fill)


def position_row(position: Position) -> PositionRow:
    traded = position.entry_price > 0
    return position.position_id, position.symbol, traded, position.closed_ms, encode(position)


def adjustment_row(adjustment: Adjustment) -> tuple[str, int, bytes]:
    return adjustment.adjustment_id, adjustment.at_ms, encode(adjustment)


def decided_rows(signals: Sequence[tuple[Signal, Decision]]) -> list[tuple[str, int]]:
    return [(signal.signal_id, signal.candle_close_ms) for signal, _ in signals]


def shadow_rows(shadows: Sequence[ShadowPosition]) -> list[ShadowRow]:
    """JSON has no infinity and no NaN: a shadow with one could not be read again and is left out."""
    rows = []
    for shadow in shadows:
        if all(math.isfinite(value) for value in _floats(shadow)):
            rows.append((shadow.position_id, shadow.closed_ms, encode(shadow)))
        else:
            log.error("a shadow position is no number and is not kept", shadow=str(shadow))
    return rows


def retired(entry: ModelEntry) -> ModelEntry:
    return msgspec.structs.replace(entry, role=ModelRole.RETIRED)


def _floats(shadow: ShadowPosition) -> list[float]:
    return [v for name in shadow.__struct_fields__ if isinstance(v := getattr(shadow, name), float)]


def ledger_totals(stored: Sequence[tuple[str, str | Decimal]]) -> dict[str, Decimal]:
    """Every total by name, 0 where nothing is booked."""
    found = {name: Decimal(amount) for name, amount in stored}
    return {name: found.get(name, Decimal(0)) for name in TOTALS}
