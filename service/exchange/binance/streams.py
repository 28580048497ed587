"""WebSocket streams that renew, reconnect and resubscribe by themselves.

A `Link` is one connection. A `Supervisor` keeps one link alive: it replaces it before the venue's
24-hour limit, with an overlap, and after a loss or a silence, with a call to `on_gap`.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import msgspec
import picows
import structlog

from service.errors import (
    RequestRejected,
    VenueCredentials,
    VenueError,
    VenueRestricted,
    VenueUnavailable,
)
from service.exchange.binance.codec import beginning, candle_update, market_message
from service.ports import Clock
from service.records import CandleUpdate
from service.settings import ExchangeSettings

log = structlog.get_logger("exchange.streams")

NAMES_PER_REQUEST = 100
REQUEST_GAP_S = 0.25  # the venue disconnects whoever sends more than 10 messages a second
ANSWER_LIMIT_S = 10.0
PING_IDLE_S = 30.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
RENEWAL_RETRY_S = 60.0
REPORT_EVERY_S = 10.0
LARGEST_MESSAGE_BYTES = 8 * 1024 * 1024
KEEP_ALIVE_S = 1_800.0
KEEP_ALIVE_RETRY_S = 60.0
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError)


@asynccontextmanager
async def background(name: str, *works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `works` while the block runs and cancel them with it.

    The failure of one of them ends the block. A lone failure surfaces as itself, not as a group, so
    that a caller may still catch it by its name.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work, name=name) for work in works]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as failures:
        if len(failures.exceptions) == 1:
            raise failures.exceptions[0] from None
        raise


class Undecodable:
    """Counts messages that cannot be decoded and logs, now and then, how one begins."""

    def __init__(self, stream: str, clock: Clock) -> None:
        self._stream = stream
        self._clock = clock
        self._logged_s = float("-inf")
        self.count = 0

    def add(self, body: bytes, error: Exception) -> None:
        self.count += 1
        now_s = self._clock.monotonic_s()
        if now_s - self._logged_s >= REPORT_EVERY_S:
            self._logged_s = now_s
            log.warning(
                "message cannot be decoded",
                stream=self._stream,
                error=str(error),
                count=self.count,
                begins=beginning(body),
            )


class Link(picows.WSListener):
    """One open connection. `on_text` gets each whole text message; pings are answered by picows."""

    def __init__(self, on_text: Callable[["Link", bytes], None], clock: Clock) -> None:
        self._on_text = on_text
        self._clock = clock
        self._transport: picows.WSTransport | None = None
        self._fragments = bytearray()
        self._answers: dict[int, asyncio.Future[None]] = {}
        self.closed = asyncio.Event()
        self.failure: Exception | None = None
        self.heard_s = clock.monotonic_s()

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self._transport = transport

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self.closed.set()

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.TEXT and frame.fin:
            self.deliver(frame.get_payload_as_bytes())
        elif frame.msg_type == picows.WSMsgType.TEXT:
            self._fragments = bytearray(frame.get_payload_as_memoryview())
        elif frame.msg_type == picows.WSMsgType.CONTINUATION:
            self._fragments += frame.get_payload_as_memoryview()
            if len(self._fragments) > LARGEST_MESSAGE_BYTES:
                self.close()
            elif frame.fin:
                body, self._fragments = bytes(self._fragments), bytearray()
                self.deliver(body)
        elif frame.msg_type == picows.WSMsgType.CLOSE:
            self.close()

    def deliver(self, body: bytes) -> None:
        """Take one whole text message."""
        self.heard_s = self._clock.monotonic_s()
        try:
            self._on_text(self, body)
        except Exception as error:  # noqa: BLE001  a callback's fault ends the stream, through its supervisor
            self.failure = error
            self.close()

    def close(self) -> None:
        """Close now; `closed` follows."""
        if self._transport:
            self._transport.disconnect()

    async def request(self, request_id: int, method: str, names: Sequence[str]) -> None:
        """Send one request and wait for the venue's answer. Raises VenueUnavailable, RequestRejected."""
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers[request_id] = answered
        body = msgspec.json.encode({"method": method, "params": list(names), "id": request_id})
        try:
            if self._transport is None or self.closed.is_set():
                raise VenueUnavailable(f"{method}: the stream is closed")
            self._transport.send(picows.WSMsgType.TEXT, body)
            async with asyncio.timeout(ANSWER_LIMIT_S):
                await answered
        except TimeoutError:
            raise VenueUnavailable(f"{method}: no answer in {ANSWER_LIMIT_S:g} s") from None
        finally:
            self._answers.pop(request_id, None)

    def answer(self, request_id: int, error: str) -> None:
        """The venue answered a request; `error` is empty when it agreed."""
        waiting = self._answers.get(request_id)
        if waiting is None or waiting.done():
            return
        if error:
            waiting.set_exception(RequestRejected(f"stream request refused: {error}"))
        else:
            waiting.set_result(None)


