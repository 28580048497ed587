"""The matching core: prices move, orders fill, positions are funded and liquidated.

Assumptions, all of them stated here:
- Bid and ask lie half the spread from the last price, rounded away from it to the tick, unless
  `set_book` gave them. Taker orders pay slippage linear in their notional on top.
- A taker limit order takes what that slippage leaves within its limit, the rest rests (GTC) or
  expires (IOC). Resting orders fill whole, at their price, once the last price or the opposite
  quote touches them: no queue, no partial fills of makers.
- Within one step the price moves monotonically from the old last to the new last, so what it
  passes is executed in the order of passing. A stop that is passed fills at the new price.
- Order in a step: countdowns and funding that came due (at the marks known before it), last price
  with triggers and fills, mark price with triggers, then liquidation. A stop therefore acts before
  the liquidation behind it.
- A liquidation fills at market but never beyond the bankruptcy price: the insurance fund bears the
  rest. What is left pays the liquidation fee.
- A triggered order carries the client algo id as its client order id.
- Triggered market orders are exempt from PERCENT_PRICE: a stop always executes.
- `portions` and `trigger_refusal` let faults split a market order's fill and refuse a trigger's order.
"""

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from service.exchange.simulated.account import (
    DEFAULT_LEVERAGE,
    Account,
    Position,
    SymbolSetting,
    account_event,
    keep,
    position_event_row,
    position_key,
)
from service.exchange.simulated.faults import VenueFault, fault
from service.exchange.simulated.filters import notional_cap, on_step, on_tick
from service.exchange.simulated.margin import (
    LIQUIDATION_FEE_FRACTION,
    MARGIN_CALL_FRACTION,
    bankruptcy_price,
    booked,
    maintenance_margin,
)
from service.exchange.simulated.orders import (
    JSON,
    AlgoOrder,
    Income,
    Order,
    Trade,
    algo_event,
    number,
    order_event,
)
from service.records import Bracket, Instrument

ZERO = Decimal(0)
ONE_BPS = Decimal("0.0001")
MILLION = Decimal(1_000_000)


class Assumptions(msgspec.Struct, frozen=True):
    """What a simulated fill costs. Spread is the whole width; slippage grows with the notional."""

    maker_fee_fraction: Decimal
    taker_fee_fraction: Decimal
    spread_bps: Decimal
    slippage_bps_per_million: Decimal


class Market:
    """One symbol: its rules, its prices, and who has something in it."""

    __slots__ = ("algos", "ask", "bid", "brackets", "holders", "instrument", "last", "mark", "orders")

    def __init__(self, instrument: Instrument, brackets: tuple[Bracket, ...]) -> None:
        self.instrument = instrument
        self.brackets = brackets
        self.last = ZERO
        self.mark = ZERO
        self.bid: Decimal | None = None
        self.ask: Decimal | None = None
        self.orders: dict[int, tuple[Account, Order]] = {}
        self.algos: dict[int, tuple[Account, AlgoOrder]] = {}
        self.holders: dict[str, Account] = {}

    @property
    def busy(self) -> bool:
        return bool(self.orders or self.algos or self.holders)

    @property
    def mark_price(self) -> Decimal:
        return self.mark or self.last

    def working_price(self, working_type: str) -> Decimal:
        return self.mark_price if working_type == "MARK_PRICE" else self.last


class Quote(msgspec.Struct):
    """Prices of one symbol in a saved state."""

    last: Decimal
    mark: Decimal
    bid: Decimal | None
    ask: Decimal | None


class Listing(msgspec.Struct):
    """Rules of one symbol in a saved state, so that it can be restored even when delisted since."""

    instrument: Instrument
    brackets: tuple[Bracket, ...]


class State(msgspec.Struct, kw_only=True):
    """Everything a restart of the simulator must know."""

    now_ms: int
    order_id: int
    trade_id: int
    algo_id: int
    tran_id: int
    accounts: dict[str, Account]
    quotes: dict[str, Quote]
    listings: list[Listing]
    events: list[tuple[str, dict[str, Any]]]


