"""Requests to the venue: signed, counted against its limits, and refused with our errors.

Reads are repeated a few times with growing pauses. Nothing else is ever repeated, with one exception:
a request refused for its timestamp was not executed, so it is signed again, once, with the right time.
"""

import hashlib
import hmac
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
import structlog
from yarl import URL

from service.clock import WallClock
from service.errors import (
    OrderOutcomeUnknown,
    VenueClockSkew,
    VenueCredentials,
    VenueError,
    VenueMalformed,
    VenueRestricted,
    VenueThrottled,
    VenueUnavailable,
)
from service.exchange.binance.codec import server_time
from service.exchange.binance.errors import Kind, error_for
from service.exchange.binance.limits import WeightBudget
from service.exchange.gate import OPEN, Gate
from service.ports import Clock, Recorder
from service.settings import ExchangeSettings

log = structlog.get_logger("exchange.binance")

T = TypeVar("T")
READ_ATTEMPTS = 4
FIRST_PAUSE_S = 0.25
CONNECTIONS = 32
CONNECT_LIMIT_S = 5.0
OFFSET_EVERY_S = 3_600.0
LARGEST_RECV_WINDOW_MS = 60_000
BANNED = 418
ORDER_COUNTS = {"X-MBX-ORDER-COUNT-10S": 10_000, "X-MBX-ORDER-COUNT-1M": 60_000}


class Call(msgspec.Struct, frozen=True):
    """One endpoint and what it costs."""

    method: str
    path: str
    weight: int = 1
    kind: Kind = Kind.READ
    signed: bool = False
    key: bool = False  # the key's header without a signature
    priority: bool = False  # may use what is reserved: weight for orders, order counts for stops and exits

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


class Transport(Protocol):
    """What carries a call to an exchange and brings its answer's body back."""

    async def send(self, call: Call, params: Mapping[str, str]) -> bytes:
        """Raises the errors of `service.errors` that begin with Venue, Request or Order."""
        ...


async def read(
    transport: Transport, call: Call, params: Mapping[str, str], decode: Callable[[bytes], T]
) -> T:
    """Send a read and decode its answer; a malformed answer is asked for once more."""
    try:
        return decode(await transport.send(call, params))
    except VenueMalformed as error:
        log.warning("malformed answer, asking again", endpoint=call.name, error=str(error))
    return decode(await transport.send(call, params))


def query(params: Mapping[str, str]) -> str:
    """Percent-encoded UTF-8, the very text that is signed and sent."""
    return urlencode(params, quote_via=quote, safe="")


def signature(text: str, secret: str) -> str:
    """HMAC SHA-256, hexadecimal."""
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


