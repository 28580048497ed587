"""Questions to the venue that only a check asks: key permissions, a test order, whether streams deliver."""

import asyncio
from decimal import ROUND_UP, Decimal

import msgspec

from service.exchange.binance.codec import Answer
from service.exchange.binance.errors import Kind
from service.exchange.binance.rest import Call, RestClient, read
from service.records import CandleUpdate, Instrument

PERMISSIONS = Call("GET", "/sapi/v1/account/apiRestrictions", signed=True)
TEST_ORDER = Call("POST", "/fapi/v1/order/test", kind=Kind.WRITE, signed=True)


class KeyPermissions(msgspec.Struct, frozen=True, rename="camel"):
    """What a key may do, in the venue's words. A field it does not send counts as the dangerous value."""

    enable_withdrawals: bool = True
    enable_futures: bool = False
    ip_restrict: bool = False
    enable_internal_transfer: bool = False
    permits_universal_transfer: bool = False


_permissions: Answer[KeyPermissions] = Answer(KeyPermissions, "apiRestrictions")


async def key_permissions(wallet: RestClient) -> KeyPermissions:
    """Args: wallet: a client of the venue's wallet API, another host than the futures'."""
    return await read(wallet, PERMISSIONS, {}, _permissions.decode)


async def test_order(futures: RestClient, instrument: Instrument, price: Decimal) -> Decimal:
    """Have the venue check a small market order without placing it; returns its quantity.

    Raises RequestRejected with the venue's reason, and what a request raises.
    """
    quantity = least_quantity(instrument, price)
    await futures.send(
        TEST_ORDER,
        {"symbol": instrument.symbol, "side": "BUY", "type": "MARKET", "quantity": format(quantity, "f")},
    )
    return quantity


def least_quantity(instrument: Instrument, price: Decimal) -> Decimal:
    """The smallest quantity of a market order whose notional the venue accepts, with a tenth to spare."""
    wanted = max(instrument.market_min_quantity, instrument.min_notional * Decimal("1.1") / price)
    steps = (wanted / instrument.market_step_size).to_integral_value(ROUND_UP)
    return steps * instrument.market_step_size


class FirstCandle:
    """Waits for the first update of a candle stream."""

    def __init__(self) -> None:
        self._seen = asyncio.Event()

    def on_candle(self, update: CandleUpdate) -> None:
        self._seen.set()

    def on_gap(self, symbols: object) -> None:
        """A reconnect is no delivery."""

    async def within(self, seconds: float) -> bool:
        """Args: seconds: of wall time."""
        try:
            async with asyncio.timeout(seconds):
                await self._seen.wait()
        except TimeoutError:
            return False
        return True


def header_address(text: str) -> str:
    """The address the venue saw, where its refusal names it; else ""."""
    _, found, rest = text.partition("request ip: ")
    return rest.split()[0].rstrip(".,;") if found and rest else ""