async def connect(url: str, on_text: Callable[[Link, bytes], None], clock: Clock, limit_s: float) -> Link:
    """Open one connection. Raises VenueUnavailable; the message never holds the URL, which may hold a key."""
    try:
        async with asyncio.timeout(limit_s):
            _, link = await picows.ws_connect(
                lambda: Link(on_text, clock),
                url,
                websocket_handshake_timeout=limit_s,
                enable_auto_ping=True,
                auto_ping_idle_timeout=PING_IDLE_S,
                auto_ping_reply_timeout=PING_IDLE_S,
                max_frame_size=LARGEST_MESSAGE_BYTES,
                max_redirects=0,
            )
    except picows.WSHandshakeError as error:
        status = int(error.response.status) if error.response else 0
        raise VenueUnavailable(f"stream refused with HTTP {status}", status=status) from None
    except (OSError, TimeoutError, picows.WSError) as error:
        raise VenueUnavailable(f"stream cannot be opened: {type(error).__name__}") from None
    assert isinstance(link, Link)
    return link


Connect = Callable[[str, Callable[[Link, bytes], None], Clock, float], Awaitable[Link]]
"""What opens a connection: `connect`, or a simulation's own."""


def nothing() -> None:
    """Nobody asked to be told."""


class Supervisor:
    """Keeps one link alive until cancelled.

    Args: dial: opens a link, subscriptions included, or raises VenueError.
    on_gap: called when messages may have been missed. silence_limit_s: wall seconds without a
    message after which a link counts as dead, None where silence is normal. on_lost: called as a link is
    lost, long before the next one is open; on_silence: it acknowledged and then delivered nothing.
    """

    def __init__(
        self,
        name: str,
        dial: Callable[[], Awaitable[Link]],
        on_gap: Callable[[], None],
        clock: Clock,
        *,
        silence_limit_s: float | None,
        renew_after_s: float,
        on_lost: Callable[[], None] = nothing,
        on_silence: Callable[[], None] = nothing,
    ) -> None:
        self._on_lost = on_lost
        self._on_silence = on_silence
        self._name = name
        self._dial = dial
        self._on_gap = on_gap
        self._clock = clock
        self._silence_limit_s = silence_limit_s
        self._renew_after_s = renew_after_s
        self._missed = False
        self.open = asyncio.Event()
        self.problem = ""  # why the newest attempt to open it failed
        self.reconnects = 0

    def entered_late(self) -> None:
        """The block began without a link, so its first one comes after a gap."""
        self._missed = not self.open.is_set()

    async def run(self) -> None:
        """Raises what a callback raised, and what refuses the very first link for good."""
        failures = 0
        while True:
            try:
                link = await self._dial()
            except (VenueCredentials, VenueRestricted) as error:
                if not self.open.is_set():
                    raise  # it never worked: the settings are wrong
                failures += 1
                log.error("stream refused", stream=self._name, error=str(error), failures=failures)
                await self._pause(failures)
                continue
            except VenueError as error:
                failures += 1
                self.problem = str(error)
                log.warning("stream not open", stream=self._name, error=str(error), failures=failures)
                await self._pause(failures)
                continue
            self.open.set()
            if self._missed:
                self._on_gap()
            began_s = self._clock.monotonic_s()
            await self._hold(link)
            self._on_lost()
            self._missed = True
            self.reconnects += 1
            # A link that is lost at once must not be redialled in a tight loop.
            failures = failures + 1 if self._clock.monotonic_s() - began_s < LONGEST_PAUSE_S else 1
            await self._pause(failures)

    async def _hold(self, link: Link) -> None:
        """Return when the link, or the one that replaced it, is lost."""
        renew_at_s = self._clock.monotonic_s() + self._renew_after_s
        try:
            while not await self._closed_before(link, renew_at_s):
                now_s = self._clock.monotonic_s()
                if self._silence_limit_s and now_s - link.heard_s >= self._silence_limit_s:
                    log.warning(
                        "stream silent, reconnecting",
                        stream=self._name,
                        silent_s=round(now_s - link.heard_s, 1),
                    )
                    self._on_silence()
                    return
                if now_s >= renew_at_s:
                    link, renew_at_s = await self._renew(link)
            if link.failure:
                raise link.failure
            log.warning("stream lost, reconnecting", stream=self._name)
        finally:
            link.close()

    async def _closed_before(self, link: Link, renew_at_s: float) -> bool:
        """Wait for the link's end; False when it is time to look at silence or renewal instead."""
        at_s = renew_at_s
        if self._silence_limit_s:
            at_s = min(at_s, link.heard_s + self._silence_limit_s)
        try:
            async with asyncio.timeout(max(at_s - self._clock.monotonic_s(), 0.0) + 0.001):
                await link.closed.wait()
        except TimeoutError:
            return False
        return True

    async def _renew(self, old: Link) -> tuple[Link, float]:
        """Open the successor before the old link is closed. Returns the link to hold and its renewal time."""
        try:
            link = await self._dial()
        except VenueError as error:
            log.warning("stream not renewed yet", stream=self._name, error=str(error))
            return old, self._clock.monotonic_s() + RENEWAL_RETRY_S
        if old.closed.is_set():  # lost before the successor listened
            self._on_gap()
        old.close()
        log.info("stream renewed", stream=self._name)
        return link, self._clock.monotonic_s() + self._renew_after_s

    async def _pause(self, failures: int) -> None:
        pause_s = min(FIRST_PAUSE_S * 2 ** min(failures - 1, 10), LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))


