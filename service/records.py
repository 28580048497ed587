"""What crosses a part's boundary: immutable records, named in the field's standard terms.

Prices are in the quote currency, quantities in the base currency, notionals and PnL in the quote
currency. `Decimal` wherever the venue keeps the books; float only in analysis. Times are venue time.
"""

from decimal import Decimal
from enum import StrEnum

import msgspec

TIMEFRAMES: tuple[str, ...] = ("5m", "15m", "1h")
TIMEFRAME_MS: dict[str, int] = {
    "1m": 60_000,
    "3m": 180_000,
    "5m": 300_000,
    "15m": 900_000,
    "30m": 1_800_000,
    "1h": 3_600_000,
    "2h": 7_200_000,
    "4h": 14_400_000,
    "6h": 21_600_000,
    "8h": 28_800_000,
    "12h": 43_200_000,
    "1d": 86_400_000,
}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every record that is archived, stored or passed between parts."""


class Side(StrEnum):
    """Direction of an order."""

    BUY = "BUY"
    SELL = "SELL"

    @property
    def opposite(self) -> "Side":
        return Side.SELL if self is Side.BUY else Side.BUY


class PositionSide(StrEnum):
    """Direction of a position or of a signal."""

    LONG = "LONG"
    SHORT = "SHORT"

    @property
    def entry_side(self) -> Side:
        return Side.BUY if self is PositionSide.LONG else Side.SELL

    @property
    def exit_side(self) -> Side:
        return self.entry_side.opposite

    @property
    def sign(self) -> int:
        return 1 if self is PositionSide.LONG else -1


class OrderType(StrEnum):
    """What the venue is asked to do; the last two are conditional (algo) orders."""

    MARKET = "MARKET"
    LIMIT = "LIMIT"
    STOP_MARKET = "STOP_MARKET"
    TAKE_PROFIT_MARKET = "TAKE_PROFIT_MARKET"

    @property
    def conditional(self) -> bool:
        return self in (OrderType.STOP_MARKET, OrderType.TAKE_PROFIT_MARKET)


class OrderStatus(StrEnum):
    """Life of an order. INTENDED to UNKNOWN are ours, the rest the venue's."""

    INTENDED = "intended"  # written down, not sent
    SENT = "sent"  # sent, no answer yet
    UNKNOWN = "unknown"  # sent, no usable answer: ask the venue
    OPEN = "open"
    PARTLY_FILLED = "partly_filled"
    FILLED = "filled"
    TRIGGERED = "triggered"  # a conditional order that became a market order
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REJECTED = "rejected"

    @property
    def final(self) -> bool:
        return self in (
            OrderStatus.FILLED,
            OrderStatus.CANCELLED,
            OrderStatus.EXPIRED,
            OrderStatus.REJECTED,
        )


class OrderPurpose(StrEnum):
    """Why we send an order."""

    ENTRY = "entry"
    STOP = "stop"
    TARGET = "target"
    EXIT = "exit"


class CloseReason(StrEnum):
    """Why a position ended."""

    STOP = "stop"
    TARGET = "target"
    EXPIRED = "expired"
    EXIT = "exit"  # perpd closed it at market
    LIQUIDATION = "liquidation"
    ADL = "adl"
    SETTLEMENT = "settlement"
    MANUAL = "manual"
    NO_CANDLES = "no_candles"  # a shadow whose market ended: its price is no outcome


class RefusalReason(StrEnum):
    """Why a signal is not traded. Every refused signal carries one and lives on as a shadow position."""

    LOW_CONFIDENCE = "low_confidence"
    NOT_IN_TOP = "not_in_top"  # ranked below the traded top of the cycle
    MAX_POSITIONS = "max_positions"
    SYMBOL_HELD = "symbol_held"
    COOLDOWN = "cooldown"  # the symbol's last position ended at its stop a short while ago
    STALE_DATA = "stale_data"
    BALANCE_UNKNOWN = "balance_unknown"
    NEGATIVE_EXPECTANCY = "negative_expectancy"
    CAUTION = "caution"  # loss streak or daily loss: only strong signals
    DAILY_LOSS = "daily_loss"
    DRAWDOWN_BREAKER = "drawdown_breaker"
    FINAL_STOP = "final_stop"
    BELOW_MINIMUM = "below_minimum"  # the risk budget buys less than the venue's minimum order
    ABOVE_BRACKET = "above_bracket"
    MARGIN_INSUFFICIENT = "margin_insufficient"
    STOP_INVALID = "stop_invalid"  # the stop breaks a filter or lies beyond liquidation
    ENTRIES_OFF = "entries_off"  # draining, unwritable archive, memory, by hand
    ORDER_REJECTED = "order_rejected"
    ORDER_UNKNOWN = "order_unknown"


