"""The account's books from our own records: wallet = deposits + realised PnL - fees + funding.

Realised PnL is computed here from the average cost of what is held and compared with what the venue
states. Amounts are booked as the venue books them: 8 decimals, half to even.
"""

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal

import msgspec
import structlog

from service.ports import Recorder, StateStore
from service.records import Account, Adjustment, Fill, Position, Side

log = structlog.get_logger("trading.ledger")

ZERO = Decimal(0)
EIGHT_DECIMALS = Decimal("0.00000001")
STATED_TOLERANCE = Decimal("0.000001")  # the venue rounds the entry price it divides by
HOUR_MS = 3_600_000
STARTED = "ledger.started_ms"


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What is held of one symbol: signed quantity, and price times signed quantity of what is open."""

    quantity: Decimal = ZERO
    cost: Decimal = ZERO


class Booking(msgspec.Struct, frozen=True, kw_only=True):
    """What one fill moves."""

    realised_pnl: Decimal
    fee: Decimal
    holding: Holding  # after the fill


class LedgerCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Our equity against the venue's, at the same instant and marks."""

    ledger_equity: Decimal
    venue_equity: Decimal
    difference: Decimal  # ours less theirs
    mismatched: tuple[str, ...]  # symbols whose quantity differs


def booked(amount: Decimal) -> Decimal:
    return amount.quantize(EIGHT_DECIMALS, ROUND_HALF_EVEN)


def book(holding: Holding, fill: Fill, quote_asset: str) -> Booking:
    """What a fill does to what is held. Pure.

    A fill against the holding realises the share of the cost that it closes; one that crosses zero
    closes all of it and opens the rest at the fill's price.
    """
    signed = fill.quantity if fill.side is Side.BUY else -fill.quantity
    fee = fill.fee if fill.fee_asset in ("", quote_asset) else ZERO  # another wallet pays it
    held = holding.quantity
    if held * signed >= 0:
        grown = Holding(quantity=held + signed, cost=holding.cost + signed * fill.price)
        return Booking(realised_pnl=ZERO, fee=fee, holding=grown)
    closing = min(abs(signed), abs(held))
    whole = closing == abs(held)
    released = holding.cost if whole else holding.cost * closing / abs(held)
    proceeds = closing * fill.price * (1 if held > 0 else -1)
    opened = signed + closing * (1 if held > 0 else -1)  # what is left of the fill beyond zero
    rest = held + signed
    after = Holding(
        quantity=rest,
        cost=opened * fill.price if opened else holding.cost - released,
    )
    return Booking(realised_pnl=booked(proceeds - released), fee=fee, holding=after if rest else Holding())


