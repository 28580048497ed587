"""The simulated exchange as a server: one market clock, one engine, REST and streams on one port.

The market is taken step by step (15 s of market time) and never skips one: before any request is
answered, every step that came due has been shown to the engine. So what an account lives through
does not depend on how busy the machine is, only on when its requests arrive.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web

from service.clock import ScaledClock
from service.errors import PortInUse
from service.exchange.simulated.auth import Keys, ListenKeys
from service.exchange.simulated.engine import Assumptions, Engine
from service.exchange.simulated.fault_plan import FaultPlan
from service.exchange.simulated.quotes import Quotes
from service.exchange.simulated.rest import Answer, Request, Rest
from service.exchange.simulated.state import Saved, encode_state, load_state, write_state
from service.exchange.simulated.streams import PING_EVERY_S, Sockets, Streams
from service.exchange.simulated.tape import STEP_MS, Tape
from service.exchange.simulated.troubles import Troubles

log = structlog.get_logger("sim.server")

HOUSEKEEPING_S = 1.0
SAVE_AT_LEAST_EVERY_S = 10.0  # so that a killed exchange loses little market time
STEPS_AT_A_TIME = 64  # then other tasks get the loop
SHORTEST_SLEEP_S = 0.001
LONGEST_SLEEP_S = 0.25
LOST_ANSWER_S = 60.0  # longer than any client waits


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a market is served. `market` names it in the state file."""

    speed: float
    keys: Mapping[str, str]  # API key -> secret
    deposit: Decimal  # quote, of every account
    assumptions: Assumptions
    latency_ms: float = 0.0  # wall time between a request and its answer
    stream_messages_per_s: int = 2_000  # wall time
    state: Path | None = None
    market: Mapping[str, str] = field(default_factory=dict)
    end_ms: int | None = None  # the market freezes here, if before the tape's end
    faults: FaultPlan | None = None


