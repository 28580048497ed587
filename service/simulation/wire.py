"""What lies between a simulated process and the venue: requests and streams without sockets.

The daemon's own REST client, stream supervisors and decoders run on it; below them there is only this.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import cast
from urllib.parse import unquote

import aiohttp
import msgspec
import picows
from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

from service.errors import VenueUnavailable
from service.exchange.binance.streams import Link
from service.exchange.simulated.rest import Answer, Request
from service.exchange.simulated.server import Venue
from service.exchange.simulated.streams import Connection, Sockets, text_frame
from service.exchange.simulated.troubles import Disturbed, Troubles
from service.ports import Clock
from service.simulation.process import Gone, Process
from service.simulation.world import World

ADDRESS = "198.51.100.7"
FASTEST_S, SLOWEST_S = 0.004, 0.060
"""One way, when nothing is wrong."""
NO_PORT = ConnectionKey("venue", 443, True, True, None, None, None)


class Watcher:
    """Told of all that passes on the wire; see `auditor`."""

    def arrived(self, process: Process, request: Request) -> None:
        """A request is about to be executed."""

    def answered(self, process: Process, request: Request, answer: Answer, disturbed: Disturbed) -> None:
        """The venue's own answer, before the wire does anything to it."""

    def disturbed(self, process: Process, request: Request, kind: str) -> None:
        """A fault strikes a request."""


class Wire:
    """One process's connections to the venue."""

    def __init__(
        self,
        world: World,
        process: Process,
        venue: Venue,
        troubles: Troubles,
        watcher: Watcher,
        *,
        request_limit_s: float,
        address: str = ADDRESS,
        held_s: Callable[[Process, str], float] = lambda process, method: 0.0,
    ) -> None:
        self._world = world
        self._process = process
        self._venue = venue
        self._troubles = troubles
        self._watcher = watcher
        self._request_limit_s = request_limit_s
        self._address = address
        self._held_s = held_s
        self._sockets = Sockets(venue.streams)
        self._pipes: list[Pipe] = []

    def _delay_s(self) -> float:
        return self._world.random.uniform(FASTEST_S, SLOWEST_S)

    def close(self) -> None:
        """The process is gone, and its connections with it."""
        for pipe in list(self._pipes):
            pipe.abort()

    # Requests: what RestClient sees of an aiohttp.ClientSession

    def request(
        self, method: str, url: URL, *, headers: dict[str, str], allow_redirects: bool = False
    ) -> "RoundTrip":
        return RoundTrip(self, method, url, headers)

    async def round_trip(self, method: str, url: URL, headers: dict[str, str]) -> Answer:
        """The answer, or what aiohttp raises without one."""
        if not self._process.alive:
            raise Gone
        future: asyncio.Future[Answer] = self._process.loop.create_future()
        path, _, query = str(url).partition("?")
        path = "/" + path.split("/", 3)[3]
        held_s = self._held_s(self._process, method)
        if held_s:
            self._fail(future, self._request_limit_s, aiohttp.SocketTimeoutError("no answer in time"))
        self._world.later(
            held_s + self._delay_s(),
            lambda: self._arrive(future, method, path, query, headers.get("X-MBX-APIKEY"), held=held_s > 0),
        )
        return await future

    def _arrive(
        self,
        future: asyncio.Future[Answer],
        method: str,
        path: str,
        query: str,
        key: str | None,
        *,
        held: bool,
    ) -> None:
        """The request has left the process: what it does at the venue no longer depends on the process."""
        now_ms = self._venue.catch_up()
        request = Request(method, path, query, "", key, self._address, now_ms, self._world.now_s)
        fault = self._troubles.request(method, path, now_ms)
        self._world.note("request", f"{self._process.name} {method} {path} {query} {fault.kind}")
        if fault.kind or held:
            self._watcher.disturbed(self._process, request, fault.kind or "held")
        found: Answer | None = None
        if fault.executes:
            self._watcher.arrived(self._process, request)
            found = self._venue.answer(request)
            self._watcher.answered(self._process, request, found, fault)
        answer = fault.answer or found
        if fault.lost:
            self._fail(future, self._request_limit_s, aiohttp.SocketTimeoutError("no answer in time"))
        elif fault.broken and fault.kind == "exchange_restart":
            error = aiohttp.ClientConnectorError(NO_PORT, ConnectionRefusedError(111, "refused"))
            self._fail(future, self._delay_s(), error)
        elif fault.broken:
            self._fail(future, self._delay_s(), aiohttp.ServerDisconnectedError())
        else:
            assert answer is not None
            self._settle(future, fault.delay_s + self._delay_s(), answer)

    def _settle(self, future: asyncio.Future[Answer], delay_s: float, answer: Answer) -> None:
        def settle() -> None:
            if self._process.alive and not future.done():
                self._world.note("answer", f"{self._process.name} {answer.status} {len(answer.body)}")
                future.set_result(answer)

        if delay_s < self._request_limit_s:
            self._world.later(delay_s, settle)
        else:
            self._fail(future, self._request_limit_s, aiohttp.SocketTimeoutError("no answer in time"))

    def _fail(self, future: asyncio.Future[Answer], delay_s: float, error: Exception) -> None:
        def fail() -> None:
            if self._process.alive and not future.done():
                self._world.note("no answer", f"{self._process.name} {type(error).__name__}")
                future.set_exception(error)

        self._world.later(delay_s, fail)

    # Streams: what the supervisors see of `streams.connect`

    async def connect(
        self, url: str, on_text: Callable[[Link, bytes], None], clock: Clock, limit_s: float
    ) -> Link:
        opened: asyncio.Future[None] = self._process.loop.create_future()
        self._world.later(2 * self._delay_s(), lambda: self._let_in(opened))
        await opened
        down_until_s = self._venue.streams.down_until_s
        if self._world.now_s < down_until_s:
            raise VenueUnavailable("stream cannot be opened: ConnectionRefusedError")
        link = Link(on_text, clock)
        pipe = Pipe(self, link, url)
        self._pipes.append(pipe)
        link.on_ws_connected(cast(picows.WSTransport, pipe))
        return link

    def _let_in(self, opened: asyncio.Future[None]) -> None:
        if self._process.alive and not opened.done():
            opened.set_result(None)

    def forget(self, pipe: "Pipe") -> None:
        if pipe in self._pipes:
            self._pipes.remove(pipe)


