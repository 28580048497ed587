"""What must hold whatever happens, checked against the venue's own books and against what is durable."""

from collections import Counter, defaultdict
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from service.errors import PerpdError
from service.exchange.embedded import SIM_KEY
from service.exchange.simulated.account import Account, Position
from service.exchange.simulated.auth import parse_parameters
from service.exchange.simulated.orders import AlgoOrder
from service.exchange.simulated.rest import Answer, Request
from service.exchange.simulated.troubles import EXECUTES_OR_NOT, Disturbed
from service.records import Decision, DecisionOutcome, Fill, Order, OrderStatus, RefusalReason, Signal
from service.simulation.lease_auditor import LeaseAuditor
from service.simulation.process import Process
from service.simulation.wire import Watcher
from service.store.rows import to_position
from service.trading.orders import is_ours

if TYPE_CHECKING:
    from service.simulation.run import Simulation

UNPROTECTED_LIMIT_S = 60.0
"""From the last disturbance on: the entry's answer (10 s), one question about it (10 s), the stop's limit
(15 s), and one market order to close (10 s + 10 s)."""
HEALTHY_WITHIN_S = 300.0
LOOKS_AFTER_UNKNOWN_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
QUIET_FOR_S = 60.0  # a difference that lasts this long in calm is no event on its way
CENT = Decimal("0.01")
LOSS_TOLERANCE = Decimal("1.3")  # the fill's distance from the price that was decided on
MOST_VIOLATIONS = 20
COOLDOWN_TOLERANCE_S = 30.0  # the venue's clock jumps by seconds, and perpd's follows later
FORCED = ("autoclose-", "adl_autoclose")  # names of the venue's own closing orders that begin a cooldown
ORDER_PATHS = ("/fapi/v1/order", "/fapi/v1/algoOrder")


