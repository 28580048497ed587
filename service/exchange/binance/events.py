"""The private stream's messages as our events. One message may carry several, or none for us.

A conditional order becomes an order of its own at the trigger. Whatever id the venue gives that one,
here it keeps the client order id and the algo id under which we placed it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TypeVar

import msgspec
from msgspec import field

from service.exchange.binance.codec import (
    HOUR_MS,
    ZERO,
    algo_status,
    decimal_or_zero,
    funding_adjustment,
    order_status,
    order_type,
    purpose_of,
)
from service.ports import UserEvent
from service.records import Fill, Order, OrderStatus, OrderType, Side

K = TypeVar("K")
V = TypeVar("V")
ABSENT = msgspec.Raw(b"")
REMEMBERED_ORDERS = 1_000
REMEMBERED_FILLS = 200
FUNDING_DELAY_MS = 300_000
"""Funding reported later than this after the hour is left to the income history, which dates it rightly."""


class _Envelope(msgspec.Struct, frozen=True):
    """The parts common to all messages; the combined form wraps one in `data`."""

    event: str = field(name="e", default="")
    at_ms: int = field(name="T", default=0)
    event_ms: int = field(name="E", default=0)
    order: msgspec.Raw = field(name="o", default=ABSENT)
    account: msgspec.Raw = field(name="a", default=ABSENT)
    config: msgspec.Raw = field(name="ac", default=ABSENT)
    symbol: str = field(name="S", default="")
    data: msgspec.Raw = ABSENT


class _OrderPart(msgspec.Struct, frozen=True):
    symbol: str = field(name="s")
    client_id: str = field(name="c")
    side: Side = field(name="S")
    type: str = field(name="o")
    quantity: Decimal = field(name="q")
    execution: str = field(name="x")
    status: str = field(name="X")
    order_id: int = field(name="i")
    last_quantity: Decimal = field(name="l")
    filled: Decimal = field(name="z")
    last_price: Decimal = field(name="L")
    at_ms: int = field(name="T")
    average_price: str | None = field(name="ap", default=None)
    stop_price: str | None = field(name="sp", default=None)
    fee: str | None = field(name="n", default=None)
    fee_asset: str | None = field(name="N", default=None)
    trade_id: int = field(name="t", default=0)
    maker: bool = field(name="m", default=False)
    original_type: str | None = field(name="ot", default=None)
    realised_pnl: str | None = field(name="rp", default=None)
    reduce_only: bool = field(name="R", default=False)
    close_position: bool = field(name="cp", default=False)


class _AlgoPart(msgspec.Struct, frozen=True):
    client_id: str = field(name="caid")
    algo_id: int = field(name="aid")
    symbol: str = field(name="s")
    side: Side = field(name="S")
    type: str = field(name="o")
    status: str = field(name="X")
    quantity: str | None = field(name="q", default=None)
    order_id: str | int | None = field(name="ai", default=None)
    average_price: str | None = field(name="ap", default=None)
    filled: str | None = field(name="aq", default=None)
    trigger_price: str | None = field(name="tp", default=None)
    reason: str | None = field(name="rm", default=None)

    @property
    def became(self) -> str:
        """Venue id of the order it became, "" before the trigger."""
        text = str(self.order_id or "")
        return "" if text == "0" else text


class _BalancePart(msgspec.Struct, frozen=True):
    asset: str = field(name="a")
    change: Decimal = field(name="bc", default=ZERO)


class _PositionPart(msgspec.Struct, frozen=True):
    symbol: str = field(name="s")


class _AccountPart(msgspec.Struct, frozen=True):
    reason: str = field(name="m", default="")
    balances: list[_BalancePart] = field(name="B", default=[])
    positions: list[_PositionPart] = field(name="P", default=[])
    symbol: str = field(name="S", default="")


class _ConfigPart(msgspec.Struct, frozen=True):
    symbol: str = field(name="s", default="")
    leverage: int = field(name="l", default=0)


_config_part = msgspec.json.Decoder(_ConfigPart, strict=False)
_envelope = msgspec.json.Decoder(_Envelope, strict=False)
_order_part = msgspec.json.Decoder(_OrderPart, strict=False)
_algo_part = msgspec.json.Decoder(_AlgoPart, strict=False)
_account_part = msgspec.json.Decoder(_AccountPart, strict=False)


class _Conditional(msgspec.Struct):
    """What is remembered of a conditional order while its events arrive."""

    algo_id: str
    client_id: str
    type: OrderType
    trigger_price: Decimal
    ended: bool = False


class UserEvents:
    """Decoder of the private stream.

    Args: on_key_expired: called when the venue drops the key; on_setting(symbol, leverage): called when a
    symbol's settings changed, whoever changed them, with 0 where the leverage is not told; on_transfer:
    called when money came or went; the income history says what.
    """

    def __init__(
        self,
        on_key_expired: Callable[[], None],
        quote_asset: str = "USDT",
        on_setting: Callable[[str, int], None] = lambda symbol, leverage: None,
        on_transfer: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_key_expired = on_key_expired
        self._on_setting = on_setting
        self._on_transfer = on_transfer
        self._quote_asset = quote_asset
        self._conditionals: OrderedDict[str, _Conditional] = OrderedDict()  # by client id
        self._became: OrderedDict[str, str] = OrderedDict()  # venue id of the order it became -> client id
        self._unclaimed: OrderedDict[tuple[str, str], Fill] = OrderedDict()

    def decode(self, body: bytes) -> Sequence[UserEvent]:
        """The events in one message. Raises msgspec.MsgspecError or UnicodeDecodeError."""
        envelope = _envelope.decode(body)
        if envelope.data:
            envelope = _envelope.decode(envelope.data)
        if envelope.event == "ORDER_TRADE_UPDATE" and envelope.order:
            return self._order_events(_order_part.decode(envelope.order))
        if envelope.event == "ALGO_UPDATE" and envelope.order:
            return self._algo_events(_algo_part.decode(envelope.order), envelope.at_ms or envelope.event_ms)
        if envelope.event == "ACCOUNT_UPDATE" and envelope.account:
            part = _account_part.decode(envelope.account)
            return self._account_events(part, part.symbol or envelope.symbol, envelope.at_ms)
        if envelope.event == "ACCOUNT_CONFIG_UPDATE" and envelope.config:
            changed = _config_part.decode(envelope.config)
            if changed.symbol:
                self._on_setting(changed.symbol, changed.leverage)
        if envelope.event == "listenKeyExpired":
            self._on_key_expired()
        return ()

    def _order_events(self, part: _OrderPart) -> list[UserEvent]:
        client_id = self._became.get(str(part.order_id), part.client_id)
        events: list[UserEvent] = []
        if part.execution in ("TRADE", "CALCULATED") and part.last_quantity > 0:
            fill = _fill(part, client_id)
            if client_id not in self._conditionals:
                _remember(self._unclaimed, (fill.venue_order_id, fill.trade_id), fill, REMEMBERED_FILLS)
            events.append(fill)
        events.append(self._order(part, client_id))
        return events

    def _order(self, part: _OrderPart, client_id: str) -> Order:
        conditional = self._conditionals.get(client_id)
        kind = order_type(part.original_type or part.type)
        if conditional:
            kind = conditional.type
        status = order_status(part.status, part.filled, part.quantity)
        if kind.conditional and status is OrderStatus.OPEN:
            status = OrderStatus.TRIGGERED
        if conditional and status.final:
            conditional.ended = True
        return Order(
            client_order_id=client_id,
            venue_order_id=conditional.algo_id if conditional else str(part.order_id),
            position_id="",
            symbol=part.symbol,
            side=part.side,
            type=kind,
            purpose=purpose_of(kind, reducing=part.reduce_only or part.close_position),
            status=status,
            quantity=part.quantity,
            filled_quantity=part.filled,
            average_price=decimal_or_zero(part.average_price),
            trigger_price=conditional.trigger_price if conditional else decimal_or_zero(part.stop_price),
            reason=part.status if status in (OrderStatus.EXPIRED, OrderStatus.REJECTED) else "",
            created_ms=part.at_ms,
            updated_ms=part.at_ms,
            became_order_id=str(part.order_id) if conditional else "",
        )

    def _algo_events(self, part: _AlgoPart, at_ms: int) -> list[UserEvent]:
        conditional = self._conditionals.get(part.client_id)
        if conditional is None or conditional.algo_id != str(part.algo_id):
            conditional = _Conditional(
                algo_id=str(part.algo_id),
                client_id=part.client_id,
                type=order_type(part.type),
                trigger_price=decimal_or_zero(part.trigger_price),
            )
            _remember(self._conditionals, part.client_id, conditional, REMEMBERED_ORDERS)
        events: list[UserEvent] = list(self._claim(part))
        filled = None if part.filled is None else decimal_or_zero(part.filled)
        status = algo_status(part.status, filled)
        if conditional.ended and not status.final:
            return events  # the order it became has ended already; its trigger is reported late
        conditional.ended = status.final
        events.append(
            Order(
                client_order_id=part.client_id,
                venue_order_id=conditional.algo_id,
                position_id="",
                symbol=part.symbol,
                side=part.side,
                type=conditional.type,
                purpose=purpose_of(conditional.type, reducing=True),
                status=status,
                quantity=decimal_or_zero(part.quantity) or filled or ZERO,
                filled_quantity=filled or ZERO,
                average_price=decimal_or_zero(part.average_price),
                trigger_price=decimal_or_zero(part.trigger_price),
                reason=(part.reason or "") if status in (OrderStatus.REJECTED, OrderStatus.EXPIRED) else "",
                created_ms=at_ms,
                updated_ms=at_ms,
                became_order_id=part.became,
            )
        )
        return events

    def _claim(self, part: _AlgoPart) -> list[Fill]:
        """Learn which order it became, and repeat under our id the fills that came before we knew."""
        order_id = part.became
        if not order_id or order_id in self._became:
            return []
        _remember(self._became, order_id, part.client_id, REMEMBERED_ORDERS)
        early = [key for key in self._unclaimed if key[0] == order_id]
        fills = [self._unclaimed.pop(key) for key in early]
        return [
            msgspec.structs.replace(fill, client_order_id=part.client_id)
            for fill in fills
            if fill.client_order_id != part.client_id
        ]

    def _account_events(self, part: _AccountPart, symbol: str, at_ms: int) -> list[UserEvent]:
        if part.reason == "MARGIN_TYPE_CHANGE":
            for position in part.positions:
                self._on_setting(position.symbol, 0)
        change = sum((each.change for each in part.balances if each.asset == self._quote_asset), ZERO)
        if not change:
            return []
        if part.reason in ("DEPOSIT", "WITHDRAW"):
            self._on_transfer()  # the income history numbers it: two equal ones must not become one
            return []
        if part.reason == "FUNDING_FEE":
            symbol = symbol or (part.positions[0].symbol if len(part.positions) == 1 else "")
            if symbol and at_ms % HOUR_MS <= FUNDING_DELAY_MS:
                return [funding_adjustment(symbol, change, at_ms)]
        return []


def _fill(part: _OrderPart, client_id: str) -> Fill:
    return Fill(
        trade_id=str(part.trade_id) if part.trade_id > 0 else f"{part.order_id}-{part.at_ms}",
        client_order_id=client_id,
        venue_order_id=str(part.order_id),
        symbol=part.symbol,
        side=part.side,
        price=part.last_price,
        quantity=part.last_quantity,
        fee=decimal_or_zero(part.fee),
        fee_asset=part.fee_asset or "",
        realised_pnl=decimal_or_zero(part.realised_pnl),
        maker=part.maker,
        filled_ms=part.at_ms,
    )


def _remember(memory: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    memory[key] = value
    if len(memory) > most:
        memory.popitem(last=False)