class Instrument(Record, frozen=True, kw_only=True, gc=False):
    """The venue's rules for one symbol."""

    symbol: str
    base_asset: str
    quote_asset: str
    contract_type: str  # PERPETUAL, TRADIFI_PERPETUAL, CURRENT_QUARTER, ...
    status: str  # TRADING, SETTLING, PENDING_TRADING, ...
    onboard_ms: int
    delivery_ms: int
    tick_size: Decimal
    step_size: Decimal  # limit orders
    market_step_size: Decimal
    min_price: Decimal
    max_price: Decimal
    min_quantity: Decimal
    max_quantity: Decimal
    market_min_quantity: Decimal
    market_max_quantity: Decimal
    min_notional: Decimal
    multiplier_up: Decimal  # PERCENT_PRICE against the mark price
    multiplier_down: Decimal


class Bracket(Record, frozen=True, kw_only=True, gc=False):
    """One row of a symbol's leverage brackets, ordered by notional."""

    notional_floor: Decimal
    notional_cap: Decimal
    max_leverage: int
    maintenance_margin_fraction: Decimal
    maintenance_amount: Decimal  # quote; subtracted so that the requirement is continuous


class Load(msgspec.Struct, frozen=True, gc=False):
    """How busy the daemon's process tree is. Each 0 to 1, and beyond when over its limit."""

    memory_fraction: float  # PSS over the memory limit
    cpu_fraction: float  # CPU time over what all cores could have given


class Ticker(Record, frozen=True, kw_only=True, gc=False):
    """Last 24 hours of one symbol."""

    symbol: str
    last_price: float
    quote_volume: float


class CandleUpdate(Record, frozen=True, kw_only=True, gc=False):
    """A candle as the stream reports it; final once `closed`."""

    symbol: str
    timeframe: str
    open_ms: int
    open: float
    high: float
    low: float
    close: float
    volume: float  # base
    closed: bool
    event_ms: int


class MarkPrice(Record, frozen=True, kw_only=True, gc=False):
    """Mark price and funding of one symbol."""

    symbol: str
    mark_price: Decimal
    funding_rate: Decimal  # a fraction, of the running interval
    next_funding_ms: int


class FundingRate(Record, frozen=True, kw_only=True, gc=False):
    """One settled funding of one symbol: a long pays rate x notional at the mark price, a short gets it."""

    symbol: str
    at_ms: int  # on the minute: the venue's times carry a few milliseconds of jitter
    rate: float  # a fraction; negative: shorts pay
    mark_price: float  # at the settlement; 0 where the venue does not say


class Signal(Record, frozen=True, kw_only=True, gc=False):
    """A strategy's wish to open a position, computed on closed candles only.

    `signal_id` is deterministic: strategy, symbol, candle close and side, so the same candles give the
    same id in any mode, batch and process. Joins with outcomes go through it, never through the symbol.
    """

    signal_id: str
    strategy: str
    symbol: str
    position_side: PositionSide
    candle_close_ms: int  # first millisecond after the newest 5m candle used
    entry: float
    stop: float
    target: float
    atr: float  # ATR(14) of 5m, quote
    confidence: float  # 0 to 1
    scores: dict[str, float]  # the parts of the confidence, each 0 to 1
    features: dict[str, float]  # what a model scores; the same function serves and trains


class DecisionOutcome(StrEnum):
    ACCEPTED = "accepted"
    REFUSED = "refused"


class Decision(Record, frozen=True, kw_only=True, gc=False):
    """What became of one signal. Each signal has exactly one."""

    signal_id: str
    symbol: str
    position_side: PositionSide
    outcome: DecisionOutcome
    reason: str  # a RefusalReason, or "" when accepted
    detail: str  # the value and the limit, in words
    rank: int  # 1 is the best of its cycle
    cycle: int
    decided_ms: int
    leverage: int = 0
    quantity: Decimal = Decimal(0)
    notional: Decimal = Decimal(0)
    margin: Decimal = Decimal(0)
    risk_amount: Decimal = Decimal(0)  # loss at the stop with fees, quote
    equity: Decimal = Decimal(0)


class OrderRequest(Record, frozen=True, kw_only=True, gc=False):
    """One order as we ask for it. `trigger_price` is set on conditional orders only."""

    client_order_id: str
    symbol: str
    side: Side
    type: OrderType
    purpose: OrderPurpose
    position_id: str
    quantity: Decimal | None = None  # None with close_position
    price: Decimal | None = None
    trigger_price: Decimal | None = None
    reduce_only: bool = False
    close_position: bool = False
    time_in_force: str = ""
    working_type: str = ""  # conditional orders: CONTRACT_PRICE or MARK_PRICE; "" is as configured


class Order(Record, frozen=True, kw_only=True, gc=False):
    """An order and what is known of its life. A new record replaces the old on each change."""

    client_order_id: str
    venue_order_id: str  # "" until the venue answered; the algo id for conditional orders
    position_id: str
    symbol: str
    side: Side
    type: OrderType
    purpose: OrderPurpose
    status: OrderStatus
    quantity: Decimal
    filled_quantity: Decimal
    average_price: Decimal
    trigger_price: Decimal
    reason: str  # the venue's words when rejected or expired
    created_ms: int
    updated_ms: int
    became_order_id: str = ""  # conditional orders: venue id of the order that the trigger made


