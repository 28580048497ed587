"""The seams between parts. `daemon.py` hands each part what it needs; nothing else reads the clock,
the environment or the network."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from typing import Protocol

from service.records import (
    Account,
    Adjustment,
    Bracket,
    CandleUpdate,
    Decision,
    Fill,
    FundingRate,
    Instrument,
    MarkPrice,
    ModelEntry,
    Order,
    OrderRequest,
    Position,
    Record,
    ShadowPosition,
    Signal,
    Ticker,
)

CandleRow = tuple[int, float, float, float, float, float]
"""open_ms, open, high, low, close, volume (base)."""

UserEvent = Order | Fill | Adjustment
"""What the venue's private stream says: order changes, executions, wallet changes."""


class Clock(Protocol):
    """Venue time and waiting. See `clock.py`."""

    @property
    def speed(self) -> float: ...
    def now_ms(self) -> int: ...
    def monotonic_s(self) -> float: ...
    async def sleep_s(self, seconds: float) -> None: ...
    async def sleep_until(self, at_ms: int) -> None: ...


class MarketData(Protocol):
    """Public data of one venue. Reads raise VenueUnavailable (retry), VenueRestricted, VenueMalformed.

    Reads wait for room in the venue's weight budget instead of failing.
    """

    async def server_time_ms(self) -> int: ...
    async def instruments(self) -> list[Instrument]: ...
    async def tickers(self) -> list[Ticker]: ...
    async def mark_prices(self) -> list[MarkPrice]: ...
    async def candles(
        self, symbol: str, timeframe: str, *, limit: int, start_ms: int | None = None
    ) -> list[CandleRow]:
        """Closed candles only, oldest first, each on the timeframe's grid, no duplicates."""
        ...

    async def funding_rates(self, start_ms: int, end_ms: int) -> list[FundingRate]:
        """What was settled within [start_ms, end_ms], of all symbols, oldest first, no duplicates."""
        ...

    def candle_stream(
        self,
        symbols: Sequence[str],
        timeframe: str,
        on_candle: Callable[[CandleUpdate], None],
        on_gap: Callable[[Sequence[str]], None],
    ) -> AbstractAsyncContextManager[None]:
        """Deliver updates to `on_candle` while the block runs, reconnecting and renewing by itself.

        `on_gap(symbols)` is called when updates may have been missed (after a reconnect): repair by REST.
        """
        ...


class Exchange(MarketData, Protocol):
    """One account at one venue."""

    async def account(self) -> Account: ...
    async def brackets(self) -> dict[str, tuple[Bracket, ...]]: ...
    async def prepare(self, symbols: Sequence[str], margin_type: str) -> None:
        """One-way mode and single-asset margin checked; raises RequestRejected when the account differs."""
        ...

    async def set_leverage(self, symbol: str, leverage: int, margin_type: str) -> None: ...
    async def place(self, request: OrderRequest) -> Order:
        """Send one order.

        Raises OrderRejected (nothing rests), OrderOutcomeUnknown (sent, no usable answer), or
        VenueUnavailable (nothing was sent). Never resends by itself.
        """
        ...

    async def cancel(self, order: Order) -> bool:
        """Cancel. False when the venue no longer knows it: it ended before, ask how."""
        ...

    async def order(self, order: Order) -> tuple[Order, list[Fill]] | None:
        """The venue's view of one of our orders and its fills; None when it does not know it."""
        ...

    async def open_orders(self) -> list[Order]:
        """All resting orders, conditional ones included."""
        ...

    async def executions(self, symbol: str, since_ms: int) -> list[Fill]:
        """All executions on a symbol since then, ours or not, oldest first, under their client order ids.

        The venue keeps three months of them. "" where it no longer knows the order.
        """
        ...

    async def adjustments(self, since_ms: int) -> list[Adjustment]:
        """Funding and transfers since then, oldest first (the venue's income history)."""
        ...

    def user_stream(
        self, on_event: Callable[[UserEvent], None], on_gap: Callable[[], None]
    ) -> AbstractAsyncContextManager[None]:
        """Deliver our orders' events, in the venue's order; `on_gap` asks for a reconciliation."""
        ...


class Archive(Protocol):
    """Where every record goes for good."""

    async def put(self, stream: str, record: Record) -> None:
        """Accept one record; it survives SIGKILL on return. Waits when the disk is slow. Streams: see
        `archive.schema.STREAMS`."""
        ...

    @property
    def writable(self) -> bool: ...

    @property
    def identity(self) -> str:
        """Which archive it is: sequence numbers of two archives say nothing about each other."""
        ...

    def sequence(self, stream: str) -> int:
        """The last number given out in a stream, 0 before the first; after a start, of what is durable."""
        ...


