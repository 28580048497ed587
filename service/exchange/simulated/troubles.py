"""The faults of a plan, performed on a simulated venue: on its requests, its streams and its engine."""

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import structlog

from service.exchange.simulated.fault_plan import FaultPlan, Where
from service.exchange.simulated.faults import VenueFault
from service.exchange.simulated.filters import on_step
from service.exchange.simulated.orders import JSON
from service.exchange.simulated.rest import Answer
from service.exchange.simulated.tape import STEP_MS

if TYPE_CHECKING:
    from service.exchange.simulated.server import Venue

log = structlog.get_logger("sim.troubles")

PLACES = {
    ("POST", "/fapi/v1/order"): (Where.ORDER, Where.REQUEST),
    ("POST", "/fapi/v1/algoOrder"): (Where.STOP, Where.ORDER, Where.REQUEST),
}
LONGEST_LATENCY_S = 8.0
LONGEST_SILENCE_S = 180.0
LONGEST_RESTART_S = 60.0
LONGEST_BAN_MS = 120_000
LONGEST_SKEW_MS = 3_000
LATEST_EVENT_S = 3.0
FOREIGN_LIFE_S = 600.0

REFUSALS: dict[str, tuple[int, int, str]] = {
    "unavailable_503": (503, 0, "Service Unavailable."),
    "unknown_503": (503, 0, "Unknown error, please check your request or try again later."),
    "protection_1008": (
        503,
        -1008,
        "Request throttled by system-level protection. Reduce-only/close-position orders are exempt.",
    ),
    "timeout_1007": (
        408,
        -1007,
        "Timeout waiting for response from backend server. Send status unknown; execution status unknown.",
    ),
    "clock_1021": (400, -1021, "Timestamp for this request is outside of the recvWindow."),
    "stop_2021": (400, -2021, "Order would immediately trigger."),
    "stop_4164": (400, -4164, "Order's notional must be no smaller than 5 (unless you choose reduce only)."),
    "stop_percent_price": (
        400,
        -4131,
        "The counterparty's best price does not meet the PERCENT_PRICE filter limit.",
    ),
}
"""Status, code and text of each fault that is an answer."""
EXECUTES_OR_NOT = frozenset({"unknown_503", "timeout_1007"})


class Disturbed(NamedTuple):
    """What becomes of one request."""

    kind: str = ""
    delay_s: float = 0.0  # before the answer
    executes: bool = True
    answer: Answer | None = None  # instead of the venue's own
    lost: bool = False  # no answer ever comes
    broken: bool = False  # the connection breaks instead


UNDISTURBED = Disturbed()