class RestClient:
    """The venue's REST interface under one key, or none."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: ExchangeSettings,
        clock: Clock,
        *,
        api_key: str = "",
        api_secret: str = "",
        recorder: Recorder | None = None,
        gate: Gate = OPEN,
    ) -> None:
        self._session = session
        self._base = settings.rest_url.rstrip("/")
        # A timestamp ages `speed` times as fast in an accelerated market.
        self._recv_window_ms = min(int(settings.recv_window_ms * clock.speed), LARGEST_RECV_WINDOW_MS)
        self._clock = clock
        self._api_key = api_key
        self._api_secret = api_secret
        self._recorder = recorder
        self._offset_ms = 0
        self._gate = gate
        self.host = URL(self._base).authority
        self.budget = WeightBudget(clock, settings.weight_reserve_fraction)
        self.budget.silence_until(gate.silent_until_ms(self.host))

    async def send(self, call: Call, params: Mapping[str, str]) -> bytes:
        """Send one call, reads several times if need be. Returns the body of a 200 answer."""
        if (call.signed or call.key) and not (self._api_key and self._api_secret):
            raise VenueCredentials(f"{call.name} needs an API key and secret, and none is configured")
        attempts = READ_ATTEMPTS if call.kind is Kind.READ else 1
        for attempt in range(1, attempts + 1):
            try:
                return await self._send_signed(call, params)
            except VenueUnavailable as error:
                if attempt == attempts:
                    raise
                log.debug("read failed, trying again", endpoint=call.name, attempt=attempt, error=str(error))
                if not isinstance(error, VenueThrottled):  # the budget waits out a silence
                    await self._pause(attempt)
        raise AssertionError("unreachable")

    async def measure_offset(self) -> None:
        """Learn how far the venue's clock is ahead of ours, from the middle of one round trip.

        An offset smaller than the measurement's own uncertainty counts as none. A wall clock is
        shifted, so that every part sees venue time; other clocks are the venue's already and only
        the signatures are corrected. Raises VenueUnavailable, VenueRestricted, VenueMalformed.
        """
        began_ms = self._clock.now_ms()
        body = await self.send(Call("GET", "/fapi/v1/time", priority=True), {})
        ended_ms = self._clock.now_ms()
        ahead_ms = server_time.decode(body).server_ms - (began_ms + ended_ms) // 2
        if abs(ahead_ms) <= (ended_ms - began_ms) // 2 + 1:
            ahead_ms = 0
        if isinstance(self._clock, WallClock):
            self._clock.correct(ahead_ms)
        else:
            self._offset_ms = ahead_ms
        if ahead_ms:
            log.info("venue clock measured", ahead_ms=ahead_ms, round_trip_ms=ended_ms - began_ms)

    async def keep_offset(self) -> None:
        """Measure the offset every hour of wall time, until cancelled."""
        while True:
            await self._clock.sleep_s(OFFSET_EVERY_S * self._clock.speed)
            try:
                await self.measure_offset()
            except VenueError as error:
                log.warning("venue clock not measured", error=str(error))

    async def _send_signed(self, call: Call, params: Mapping[str, str]) -> bytes:
        try:
            return await self._send_once(call, params)
        except VenueClockSkew:
            log.warning("timestamp refused, measuring the venue clock", endpoint=call.name)
            await self.measure_offset()
        return await self._send_once(call, params)

    async def _send_once(self, call: Call, params: Mapping[str, str]) -> bytes:
        ordering = call.kind is Kind.ORDER
        urgent = ordering and call.priority
        if ordering:
            await self.budget.take_order(urgent=urgent)
        await self.budget.take(call.weight, priority=call.priority or ordering, urgent=urgent)
        if call.signed and call.kind is not Kind.READ:  # after the waits above: now is when it leaves
            opens = ordering and not call.priority
            barred = self._gate.may_send() or (self._gate.may_open() if opens else "")
            if barred:
                self._count("exchange.request.barred")
                raise VenueUnavailable(f"{call.name}: nothing was sent: {barred}")
        asked_ms, began_s = self._clock.now_ms(), self._clock.monotonic_s()
        url = self._url(call, params)
        headers = {"X-MBX-APIKEY": self._api_key} if call.signed or call.key else {}
        try:
            async with self._session.request(
                call.method, url, headers=headers, allow_redirects=False
            ) as answer:
                self._observe(answer.headers, asked_ms)
                body = await answer.read()
                status, answer_headers = answer.status, answer.headers
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._count("exchange.request.errors")
            raise _no_answer(call, error) from None
        if self._recorder:
            self._recorder.record(f"exchange {call.name}", self._clock.monotonic_s() - began_s)
        if status == 200 and not body.startswith(b'{"code":-'):
            return body
        self._count("exchange.request.errors")
        error_met = error_for(
            status,
            body,
            answer_headers,
            endpoint=call.name,
            kind=call.kind,
            now_ms=self._clock.now_ms(),
        )
        if isinstance(error_met, VenueThrottled):
            self.budget.silence_until(error_met.retry_at_ms, banned=status == BANNED)
            if status == BANNED:
                self._gate.silenced(self.host, error_met.retry_at_ms)
            log.warning("throttled by the venue", endpoint=call.name, retry_at_ms=error_met.retry_at_ms)
        raise error_met

    def _url(self, call: Call, params: Mapping[str, str]) -> URL:
        text = query(params)
        if call.signed:
            timestamp_ms = self._clock.now_ms() + self._offset_ms
            text += ("&" if text else "") + f"recvWindow={self._recv_window_ms}&timestamp={timestamp_ms}"
            text += f"&signature={signature(text, self._api_secret)}"
        return URL(f"{self._base}{call.path}?{text}" if text else f"{self._base}{call.path}", encoded=True)

    def _observe(self, headers: Mapping[str, str], asked_ms: int) -> None:
        used = headers.get("X-MBX-USED-WEIGHT-1M", "")
        if used.isdigit():
            self.budget.observe(int(used), asked_ms)
        counts = {
            length_ms: int(text)
            for name, length_ms in ORDER_COUNTS.items()
            if (text := headers.get(name, "")).isdigit()
        }
        if counts:
            self.budget.observe_orders(counts, asked_ms)

    def _count(self, name: str) -> None:
        if self._recorder:
            self._recorder.count(name)

    async def _pause(self, attempt: int) -> None:
        """Wall time, doubling, with jitter so that many readers do not come back at once."""
        pause_s = FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        await self._clock.sleep_s(pause_s * self._clock.speed)


def _no_answer(call: Call, error: Exception) -> VenueError:
    """What a request without an answer means. Only a failed connection proves that nothing was sent."""
    reason = str(error) or "no answer in time"
    kind = type(error).__name__
    text = f"{call.name}: the venue was not reached: {kind}: {reason}"
    not_sent = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)
    if call.kind is Kind.ORDER and not isinstance(error, not_sent):
        # The reason may quote the request, and so the signature: name only its kind.
        return OrderOutcomeUnknown(f"{call.name}: {kind}: sent, no usable answer")
    if isinstance(error, aiohttp.InvalidURL):
        return VenueUnavailable(f"{call.name}: the exchange's address is not a URL")
    return VenueUnavailable(text if isinstance(error, not_sent) else f"{call.name}: no answer: {kind}")


@asynccontextmanager
async def open_rest(
    settings: ExchangeSettings,
    clock: Clock,
    *,
    api_key: str = "",
    api_secret: str = "",
    recorder: Recorder | None = None,
    gate: Gate = OPEN,
) -> AsyncIterator[RestClient]:
    """A client whose connections close with the block."""
    timeout = aiohttp.ClientTimeout(total=settings.request_limit_s, sock_connect=CONNECT_LIMIT_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=timeout,
        trust_env=False,
    ) as session:
        yield RestClient(
            session, settings, clock, api_key=api_key, api_secret=api_secret, recorder=recorder, gate=gate
        )


async def first_contact(client: RestClient) -> None:
    """Sit out a ban of before the restart, then measure the offset.

    Raises VenueRestricted; anything else may pass and is logged.
    """
    await client.budget.silence_over()
    try:
        await client.measure_offset()
    except VenueRestricted:
        raise
    except VenueError as error:
        log.warning("venue clock not measured", error=str(error))
