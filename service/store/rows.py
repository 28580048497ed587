"""Records as rows and back: what both dialects keep is the same text, in the same columns."""

import math
from collections.abc import Sequence
from decimal import Decimal
from hashlib import blake2s

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
    Record,
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

OrderRow = tuple[str, str, bool, str, str, bool, bytes, str | None]
FillRow = tuple[str, str, str, int, bytes]
PositionRow = tuple[str, str, bool, int, bytes]
ShadowRow = tuple[str, int, bytes]
OutboxRow = tuple[str, str, str]

_of_stream: dict[str, msgspec.json.Decoder[Order | Fill | Position | Adjustment | ShadowPosition]] = {
    "orders": msgspec.json.Decoder(Order),
    "fills": msgspec.json.Decoder(Fill),
    "positions": msgspec.json.Decoder(Position),
    "adjustments": msgspec.json.Decoder(Adjustment),
    "shadow_outcomes": msgspec.json.Decoder(ShadowPosition),
}


def order_row(order: Order) -> OrderRow:
    matched = order.became_order_id if order.type.conditional else order.venue_order_id
    return (
        order.client_order_id,
        order.venue_order_id,
        order.type.conditional,
        order.symbol,
        order.position_id,
        order.status.final,
        encode(order),
        matched or None,
    )


def fill_row(fill: Fill) -> FillRow:
    return fill.symbol, fill.trade_id, fill.client_order_id, fill.filled_ms, encode(fill)


def position_row(position: Position) -> PositionRow:
    traded = position.entry_price > 0
    return position.position_id, position.symbol, traded, position.closed_ms, encode(position)


def outbox_row(stream: str, record: Record) -> OutboxRow:
    """What the archive has still to get; a newer state of the same thing replaces an older one.

    Each state of an order is a thing of its own: they tell how it came to its end, and what followed.
    """
    names = {
        Order: ("client_order_id",),
        Fill: ("symbol", "trade_id"),
        Position: ("position_id",),
        Adjustment: ("adjustment_id",),
        ShadowPosition: ("position_id",),
    }[type(record)]
    name = ":".join((stream, *(getattr(record, name) for name in names)))
    payload = encode(record)
    if isinstance(record, Order):
        name += f":{record.updated_ms:014d}:{blake2s(payload, digest_size=8).hexdigest()}"
    return name, stream, payload.decode()


def outbox_rows(records: Sequence[Record]) -> list[OutboxRow]:
    """Rows of those of the records that the archive gets for sure."""
    found = []
    for record in records:
        if isinstance(record, Fill):
            found.append(outbox_row("fills", record))
        elif isinstance(record, Adjustment):
            found.append(outbox_row("adjustments", record))
        elif isinstance(record, Order):
            found.append(outbox_row("orders", record))
        elif isinstance(record, Position) and record.closed_ms and record.entry_price:
            found.append(outbox_row("positions", record))
        elif isinstance(record, ShadowPosition) and record.closed_ms and _finite(record):
            found.append(outbox_row("shadow_outcomes", record))
    return found


def outbox_marks(records: Sequence[tuple[str, Record]]) -> list[tuple[str, str]]:
    """Name and payload of the rows that records, each of a stream, have there; some kinds have none."""
    return [(name, payload) for name, _, payload in outbox_rows([record for _, record in records])]


def from_outbox(stream: str, payload: str) -> Record:
    return _of_stream[stream].decode(payload)


def adjustment_row(adjustment: Adjustment) -> tuple[str, int, bytes]:
    return adjustment.adjustment_id, adjustment.at_ms, encode(adjustment)


def decided_rows(signals: Sequence[tuple[Signal, Decision]]) -> list[tuple[str, int]]:
    return [(signal.signal_id, signal.candle_close_ms) for signal, _ in signals]


def shadow_rows(shadows: Sequence[ShadowPosition]) -> list[ShadowRow]:
    """JSON has no infinity and no NaN: a shadow with one could not be read again and is left out."""
    rows = []
    for shadow in shadows:
        if _finite(shadow):
            rows.append((shadow.position_id, shadow.closed_ms, encode(shadow)))
        else:
            log.error("a shadow position is no number and is not kept", shadow=str(shadow))
    return rows


def retired(entry: ModelEntry) -> ModelEntry:
    return msgspec.structs.replace(entry, role=ModelRole.RETIRED)


def _finite(shadow: ShadowPosition) -> bool:
    values = [getattr(shadow, name) for name in shadow.__struct_fields__]
    return all(math.isfinite(value) for value in values if isinstance(value, float))


def ledger_totals(stored: Sequence[tuple[str, str | Decimal]]) -> dict[str, Decimal]:
    """Every total by name, 0 where nothing is booked."""
    found = {name: Decimal(amount) for name, amount in stored}
    return {name: found.get(name, Decimal(0)) for name in TOTALS}