class Fill(Record, frozen=True, kw_only=True, gc=False):
    """One execution of one order, on the venue's grid."""

    trade_id: str
    client_order_id: str
    venue_order_id: str
    symbol: str
    side: Side
    price: Decimal
    quantity: Decimal
    fee: Decimal  # quote currency; positive is paid
    fee_asset: str
    realised_pnl: Decimal  # as the venue states it, fees excluded
    maker: bool
    filled_ms: int


class Adjustment(Record, frozen=True, kw_only=True, gc=False):
    """A change of the wallet that is not a trade: funding, transfer, correction."""

    adjustment_id: str
    kind: str  # funding, deposit, correction, settlement, ...
    symbol: str  # "" where it belongs to none
    amount: Decimal  # quote; positive is received
    reason: str
    at_ms: int

    @property
    def total(self) -> str:
        """The ledger's sum it belongs to. Only money that was moved in or out is a deposit: a loss that
        was missed and taken over later must count as a loss in every limit."""
        return {"funding": "funding", "deposit": "deposits"}.get(self.kind, "corrections")


class VenuePosition(Record, frozen=True, kw_only=True, gc=False):
    """A position as the venue holds it. Quantity is signed: negative is short."""

    symbol: str
    quantity: Decimal
    entry_price: Decimal
    mark_price: Decimal
    unrealised_pnl: Decimal
    liquidation_price: Decimal
    leverage: int  # 0 where the venue does not say
    updated_ms: int


class Account(Record, frozen=True, kw_only=True):
    """The account as the venue states it, in one answer and so at one instant."""

    wallet_balance: Decimal
    unrealised_pnl: Decimal
    equity: Decimal  # the venue's margin balance: wallet + unrealised PnL
    available_balance: Decimal
    positions: tuple[VenuePosition, ...]  # non-zero only
    at_ms: int  # venue time at which it was received


class Position(Record, frozen=True, kw_only=True, gc=False):
    """A position of ours, from its entry's fill to its close."""

    position_id: str
    signal_id: str
    symbol: str
    position_side: PositionSide
    quantity: Decimal  # still open; 0 when closed
    entry_price: Decimal  # average of the entry's fills
    stop: Decimal
    target: Decimal
    leverage: int
    margin: Decimal
    opened_ms: int
    closed_ms: int = 0
    exit_price: Decimal = Decimal(0)
    close_reason: str = ""  # a CloseReason, or "" while open
    realised_pnl: Decimal = Decimal(0)  # fees and funding excluded
    fees: Decimal = Decimal(0)
    funding: Decimal = Decimal(0)
    stop_order_id: str = ""  # client order ids
    target_order_id: str = ""
    protected_ms: int = 0  # when the stop was known to rest on the venue; 0 while unprotected
    first_stop: Decimal = Decimal(0)  # where the stop was at the entry; the risk is measured from it


class Resolution(StrEnum):
    """What told the order in which a shadow's prices came."""

    CANDLE = "5m"  # the 5m candle touched one of stop and target, or neither
    FINER = "1m"  # it touched both, and 1m candles told which came first
    ASSUMED = "assumed"  # even they could not tell: the stop counts


class ShadowPosition(Record, frozen=True, kw_only=True, gc=False):
    """A position that is tracked on real prices but never ordered.

    Prices are floats: a shadow has no books at the venue. `excursion`s are in R (entry to stop is 1).
    A signal that was traded has a shadow too, `traded`: what the same rules make of it at the signal's
    prices, so that the difference to its real position is the slippage.
    """

    position_id: str
    signal_id: str
    symbol: str
    position_side: PositionSide
    entry: float
    stop: float
    target: float
    opened_ms: int
    checked_ms: int  # close time of the last candle it was checked against
    favourable_excursion: float = 0.0
    adverse_excursion: float = 0.0
    closed_ms: int = 0
    exit_price: float = 0.0
    close_reason: str = ""
    outcome_r: float = 0.0  # result in R after fees and funding
    pnl_fraction: float = 0.0  # of notional, after fees and funding
    funding_fraction: float = 0.0  # of notional, over the time held; positive is received
    resolution: str = ""  # a Resolution, or "" while open
    traded: bool = False  # the signal has a real position as well


class CycleReport(Record, frozen=True, kw_only=True):
    """What one cycle did, and how long it took (wall time)."""

    number: int  # since the start of its run, from 1
    finished_ms: int
    analysed: int
    stale: int
    failed: int
    shed: int  # not reached before the deadline
    signals: int
    accepted: int
    refused: dict[str, int]  # by RefusalReason
    batches: int
    analysis_s: float
    close_to_signal_s: float | None  # per cycle: of its latest new signal; None without one
    seconds: float
    garbage_s: float
    series_reused: int  # parts of the analysis that depend on one series, which had not changed
    series_computed: int


class ModelRole(StrEnum):
    """The champion trades, a challenger is compared with it, a retired one is history."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    RETIRED = "retired"


class ModelEntry(Record, frozen=True, kw_only=True):
    """One trained model as the registry knows it."""

    name: str
    created_ms: int
    path: str  # below the data directory
    metrics: dict[str, float]
    role: ModelRole
