"""The kill switch: what trips it, what it allows, and what lifts it. Pure.

Three levels: no_entries opens nothing, reduce_only sends nothing that adds to a position, flatten closes
all positions. A person trips it by hand, a rule by a value that reached its limit. A trip is latched until
a person resumes, with three exceptions: a day's loss ends with the UTC day, faults of the surroundings end
with them where `kill.latch_faults` is false, and an equity that our books do not explain opens nothing
until it is explained, or until a person who resumes has it booked.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from service.clock import utc_time
from service.records import Position, RefusalReason
from service.settings import KillSettings, RiskSettings
from service.trading.equity import CENT, unexplained_words
from service.trading.leverage import net_result
from service.trading.ranking import Refused
from service.trading.risk import DAY_MS, EquityMarks, fall


class Level(StrEnum):
    """What is still allowed, from mild to severe."""

    NO_ENTRIES = "no_entries"
    REDUCE_ONLY = "reduce_only"
    FLATTEN = "flatten"

    @property
    def severity(self) -> int:
        return list(Level).index(self)


class Rule(StrEnum):
    """What tripped it."""

    BY_HAND = "by_hand"
    DAY_LOSS = "day_loss"
    DRAWDOWN = "drawdown"
    LOSS_STREAK = "loss_streak"
    ORDER_ERRORS = "order_errors"
    STALE_DATA = "stale_data"
    UNPROTECTED = "unprotected"
    CLOCK_OFFSET = "clock_offset"
    MEMORY = "memory"
    UNEXPLAINED = "unexplained_equity"

    @property
    def about_loss(self) -> bool:
        return self in (Rule.DAY_LOSS, Rule.DRAWDOWN, Rule.LOSS_STREAK)

    @property
    def about_surroundings(self) -> bool:
        """It ends by itself where the cause does."""
        return self in (Rule.STALE_DATA, Rule.CLOCK_OFFSET, Rule.MEMORY)


REFUSALS = {Rule.DAY_LOSS: RefusalReason.DAILY_LOSS, Rule.DRAWDOWN: RefusalReason.FINAL_STOP}
"""Why a signal is refused; ENTRIES_OFF for all others."""


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """One reason why the switch is tripped; one for each rule at most."""

    rule: Rule
    level: Level
    value: float  # what was measured; 0 by hand
    limit: float  # what it may be; 0 by hand
    words: str  # the value and the limit, or the person's reason
    by: str  # "rule", or the way by which a person did it
    tripped_ms: int
    until_ms: int = 0  # it ends then by itself; 0 is latched


class Switch(msgspec.Struct, frozen=True, kw_only=True):
    """The state that the store keeps."""

    trips: tuple[Trip, ...] = ()
    resumed_ms: int = 0  # when a person last resumed; losses before that are forgiven
    resumed_by: str = ""
    resumed_reason: str = ""
    asked: str = ""  # the newest request from beside the lease that is taken up; see `kill_request`

    @property
    def level(self) -> Level | None:
        """The severest level in force."""
        levels = [trip.level for trip in self.trips]
        return max(levels, key=lambda level: level.severity) if levels else None

    @property
    def words(self) -> str:
        """Why nothing may be opened, or ''."""
        return "; ".join(f"kill switch {trip.level}: {trip.words}" for trip in self.trips)

    @property
    def by_hand(self) -> Trip | None:
        """What a person set."""
        return next((trip for trip in self.trips if trip.rule is Rule.BY_HAND), None)

    def refusal(self) -> Refused | None:
        """The answer to a signal while it is tripped; the first trip names the reason."""
        if not self.trips:
            return None
        reason = REFUSALS.get(self.trips[0].rule, RefusalReason.ENTRIES_OFF)
        return Refused(reason=reason, detail=self.words)


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """What the rules look at. None where it cannot be known now: it trips nothing and lifts nothing."""

    equity: float | None = None  # with open positions
    marks: EquityMarks | None = None
    losses_in_a_row: int = 0  # since the last resume
    orders: int = 0  # sent lately
    order_errors: int = 0  # of them
    stale_fraction: float = 0.0  # of the symbols followed
    stale_s: float = 0.0  # wall seconds for which that was above its limit
    unprotected_s: float = 0.0  # wall seconds, the longest
    clock_moved_ms: float = 0.0
    memory_critical: bool = False
    unexplained: float | None = None  # of equity, ours less the venue's, once the books are reconciled


class Finding(msgspec.Struct, frozen=True):
    """A value, its limit, and both in words."""

    value: float
    limit: float
    words: str

    @property
    def reached(self) -> bool:
        return self.limit > 0 and self.value >= self.limit


Look = Callable[[Readings, KillSettings, RiskSettings], Finding | None]


def _day_loss(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    if now.equity is None or now.marks is None:
        return None
    lost, limit = fall(now.marks.day_start, now.equity), risk.day_loss_fraction
    words = f"the day's loss is {lost:.4f} of its opening equity {now.marks.day_start:.2f}, limit {limit}"
    return Finding(lost, limit, f"{words}; until the next UTC day")


def _drawdown(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    if now.equity is None or now.marks is None:
        return None
    depth, limit = fall(now.marks.peak, now.equity), risk.final_drawdown_fraction
    return Finding(depth, limit, f"drawdown is {depth:.4f} of the peak {now.marks.peak:.2f}, limit {limit}")


def _loss_streak(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    losses, limit = now.losses_in_a_row, kill.loss_streak
    return Finding(losses, limit, f"{losses} losses in a row, limit {limit}")


def _order_errors(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    if now.orders < kill.order_window:
        return None
    fraction, limit = now.order_errors / now.orders, kill.order_error_fraction
    words = f"{now.order_errors} of the last {now.orders} orders failed ({fraction:.2f}), limit {limit}"
    return Finding(fraction, limit, words)


def _stale_data(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    words = f"{now.stale_fraction:.2f} of the symbols are stale since {now.stale_s:.0f} s"
    return Finding(now.stale_s, kill.stale_s, f"{words}, limit {kill.stale_fraction} for {kill.stale_s:g} s")


def _unprotected(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    seconds, limit = now.unprotected_s, kill.unprotected_s
    return Finding(seconds, limit, f"a position is without its stop for {seconds:.1f} s, limit {limit:g}")


def _clock_offset(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    offset, limit = abs(now.clock_moved_ms), kill.clock_offset_ms
    moved = f"moved {now.clock_moved_ms:.0f} ms against the venue's since it was measured before"
    words = f"this machine's clock {moved}, limit {limit:g}"
    return Finding(offset, limit, words)


def _memory(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    return Finding(float(now.memory_critical), float(kill.memory), "the memory level is critical")


def _unexplained(now: Readings, kill: KillSettings, risk: RiskSettings) -> Finding | None:
    if now.unexplained is None:
        return None
    return Finding(abs(now.unexplained), float(CENT), unexplained_words(now.unexplained))


LOOKS: dict[Rule, Look] = {
    Rule.DRAWDOWN: _drawdown,
    Rule.DAY_LOSS: _day_loss,
    Rule.LOSS_STREAK: _loss_streak,
    Rule.ORDER_ERRORS: _order_errors,
    Rule.STALE_DATA: _stale_data,
    Rule.UNPROTECTED: _unprotected,
    Rule.CLOCK_OFFSET: _clock_offset,
    Rule.MEMORY: _memory,
    Rule.UNEXPLAINED: _unexplained,
}


def looked(switch: Switch, now: Readings, kill: KillSettings, risk: RiskSettings, now_ms: int) -> Switch:
    """The switch after one look at the readings: what is over is dropped, what reached its limit is added."""
    findings = {rule: look(now, kill, risk) for rule, look in LOOKS.items()}
    if now.marks is not None and now.marks.day != now_ms // DAY_MS:
        findings[Rule.DAY_LOSS] = None  # the opening equity is another day's: it moves with the next cycle
    kept = tuple(trip for trip in switch.trips if not _over(trip, findings.get(trip.rule), kill, now_ms))
    known = {trip.rule for trip in kept}
    added = tuple(
        _trip(rule, found, kill, now_ms)
        for rule, found in findings.items()
        if found is not None and found.reached and rule not in known
    )
    return msgspec.structs.replace(switch, trips=kept + added)


def _over(trip: Trip, found: Finding | None, kill: KillSettings, now_ms: int) -> bool:
    if trip.until_ms:
        return now_ms >= trip.until_ms
    passing = trip.rule is Rule.UNEXPLAINED or (trip.rule.about_surroundings and not kill.latch_faults)
    return passing and found is not None and not found.reached


def _trip(rule: Rule, found: Finding, kill: KillSettings, now_ms: int) -> Trip:
    level = Level(kill.loss_level if rule.about_loss else kill.fault_level)
    return Trip(
        rule=rule,
        level=Level.NO_ENTRIES if rule is Rule.UNEXPLAINED else level,  # no reason to close anything
        value=found.value,
        limit=found.limit,
        words=found.words,
        by="rule",
        tripped_ms=now_ms,
        until_ms=(now_ms // DAY_MS + 1) * DAY_MS if rule is Rule.DAY_LOSS else 0,
    )


def tripped(switch: Switch, level: Level, reason: str, by: str, now_ms: int) -> Switch:
    """Tripped by hand. Only `resumed` lowers a level: a word that is no severer than the one before
    changes nothing, so that a milder command of somebody else cannot call a flatten off."""
    known = switch.by_hand
    if known is not None and level.severity <= known.level.severity:
        return switch
    trip = Trip(
        rule=Rule.BY_HAND,
        level=level,
        value=0.0,
        limit=0.0,
        words=f"by hand ({by}): {reason or 'no reason given'}",
        by=by,
        tripped_ms=now_ms,
    )
    others = tuple(other for other in switch.trips if other.rule is not Rule.BY_HAND)
    return msgspec.structs.replace(switch, trips=(trip, *others))


def standing(switch: Switch, level: Level) -> str:
    """What a command by hand finds in force already, in words for who gives it; '' where it is obeyed."""
    severest = max(switch.trips, key=lambda trip: trip.level.severity, default=None)
    known = switch.by_hand
    if severest is not None and severest.level.severity > level.severity:
        return f"{severest.level} is set {_since(severest)} and stays; resume first to lower it"
    if known is not None and known.level is level:
        return f"{level} is set already {_since(known)}; that reason and time stay"
    return ""


def _since(trip: Trip) -> str:
    return f"since {utc_time(trip.tripped_ms)} ({trip.words})"


def resumed(switch: Switch, reason: str, by: str, now_ms: int, *, settled: bool = False) -> Switch:
    """Lifted by a person, all of it; what was lost until now is forgiven.

    Args: settled: an equity that our books did not explain is booked; else that trip stays.
    """
    kept = () if settled else tuple(trip for trip in switch.trips if trip.rule is Rule.UNEXPLAINED)
    return msgspec.structs.replace(
        switch, trips=kept, resumed_ms=max(now_ms, 1), resumed_by=by, resumed_reason=reason
    )


def losses_in_a_row(closed: Sequence[Position], since_ms: int) -> int:
    """Losses since then without a win between. Args: closed: newest first, as the store returns them."""
    count = 0
    for position in closed:
        if position.closed_ms <= since_ms or net_result(position) >= 0:
            break
        count += 1
    return count


def effect(level: Level, positions: Sequence[Position]) -> str:
    """What a level does, in words, with the positions that it finds."""
    held = ", ".join(sorted(position.symbol for position in positions)) or "none"
    done = {
        Level.NO_ENTRIES: "nothing is opened; positions keep their stops",
        Level.REDUCE_ONLY: "nothing that adds to a position is sent or rests; positions keep their stops",
        Level.FLATTEN: "nothing is opened and all positions are closed at market",
    }
    return f"{done[level]}: {held}"