class Ledger:
    """The books. `open_ledger` reads them; every change is durable before it is seen here."""

    def __init__(
        self,
        store: StateStore,
        recorder: Recorder,
        totals: Mapping[str, Decimal],
        holdings: Mapping[str, Holding],
        started_ms: int,
        quote_asset: str = "USDT",
    ) -> None:
        self._store = store
        self._recorder = recorder
        self._totals = dict(totals)
        self._holdings = dict(holdings)
        self._started_ms = started_ms
        self._quote_asset = quote_asset

    @property
    def started_ms(self) -> int:
        """Venue time of the opening balance; what happened before is in it."""
        return self._started_ms

    @property
    def totals(self) -> dict[str, Decimal]:
        return dict(self._totals)

    @property
    def deposits(self) -> Decimal:
        return self._totals["deposits"]

    @property
    def wallet(self) -> Decimal:
        totals = self._totals
        booked_results = totals["realised_pnl"] - totals["fees"] + totals["funding"] + totals["corrections"]
        return totals["deposits"] + booked_results

    def holding(self, symbol: str) -> Holding:
        return self._holdings.get(symbol, Holding())

    def held_symbols(self) -> frozenset[str]:
        return frozenset(self._holdings)

    def unrealised(self, marks: Mapping[str, Decimal]) -> Decimal:
        """Raises KeyError: a held symbol has no mark price."""
        return sum((booked(marks[s] * held.quantity - held.cost) for s, held in self._holdings.items()), ZERO)

    def equity(self, marks: Mapping[str, Decimal]) -> Decimal:
        """Wallet plus unrealised PnL at these mark prices. Raises KeyError as `unrealised`."""
        return self.wallet + self.unrealised(marks)

    def preview(self, fill: Fill) -> Booking:
        return book(self.holding(fill.symbol), fill, self._quote_asset)

    async def book_fill(
        self,
        fill: Fill,
        booking: Booking,
        position: Position | None = None,
        *,
        cooldown_until_ms: int = 0,
    ) -> bool:
        """Book a fill once, with our position after it. False when it was booked before.

        `booking` is `preview(fill)` with nothing booked in between: the caller serialises.
        """
        new = await self._store.save_fill(
            fill,
            realised_pnl=booking.realised_pnl,
            fee=booking.fee,
            quantity=booking.holding.quantity,
            cost=booking.holding.cost,
            position=position,
            cooldown_until_ms=cooldown_until_ms,
        )
        if not new:
            self._recorder.count("ledger.duplicate_fills")
            return False
        self._totals["realised_pnl"] += booking.realised_pnl
        self._totals["fees"] += booking.fee
        self._hold(fill.symbol, booking.holding)
        self._compare_stated(fill, booking)
        return True

    async def book_adjustment(self, adjustment: Adjustment, holding: Holding | None = None) -> bool:
        """Book funding, a transfer or a correction once. False when it is booked or older than the books.

        Funding is known by symbol and hour, since the stream and the income history number it differently.
        """
        if adjustment.kind == "funding":
            hour = (adjustment.at_ms + HOUR_MS // 2) // HOUR_MS
            name = f"funding:{adjustment.symbol}:{hour}"
            adjustment = msgspec.structs.replace(adjustment, adjustment_id=name)
        if adjustment.at_ms <= self._started_ms:
            return False
        row = (adjustment.symbol, holding.quantity, holding.cost) if holding else None
        if not await self._store.save_adjustment(adjustment, holding=row):
            return False
        self._totals[adjustment.total] += adjustment.amount
        if holding is not None:
            self._hold(adjustment.symbol, holding)
        return True

    def compare(self, account: Account) -> LedgerCheck:
        """Our equity against the venue's own words, with the marks of the same answer."""
        marks = {position.symbol: position.mark_price for position in account.positions}
        theirs = {position.symbol: position.quantity for position in account.positions}
        symbols = self._holdings.keys() | theirs.keys()
        mismatched = sorted(s for s in symbols if self.holding(s).quantity != theirs.get(s, ZERO))
        known = {s: marks.get(s, _cost_price(held)) for s, held in self._holdings.items()}
        ours = self.equity(known)
        return LedgerCheck(
            ledger_equity=ours,
            venue_equity=account.equity,
            difference=ours - account.equity,
            mismatched=tuple(mismatched),
        )

    def _hold(self, symbol: str, holding: Holding) -> None:
        if holding.quantity:
            self._holdings[symbol] = holding
        else:
            self._holdings.pop(symbol, None)

    def _compare_stated(self, fill: Fill, booking: Booking) -> None:
        difference = abs(booking.realised_pnl - fill.realised_pnl)
        if difference > STATED_TOLERANCE:
            self._recorder.count("ledger.stated_pnl_differs")
            log.warning(
                "realised PnL differs from the venue's",
                symbol=fill.symbol,
                trade_id=fill.trade_id,
                ours=str(booking.realised_pnl),
                theirs=str(fill.realised_pnl),
            )


def _cost_price(holding: Holding) -> Decimal:
    return holding.cost / holding.quantity


async def open_ledger(
    store: StateStore, account: Account, recorder: Recorder, quote_asset: str = "USDT"
) -> tuple[Ledger, Adjustment | None]:
    """The books as the store has them.

    At the first start the venue's wallet becomes the opening deposit, and what is already held there is
    taken over at the venue's entry price; the opening record is returned for the archive.
    """
    started = await store.get_value(STARTED)
    if started is None:
        opening = Adjustment(
            adjustment_id="opening",
            kind="deposit",
            symbol="",
            amount=account.wallet_balance,
            reason="wallet balance at the first start",
            at_ms=account.at_ms,
        )
        await store.save_adjustment(opening)
        for position in account.positions:
            await store.save_adjustment(
                _taken_over(position.symbol, account.at_ms),
                holding=(position.symbol, position.quantity, position.quantity * position.entry_price),
            )
        await store.set_value(STARTED, str(account.at_ms))
        started = str(account.at_ms)
    else:
        opening = None
    holdings = {s: Holding(quantity=q, cost=c) for s, (q, c) in (await store.holdings()).items()}
    totals = await store.ledger_totals()
    return Ledger(store, recorder, totals, holdings, int(started), quote_asset), opening


def _taken_over(symbol: str, at_ms: int) -> Adjustment:
    return Adjustment(
        adjustment_id=f"opening:{symbol}",
        kind="deposit",
        symbol=symbol,
        amount=ZERO,
        reason="position held before the first start",
        at_ms=at_ms,
    )
