"""When an order was decided and when its request left, inside a process that runs the real daemon.

`watch` wraps functions of trading and of the store and hooks into the HTTP client, before the daemon
starts. A request has left when its bytes were handed to the kernel's socket.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from types import SimpleNamespace

    import aiohttp

ORDER_PATHS = ("/fapi/v1/order", "/fapi/v1/algoOrder")


class Wire:
    """Milliseconds by kind of order."""

    def __init__(self) -> None:
        self.decided_s: dict[str, float] = {}  # by position id: the newest decision that is on its way
        self.leverage_s: dict[str, float] = {}  # by symbol: waited for the venue to set it, of that decision
        self.store_s: defaultdict[str, float] = defaultdict(
            float
        )  # by client id: waited for the state store on the way
        self.entry_ms: list[float] = []
        self.entry_with_leverage_ms: list[float] = []
        self.entry_store_ms: list[float] = []
        self.stop_ms: list[float] = []
        self.stop_store_ms: list[float] = []

    def left(self, method: str, path: str, query: str) -> None:
        """A request left."""
        if method != "POST" or path not in ORDER_PATHS:
            return
        now_s = time.monotonic()
        asked = parse_qs(query)
        name = (asked.get("newClientOrderId") or asked.get("clientAlgoId") or [""])[0]
        leg = name.rpartition("-")[2][:1]
        began_s = self.decided_s.pop(name, None)
        if began_s is None:
            return
        in_store_ms = self.store_s.pop(name, 0.0) * 1000
        if leg == "e":
            self.entry_store_ms.append(in_store_ms)
            waited_s = self.leverage_s.pop(asked["symbol"][0], 0.0)
            self.entry_with_leverage_ms.append((now_s - began_s) * 1000)
            self.entry_ms.append((now_s - began_s - waited_s) * 1000)
        elif leg == "s":
            self.stop_store_ms.append(in_store_ms)
            self.stop_ms.append((now_s - began_s) * 1000)

    def as_json(self) -> dict[str, list[float]]:
        names = ("entry_ms", "entry_with_leverage_ms", "entry_store_ms", "stop_ms", "stop_store_ms")
        return {name: getattr(self, name) for name in names}


def watch() -> Wire:
    """Hook in; call it before the daemon opens anything."""
    import aiohttp

    from service.exchange.binance.account import AccountCalls
    from service.store.sqlite import SqliteStore
    from service.trading.entering import Opener
    from service.trading.orders import client_order_id
    from service.trading.positions import position_id_of
    from service.trading.protecting import Protector

    wire = Wire()
    enter, set_leverage, protect = Opener.enter, AccountCalls.set_leverage, Protector.protect

    async def timed_enter(self: Any, signal: Any, approved: Any) -> Any:
        name = client_order_id(position_id_of(signal.signal_id), "entry", 0)
        wire.decided_s[name] = time.monotonic()
        return await enter(self, signal, approved)

    async def timed_leverage(self: Any, symbol: str, leverage: int, margin_type: str) -> None:
        began_s = time.monotonic()
        await set_leverage(self, symbol, leverage, margin_type)
        wire.leverage_s[symbol] = time.monotonic() - began_s

    def timed_protect(self: Any, name: str) -> None:
        wire.decided_s.setdefault(client_order_id(name, "stop", 0), time.monotonic())
        protect(self, name)

    def timed_store(method: Any, name_of: Callable[..., str]) -> Any:
        async def timed(self: Any, *args: Any) -> Any:
            began_s = time.monotonic()
            try:
                return await method(self, *args)
            finally:
                name = name_of(*args)
                if name in wire.decided_s:
                    wire.store_s[name] += time.monotonic() - began_s

        return timed

    async def headers_sent(
        session: "aiohttp.ClientSession",
        context: "SimpleNamespace",
        params: "aiohttp.TraceRequestHeadersSentParams",
    ) -> None:
        wire.left(params.method, params.url.path, params.url.raw_query_string)

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(headers_sent)
    made = aiohttp.ClientSession.__init__

    def with_trace(self: Any, *args: Any, **words: Any) -> None:
        made(self, *args, trace_configs=[trace], **words)

    for method, name_of in (
        ("order", lambda name: name),
        ("save_order", lambda order: order.client_order_id),
        ("save_intent", lambda _, order: order.client_order_id),
    ):
        setattr(SqliteStore, method, timed_store(getattr(SqliteStore, method), name_of))
    setattr(Opener, "enter", timed_enter)  # noqa: B010 - a wrapped method, seen by every instance
    setattr(AccountCalls, "set_leverage", timed_leverage)  # noqa: B010
    setattr(Protector, "protect", timed_protect)  # noqa: B010
    setattr(aiohttp.ClientSession, "__init__", with_trace)  # noqa: B010
    return wire