class StateStore(Protocol):
    """Durable state: what a restart must know. Each call takes effect whole, and is durable on return.

    Calls take effect in the order made, except `save_shadows`, `open_shadows`, `archived`, `unarchived` and
    `prune`, which keep their order among themselves and may come after calls made later. A cancelled one
    takes effect whole or not at all. They raise DataDirectoryUnusable (nothing was written that the next
    try would not repair: call again later), StateConflict (what is asked for contradicts what is kept) and
    LeaseLost (another perpd writes now).
    """

    async def save_order(self, order: Order) -> None: ...
    async def open_orders(self) -> list[Order]: ...
    async def order(self, client_order_id: str) -> Order | None: ...
    async def save_fill(
        self,
        fill: Fill,
        *,
        realised_pnl: Decimal,
        fee: Decimal,
        quantity: Decimal,
        cost: Decimal,
        position: Position | None = None,
        cooldown_until_ms: int = 0,
    ) -> bool:
        """Book a fill with all it moves: totals, the symbol's holding after it, our position after it.

        The cooldown is that of the position's symbol, 0 for none; it never ends one that lasts longer.
        True when the fill is new; the venue's (symbol, trade_id) is booked once for ever.
        """
        ...

    async def fills(self, client_order_id: str) -> list[Fill]: ...
    async def save_intent(self, position: Position, order: Order) -> None:
        """A position that is meant to be, and the order that shall open it."""
        ...

    async def save_position(self, position: Position, *, cooldown_until_ms: int = 0) -> None:
        """Add or replace, with the cooldown that begins with it, as in `save_fill`."""
        ...

    async def position(self, position_id: str) -> Position | None: ...
    async def open_positions(self) -> list[Position]: ...
    async def closed_positions(self, limit: int) -> list[Position]:
        """The most recently closed, newest first."""
        ...

    async def save_shadows(self, shadows: Sequence[ShadowPosition]) -> None: ...
    async def open_shadows(self) -> list[ShadowPosition]: ...
    async def save_signal_decided(
        self, signals: Sequence[tuple[Signal, Decision]], shadows: Sequence[ShadowPosition] = ()
    ) -> None:
        """Mark signals as decided, and keep those of their shadows that are not kept yet."""
        ...

    async def decided_since(self, candle_close_ms: int) -> set[str]:
        """Signal ids already decided on candles closing at or after then."""
        ...

    async def save_adjustment(
        self, adjustment: Adjustment, *, holding: tuple[str, Decimal, Decimal] | None = None
    ) -> bool:
        """True when it is new. `holding` (symbol, quantity, cost) replaces what is booked there."""
        ...

    async def unarchived(self, stream: str) -> list[Record]:
        """Records of a stream that are kept here and were not called `archived` since: fills, adjustments,
        states of orders, closed positions and closed shadows (`shadow_outcomes`). In no order of time."""
        ...

    async def archived(self, records: Sequence[tuple[str, Record]]) -> None:
        """The archive has these, each of a stream, as they are."""
        ...

    async def get_value(self, key: str) -> str | None: ...
    async def set_value(self, key: str, value: str) -> None: ...
    async def bans(self) -> dict[str, int]:
        """Host to venue time (ms) until which it asked for silence."""
        ...

    async def save_ban(self, host: str, until_ms: int) -> None: ...
    async def cooldowns(self) -> dict[str, int]:
        """Symbol to venue time (ms) until which nothing is opened on it; some are over."""
        ...

    async def models(self) -> list[ModelEntry]:
        """The model registry, newest first."""
        ...

    async def save_model(self, entry: ModelEntry) -> None:
        """Add or replace by name. A new champion retires the one before, in the same transaction."""
        ...

    async def prune(self, now_ms: int) -> int:
        """Forget what ended long ago, so that the store does not grow. Returns the rows deleted."""
        ...

    async def ledger_totals(self) -> dict[str, Decimal]:
        """Sums over all that is booked: realised_pnl, fees, funding, deposits, corrections."""
        ...

    async def holdings(self) -> dict[str, tuple[Decimal, Decimal]]:
        """Per symbol the signed quantity and cost that the fills left, zero quantities excluded."""
        ...


class Recorder(Protocol):
    """Where parts report how long an operation took and what they count."""

    def record(self, operation: str, seconds: float) -> None: ...
    def count(self, name: str, amount: int = 1) -> None: ...


class CacheTier(Protocol):
    """Where the feature cache keeps what memory does not. Bodies come back as they were put, or not at all.

    A token names one entry for ever: code, options, key and candles. Each call is one batch and may raise
    CacheUnavailable; the caller gives up a get after `limit_s`, a put after `put_limit_s` (wall).
    """

    @property
    def shared(self) -> bool:
        """Whether others write to it too."""
        ...

    @property
    def limit_s(self) -> float: ...
    @property
    def put_limit_s(self) -> float: ...
    async def get_many(
        self, rows: Sequence[int], tokens: Sequence[bytes], now_ms: int, ttl_ms: int
    ) -> list[bytes | None]:
        """The body of each token, None where there is none that is still in time."""
        ...

    async def put_many(
        self, rows: Sequence[int], tokens: Sequence[bytes], bodies: Sequence[bytes], now_ms: int, ttl_ms: int
    ) -> None:
        """Keep each body for `ttl_ms` of market time. A row's older entry may be dropped."""
        ...

    async def close(self) -> None: ...