class MarketClock(ScaledClock):
    """Market time that stops at the end of the market."""

    def __init__(
        self, origin_ms: int, speed: float, end_ms: int, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(origin_ms, monotonic_s(), speed, monotonic_s)
        self.end_ms = end_ms

    def now_ms(self) -> int:
        return min(super().now_ms(), self.end_ms)

    @property
    def ended(self) -> bool:
        return self.now_ms() >= self.end_ms


class Venue:
    """A market in motion with its accounts. `port` is set once it is served.

    Args: monotonic_s: the clock that its time is derived from; a simulation brings its own.
    """

    def __init__(
        self,
        tape: Tape,
        options: ServerOptions,
        saved: Saved | None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        origin_ms = saved.market_ms if saved else tape.start_ms
        end_ms = min(options.end_ms or tape.end_ms, tape.end_ms)
        self.tape = tape
        self.options = options
        self.monotonic_s = monotonic_s
        self.troubles: Troubles | None = None
        self.clock = MarketClock(origin_ms, options.speed, end_ms, monotonic_s)
        self.engine = Engine(
            tape.instruments,
            tape.brackets,
            options.assumptions,
            now_ms=origin_ms,
            funding_interval_ms=self._funding_interval_ms,
            funding_rate=self._funding_rate,
        )
        if saved:
            self.engine.restore(saved.engine)
        for key in options.keys:
            self.engine.open_account(key, options.deposit)
        self.quotes = Quotes(tape, float(options.assumptions.spread_bps))
        self.listen_keys = ListenKeys()
        self.streams = Streams(self.quotes, self.listen_keys, options.stream_messages_per_s, monotonic_s())
        self.rest = Rest(
            self.engine,
            self.quotes,
            Keys(options.keys, options.speed),
            self.listen_keys,
            self.show_prices,
            self.streams.drop_listen_key,
        )
        self.step_ms = origin_ms // STEP_MS * STEP_MS
        self.changed = saved is None
        self.port = 0
        self._shown_step = -1
        self._shown: set[str] = set()
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda account, event: None
        self.show_prices((), origin_ms)
        self.tell_events()

    def disturb_by(self, troubles: Troubles) -> None:
        """From now on these faults strike."""
        self.troubles = troubles
        troubles.install()

    def _funding_interval_ms(self, symbol: str) -> int:
        return self.tape.funding_interval_ms(self.quotes.index[symbol])

    def _funding_rate(self, symbol: str, settle_ms: int) -> float:
        return self.tape.funding_rate(self.quotes.index[symbol], settle_ms)

    # Time

    def take_steps(self, at_most: int) -> bool:
        """Live through up to `at_most` steps that came due; True when more are due."""
        now_ms = self.clock.now_ms()
        for _ in range(at_most):
            if self.step_ms + STEP_MS > now_ms:
                return False
            self.step_ms += STEP_MS
            if self.engine.watched_symbols():
                self.show_prices((), self.step_ms)
            if self.troubles is not None:
                self.troubles.step()
            self.tell_events()
            self.streams.close_candles(self.step_ms)
        return self.step_ms + STEP_MS <= now_ms

    def catch_up(self) -> int:
        """Live through all that came due. Returns market time, not before the last step."""
        while self.take_steps(STEPS_AT_A_TIME):
            pass
        return max(self.clock.now_ms(), self.step_ms)

    def show_prices(self, symbols: Iterable[str], at_ms: int) -> None:
        """Give the engine the prices of what it watches and of `symbols`, once a step: they move with it."""
        step = at_ms // STEP_MS
        if step != self._shown_step:
            self._shown_step, self._shown = step, set()
        unseen = self.engine.watched_symbols().union(symbols) - self._shown
        if unseen:
            self._shown |= unseen
            last, mark = self.quotes.prices(at_ms, sorted(unseen))
            self.engine.on_prices(at_ms, last, mark)

    def tell_events(self) -> None:
        """Send what the engine has to say; faults may repeat, delay or lose it."""
        for account, event in self.engine.take_events():
            self.changed = True
            self.on_event(account, event)
            if self.troubles is None:
                self.streams.user_event(account, event)
                continue
            for delay_s in self.troubles.event_delays(event):
                if delay_s:
                    self.troubles.tell_later(delay_s, partial(self._tell_late, account, event))
                else:
                    self.streams.user_event(account, event)

    def _tell_late(self, account: str, event: dict[str, Any]) -> None:
        self.streams.user_event(account, event)
        self.streams.flush()

    # Requests

    def answer(self, request: Request) -> Answer:
        answer = self.rest.answer(request)
        self.changed = self.changed or answer.changed
        self.tell_events()
        self.streams.flush()
        return answer

    def clock_facts(self) -> dict[str, Any]:
        """What a daemon on this machine needs to share the clock."""
        return {
            "serverTime": self.clock.now_ms(),
            "originTime": self.clock.origin_ms,
            "originMonotonic": self.clock.origin_monotonic_s,
            "speed": self.clock.speed,
            "startTime": self.tape.start_ms,
            "endTime": self.clock.end_ms,
            "ended": self.clock.ended,
            "symbols": len(self.tape.symbols),
        }

    # Tasks

    async def run_market(self) -> None:
        while True:
            while self.take_steps(STEPS_AT_A_TIME):
                self.streams.flush()
                await asyncio.sleep(0)
            self.streams.push(self.step_ms, time.monotonic())
            await asyncio.sleep(self._until_next_step_s())

    def _until_next_step_s(self) -> float:
        left_s = (self.step_ms + STEP_MS - self.clock.now_ms()) / 1_000 / self.clock.speed
        return min(max(left_s, SHORTEST_SLEEP_S), LONGEST_SLEEP_S)

    async def keep_house(self) -> None:
        """Expire listen keys, ping streams, save what changed."""
        ping_s = saved_s = time.monotonic()
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            now_s = time.monotonic()
            for listen_key in self.listen_keys.expire(now_s):
                self.streams.expire_listen_key(listen_key, self.clock.now_ms())
            if now_s - ping_s >= PING_EVERY_S:
                ping_s = now_s
                self.streams.maintain(now_s)
            if self.changed or now_s - saved_s >= SAVE_AT_LEAST_EVERY_S:
                saved_s = now_s
                await self.save()

    async def save(self) -> None:
        """Write the state file, if there is one; a disk that refuses is reported and tried again."""
        path = self.options.state
        if path is None:
            self.changed = False
            return
        now_ms = self.catch_up()
        content = encode_state(self.options.market, now_ms, self.engine.state())
        self.changed = False
        writing = asyncio.ensure_future(asyncio.to_thread(write_state, path, content))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing  # a thread cannot be cancelled, and the next save must not overtake it
            raise
        except OSError as error:
            self.changed = True
            log.error("the state could not be saved", path=str(path), reason=error.strerror)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises PortInUse."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1_024)
    except OSError as error:
        raise PortInUse(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        ) from None


@asynccontextmanager
async def serving(tape: Tape, options: ServerOptions, listener: socket.socket) -> AsyncIterator[Venue]:
    """Serve the market while the block runs; afterwards its state is saved and every socket closed.

    Raises: SettingsInvalid: the state file belongs to another market.
    """
    saved = load_state(options.state, options.market) if options.state else None
    venue = Venue(tape, options, saved)
    venue.port = listener.getsockname()[1]
    if options.faults is not None:
        venue.disturb_by(Troubles(options.faults, venue, asyncio.get_running_loop().call_later))
    runner = web.AppRunner(_application(venue), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        async with asyncio.TaskGroup() as tasks:
            market = tasks.create_task(venue.run_market(), name="sim.market")
            house = tasks.create_task(venue.keep_house(), name="sim.house")
            try:
                yield venue
            finally:
                market.cancel()
                house.cancel()
        await venue.save()
    finally:
        venue.streams.abort_all()
        await runner.cleanup()


async def _disturbed(venue: Venue, asked: Request, request: web.Request) -> Answer:
    """The venue's answer, with what faults make of it. Raises ConnectionResetError when none is sent."""
    if venue.troubles is None:
        return venue.answer(asked)
    fault = venue.troubles.request(asked.method, asked.path, asked.now_ms)
    found = venue.answer(asked) if fault.executes else fault.answer
    if fault.lost:
        await asyncio.sleep(LOST_ANSWER_S)
    if fault.lost or fault.broken:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("a fault broke the connection")
    if fault.delay_s:
        await asyncio.sleep(fault.delay_s)
    answer = fault.answer or found
    assert answer is not None
    return answer


def _application(venue: Venue) -> web.Application:
    delay_s = venue.options.latency_ms / 2_000  # half on the way there, half on the way back

    async def answer(request: web.Request) -> web.Response:
        raw_path, _, query = request.raw_path.partition("?")
        body = (await request.read()).decode(errors="replace") if request.can_read_body else ""
        if delay_s:
            await asyncio.sleep(delay_s)
        asked = Request(
            request.method,
            raw_path,
            query,
            body,
            request.headers.get("X-MBX-APIKEY"),
            request.remote or "",
            venue.catch_up(),
            time.monotonic(),
        )
        found = await _disturbed(venue, asked, request)
        if delay_s:
            await asyncio.sleep(delay_s)
        return web.Response(status=found.status, body=found.body, headers=found.headers)

    async def clock(request: web.Request) -> web.Response:
        return web.json_response(venue.clock_facts())

    async def books(request: web.Request) -> web.Response:
        """What the venue itself holds of an account, told without faults to whoever judges a client."""
        key = request.query.get("key", "")
        if key not in venue.options.keys:
            return web.Response(status=404, text="no such account")
        venue.catch_up()
        plan = venue.options.faults
        told = {
            "serverTime": venue.clock.now_ms(),
            "account": venue.engine.account_of(key),
            "faults": dict(sorted(plan.counts.items())) if plan else {},
        }
        return web.Response(body=msgspec.json.encode(told), content_type="application/json")

    application = web.Application()
    application.router.add_get("/sim/v1/books", books)
    application.router.add_get("/sim/v1/clock", clock)
    application.router.add_routes(Sockets(venue.streams).routes())
    application.router.add_route("*", "/{path:.*}", answer)
    return application
