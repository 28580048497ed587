"""One trading cycle: look at the market, analyse it, decide on each signal, trade the best of them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import msgspec
import structlog

from service.analysis.analyzer import AnalysisResult, ParallelAnalyzer
from service.archive.archiver import DataArchiver
from service.market.feed import CandleFeed
from service.market.instruments import InstrumentTable
from service.monitor.collection import Collector
from service.monitor.performance import PerformanceMonitor
from service.ports import Clock, StateStore
from service.records import (
    Bracket,
    CycleReport,
    Decision,
    DecisionOutcome,
    Load,
    RefusalReason,
    Signal,
)
from service.settings import CycleSettings, Settings
from service.trading.decide import as_decision, decide
from service.trading.decision_log import DecisionLog
from service.trading.equity import EquityWatch
from service.trading.executor import Executor
from service.trading.following import ShadowFollower
from service.trading.leverage import trade_statistics
from service.trading.ranking import Ranked, Refused, rank_signals
from service.trading.risk import Limits, RiskContext, after_entry
from service.trading.shadow import ShadowBook
from service.trading.sizing import Approved

log = structlog.get_logger("cycle")

NOTHING_ANALYSED = AnalysisResult([], 0, 0, {}, {}, [], 0, 0, 0, 0, 0.0)
CLOSE_TO_SIGNAL = "close to signal"
SHORTEST_DEADLINE_S = 2.0
REMEMBERED_MS = 2 * 3_600_000  # a decided signal cannot come back once its candle left every window of doubt


@dataclass(slots=True)
class Parts:
    """What a cycle works with; `daemon.py` opens them."""

    settings: Settings
    clock: Clock
    feed: CandleFeed
    analyzer: ParallelAnalyzer
    instruments: InstrumentTable
    brackets: Mapping[str, tuple[Bracket, ...]]
    equity: EquityWatch
    executor: Executor
    shadows: ShadowBook
    follower: ShadowFollower
    store: StateStore
    archive: DataArchiver
    decisions: DecisionLog
    monitor: PerformanceMonitor
    collector: Collector
    load: Callable[[], Load]
    entries_off: Callable[[], str]  # why nothing may be opened now, or ""
    halt: Callable[[], Refused | None]  # the kill switch's answer while it is tripped
    decided: dict[str, int] = field(default_factory=dict)  # signal id to candle close, recent ones only
    first_ms: int = 0  # when the first cycle began; what closed before it was nobody's delay


async def run_cycle(parts: Parts, number: int) -> CycleReport:
    """Run one cycle on what is fresh now."""
    started_s = parts.clock.monotonic_s()
    now_ms = parts.clock.now_ms()
    fresh, stale = parts.feed.fresh_symbols(now_ms)
    if not parts.archive.writable:
        # Nothing may be decided that cannot be recorded; positions are looked after all the same.
        await parts.equity.look()
        return _report(parts, number, NOTHING_ANALYSED, stale, [], started_s, 0.0, None)
    parts.first_ms = parts.first_ms or now_ms
    for signal, _ in await parts.decisions.resume():
        parts.decided[signal.signal_id] = signal.candle_close_ms
    analysis = await parts.analyzer.analyse(
        fresh,
        now_ms,
        parts.load(),
        first=parts.executor.held_symbols(),
        limit_s=deadline_s(parts.settings.cycle, parts.clock.speed),
    )
    parts.monitor.record("analysis", analysis.seconds)
    new = undecided(parts, analysis.signals)
    close_to_signal_s = time_to_signal(parts, new)
    with parts.monitor.operation("cycle.decisions"):
        decisions = await _decide_all(parts, new, stale, number)
    with parts.monitor.operation("cycle.shadows"):
        await parts.follower.follow(now_ms)
    garbage_s = parts.collector.collect() if parts.settings.cycle.collect_garbage else 0.0
    return _report(parts, number, analysis, stale, decisions, started_s, garbage_s, close_to_signal_s)


def deadline_s(settings: CycleSettings, speed: float) -> float:
    """Wall time the analysis of a cycle may take; at least two seconds, however fast the market runs."""
    return max(settings.interval_s * settings.deadline_fraction / speed, SHORTEST_DEADLINE_S)


def time_to_signal(parts: Parts, new: Sequence[Signal]) -> float | None:
    """Record the longest wall time from a new signal's candle close to its being ready to be decided.

    One sample a cycle: a cycle's signals share a moment, and each recorded would crowd other cycles out of
    the window. Signals of candles that closed before the first cycle are left out; None without another.
    """
    now_ms, speed = parts.clock.now_ms(), parts.clock.speed
    closes = [signal.candle_close_ms for signal in new if signal.candle_close_ms >= parts.first_ms]
    if not closes:
        return None
    longest_s = (now_ms - min(closes)) / 1000 / speed
    parts.monitor.record(CLOSE_TO_SIGNAL, longest_s)
    return longest_s


def undecided(parts: Parts, signals: Sequence[Signal]) -> list[Signal]:
    """Signals not decided in an earlier cycle; the memory of them is bounded by time."""
    newest = max((signal.candle_close_ms for signal in signals), default=0)
    for signal_id in [key for key, at in parts.decided.items() if at < newest - REMEMBERED_MS]:
        del parts.decided[signal_id]
    return [signal for signal in signals if signal.signal_id not in parts.decided]


async def _decide_all(
    parts: Parts, signals: Sequence[Signal], stale: Sequence[str], cycle: int
) -> list[tuple[Signal, Decision]]:
    """Decide in rank order; what is approved is opened before the next is decided."""
    account = await parts.equity.look()
    if not signals:
        return []
    trading, risk = parts.settings.trading, parts.settings.risk
    history = await parts.store.closed_positions(risk.history_trades)
    context = RiskContext(
        equity=float(account.equity) if account else None,
        available_balance=float(account.available_balance) if account else None,
        marks=parts.equity.marks,
        statistics=trade_statistics(history),
        open_positions=len(parts.executor.positions()) + len(parts.executor.pending_positions()),
        held_symbols=parts.executor.held_symbols(),
        stale_symbols=frozenset(stale),
        cooling=parts.executor.cooling(),
        entries_off=parts.entries_off(),
        halt=parts.halt(),
    )
    limits = Limits(trading=trading, risk=risk)
    decisions: list[tuple[Signal, Decision]] = []
    refused: list[tuple[Signal, Decision]] = []
    ranked_signals = rank_signals(signals, max_signals=trading.max_signals)
    for ranked in ranked_signals:
        context = msgspec.structs.replace(context, entries_off=parts.entries_off(), halt=parts.halt())
        answer = _judge(parts, ranked, context, limits)
        approved = answer if isinstance(answer, Approved) else None
        if approved is not None:
            decision = as_decision(ranked, approved, cycle=cycle, now_ms=parts.clock.now_ms())
            await parts.decisions.begin((ranked.signal, decision))
            answer, context = await _enter(parts, ranked, approved, context)
        decision = as_decision(ranked, answer, cycle=cycle, now_ms=parts.clock.now_ms())
        if approved is not None:
            await _keep(parts, [(ranked.signal, decision)])  # at once: it is about an order that was sent
        else:
            refused.append((ranked.signal, decision))
        decisions.append((ranked.signal, decision))
    await _keep(parts, refused)
    return decisions


def _judge(parts: Parts, ranked: Ranked, context: RiskContext, limits: Limits) -> Approved | Refused:
    symbol = ranked.signal.symbol
    return decide(
        _at_last_price(ranked, parts.feed.last_price(symbol)),
        context,
        limits,
        parts.instruments.get(symbol),
        parts.brackets.get(symbol, ()),
        Decimal(repr(parts.settings.sim.taker_fee_fraction)),
    )


async def _enter(
    parts: Parts, ranked: Ranked, approved: Approved, context: RiskContext
) -> tuple[Approved | Refused, RiskContext]:
    symbol = ranked.signal.symbol
    with parts.monitor.operation("open position"):
        opened = await parts.executor.open(ranked.signal, approved)
    if isinstance(opened, Refused):
        # An order of unknown fate may have become a position: it takes its place until that is known.
        unknown = opened.reason is RefusalReason.ORDER_UNKNOWN
        return opened, after_entry(context, symbol, float(approved.margin)) if unknown else context
    log.info(
        "position opened",
        symbol=symbol,
        position_side=opened.position_side,
        quantity=opened.quantity,
        entry_price=opened.entry_price,
        stop=opened.stop,
        target=opened.target,
        leverage=opened.leverage,
        confidence=round(ranked.signal.confidence, 3),
    )
    return approved, after_entry(context, symbol, float(approved.margin))


def _at_last_price(ranked: Ranked, price: float | None) -> Ranked:
    """The signal entered where the market is now: its size and its stop are judged on that."""
    if price is None:
        return ranked
    signal = msgspec.structs.replace(ranked.signal, entry=price)
    return msgspec.structs.replace(ranked, signal=signal)


async def _keep(parts: Parts, decisions: Sequence[tuple[Signal, Decision]]) -> None:
    """Every signal and its decision is recorded, and every signal is followed as a shadow, traded or not."""
    if not decisions:
        return
    await parts.decisions.keep(decisions)
    for signal, _ in decisions:
        parts.decided[signal.signal_id] = signal.candle_close_ms


def _report(
    parts: Parts,
    number: int,
    analysis: AnalysisResult,
    stale: Sequence[str],
    decisions: Sequence[tuple[Signal, Decision]],
    started_s: float,
    garbage_s: float,
    close_to_signal_s: float | None,
) -> CycleReport:
    seconds = parts.clock.monotonic_s() - started_s
    parts.monitor.record("cycle", seconds)
    refused = Counter(d.reason for _, d in decisions if d.outcome is DecisionOutcome.REFUSED)
    return CycleReport(
        number=number,
        finished_ms=parts.clock.now_ms(),
        analysed=analysis.analysed + analysis.reused,
        stale=len(stale),
        failed=len(analysis.failed),
        shed=len(analysis.shed),
        signals=len(decisions),
        accepted=len(decisions) - refused.total(),
        refused=dict(refused),
        batches=analysis.batches,
        analysis_s=analysis.seconds,
        close_to_signal_s=close_to_signal_s,
        seconds=seconds,
        garbage_s=garbage_s,
        series_reused=analysis.series_reused,
        series_computed=analysis.series_computed,
    )