class Troubles:
    """Performs a plan's faults. Enter them with `install`; the venue asks at each request and event.

    Args: later: call a function after so many seconds of the venue's wall time.
    """

    def __init__(self, plan: FaultPlan, venue: "Venue", later: Callable[[float, Callable[[], None]], object]):
        self.plan = plan
        self._venue = venue
        self._later = later
        self._random = plan.random
        self._foreign = 0
        self._banned_until_ms = 0
        self._end_ms = venue.clock.now_ms() + plan.hours * 3_600_000 if plan.hours else None
        self.down_until_ms = 0  # until then nothing is reachable

    def install(self) -> None:
        """Have the engine ask before it fills a market order and at each trigger."""
        self._venue.engine.portions = self._portions
        self._venue.engine.trigger_refusal = self._trigger_refusal

    # Requests

    def request(self, method: str, path: str, now_ms: int) -> Disturbed:
        """What shall become of a request."""
        if now_ms < self.down_until_ms:
            return Disturbed("exchange_restart", executes=False, broken=True)
        if now_ms < self._banned_until_ms:
            return Disturbed("banned_418", executes=False, answer=self._ban())
        kind = self.plan.draw(*PLACES.get((method, path), (Where.REQUEST,)))
        if not kind:
            return UNDISTURBED
        match kind:
            case "latency":
                return Disturbed(kind, delay_s=self._random.uniform(0.05, LONGEST_LATENCY_S))
            case "lost_request":
                return Disturbed(kind, executes=False, lost=True)
            case "broken_connection":
                return Disturbed(kind, executes=False, broken=True)
            case "lost_answer":
                return Disturbed(kind, lost=self._random.random() < 0.5, broken=True)
            case "unreadable":
                return Disturbed(kind, answer=_answer(200, b"<html>upstream error</html>"))
            case "throttled_429":
                return Disturbed(kind, executes=False, answer=self._throttle())
            case "banned_418":
                self._banned_until_ms = now_ms + self._random.randrange(5_000, LONGEST_BAN_MS)
                return Disturbed(kind, executes=False, answer=self._ban())
        executes = kind in EXECUTES_OR_NOT and self._random.random() < 0.5
        return Disturbed(kind, executes=executes, answer=_refusal(*REFUSALS[kind]))

    def _throttle(self) -> Answer:
        answer = _refusal(429, -1003, "Too many requests; current limit of IP is 2400 requests per minute.")
        answer.headers["Retry-After"] = str(self._random.randrange(1, 20))
        return answer

    def _ban(self) -> Answer:
        return _refusal(418, -1003, f"Way too many requests; IP banned until {self._banned_until_ms}.")

    @property
    def troubled_until_ms(self) -> int:
        """Market time until which the venue cannot be reached."""
        return max(self.down_until_ms, self._banned_until_ms)

    # Streams

    def event_delays(self, event: JSON) -> tuple[float, ...]:
        """When an event is told: once at once, twice, late, or never."""
        match self.plan.draw(Where.EVENT):
            case "event_duplicated":
                return (0.0, self._random.uniform(0.0, LATEST_EVENT_S))
            case "event_late":
                return (self._random.uniform(0.05, LATEST_EVENT_S),)
            case "event_lost":
                return ()
        return (0.0,)

    def tell_later(self, seconds: float, tell: Callable[[], None]) -> None:
        self._later(seconds, tell)

    # The engine

    def _portions(self, quantity: Decimal, step: Decimal) -> list[Decimal]:
        """In which parts a market order fills; less than all of it when the rest expires."""
        if self.plan.draw(Where.FILL) == "" or quantity < 4 * step:
            return [quantity]
        first = max(quantity * self._random.randrange(1, 10) / 10 // step, Decimal(1)) * step
        rest = quantity - first
        return [first, rest] if self._random.random() < 0.8 else [first]

    def _trigger_refusal(self) -> str:
        return "Margin is insufficient." if self.plan.draw(Where.TRIGGER) else ""

    # The venue itself

    def step(self) -> None:
        """One step of the market passed."""
        if self._end_ms is not None and self._venue.clock.now_ms() >= self._end_ms:
            self.plan.active = False
        for kind in self.plan.due(STEP_MS / 1_000):
            if self.happen(kind):
                self.plan.counts[kind] += 1

    def happen(self, kind: str) -> bool:
        """Perform one of the venue's own troubles; False when there is nothing it could strike."""
        done: bool = getattr(self, f"_{kind}")()
        if done:
            log.info("trouble", kind=kind)
        return done

    def _silent_stream(self) -> bool:
        connections = self._venue.streams.connections()
        if not connections:
            return False
        silence_s = self._random.uniform(20.0, LONGEST_SILENCE_S)
        self._random.choice(connections).mute_until_s = self._venue.monotonic_s() + silence_s
        return True

    def _disconnect(self) -> bool:
        connections = self._venue.streams.connections()
        if connections:
            self._random.choice(connections).abort()
        return bool(connections)

    def _exchange_restart(self) -> bool:
        down_s = self._random.uniform(2.0, LONGEST_RESTART_S)
        self.down_until_ms = self._venue.clock.now_ms() + int(down_s * 1_000 * self._venue.clock.speed)
        self._venue.streams.down_until_s = self._venue.monotonic_s() + down_s
        self._venue.streams.abort_all()
        return True

    def _clock_skew(self) -> bool:
        self._venue.rest.skew_ms = self._random.randrange(-LONGEST_SKEW_MS, LONGEST_SKEW_MS)
        return True

    def _held(self) -> list[tuple[str, str]]:
        """(account, symbol) of every position."""
        return self._venue.engine.held()

    def _liquidation(self) -> bool:
        return self._by_venue(self._venue.engine.force_liquidation)

    def _deleveraging(self) -> bool:
        return self._by_venue(self._venue.engine.force_deleveraging)

    def _by_venue(self, close: Callable[[str, str, int], None]) -> bool:
        held = self._held()
        if not held:
            return False
        close(*self._random.choice(held), self._venue.clock.now_ms())
        return True

    def _manual_close(self) -> bool:
        held = self._held()
        if not held:
            return False
        account, symbol = self._random.choice(held)
        share = Decimal(1) if self._random.random() < 0.5 else Decimal("0.5")
        return self._close(account, symbol, share)

    def _close(self, account: str, symbol: str, share: Decimal) -> bool:
        quantity = self._venue.engine.held_quantity(account, symbol)
        rules = self._venue.engine.instrument(symbol)
        closing = on_step(rules, abs(quantity) * share) or abs(quantity)
        return self._by_hand(account, symbol, "SELL" if quantity > 0 else "BUY", closing, reduce_only=True)

    def _by_hand(
        self, account: str, symbol: str, side: str, quantity: Decimal, *, reduce_only: bool = False
    ) -> bool:
        """A market order of a person; False when the venue refuses it."""
        self._foreign += 1
        order = {
            "symbol": symbol,
            "side": side,
            "type": "MARKET",
            "quantity": f"{quantity:f}",
            "newClientOrderId": f"web_{self._foreign}",
            **({"reduceOnly": "true"} if reduce_only else {}),
        }
        try:
            self._venue.engine.new_order(account, order, self._venue.clock.now_ms())
        except VenueFault:
            return False
        return True

    def _manual_cancel(self) -> bool:
        waiting = self._venue.engine.waiting()
        if not waiting:
            return False
        account, algo_id = self._random.choice(waiting)
        self._venue.engine.cancel_algo_order(account, {"algoId": algo_id}, self._venue.clock.now_ms())
        return True

    def _foreign_position(self) -> bool:
        engine, now_ms = self._venue.engine, self._venue.clock.now_ms()
        account = self._random.choice(sorted(self._venue.options.keys))
        held = {symbol for _, symbol in self._held()}
        free = [symbol for symbol in self._venue.tape.symbols if symbol not in held]
        if not free:
            return False
        symbol = self._random.choice(free)
        self._venue.show_prices((symbol,), now_ms)
        rules, price = engine.instrument(symbol), engine.last_price(symbol)
        if not price:
            return False
        quantity = on_step(rules, 3 * rules.min_notional / price) + rules.step_size
        if not self._by_hand(account, symbol, self._random.choice(("BUY", "SELL")), quantity):
            return False
        self._later(
            FOREIGN_LIFE_S / self._venue.clock.speed,
            lambda: self._give_back(account, symbol),
        )
        return True

    def _give_back(self, account: str, symbol: str) -> None:
        """The person closes again what is left."""
        if self._venue.engine.held_quantity(account, symbol):
            self._close(account, symbol, Decimal(1))
            self._venue.tell_events()

    def _delisting(self) -> bool:
        symbols = self._venue.engine.trading_symbols()
        if len(symbols) < 2:
            return False
        self._venue.engine.remove_instrument(self._random.choice(symbols), self._venue.clock.now_ms())
        return True


def _answer(status: int, body: bytes) -> Answer:
    return Answer(status, body, {"Content-Type": "application/json"}, changed=False)


def _refusal(status: int, code: int, text: str) -> Answer:
    if not code:
        return _answer(status, text.encode())
    return _answer(status, msgspec.json.encode({"code": code, "msg": text}))