class RoundTrip:
    """One request and its answer, as `async with session.request(...)` has it."""

    def __init__(self, wire: Wire, method: str, url: URL, headers: dict[str, str]) -> None:
        self._wire = wire
        self._asked = (method, url, headers)
        self._answer: Answer | None = None

    async def __aenter__(self) -> "RoundTrip":
        self._answer = await self._wire.round_trip(*self._asked)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    @property
    def status(self) -> int:
        assert self._answer is not None
        return self._answer.status

    @property
    def headers(self) -> dict[str, str]:
        assert self._answer is not None
        return self._answer.headers

    async def read(self) -> bytes:
        assert self._answer is not None
        return self._answer.body


class Pipe:
    """One stream connection; to the venue it is a transport, and to the daemon's link one of picows."""

    def __init__(self, wire: Wire, link: Link, url: str) -> None:
        self._wire = wire
        self._link = link
        self._world = wire._world
        self._process = wire._process
        self._venue = wire._venue
        self._closed = False
        self._last_s = 0.0
        path, _, query = url.partition("?")
        route = path.split("/")[3]
        self._connection = Connection(
            route, path.endswith("/stream"), cast(asyncio.Transport, self), self._venue.monotonic_s
        )
        self._venue.streams.open(self._connection)
        if query.startswith("listenKey="):
            self._venue.streams.subscribe(self._connection, [unquote(query.removeprefix("listenKey="))])

    # For the venue

    def is_closing(self) -> bool:
        return self._closed

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, frames: bytes) -> None:
        """Deliver in order, each after the way's delay."""
        arrives_s = max(self._world.now_s + self._wire._delay_s(), self._last_s)
        self._last_s = arrives_s
        self._world.at(arrives_s, lambda: self._deliver(frames))

    def _deliver(self, frames: bytes) -> None:
        if self._closed or not self._process.alive:
            return
        loop = self._process.loop
        for payload in _payloads(frames):
            self._world.note("event", f"{self._process.name} {len(payload)}")
            loop.call_soon(self._link.deliver, payload)

    def abort(self) -> None:
        """The connection is lost, on both sides."""
        if self._closed:
            return
        self._closed = True
        self._wire.forget(self)
        self._venue.streams.close(self._connection)
        if self._process.alive:
            self._process.loop.call_soon(self._link.on_ws_disconnected, cast(picows.WSTransport, self))

    # For the daemon's link

    def send(self, kind: picows.WSMsgType, body: bytes) -> None:
        if self._process.alive:
            self._world.later(self._wire._delay_s(), lambda: self._asked(body))

    def _asked(self, body: bytes) -> None:
        if self._closed:
            return
        answer = self._wire._sockets.answer(self._connection, body)
        self._connection.send(text_frame(msgspec.json.encode(answer)))
        self._connection.flush()

    def disconnect(self) -> None:
        if self._process.alive:
            self.abort()


def _payloads(frames: bytes) -> list[bytes]:
    """The payloads of unmasked text frames; pings are answered by picows and not our concern here."""
    found: list[bytes] = []
    at = 0
    while at < len(frames):
        opcode, length = frames[at], frames[at + 1]
        at += 2
        if length == 126:
            length = int.from_bytes(frames[at : at + 2], "big")
            at += 2
        elif length == 127:
            length = int.from_bytes(frames[at : at + 8], "big")
            at += 8
        if opcode == 0x81:
            found.append(frames[at : at + length])
        at += length
    return found