class CandleStream:
    """The kline streams of some symbols, at most `streams_per_connection` to a link."""

    def __init__(
        self,
        settings: ExchangeSettings,
        clock: Clock,
        timeframe: str,
        on_candle: Callable[[CandleUpdate], None],
        on_gap: Callable[[Sequence[str]], None],
        on_silence: Callable[[], None] = nothing,
        connect: Connect = connect,
    ) -> None:
        self._connect = connect
        self._settings = settings
        self._clock = clock
        self._on_silence = on_silence
        self._timeframe = timeframe
        self._on_candle = on_candle
        self._on_gap = on_gap
        self._url = f"{settings.stream_url.rstrip('/')}/market/stream"
        self.undecodable = Undecodable(f"kline_{timeframe}", clock)

    def supervisors(self, symbols: Sequence[str]) -> list[Supervisor]:
        size = self._settings.streams_per_connection
        return [self._supervisor(symbols[at : at + size]) for at in range(0, len(symbols), size)]

    def _supervisor(self, symbols: Sequence[str]) -> Supervisor:
        return Supervisor(
            f"kline_{self._timeframe}",
            lambda: self._dial(symbols),
            lambda: self._on_gap(symbols),
            self._clock,
            silence_limit_s=self._settings.silence_limit_s,
            renew_after_s=self._settings.renew_after_s,
            on_silence=self._on_silence,
        )

    async def _dial(self, symbols: Sequence[str]) -> Link:
        link = await self._connect(self._url, self.on_text, self._clock, self._settings.request_limit_s)
        names = [f"{symbol.lower()}@kline_{self._timeframe}" for symbol in symbols]
        try:
            for at in range(0, len(names), NAMES_PER_REQUEST):
                if at:
                    await asyncio.sleep(REQUEST_GAP_S)
                await link.request(at + 1, "SUBSCRIBE", names[at : at + NAMES_PER_REQUEST])
        except BaseException:
            link.close()
            raise
        link.heard_s = self._clock.monotonic_s()
        return link

    def on_text(self, link: Link, body: bytes) -> None:
        """Handle one message; called thousands of times a second."""
        try:
            message = market_message(body)
        except DECODE_ERRORS as error:
            self.undecodable.add(body, error)
            return
        event = message.data
        if event is not None:
            update = candle_update(event)
            if update is not None:
                self._on_candle(update)
            elif event.kline is not None:
                self.undecodable.add(body, ValueError("not a possible candle"))
            elif event.event == "serverShutdown":
                link.close()
        elif message.error is not None:
            link.answer(message.id or 0, f"{message.error.code} {message.error.msg}")
        elif message.id is not None:
            link.answer(message.id, "")
        elif message.event == "serverShutdown":
            link.close()