class Matching:
    """Prices in, fills and events out. `Engine` adds the venue's requests."""

    def __init__(
        self,
        instruments: Sequence[Instrument],
        brackets: Mapping[str, tuple[Bracket, ...]],
        assumptions: Assumptions,
        *,
        now_ms: int,
        funding_interval_ms: Callable[[str], int],
        funding_rate: Callable[[str, int], float | Decimal],
    ) -> None:
        self._assumptions = assumptions
        self._funding_interval_ms = funding_interval_ms
        self._funding_rate = funding_rate
        self._now_ms = now_ms
        self._order_id = 1_000_000_000
        self._trade_id = 0
        self._algo_id = 2_000_000_000
        self._tran_id = 0
        self._accounts: dict[str, Account] = {}
        self._events: list[tuple[str, JSON]] = []
        self._markets: dict[str, Market] = {}
        self._held: dict[str, Market] = {}  # markets with a position
        self.portions: Callable[[Decimal, Decimal], Sequence[Decimal]] = lambda quantity, step: (quantity,)
        self.trigger_refusal: Callable[[], str] = str
        for instrument in instruments:
            self.add_instrument(instrument, brackets.get(instrument.symbol, ()))

    # Markets

    def add_instrument(self, instrument: Instrument, brackets: tuple[Bracket, ...]) -> None:
        """List a symbol, or change the rules of a listed one."""
        market = self._markets.get(instrument.symbol)
        if market is None:
            self._markets[instrument.symbol] = Market(instrument, brackets)
        else:
            market.instrument, market.brackets = instrument, brackets

    def remove_instrument(self, symbol: str, at_ms: int) -> None:
        """Delist: status SETTLING, orders expire, positions close at the mark price without a fee."""
        self._advance(at_ms)
        market = self._markets[symbol]
        market.instrument = msgspec.structs.replace(market.instrument, status="SETTLING")
        for _, (account, order) in sorted(market.orders.items()):
            self._end_order(account, market, order, "EXPIRED")
        for _, (account, algo) in sorted(market.algos.items()):
            self._end_algo(account, market, algo, "EXPIRED")
        for _, account in sorted(market.holders.items()):
            for position in self._positions_of(account, symbol):
                price = on_tick(market.instrument, market.mark_price, up=position.quantity < 0)
                self._close_by_venue(
                    account, market, position, price, "settlement_autoclose-", "TRADE", fee=ZERO
                )

    def force_liquidation(self, key: str, symbol: str, at_ms: int) -> None:
        """Liquidate an account's position in a symbol, whatever its margin."""
        self._advance(at_ms)
        account, market = self._accounts[key], self._markets[symbol]
        for position in self._positions_of(account, symbol):
            backing = position.isolated_wallet if position.isolated else account.cross_wallet
            self._liquidate(account, market, position, backing)

    def force_deleveraging(self, key: str, symbol: str, at_ms: int) -> None:
        """Close an account's position in a symbol at the mark price, as the venue's ADL does."""
        self._advance(at_ms)
        account, market = self._accounts[key], self._markets[symbol]
        for position in self._positions_of(account, symbol):
            price = on_tick(market.instrument, market.mark_price, up=position.quantity < 0)
            self._close_by_venue(account, market, position, price, "adl_autoclose", "TRADE")

    def held(self) -> list[tuple[str, str]]:
        """(account key, symbol) of every position."""
        return [(key, p.symbol) for key, a in self._accounts.items() for p in a.positions.values()]

    def held_quantity(self, key: str, symbol: str) -> Decimal:
        """Signed quantity an account holds in one-way mode."""
        return self._accounts[key].quantity(symbol, "BOTH")

    def waiting(self) -> list[tuple[str, int]]:
        """(account key, algo id) of every conditional order."""
        return [(key, algo_id) for key, a in self._accounts.items() for algo_id in a.algos]

    def instrument(self, symbol: str) -> Instrument:
        return self._markets[symbol].instrument

    def last_price(self, symbol: str) -> Decimal:
        """0 before the first."""
        return self._markets[symbol].last

    def trading_symbols(self) -> list[str]:
        """Symbols that are not delisted."""
        return [s for s, market in self._markets.items() if market.instrument.status == "TRADING"]

    def account_of(self, key: str) -> Account:
        """The account as the venue keeps it; read only."""
        return self._accounts[key]

    def set_book(self, symbol: str, bid: Decimal | None, ask: Decimal | None) -> None:
        """Use this bid and ask until the next call; None goes back to the last price and spread."""
        market = self._markets[symbol]
        market.bid, market.ask = bid, ask

    def watched_symbols(self) -> set[str]:
        """Symbols in which anybody has an order, a conditional order or a position."""
        return {symbol for symbol, market in self._markets.items() if market.busy}

    def take_events(self) -> list[tuple[str, JSON]]:
        """(account key, user-data event), in order; each is handed out once."""
        events, self._events = self._events, []
        return events

    def on_prices(self, at_ms: int, last: Mapping[str, Decimal], mark: Mapping[str, Decimal]) -> None:
        """One step of the market. Unknown symbols and prices <= 0 are skipped."""
        self._advance(at_ms)
        moved = self._take_prices(last, mark)
        for market, last_before, mark_before in moved:
            if last_before:
                self._walk(market, "CONTRACT_PRICE", last_before, market.last)
            if mark_before and market.algos:
                self._walk(market, "MARK_PRICE", mark_before, market.mark_price)
        exposed = {key for market, _, _ in moved for key in market.holders}
        for key in sorted(exposed):
            self._check_margin(self._accounts[key])

    def _take_prices(
        self, last: Mapping[str, Decimal], mark: Mapping[str, Decimal]
    ) -> list[tuple[Market, Decimal, Decimal]]:
        """Set all prices first. Returns the busy markets with their last and mark price before."""
        moved: dict[str, tuple[Market, Decimal, Decimal]] = {}
        for symbol, price in last.items():
            market = self._markets.get(symbol)
            if market is None or price <= 0:
                continue
            if market.orders or market.algos or market.holders:
                moved[symbol] = (market, market.last, market.mark_price)
            market.last = price
        for symbol, price in mark.items():
            market = self._markets.get(symbol)
            if market is None or price <= 0:
                continue
            if symbol not in moved and (market.algos or market.holders):
                moved[symbol] = (market, market.last, market.mark_price)
            market.mark = price
        return list(moved.values())

    # Time: what comes due without a price

    def _advance(self, now_ms: int) -> None:
        """Settle what came due since the last call; time never goes back."""
        if now_ms <= self._now_ms:
            return
        before, self._now_ms = self._now_ms, now_ms
        for symbol in sorted(self._held):  # the same order after a restart
            market = self._held[symbol]
            interval = self._funding_interval_ms(symbol)
            if interval <= 0:
                continue
            for due_ms in range((before // interval + 1) * interval, now_ms + 1, interval):
                self._settle_funding(market, due_ms)
        for account in self._accounts.values():
            if account.cancel_due_ms:
                self._cancel_overdue(account)

    def _settle_funding(self, market: Market, due_ms: int) -> None:
        symbol = market.instrument.symbol
        rate = self._funding_rate(symbol, due_ms)
        fraction = rate if isinstance(rate, Decimal) else Decimal(str(rate))
        for _, account in sorted(market.holders.items()):
            for position in self._positions_of(account, symbol):
                amount = booked(-position.notional(market.mark_price) * fraction)
                account.wallet += amount
                account.funding += amount
                if position.isolated:
                    position.isolated_wallet += amount
                self._add_income(account, "FUNDING_FEE", symbol, amount, at_ms=due_ms)
                rows = [position_event_row(position, market.mark_price)] if position.isolated else []
                self._emit(
                    account,
                    account_event(account, self._now_ms, "FUNDING_FEE", rows, change=amount, symbol=symbol),
                )

    def _cancel_overdue(self, account: Account) -> None:
        for symbol, due_ms in list(account.cancel_due_ms.items()):
            if due_ms <= self._now_ms:
                del account.cancel_due_ms[symbol]
                self._cancel_orders(account, self._markets[symbol])

    # Prices move

    def _walk(self, market: Market, working: str, before: Decimal, now: Decimal) -> None:
        """Execute what the price passed on its way, nearest first, then oldest first."""
        passed: list[tuple[Decimal, int, Account, Order | AlgoOrder]] = []
        for _, (account, algo) in sorted(market.algos.items()):
            if algo.working_type != working:
                continue
            if algo.trailing:
                self._follow(account, algo, now)
            if algo.reached(now):
                passed.append((abs(algo.level - before), algo.algo_id, account, algo))
        if working == "CONTRACT_PRICE":
            for account, order in market.orders.values():
                if self._touched(market, order):
                    passed.append((abs(order.price - before), order.order_id, account, order))
        passed.sort(key=lambda entry: entry[:2])
        for _, _, account, resting in passed:
            if isinstance(resting, AlgoOrder):
                if resting.algo_id in market.algos:
                    self._trigger(account, market, resting)
            elif resting.order_id in market.orders:
                self._fill_resting(account, market, resting)

    def _touched(self, market: Market, order: Order) -> bool:
        bid, ask = self._book(market)
        if order.buy:
            return order.price >= min(market.last, ask)
        return order.price <= max(market.last, bid)

    def _follow(self, account: Account, algo: AlgoOrder, price: Decimal) -> None:
        """Activate a trailing stop, and let its extreme follow the price."""
        if not algo.activated:
            reached = price <= algo.activate_price if algo.buy else price >= algo.activate_price
            if not reached:
                return
            algo.activated, algo.extreme, algo.updated_ms = True, price, self._now_ms
            self._emit(account, algo_event(algo, self._now_ms))
        algo.extreme = min(algo.extreme, price) if algo.buy else max(algo.extreme, price)

    def _fill_resting(self, account: Account, market: Market, order: Order) -> None:
        quantity = order.remaining
        if order.reduce_only:
            quantity = min(quantity, self._reducible(account, order))
        if quantity > 0:
            self._fill(account, market, order, order.price, quantity, maker=True)
        if order.open:
            self._end_order(account, market, order, "EXPIRED")

    # Conditional orders

    def _trigger(self, account: Account, market: Market, algo: AlgoOrder) -> None:
        algo.trigger_price = (
            algo.level if not algo.trailing else on_tick(market.instrument, algo.level, up=algo.buy)
        )
        algo.triggered_ms = self._now_ms
        self._set_algo_status(account, algo, "TRIGGERING")
        if algo.close_position and not self._closable(account, algo):
            self._end_algo(account, market, algo, "EXPIRED")
            return
        refused = self.trigger_refusal()
        if refused:
            algo.reject_reason = refused
            self._end_algo(account, market, algo, "REJECTED")
            return
        try:
            order = self._order_of(account, market, algo)
        except VenueFault as refusal:
            algo.reject_reason = refusal.message
            self._end_algo(account, market, algo, "REJECTED")
            return
        del account.algos[algo.algo_id], market.algos[algo.algo_id]
        keep(account.finished_algos, algo.symbol, algo)
        algo.order_id = order.order_id
        self._set_algo_status(account, algo, "TRIGGERED")
        self._match(account, market, order)

    def _order_of(self, account: Account, market: Market, algo: AlgoOrder) -> Order:
        """The order a trigger sends to the book. Raises VenueFault where the book refuses it."""
        quantity = self._closable(account, algo) if algo.close_position else algo.quantity
        order = Order(
            order_id=0,
            client_order_id=algo.client_algo_id,
            symbol=algo.symbol,
            side=algo.side,
            position_side=algo.position_side,
            type=algo.became,
            original_type=algo.type,
            time_in_force="GTC" if algo.time_in_force == "GTE_GTC" else algo.time_in_force,
            price=algo.price,
            quantity=quantity,
            reduce_only=algo.reduce_only or algo.close_position,
            close_position=algo.close_position,
            stop_price=algo.trigger_price,
            working_type=algo.working_type,
            algo_id=algo.algo_id,
        )
        self._admit(account, market, order)
        return self._accept(order)

    def _closable(self, account: Account, algo: AlgoOrder) -> Decimal:
        """Quantity a closePosition order of this side would close."""
        held = account.quantity(algo.symbol, algo.position_side)
        return max(ZERO, -held if algo.buy else held)

    def _set_algo_status(self, account: Account, algo: AlgoOrder, status: str) -> None:
        algo.status, algo.updated_ms = status, self._now_ms
        self._emit(account, algo_event(algo, self._now_ms))

    def _end_algo(self, account: Account, market: Market, algo: AlgoOrder, status: str) -> None:
        del account.algos[algo.algo_id], market.algos[algo.algo_id]
        keep(account.finished_algos, algo.symbol, algo)
        self._set_algo_status(account, algo, status)

    def _finish_algo(self, account: Account, order: Order) -> None:
        """The order that a conditional one became has ended."""
        for algo in reversed(account.finished_algos.get(order.symbol, [])):
            if algo.algo_id == order.algo_id:
                algo.average_price, algo.executed = order.average_price, order.executed
                self._set_algo_status(account, algo, "FINISHED")
                return

    # Orders

    def _accept(self, order: Order) -> Order:
        self._order_id += 1
        order.order_id = self._order_id
        order.client_order_id = order.client_order_id or f"sim{order.order_id}"
        order.created_ms = order.updated_ms = self._now_ms
        return order

    def _admit(self, account: Account, market: Market, order: Order) -> None:
        """What is checked when an order reaches the book: reduce-only, brackets, margin.

        A reduce-only order larger than the position is cut to it, as on the venue.
        Raises VenueFault -2022, -2027, -2019, -5021 or -5022.
        """
        if order.reduce_only or self._hedge_exit(order):
            reducible = self._reducible(account, order)
            if not reducible or (self._hedge_exit(order) and order.quantity > reducible):
                raise fault(-2022)
            order.quantity = min(order.quantity, reducible)
        bid, ask = self._book(market)
        crosses = order.type == "MARKET" or (order.price >= ask if order.buy else order.price <= bid)
        if order.time_in_force == "GTX" and crosses:
            raise fault(-5022)
        if order.time_in_force == "FOK" and (
            not crosses or self._depth_within(market, order) < order.quantity
        ):
            raise fault(-5021)
        price = (
            self._taker_price(market, order.buy, order.quantity) if order.type == "MARKET" else order.price
        )
        self._check_affordable(account, market, order, price, taker=crosses)

    def _check_affordable(
        self, account: Account, market: Market, order: Order, price: Decimal, *, taker: bool
    ) -> None:
        notional = price * order.quantity
        before = self._exposure(account, market, order.position_side)
        after = self._exposure(account, market, order.position_side, order.buy, notional)
        if order.reduce_only or after <= before:
            return
        leverage = self._setting(account, market).leverage
        if market.brackets and after > notional_cap(market.brackets, leverage):
            raise fault(-2027)
        opening = min(Decimal(1), (after - before) / notional)
        mark = market.mark_price
        loss = max(ZERO, price - mark if order.buy else mark - price) * order.quantity * opening
        fraction = self._assumptions.taker_fee_fraction if taker else self._assumptions.maker_fee_fraction
        needed = (after - before) / leverage + notional * fraction + loss
        if market.instrument.quote_asset != account.asset or needed > self._available(account):
            raise fault(-2019)

    def _match(self, account: Account, market: Market, order: Order) -> None:
        """Announce an admitted order, take what the book offers, rest or end the remainder."""
        account.orders[order.order_id] = order
        market.orders[order.order_id] = (account, order)
        self._emit(account, order_event(order, self._now_ms, "NEW"))
        if order.type == "MARKET":
            self._match_market(account, market, order)
            return
        bid, ask = self._book(market)
        if order.price >= ask if order.buy else order.price <= bid:
            quantity = min(order.quantity, self._depth_within(market, order))
            if quantity > 0:
                price = self._taker_price(market, order.buy, quantity)
                price = min(price, order.price) if order.buy else max(price, order.price)
                self._fill(account, market, order, price, quantity, maker=False)
        if order.open and order.time_in_force == "IOC":
            self._end_order(account, market, order, "EXPIRED")

    def _match_market(self, account: Account, market: Market, order: Order) -> None:
        """Fill at market, usually at once; what faults leave of it expires."""
        price = self._taker_price(market, order.buy, order.quantity)
        for portion in self.portions(order.quantity, market.instrument.market_step_size):
            self._fill(account, market, order, price, portion, maker=False)
        if order.open:
            self._end_order(account, market, order, "EXPIRED")

    def _fill(
        self,
        account: Account,
        market: Market,
        order: Order,
        price: Decimal,
        quantity: Decimal,
        *,
        maker: bool,
        execution: str = "TRADE",
        fee: Decimal | None = None,
    ) -> None:
        """Book one execution, tell the account, and end what it made pointless."""
        trade = self._book_trade(account, market, order, price, quantity, maker, fee)
        if order.status == "FILLED":
            self._drop_order(account, market, order)
        position = account.position(order.symbol, order.position_side)
        row = position or Position(symbol=order.symbol, side=order.position_side)
        flat = not row.quantity
        if flat:
            account.positions.pop(position_key(order.symbol, order.position_side), None)
        self._emit(
            account,
            account_event(account, self._now_ms, "ORDER", [position_event_row(row, market.mark_price)]),
        )
        self._emit(account, order_event(order, self._now_ms, execution, trade=trade, asset=account.asset))
        if order.status == "FILLED" and order.algo_id:
            self._finish_algo(account, order)
        self._note_holder(account, market)
        self._sweep(account, market, order.position_side, flat=flat)

    def _book_trade(
        self,
        account: Account,
        market: Market,
        order: Order,
        price: Decimal,
        quantity: Decimal,
        maker: bool,
        fee: Decimal | None,
    ) -> Trade:
        """Change order, position and wallet; write trade and income down."""
        setting = self._setting(account, market)
        key = position_key(order.symbol, order.position_side)
        position = account.positions.get(key)
        if position is None:
            position = Position(symbol=order.symbol, side=order.position_side, isolated=setting.isolated)
            account.positions[key] = position
        reduces = bool(position.quantity) and (position.quantity > 0) != order.buy
        realised = position.fill(quantity if order.buy else -quantity, price, setting.leverage)
        quote = price * quantity
        fraction = self._assumptions.maker_fee_fraction if maker else self._assumptions.taker_fee_fraction
        paid = booked(quote * fraction) if fee is None else fee
        position.fees = position.fees + paid if position.quantity else ZERO
        position.updated_ms = account.updated_ms = order.updated_ms = self._now_ms
        account.wallet += realised - paid
        account.realised += realised
        account.fees += paid
        order.executed += quantity
        order.quote += quote
        order.status = "PARTIALLY_FILLED" if order.remaining else "FILLED"
        self._trade_id += 1
        trade = Trade(
            trade_id=self._trade_id,
            order_id=order.order_id,
            symbol=order.symbol,
            side=order.side,
            position_side=order.position_side,
            price=price,
            quantity=quantity,
            quote=quote,
            realised_pnl=realised,
            fee=paid,
            maker=maker,
            at_ms=self._now_ms,
        )
        keep(account.trades, order.symbol, trade)
        if reduces:
            self._add_income(account, "REALIZED_PNL", order.symbol, realised, trade=trade)
        if paid:
            self._add_income(account, "COMMISSION", order.symbol, -paid, trade=trade)
        return trade

    def _sweep(self, account: Account, market: Market, position_side: str, *, flat: bool) -> None:
        """Expire reduce-only orders with nothing left to reduce, and GTE_GTC ones once flat."""
        symbol = market.instrument.symbol
        for order in [o for o in account.orders.values() if o.symbol == symbol]:
            exits = order.reduce_only or self._hedge_exit(order)
            if exits and order.position_side == position_side and not self._reducible(account, order):
                self._end_order(account, market, order, "EXPIRED")
        if not flat:
            return
        for algo in [a for a in account.algos.values() if a.symbol == symbol]:
            if algo.time_in_force == "GTE_GTC" and algo.position_side == position_side:
                self._end_algo(account, market, algo, "EXPIRED")

    def _end_order(self, account: Account, market: Market, order: Order, status: str) -> None:
        """Take a resting order off the book: CANCELED or EXPIRED."""
        order.status, order.updated_ms = status, self._now_ms
        self._drop_order(account, market, order)
        self._emit(account, order_event(order, self._now_ms, status))
        if order.algo_id:
            self._finish_algo(account, order)

    def _drop_order(self, account: Account, market: Market, order: Order) -> None:
        account.orders.pop(order.order_id, None)
        market.orders.pop(order.order_id, None)
        keep(account.finished_orders, order.symbol, order)

    def _cancel_orders(self, account: Account, market: Market) -> None:
        symbol = market.instrument.symbol
        for order in [o for o in account.orders.values() if o.symbol == symbol]:
            self._end_order(account, market, order, "CANCELED")

    @staticmethod
    def _hedge_exit(order: Order) -> bool:
        """In hedge mode the side tells an exit: it cannot open the other way."""
        return (order.position_side == "LONG" and not order.buy) or (
            order.position_side == "SHORT" and order.buy
        )

    @staticmethod
    def _reducible(account: Account, order: Order) -> Decimal:
        """Quantity of the position that this order could close."""
        held = account.quantity(order.symbol, order.position_side)
        return max(ZERO, -held if order.buy else held)

    # The book

    def _book(self, market: Market) -> tuple[Decimal, Decimal]:
        """Bid and ask, on the tick."""
        half = self._assumptions.spread_bps * ONE_BPS / 2
        bid, ask = market.bid, market.ask
        if bid is None:
            bid = on_tick(market.instrument, market.last * (1 - half), up=False)
        if ask is None:
            ask = on_tick(market.instrument, market.last * (1 + half), up=True)
        return bid, ask

    def _taker_price(self, market: Market, buy: bool, quantity: Decimal) -> Decimal:
        """What taking `quantity` at once costs, on the tick, rounded against the taker."""
        bid, ask = self._book(market)
        best = ask if buy else bid
        bps = self._assumptions.slippage_bps_per_million * best * quantity / MILLION
        share = bps * ONE_BPS
        return on_tick(market.instrument, best * (1 + share if buy else 1 - share), up=buy)

    def _depth_within(self, market: Market, order: Order) -> Decimal:
        """The quantity whose taker price is within the order's limit; the inverse of the slippage."""
        bid, ask = self._book(market)
        best = ask if order.buy else bid
        room = (order.price / best - 1) if order.buy else (1 - order.price / best)
        slope = self._assumptions.slippage_bps_per_million * ONE_BPS * best / MILLION
        if not slope:
            return order.quantity
        return min(order.quantity, on_step(market.instrument, max(ZERO, room) / slope))

    # Margin

    def _setting(self, account: Account, market: Market) -> SymbolSetting:
        symbol = market.instrument.symbol
        setting = account.settings.get(symbol)
        if setting is None:
            most = market.brackets[0].max_leverage if market.brackets else DEFAULT_LEVERAGE
            setting = account.settings[symbol] = SymbolSetting(leverage=min(DEFAULT_LEVERAGE, most))
        return setting

    def _positions_of(self, account: Account, symbol: str) -> list[Position]:
        return [p for p in account.positions.values() if p.symbol == symbol]

    def _exposure(
        self, account: Account, market: Market, side: str, buy: bool = True, extra: Decimal = ZERO
    ) -> Decimal:
        """Notional to be margined: the position and the worse of its open buys or sells.

        In hedge mode each side has its own, and only its entries add to it.
        """
        bids, asks = self._open_notionals(account, market.instrument.symbol, side)
        if buy:
            bids += extra
        else:
            asks += extra
        held = account.quantity(market.instrument.symbol, side) * market.mark_price
        if side == "LONG":
            return abs(held) + bids - (min(extra, abs(held)) if not buy else ZERO)
        if side == "SHORT":
            return abs(held) + asks - (min(extra, abs(held)) if buy else ZERO)
        return max(abs(held + bids), abs(held - asks))

    @staticmethod
    def _open_notionals(account: Account, symbol: str, side: str) -> tuple[Decimal, Decimal]:
        bids = asks = ZERO
        for order in account.orders.values():
            if order.symbol != symbol or order.position_side != side or order.reduce_only:
                continue
            if order.buy:
                bids += order.price * order.remaining
            else:
                asks += order.price * order.remaining
        return bids, asks

    def _initial_margins(self, account: Account, market: Market, side: str) -> tuple[Decimal, Decimal]:
        """(of the position, of its open orders), unrounded."""
        leverage = self._setting(account, market).leverage
        held = abs(account.quantity(market.instrument.symbol, side)) * market.mark_price
        return held / leverage, max(ZERO, self._exposure(account, market, side) - held) / leverage

    def _active(self, account: Account) -> list[tuple[Market, str]]:
        """(market, position side) pairs in which the account has a position or an open order."""
        pairs = {(p.symbol, p.side): None for p in account.positions.values()}
        pairs.update({(o.symbol, o.position_side): None for o in account.orders.values()})
        return [(self._markets[symbol], side) for symbol, side in pairs]

    def _cross_profit(self, account: Account) -> Decimal:
        return sum(
            (
                p.unrealised(self._markets[p.symbol].mark_price)
                for p in account.positions.values()
                if not p.isolated
            ),
            ZERO,
        )

    def _available(self, account: Account) -> Decimal:
        """What new positions may use: cross balance less all margins taken from it; never negative."""
        taken = ZERO
        for market, side in self._active(account):
            position, orders = self._initial_margins(account, market, side)
            held = account.position(market.instrument.symbol, side)
            taken += orders if held and held.isolated else position + orders
        return max(ZERO, account.cross_wallet + self._cross_profit(account) - taken)

    def _maintenance(self, position: Position) -> Decimal:
        market = self._markets[position.symbol]
        return maintenance_margin(market.brackets, abs(position.notional(market.mark_price)))

    def _check_margin(self, account: Account) -> None:
        for position in [p for p in account.positions.values() if p.isolated]:
            market = self._markets[position.symbol]
            balance = position.isolated_wallet + position.unrealised(market.mark_price)
            if balance <= self._maintenance(position):
                self._liquidate(account, market, position, position.isolated_wallet)
        self._check_cross_margin(account)

    def _check_cross_margin(self, account: Account) -> None:
        while crossed := [p for p in account.positions.values() if not p.isolated]:
            balance = account.cross_wallet + self._cross_profit(account)
            needed = sum((self._maintenance(p) for p in crossed), ZERO)
            if balance > needed:
                self._call_margin(account, crossed, needed, balance)
                return
            for symbol in dict.fromkeys(o.symbol for o in account.orders.values()):
                self._cancel_orders(account, self._markets[symbol])
            largest = max(crossed, key=lambda p: (self._maintenance(p), p.symbol, p.side))
            market = self._markets[largest.symbol]
            others = balance - largest.unrealised(market.mark_price)
            self._liquidate(account, market, largest, others)
        account.margin_called = False

    def _call_margin(
        self, account: Account, crossed: list[Position], needed: Decimal, balance: Decimal
    ) -> None:
        """Warn once when maintenance comes near the balance, again only after it recovered."""
        near = needed >= balance * MARGIN_CALL_FRACTION
        if near and not account.margin_called:
            self._emit(account, self._margin_call(account, crossed))
        account.margin_called = near

    def _margin_call(self, account: Account, crossed: list[Position]) -> JSON:
        rows = []
        for position in crossed:
            mark = self._markets[position.symbol].mark_price
            rows.append(
                {
                    "s": position.symbol,
                    "ps": position.side,
                    "pa": number(position.quantity),
                    "mt": "CROSSED",
                    "iw": "0",
                    "mp": number(mark),
                    "up": number(position.unrealised(mark)),
                    "mm": number(self._maintenance(position)),
                }
            )
        return {"e": "MARGIN_CALL", "E": self._now_ms, "cw": number(account.cross_wallet), "p": rows}

    def _liquidate(self, account: Account, market: Market, position: Position, balance: Decimal) -> None:
        """Close at market, at the bankruptcy price if that is better, and pay the insurance fund.

        Args: balance: what stands behind the position, its own profit excluded.
        """
        long, quantity = position.quantity > 0, abs(position.quantity)
        bankrupt = bankruptcy_price(
            position.quantity, position.cost, balance, self._assumptions.taker_fee_fraction
        )
        bound = on_tick(market.instrument, bankrupt, up=long)
        price = self._taker_price(market, not long, quantity)
        price = max(price, bound) if long else min(price, bound)
        wallet_before, isolated = account.wallet, position.isolated
        self._close_by_venue(account, market, position, price, "autoclose-", "CALCULATED")
        left = balance + account.wallet - wallet_before
        if not isolated:
            left = min(left, account.cross_wallet)
        fee = min(booked(price * quantity * LIQUIDATION_FEE_FRACTION), booked(max(ZERO, left)))
        if fee > 0:
            account.wallet -= fee
            account.fees += fee
            self._add_income(account, "INSURANCE_CLEAR", market.instrument.symbol, -fee)
            self._emit(
                account,
                account_event(account, self._now_ms, "INSURANCE_CLEAR", [], change=-fee),
            )

    def _close_by_venue(
        self,
        account: Account,
        market: Market,
        position: Position,
        price: Decimal,
        prefix: str,
        execution: str,
        fee: Decimal | None = None,
    ) -> None:
        """An order of the venue's own that closes a whole position at a given price."""
        order = Order(
            order_id=0,
            client_order_id="",
            symbol=position.symbol,
            side="SELL" if position.quantity > 0 else "BUY",
            position_side=position.side,
            type="LIMIT",
            original_type="LIMIT",
            time_in_force="IOC",
            price=price,
            quantity=abs(position.quantity),
            reduce_only=True,
        )
        self._accept(order)
        order.client_order_id = f"{prefix}{order.order_id}"
        self._fill(account, market, order, price, order.quantity, maker=False, execution=execution, fee=fee)

    # Books

    def _note_holder(self, account: Account, market: Market) -> None:
        symbol = market.instrument.symbol
        if self._positions_of(account, symbol):
            market.holders[account.key] = account
        else:
            market.holders.pop(account.key, None)
        if market.holders:
            self._held[symbol] = market
        else:
            self._held.pop(symbol, None)

    def _add_income(
        self,
        account: Account,
        kind: str,
        symbol: str,
        amount: Decimal,
        *,
        trade: Trade | None = None,
        at_ms: int | None = None,
    ) -> None:
        self._tran_id += 1
        account.record_income(
            Income(
                tran_id=self._tran_id,
                kind=kind,
                symbol=symbol,
                amount=amount,
                trade_id=str(trade.trade_id) if trade else "",
                at_ms=self._now_ms if at_ms is None else at_ms,
            )
        )

    def _emit(self, account: Account, event: JSON) -> None:
        self._events.append((account.key, event))

    # State

    def state(self) -> JSON:
        """Everything, as JSON-able values; prices and rules only of symbols in use."""
        used = [(symbol, market) for symbol, market in self._markets.items() if market.busy]
        state = State(
            now_ms=self._now_ms,
            order_id=self._order_id,
            trade_id=self._trade_id,
            algo_id=self._algo_id,
            tran_id=self._tran_id,
            accounts=self._accounts,
            quotes={
                symbol: Quote(market.last, market.mark, market.bid, market.ask)
                for symbol, market in self._markets.items()
                if market.last or market.mark
            },
            listings=[Listing(market.instrument, market.brackets) for _, market in used],
            events=self._events,
        )
        saved: JSON = msgspec.to_builtins(state, str_keys=True)
        return saved

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state()` described. Rules of symbols listed now win over the saved ones."""
        # A detour through JSON: accounts must not share their histories with the given value.
        saved = msgspec.json.decode(msgspec.json.encode(state), type=State)
        self._now_ms = saved.now_ms
        self._order_id, self._trade_id = saved.order_id, saved.trade_id
        self._algo_id, self._tran_id = saved.algo_id, saved.tran_id
        self._accounts = saved.accounts
        self._events = [(key, event) for key, event in saved.events]
        self._held = {}
        for listing in saved.listings:
            if listing.instrument.symbol not in self._markets:
                self.add_instrument(listing.instrument, listing.brackets)
        for symbol, market in self._markets.items():
            fresh = Market(market.instrument, market.brackets)
            quote = saved.quotes.get(symbol)
            if quote:
                fresh.last, fresh.mark, fresh.bid, fresh.ask = quote.last, quote.mark, quote.bid, quote.ask
            self._markets[symbol] = fresh
        for account in self._accounts.values():
            self._index(account)

    def _index(self, account: Account) -> None:
        """Put an account's orders and positions back into their markets."""
        for order in account.orders.values():
            self._markets[order.symbol].orders[order.order_id] = (account, order)
        for algo in account.algos.values():
            self._markets[algo.symbol].algos[algo.algo_id] = (account, algo)
        for position in account.positions.values():
            self._note_holder(account, self._markets[position.symbol])
