"""Checks of the venue and of the account there. Nothing is placed and nothing is changed.

Each check says what it found in its own words; an error with a name is a failure with that error's advice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime
from decimal import Decimal
from ipaddress import ip_address
from urllib.parse import urlsplit

import msgspec

from service.check.result import Check, Verdict, failed, failed_with, passed, skipped, warned
from service.clock import WallClock
from service.errors import RequestRejected, VenueCredentials, VenueError
from service.exchange.access import Access
from service.exchange.binance import probes
from service.exchange.binance.account import OPEN_ALGO_ORDERS
from service.exchange.binance.adapter import TIME, BinanceExchange
from service.exchange.binance.codec import server_time
from service.exchange.binance.rest import RestClient, open_rest, read
from service.exchange.gate import OPEN, Gate
from service.market.universe import mistaken, select, unlisted, unlisted_words
from service.records import Account, Bracket, Instrument, Ticker
from service.settings import Settings

GOOD_OFFSET_MS, WORST_OFFSET_MS = 500, 1_000
"""The venue refuses a timestamp more than 1,000 ms ahead of its own."""
DELIVERY_LIMIT_S = 10.0

EMBEDDED = "a fresh simulated exchange; a running daemon's own is not looked at"

OUTBOUND = "outbound address"
PUBLIC = ("clock", "universe", "minimum notionals", "market stream")
PRIVATE = (
    "api key",
    "key permissions",
    "account modes",
    "leverage brackets",
    "open orders",
    "order route",
    "private stream",
)


class VenueChecks:
    """Asks the venue, in an order in which each answer may need the ones before."""

    def __init__(self, settings: Settings, access: Access, gate: Gate = OPEN) -> None:
        """Args: gate: what is known of bans and of the right to send; nothing is asked during a ban."""
        self._settings = settings
        self._access = access
        self._gate = gate
        self._private = bool(access.api_key)
        self._account: Account | None = None
        self._instruments: dict[str, Instrument] = {}
        self._tickers: dict[str, Ticker] = {}
        self._symbols: tuple[str, ...] = ()

    async def run(self) -> list[Check]:
        """Every check of the venue; what hangs on one that failed is named as not looked at."""
        async with AsyncExitStack() as stack:
            self._rest = await stack.enter_async_context(self._open(self._access.settings.rest_url))
            self._exchange = BinanceExchange(
                self._rest,
                self._access.settings,
                self._access.clock,
                self._settings.trading.stop_working_type,
            )
            names = PUBLIC + (PRIVATE if self._private else ())
            if silent := self._silent("venue reachable", self._rest):
                hanging = (OUTBOUND, *names)
                return [silent, *(skipped(name, "it wants silence", transient=True) for name in hanging)]
            reachable = await self._checked("venue reachable", self._reachable)
            checks = [reachable, await self._checked(OUTBOUND, self._outbound)]
            if reachable.verdict is Verdict.FAIL:
                because, transient = "the venue is not reachable", reachable.transient
                return checks + [skipped(name, because, transient=transient) for name in names]
            for name in names:
                checks.append(await self._checked(name, self._checks()[name]))
        return checks

    def _open(self, url: str) -> AbstractAsyncContextManager[RestClient]:
        settings = msgspec.structs.replace(self._access.settings, rest_url=url)
        return open_rest(
            settings,
            self._access.clock,
            api_key=self._access.api_key,
            api_secret=self._access.api_secret,
            gate=self._gate,
        )

    def _silent(self, name: str, client: RestClient) -> Check | None:
        """A failure while the host wants silence: to ask during a ban makes it longer."""
        until_ms = self._gate.silent_until_ms(client.host)
        if until_ms <= self._access.clock.now_ms():
            return None
        until = f"{datetime.fromtimestamp(until_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return failed(
            name,
            f"{client.host} asked this address for silence until {until}; nothing was asked",
            f"wait until {until}: asking earlier makes the ban longer",
            transient=True,
        )

    def _checks(self) -> dict[str, Callable[[], Awaitable[Check]]]:
        return {
            "clock": self._clock_offset,
            "universe": self._universe,
            "minimum notionals": self._minimum_notionals,
            "market stream": self._market_stream,
            "api key": self._api_key,
            "key permissions": self._key_permissions,
            "account modes": self._account_modes,
            "leverage brackets": self._brackets,
            "open orders": self._open_orders,
            "order route": self._order_route,
            "private stream": self._private_stream,
        }

    async def _checked(self, name: str, check: Callable[[], Awaitable[Check]]) -> Check:
        try:
            return await check()
        except VenueError as error:
            return failed_with(name, error)

    # -- the way to the venue

    async def _reachable(self) -> Check:
        began_s = self._access.clock.monotonic_s()
        await read(self._rest, TIME, {}, server_time.decode)
        took_ms = (self._access.clock.monotonic_s() - began_s) * 1000
        found = f"{self._access.settings.rest_url} answers in {took_ms:.0f} ms"
        if self._access.pids:
            found += f"; {EMBEDDED}"
        return passed("venue reachable", found)

    async def _outbound(self) -> Check:
        """The address we leave from. Behind a translating router the venue sees another one."""
        name = OUTBOUND
        parts = urlsplit(self._access.settings.rest_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            _, writer = await asyncio.wait_for(
                asyncio.open_connection(parts.hostname, port), self._access.settings.request_limit_s
            )
        except (OSError, TimeoutError) as error:
            found = f"no connection to {parts.hostname}: {error}"
            return failed(name, found, VenueError.advice, transient=True)
        address: str = writer.get_extra_info("sockname")[0]
        writer.close()
        return outbound_address(address)

    async def _clock_offset(self) -> Check:
        """This machine's own clock: a start has corrected ours by the first answer already."""
        clock = self._access.clock
        began_ms = clock.now_ms()
        answer = await read(self._rest, TIME, {}, server_time.decode)
        ended_ms = clock.now_ms()
        corrected_ms = clock.offset_ms if isinstance(clock, WallClock) else 0
        ahead_ms = answer.server_ms - (began_ms + ended_ms) // 2 + corrected_ms
        uncertain_ms = (ended_ms - began_ms) // 2 + 1
        found = f"{clocks_apart(ahead_ms)}, known to {uncertain_ms} ms"
        advice = "let the machine keep its time with NTP; perpd corrects an offset, it cannot correct drift"
        surely_ms = max(abs(ahead_ms) - uncertain_ms, 0)
        if surely_ms > WORST_OFFSET_MS:  # after a boot NTP sets it within minutes
            return failed("clock", found, advice, transient=True)
        return warned("clock", found, advice) if surely_ms > GOOD_OFFSET_MS else passed("clock", found)

    # -- the market

    async def _universe(self) -> Check:
        name = "universe"
        instruments = await self._exchange.instruments()
        tickers = await self._exchange.tickers()
        self._instruments = {instrument.symbol: instrument for instrument in instruments}
        self._tickers = {ticker.symbol: ticker for ticker in tickers}
        market = self._settings.market
        chosen = select(
            instruments, tickers, settings=market, held=frozenset(), now_ms=self._access.clock.now_ms()
        )
        self._symbols = chosen.symbols
        found = f"{len(chosen.symbols)} of {len(instruments)} symbols, {market.symbols} asked for"
        if unknown := unlisted(market.exclude, instruments):
            known = " or ".join(unknown)
            advice = f"correct the name; where an earlier run found {known} listed, it may stay"
            wrong = mistaken(unknown, frozenset(), self._settings.run.mode)
            return (failed if wrong else warned)(name, unlisted_words(unknown), advice)
        advice = "lower market.symbols, market.min_age_days or market.min_quote_volume"
        if not chosen.symbols:
            return failed(name, found, advice)
        if len(chosen.symbols) < market.symbols:
            return warned(name, found, f"fewer symbols fit than market.symbols asks for; to match, {advice}")
        return passed(name, found)

    async def _minimum_notionals(self) -> Check:
        """Whether the account's equity buys the smallest orders of the universe."""
        name = "minimum notionals"
        if not self._symbols:
            return skipped(name, "no symbols", transient=True)
        if self._private:
            self._account = await self._exchange.account()
        if self._account is None:
            return passed(name, "no account to hold them against in this mode")
        risk = self._settings.risk
        affordable = self._account.equity * Decimal(repr(risk.max_margin_fraction)) * risk.max_leverage
        beyond = [s for s in self._symbols if self._instruments[s].min_notional > affordable]
        found = (
            f"{len(self._symbols) - len(beyond)} of {len(self._symbols)} symbols can be traded: "
            f"the largest order of an equity of {self._account.equity:.2f} is {affordable:.2f}"
        )
        advice = "deposit more, or expect refusals below_minimum"
        if len(beyond) == len(self._symbols):
            return failed(name, found, advice)
        return warned(name, found, advice) if beyond else passed(name, found)

    async def _market_stream(self) -> Check:
        """An acknowledged subscription that brings nothing is the venue's quietest failure."""
        name = "market stream"
        if not self._symbols:
            return skipped(name, "no symbols", transient=True)
        first = probes.FirstCandle()
        symbols = self._symbols[:5]
        async with self._exchange.candle_stream(symbols, "5m", first.on_candle, first.on_gap):
            if await first.within(DELIVERY_LIMIT_S):
                return passed(name, f"{self._access.settings.stream_url} delivers")
        return failed(
            name,
            f"{self._access.settings.stream_url} accepted the subscription and sent nothing "
            f"for {DELIVERY_LIMIT_S:.0f} s",
            "check exchange.stream_url: streams are routed by /market, /public and /private since April 2026",
            transient=True,
        )

    # -- the account

    async def _api_key(self) -> Check:
        name = "api key"
        try:
            self._account = self._account or await self._exchange.account()
        except VenueCredentials as error:
            seen = probes.header_address(str(error))
            more = f"; the venue sees the address {seen}" if seen else ""
            return failed(name, f"{error}{more}", error.advice)
        equity = self._account.equity
        if equity <= 0:
            return warned(name, f"accepted, equity {equity}", "deposit USDT in the futures wallet")
        return passed(name, f"accepted, equity {equity:.2f}, {len(self._account.positions)} positions")

    async def _key_permissions(self) -> Check:
        name = "key permissions"
        url = self._access.settings.wallet_url
        if not url:
            return self._permissions_unknown(name)
        async with self._open(url) as wallet:
            if silent := self._silent(name, wallet):
                return silent
            may = await probes.key_permissions(wallet)
        if may.enable_withdrawals:
            return failed(
                name, "the key may withdraw", "make a key without withdrawals; perpd never needs them"
            )
        if not may.enable_futures:
            return failed(name, "the key may not trade futures", "enable futures for this key")
        if may.enable_internal_transfer or may.permits_universal_transfer:
            return warned(
                name, "the key may move money between accounts", "switch transfers off for this key"
            )
        if not may.ip_restrict:
            return warned(
                name,
                "no withdrawals; the key is bound to no address",
                "bind it to this machine's address: the venue deletes unbound trading keys",
            )
        return passed(name, "futures, no withdrawals, no transfers, bound to its addresses")

    def _permissions_unknown(self, name: str) -> Check:
        """Whether the key can withdraw is not known: real money is traded so only by an explicit word."""
        empty = "exchange.wallet_url is empty"
        if self._settings.run.mode == "live" and not self._access.settings.wallet_unknown_accepted:
            return Check(
                name,
                Verdict.SKIP,
                f"not looked at: {empty}, so whether the key can withdraw is not known",
                "give exchange.wallet_url; where the venue has none, make sure that the key cannot withdraw "
                "and set exchange.wallet_unknown_accepted = true",
            )
        return warned(name, f"{empty}: not looked at", "make sure that the key cannot withdraw")

    async def _account_modes(self) -> Check:
        name = "account modes"
        try:
            await self._exchange.prepare(self._symbols, self._settings.exchange.margin_type)
        except RequestRejected as error:
            found, _, advice = str(error).partition(": ")
            return failed(name, found, advice)
        return passed(name, "one-way, single asset")

    async def _brackets(self) -> Check:
        name = "leverage brackets"
        brackets = await self._exchange.brackets()
        least = self._settings.risk.min_leverage
        unknown = [symbol for symbol in self._symbols if not brackets.get(symbol)]
        low = [symbol for symbol in self._symbols if 0 < _highest(brackets.get(symbol, ())) < least]
        if len(unknown) == len(self._symbols):
            return failed(
                name, "the venue names none for the universe", "ask the venue: no size can be decided"
            )
        if unknown or low:
            return warned(
                name,
                f"{len(unknown)} symbols without brackets, {len(low)} below {least}x",
                "these are refused; exclude them with market.exclude to have others in their place",
            )
        return passed(name, f"all {len(self._symbols)} symbols allow at least {least}x")

    async def _open_orders(self) -> Check:
        name = "open orders"
        orders = await self._exchange.open_orders()
        held = self._account.positions if self._account else ()
        found = f"{len(orders)} orders rest, {len(held)} positions are open"
        if orders or held:
            return warned(
                name,
                found,
                "those that are not perpd's own block their symbols; close them if they are not wanted",
            )
        return passed(name, found)

    async def _order_route(self) -> Check:
        """A test order to the matching engine's door, and the conditional orders' list."""
        name = "order route"
        if not self._symbols:
            return skipped(name, "no symbols", transient=True)
        symbol = self._symbols[0]
        price = Decimal(repr(self._tickers[symbol].last_price))
        quantity = await probes.test_order(self._rest, self._instruments[symbol], price)
        await self._rest.send(OPEN_ALGO_ORDERS, {})
        return passed(name, f"a test order of {quantity} {symbol} and the conditional orders' list")

    async def _private_stream(self) -> Check:
        """Entering it proves nothing: a stream that does not open is tried again in the background."""
        name = "private stream"
        async with self._exchange.user_stream(lambda event: None, lambda: None):
            problem = self._exchange.private_problem()
        if problem:
            return failed(
                name,
                f"not open within {self._access.settings.request_limit_s:g} s: {problem}",
                "check exchange.stream_url, below which /private must be reachable",
                transient=True,
            )
        return passed(name, "a listen key is given and the connection stands")


def _highest(brackets: Sequence[Bracket]) -> int:
    return max((bracket.max_leverage for bracket in brackets), default=0)


def clocks_apart(ahead_ms: int) -> str:
    """Args: ahead_ms: what the venue's clock is ahead of this machine's."""
    amount = f"{abs(ahead_ms) / 1000:.1f} s" if abs(ahead_ms) >= 1_000 else f"{abs(ahead_ms)} ms"
    return f"the venue's clock is {amount} {'behind' if ahead_ms < 0 else 'ahead of'} this machine's"


def outbound_address(address: str) -> Check:
    """Args: address: of this end of a connection to the venue; one of this machine means a venue here."""
    name, seen = OUTBOUND, ip_address(address)
    if seen.is_global or seen.is_loopback:
        return passed(name, f"{address}, as this machine sees it; bind the key to what the venue sees")
    return warned(
        name,
        f"{address} is private: the venue sees another one, that of the router or platform in between",
        "bind the key to the address that the venue sees, and have the platform keep it",
    )