class Auditor(Watcher):
    """Sees everything; says what was violated, once each."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._world = simulation.world
        self.violations: list[str] = []
        self.lease = LeaseAuditor(simulation)
        self.die_at_order = ""  # let the process die when an order leaves, or when its answer does
        self.on_order_sent: Callable[[str], None] = lambda name: None
        self._said: set[str] = set()
        self._venue_ids: dict[str, set[int]] = defaultdict(set)  # plain and conditional ids, by client id
        self._asked: dict[str, Decimal] = {}  # quantity of an intent's first entry, by its digest
        self._entered: Counter[str] = Counter()
        self._trades: set[int] = set()
        self._foreign: set[str] = set()  # symbols in which a person holds something
        self._once_foreign: set[str] = set()
        self._stopped_s: dict[str, float] = {}  # when the symbol's last position ended at its stop
        self._unprotected_s: dict[str, float] = {}
        self._judged: set[str] = set()
        self._troubled_s = 0.0
        self._calm_s: float | None = 0.0
        self._ill_s: dict[str, float] = {}
        self._requests: Counter[str] = Counter()

    def violate(self, text: str) -> None:
        kind = text.split(":")[0]
        if kind in self._said or len(self.violations) >= MOST_VIOLATIONS:
            return
        self._said.add(kind)
        self._world.note("violation", text)
        self.violations.append(f"at {self._world.now_s:.3f} s: {text}")

    @property
    def _account(self) -> Account:
        return self._simulation.venue.engine.account_of(SIM_KEY)

    # The wire

    def arrived(self, process: Process, request: Request) -> None:
        self._requests[f"{request.method} {request.path}"] += 1
        if request.path not in ORDER_PATHS or request.method == "GET":
            return
        params = parse_parameters(request.query, request.body)
        if request.method == "DELETE":
            self._check_cancel(params)
            return
        name = params.get("newClientOrderId") or params.get("clientAlgoId", "")
        if not self._simulation.knows_order(name) and not self.lease.may_be_unwritten(process, name):
            self.violate(f"an order was sent before it was written down: {name}")
        self._check_cooldown(name, params.get("symbol", ""))
        self.on_order_sent(name)
        if self.die_at_order == "order sent":
            self._die(process)

    def answered(self, process: Process, request: Request, answer: Answer, disturbed: Disturbed) -> None:
        if answer.status in (418, 429):
            self.violate(f"the weight or order limit was exceeded: {request.method} {request.path}")
        self.lease.answered(process, request, answer)
        is_order = request.path in ORDER_PATHS and request.method == "POST"
        if is_order and self.die_at_order == "order answered":
            self._die(process)
        if request.method != "GET":
            self._watch_protection()
        if is_order and disturbed.kind in EXECUTES_OR_NOT:
            params = parse_parameters(request.query, request.body)
            name = params.get("newClientOrderId") or params.get("clientAlgoId", "")
            for seconds in LOOKS_AFTER_UNKNOWN_S:
                self._world.later(seconds, lambda: self._check_not_forgotten(name))

    def _check_cooldown(self, name: str, symbol: str) -> None:
        """Nothing is opened where a position has just ended at its stop, whatever was known or forgotten."""
        if not name.rpartition("-")[2].startswith("e") or symbol in self._once_foreign:
            return
        rests_s = self._simulation.settings.risk.cooldown_minutes * 60.0 - COOLDOWN_TOLERANCE_S
        since_s = self._world.now_s - self._stopped_s.get(symbol, float("-inf"))
        if since_s < rests_s:
            self.violate(f"an entry within its symbol's cooldown: {symbol} {since_s:.1f} s after its stop")

    def _check_not_forgotten(self, name: str) -> None:
        """An answer that leaves the outcome open is no refusal."""
        if name in self._venue_ids and self._simulation.disk.order_status(name) == OrderStatus.REJECTED:
            self.violate(f"an order that the venue took was given up: {name}")

    def _die(self, process: Process) -> None:
        why, self.die_at_order = self.die_at_order, ""
        if process.alive:
            process.doomed = f"with an {why}"
            process.die(process.doomed)

    def disturbed(self, process: Process, request: Request, kind: str) -> None:
        self._troubled_s = self._world.now_s

    def _check_cancel(self, params: dict[str, str]) -> None:
        """perpd never takes the only stop of a position that is open."""
        name = params.get("clientAlgoId", "")
        found = [a for a in self._account.algos.values() if a.client_algo_id == name]
        if not found or not _is_stop(found[0]):
            return
        symbol = found[0].symbol
        position = self._account.positions.get(f"{symbol}:BOTH")
        if position is None or symbol in self._foreign or not _protects(found[0], position):
            return
        others = [a for a in self._account.algos.values() if a is not found[0] and _protects(a, position)]
        if not others:
            self.violate(f"the only stop of an open position was cancelled: {symbol} {name}")

    # The venue's own words

    def on_event(self, account: str, event: dict[str, Any]) -> None:
        if event["e"] == "ORDER_TRADE_UPDATE":
            self._on_order(event["o"])
        elif event["e"] == "ALGO_UPDATE" and event["o"]["X"] == "NEW":
            self._accepted(event["o"]["caid"], int(event["o"]["aid"]))

    def _on_order(self, order: dict[str, Any]) -> None:
        name, number = str(order["c"]), int(order["i"])
        plain = order.get("ot", order["o"]) in ("MARKET", "LIMIT")
        stopped = is_ours(name) and name.rpartition("-")[2].startswith("s")
        if order["x"] in ("TRADE", "CALCULATED") and (stopped or name.startswith(FORCED)):
            position = self._account.positions.get(f"{order['s']}:BOTH")
            if position is None or not position.quantity:
                self._stopped_s[order["s"]] = self._world.now_s
        if name.startswith("web_") and not order.get("R"):
            self._foreign.add(order["s"])
            self._once_foreign.add(order["s"])
        if not is_ours(name) or not plain:
            return
        self._accepted(name, number)
        leg = name.rpartition("-")[2]
        if not leg.startswith("e"):
            return
        digest = name.rpartition("-")[0]
        self._asked.setdefault(digest, Decimal(order["q"]))
        if order["x"] == "TRADE" and order["t"] not in self._trades:
            self._trades.add(order["t"])
            self._entered[digest] += Decimal(order["l"])  # type: ignore[assignment]
            if self._entered[digest] > self._asked[digest]:
                self.violate(
                    f"an intent was executed twice: {digest} entered {self._entered[digest]}, "
                    f"asked {self._asked[digest]}"
                )

    def _accepted(self, name: str, number: int) -> None:
        if not is_ours(name):
            return
        self._venue_ids[name].add(number)
        if len(self._venue_ids[name]) > 1:
            self.violate(f"one client id became two orders: {name}")
        if not self._simulation.knows_order(name) and name not in self.lease.unwritten:
            self.violate(f"an order on the venue has no owner: {name}")

    # Each step of the market

    def look(self) -> None:
        """Called at each step."""
        if self._world.now_s < self._simulation.troubles.troubled_until_ms / 1e3 - self._start_s:
            self._troubled_s = self._world.now_s
        if self.lease.troubled():
            self._troubled_s = self._world.now_s
        self._watch_protection()
        ours = self._our_positions()
        most = self._simulation.settings.trading.max_positions
        if len(ours) > most:
            self.violate(f"more positions than allowed: {sorted(ours)}, at most {most}")
        for symbol, position in ours.items():
            self._check_loss(symbol, position)
        if self._calm_s is not None:
            self._check_health()

    @property
    def _start_s(self) -> float:
        return self._simulation.start_ms / 1e3

    def _our_positions(self) -> dict[str, Position]:
        positions = self._account.positions.values()
        self._foreign &= {p.symbol for p in positions}  # until it is flat again
        return {p.symbol: p for p in positions if p.quantity and p.symbol not in self._foreign}

    def _watch_protection(self) -> None:
        now_s = self._world.now_s
        ours = self._our_positions()
        for symbol in self._unprotected_s.keys() - ours.keys():
            del self._unprotected_s[symbol]
        leading_s = self._simulation.leading_since_s
        for symbol, position in ours.items():
            if any(_protects(algo, position) for algo in self._account.algos.values()):
                self._unprotected_s.pop(symbol, None)
                continue
            since_s = self._unprotected_s.setdefault(symbol, now_s)
            bare_s = now_s - max(since_s, self._troubled_s, leading_s)
            if bare_s > UNPROTECTED_LIMIT_S:
                self.violate(f"a position is unprotected: {symbol} for {now_s - since_s:.1f} s")

    def _check_loss(self, symbol: str, position: Position) -> None:
        """The loss at the stop, once per stop."""
        for algo in self._account.algos.values():
            if algo.client_algo_id in self._judged or not _protects(algo, position):
                continue
            self._judged.add(algo.client_algo_id)
            loss = abs(algo.trigger_price - position.entry_price) * abs(position.quantity)
            fraction = Decimal(repr(self._simulation.settings.risk.loss_fraction))
            allowed = self._account.wallet * fraction * LOSS_TOLERANCE
            adverse = (position.entry_price - algo.trigger_price) * (1 if position.quantity > 0 else -1) > 0
            if adverse and loss > allowed:
                self.violate(f"the loss at the stop is too large: {symbol} {loss:.2f} of {allowed:.2f}")

    # Health

    def storm_began(self) -> None:
        self._calm_s = None
        self._ill_s.clear()

    def calm_began(self) -> None:
        self._calm_s = self._world.now_s
        self._ill_s.clear()

    def restarted(self) -> None:
        self._troubled_s = self._world.now_s

    def ended(self, error: BaseException | None) -> None:
        """The daemon ended by itself."""
        if error is None:
            self.violate("the daemon ended without a reason")
            return
        unexpected = [one for one in _leaves(error) if not isinstance(one, PerpdError)]
        for one in unexpected:
            self.violate(f"the daemon ended with an unexpected error: {one!r}")

    def _check_health(self) -> None:
        """In calm, what is wrong for longer than it may be is a violation."""
        now_s = self._world.now_s
        calm_s = max(self._calm_s or 0.0, self._simulation.troubles.troubled_until_ms / 1e3 - self._start_s)
        if now_s < calm_s + HEALTHY_WITHIN_S - QUIET_FOR_S:
            return
        wrong = self._ailments()
        for ailment in self._ill_s.keys() - wrong.keys():
            del self._ill_s[ailment]
        for ailment, detail in wrong.items():
            since_s = self._ill_s.setdefault(ailment, now_s)
            if now_s - since_s >= QUIET_FOR_S:
                self.violate(f"{ailment}: {detail}")

    def _ailments(self) -> dict[str, str]:
        """What is not as it should be in calm, by kind."""
        life = self._simulation.life
        if life is None or life.daemon is None or not life.started.is_set():
            return {"the daemon does not trade": "not started"}
        daemon = life.daemon
        wrong = self.lease.ailments()
        executor, feed = daemon.parts.executor, daemon.parts.feed
        if life.clock.monotonic_s() - daemon.schedule.finished_s > 150.0:
            wrong["cycles do not finish"] = f"the last one ended at {daemon.schedule.finished_s:.1f} s"
        trading = set(self._simulation.venue.engine.trading_symbols())
        stale = [s for s in feed.fresh_symbols(life.clock.now_ms())[1] if s in trading]
        if stale:
            wrong["candles are stale"] = str(stale)
        if executor.unprotected():
            wrong["the daemon believes a position unprotected"] = str(executor.unprotected())
        off = daemon._entries_off()
        if off:
            wrong["entries are off"] = off
        blocked = {s: why for s, why in executor.blocked_symbols().items() if s not in self._once_foreign}
        if blocked:
            wrong["a symbol is blocked"] = str(blocked)
        unsure = [o.client_order_id for o in executor.working_orders() if not _resting(o)]
        if unsure:
            wrong["an order's fate is unknown"] = str(unsure)
        wrong |= self._differences(daemon.ledger)
        return wrong

    def _differences(self, ledger: Any) -> dict[str, str]:
        """Our books against the venue's."""
        wrong: dict[str, str] = {}
        held = {p.symbol: p.quantity for p in self._account.positions.values() if p.quantity}
        ours = {symbol: ledger.holding(symbol).quantity for symbol in ledger.held_symbols()}
        if held != ours:
            wrong["the ledger holds something else than the venue"] = f"ours {ours}, venue {held}"
        difference = ledger.wallet - self._account.wallet
        if abs(difference) > CENT:
            wrong["the ledger's wallet differs from the venue's"] = f"by {difference}"
        orphans = [
            a.client_algo_id
            for a in self._account.algos.values()
            if is_ours(a.client_algo_id) and a.symbol not in held
        ]
        if orphans:
            wrong["a stop rests without a position"] = str(orphans)
        resting = {a.client_algo_id for a in self._account.algos.values()} & self.lease.unwritten
        if unowned := sorted(name for name in resting if not self._simulation.knows_order(name)):
            wrong["a resting order was never written down"] = str(unowned)
        life = self._simulation.life
        if life is not None and life.daemon is not None:
            positions = {p.symbol: p for p in life.daemon.parts.executor.positions()}
            known = {s: p.quantity * p.position_side.sign for s, p in positions.items()}
            theirs = {s: q for s, q in held.items() if s not in self._foreign}
            if {s: q for s, q in known.items() if s not in self._foreign} != theirs:
                wrong["positions differ from the venue's"] = f"ours {known}, venue {theirs}"
        return wrong

    # The end

    def finish(self) -> None:
        """What only the whole story shows."""
        simulation = self._simulation
        decisions = [r for r in simulation.records("decisions") if isinstance(r, Decision)]
        for host in simulation.hosts:
            names = (getattr(record, "signal_id", "") for record in host.disk.records.get("decisions", []))
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                self.violate(f"the archive has a decision twice: {twice[:3]}")
        first = {d.signal_id: d for d in reversed(decisions)}
        if unlike := [d.signal_id for d in decisions if d != first[d.signal_id]]:
            self.violate(f"two archives tell a decision differently: {unlike[:3]}")
        decided = {row[0] for row in self._simulation.disk.database.execute("select signal_id from decided")}
        archived = {d.signal_id for d in decisions}
        signals = {r.signal_id for r in simulation.records("signals") if isinstance(r, Signal)}
        if self._world.now_s - simulation.leading_since_s < QUIET_FOR_S:
            return
        told = {order for order in simulation.records("orders") if isinstance(order, Order)}
        untold = [order for order in self._simulation.disk.order_states() if order not in told]
        if untold:
            self.violate(f"the archive lacks a state of an order: {untold[0]}")
        if missing := sorted(decided - archived):
            self.violate(f"the archive lacks a decision: {missing[:3]}")
        if signals != archived:
            self.violate(f"signals and decisions differ: {sorted(signals ^ archived)[:3]}")
        unsure = RefusalReason.ORDER_UNKNOWN  # the order may have been executed after all
        accepted = {
            d.signal_id for d in decisions if d.outcome is DecisionOutcome.ACCEPTED or d.reason == unsure
        }
        traded = self._simulation.disk.database.execute("select payload from positions where traded = 1")
        undecided = [p.signal_id for (raw,) in traded if (p := to_position(raw)).signal_id not in accepted]
        if undecided:
            self.violate(f"a position was opened without an accepted decision: {undecided[:3]}")

    def unknown_orders(self) -> tuple[dict[str, int], dict[str, int]]:
        """Orders whose outcome was unknown once, and those that ended known, by purpose."""
        last: dict[str, Order] = {}
        unknown: dict[str, Order] = {}
        ended: set[str] = set()  # in whichever archive
        for record in self._simulation.records("orders"):
            if isinstance(record, Order):
                last[record.client_order_id] = record
                if record.status.final:
                    ended.add(record.client_order_id)
                if record.status is OrderStatus.UNKNOWN:
                    unknown[record.client_order_id] = record
        resolved = [o for name, o in unknown.items() if name in ended or _resting(last[name])]
        return (
            dict(sorted(Counter(str(o.purpose) for o in unknown.values()).items())),
            dict(sorted(Counter(str(o.purpose) for o in resolved).items())),
        )

    def totals(self) -> dict[str, int]:
        records = self._simulation.records  # one that two archives hold counts once
        fills = {(r.symbol, r.trade_id) for r in records("fills") if isinstance(r, Fill)}
        closed = {getattr(r, "position_id", "") for r in records("positions") if getattr(r, "closed_ms", 0)}
        return {
            "requests": self._requests.total(),
            "orders": len(self._venue_ids),
            "fills": len(fills),
            "positions": len(closed),
            "decisions": len({r.signal_id for r in records("decisions") if isinstance(r, Decision)}),
            "refused in a cooldown": sum(
                isinstance(r, Decision) and r.reason == RefusalReason.COOLDOWN for r in records("decisions")
            ),
        }


def _is_stop(algo: AlgoOrder) -> bool:
    return algo.type in ("STOP_MARKET", "STOP", "TRAILING_STOP_MARKET")


def _protects(algo: AlgoOrder, position: Position) -> bool:
    return (
        _is_stop(algo)
        and algo.symbol == position.symbol
        and algo.buy == (position.quantity < 0)
        and (algo.close_position or algo.quantity >= abs(position.quantity))
    )


def _resting(order: Order) -> bool:
    """Its fate is known: it rests, or it ended."""
    return order.status.final or order.status in (OrderStatus.OPEN, OrderStatus.PARTLY_FILLED)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]