@asynccontextmanager
async def candle_stream(stream: CandleStream, symbols: Sequence[str], limit_s: float) -> AsyncIterator[None]:
    """Run the streams while the block runs. Entered once all are subscribed, or after `limit_s`:
    what subscribes later calls `on_gap` then."""
    supervisors = stream.supervisors(symbols)
    async with background("candle stream", *(each.run() for each in supervisors)):
        await _opened(supervisors, limit_s)
        yield


async def _opened(supervisors: Sequence[Supervisor], limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            for each in supervisors:
                await each.open.wait()
    except TimeoutError:
        for each in supervisors:
            each.entered_late()


class ListenKeys(msgspec.Struct, frozen=True):
    """The calls that manage the private stream's key."""

    create: Callable[[], Awaitable[str]]
    keep_alive: Callable[[], Awaitable[None]]


class UserStream:
    """The private stream. Its key is created at each dial and kept alive, and never deleted: two
    instances share one key, so deleting it on the way out would silence the other."""

    def __init__(
        self,
        settings: ExchangeSettings,
        clock: Clock,
        keys: ListenKeys,
        on_message: Callable[[bytes], None],
        on_gap: Callable[[], None],
        on_silence: Callable[[], None] = nothing,
        connect: Connect = connect,
    ) -> None:
        self._connect = connect
        self._settings = settings
        self._clock = clock
        self._on_silence = on_silence
        self._expected_s: float | None = None  # since when something must have been told
        self._expecting = asyncio.Event()
        self._keys = keys
        self._on_message = on_message
        self._link: Link | None = None
        self.undecodable = Undecodable("user data", clock)
        self.supervisor = Supervisor(
            "user data",
            self._dial,
            on_gap,
            clock,
            silence_limit_s=None,  # no trade, no message: pings tell a dead peer, `expect` a mute one
            renew_after_s=settings.renew_after_s,
            on_lost=on_gap,
        )

    async def _dial(self) -> Link:
        key = await self._keys.create()
        url = f"{self._settings.stream_url.rstrip('/')}/private/ws?listenKey={quote(key, safe='')}"
        self._link = await self._connect(url, self._on_text, self._clock, self._settings.request_limit_s)
        return self._link

    def _on_text(self, link: Link, body: bytes) -> None:
        try:
            self._on_message(body)
        except DECODE_ERRORS as error:
            self.undecodable.add(body, error)

    def expect(self, since_s: float) -> None:
        """The venue accepted something after `since_s` (monotonic) that it must tell here."""
        if self._expected_s is None:
            self._expected_s = since_s
            self._expecting.set()

    async def watch(self) -> None:
        """A stream that takes our key and delivers nothing is a fault: dial again. Until cancelled."""
        while True:
            await self._expecting.wait()
            self._expecting.clear()
            await asyncio.sleep(self._settings.request_limit_s)
            expected_s, self._expected_s = self._expected_s, None
            link = self._link
            if expected_s is None or link is None or link.closed.is_set():
                continue
            if link.heard_s < expected_s:
                log.error("private stream delivers nothing, reconnecting", since_s=round(expected_s, 1))
                self._on_silence()
                self.reconnect()

    def reconnect(self) -> None:
        """The key is no longer valid: dial again with a new one."""
        if self._link:
            self._link.close()

    async def keep_alive(self) -> None:
        """Extend the key every half hour of venue time, until cancelled."""
        pause_s = KEEP_ALIVE_S
        while True:
            await self._clock.sleep_s(pause_s)
            try:
                await self._keys.keep_alive()
                pause_s = KEEP_ALIVE_S
            except RequestRejected as error:
                log.warning("private stream's key refused, making a new one", error=str(error))
                self.reconnect()
            except VenueError as error:
                log.warning("private stream's key not extended", error=str(error))
                pause_s = KEEP_ALIVE_RETRY_S


@asynccontextmanager
async def user_stream(stream: UserStream, limit_s: float) -> AsyncIterator[None]:
    """Run the private stream while the block runs; entered once it is open, or after `limit_s`."""
    async with background("user stream", stream.supervisor.run(), stream.keep_alive(), stream.watch()):
        await _opened([stream.supervisor], limit_s)
        yield
