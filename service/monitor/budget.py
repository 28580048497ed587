"""The memory budget: which level of need the process tree is in, and what is done about it.

Pure: fractions and times in, levels and reactions out. `guard.py` reads the machine and performs.
"""

import math
from collections import deque
from enum import IntEnum, StrEnum

import msgspec

from service.settings import AnalysisSettings, MarketSettings, MonitorSettings, Settings

_HOUR_S = 3_600.0
_GROWTH_STEP_S = 60.0
_GROWTH_POINTS = 720  # half a day of minutes; a longer window keeps fewer points an hour

# What start-up takes in MB, measured as if nobody else on the machine mapped the same libraries (27 MB of
# it): the daemon; nursery and each worker; a symbol and a candle of its three timeframes.
_DAEMON_MB = 63.5
_NURSERY_MB, _WORKER_MB = 9.0, 1.6
_SYMBOL_MB, _CANDLE_MB = 0.007, 3 * 56 / 1e6
# Of its own a worker reports what it shares with the nursery, too; the room is what a batch needs meanwhile.
_WORKER_OWN_MB, _WORKER_ROOM_MB = 20.0, 10.0


class Level(IntEnum):
    """How near the limit the memory is."""

    NORMAL = 0
    ELEVATED = 1
    HIGH = 2
    CRITICAL = 3


class Reaction(StrEnum):
    """What is done while a level lasts, in words for the log."""

    SMALLER_BATCHES = "smaller batches"
    SMALLER_CACHES = "smaller caches"
    EARLY_FLUSH = "early archive flush"
    TRIM = "free memory handed back"
    NO_UPKEEP = "archive upkeep and training deferred"
    FEWER_WORKERS = "workers recycled and reduced"
    QUIET_LOG = "debug and info logs dropped"
    NO_ENTRIES = "no new entries"
    RESTART = "drained restart"


GRADES: dict[Level, tuple[Reaction, ...]] = {
    Level.NORMAL: (),
    Level.ELEVATED: (
        Reaction.SMALLER_BATCHES,
        Reaction.SMALLER_CACHES,
        Reaction.EARLY_FLUSH,
        Reaction.TRIM,
        Reaction.NO_UPKEEP,
    ),
    Level.HIGH: (Reaction.FEWER_WORKERS, Reaction.QUIET_LOG, Reaction.NO_ENTRIES),
    Level.CRITICAL: (Reaction.RESTART,),
}
"""What each level adds to the one below it, in the order in which it is done."""


def plan(level: Level) -> tuple[Reaction, ...]:
    """Every reaction in force at a level, the mildest first."""
    return tuple(reaction for grade in Level if grade <= level for reaction in GRADES[grade])


class Step(msgspec.Struct, frozen=True):
    """One change of level: what to begin, mildest first, and what to undo, strongest first."""

    before: Level
    after: Level
    begin: tuple[Reaction, ...]
    undo: tuple[Reaction, ...]
    reason: str


def step(before: Level, after: Level, reason: str) -> Step:
    """What differs between the plans of two levels."""
    old, new = plan(before), plan(after)
    return Step(
        before=before,
        after=after,
        begin=tuple(reaction for reaction in new if reaction not in old),
        undo=tuple(reaction for reaction in reversed(old) if reaction not in new),
        reason=reason,
    )


class MemoryBudget:
    """Follows the level.

    It rises one level per sample, so that each level's reactions get their chance before the next; it falls
    one level once the use stayed below the level's threshold, less the hysteresis, for the calm time.
    """

    def __init__(self, settings: MonitorSettings) -> None:
        self._thresholds = settings.memory_levels
        self._hysteresis = settings.memory_hysteresis
        self._calm_s = settings.memory_calm_s
        self._pressure_pct = settings.memory_pressure_pct
        self._calm_since_s: float | None = None
        self.level = Level.NORMAL
        self.rising = False  # the sample asked for more than one level: look again soon

    def update(self, fraction: float, pressure_pct: float | None, now_s: float) -> Step | None:
        """Take one sample; None when the level stays.

        Args: fraction: of the limit in use; pressure_pct: share of the last 10 s in which everything
        waited for memory, None where it cannot be read; now_s: monotonic seconds.
        """
        wanted, reason = self._wanted(fraction, pressure_pct)
        self.rising = wanted > self.level + 1
        if wanted > self.level:
            self._calm_since_s = None
            return self._move(Level(self.level + 1), reason)
        if self.level is Level.NORMAL or not self._is_calm(fraction, pressure_pct):
            self._calm_since_s = None
            return None
        if self._calm_since_s is None:
            self._calm_since_s = now_s
        if now_s - self._calm_since_s < self._calm_s:
            return None
        self._calm_since_s = now_s  # the next level down waits its own calm time
        return self._move(Level(self.level - 1), f"{fraction:.0%} of the limit in use")

    def _move(self, after: Level, reason: str) -> Step:
        before, self.level = self.level, after
        return step(before, after, reason)

    def _wanted(self, fraction: float, pressure_pct: float | None) -> tuple[Level, str]:
        level = Level(sum(fraction >= threshold for threshold in self._thresholds))
        if level is Level.NORMAL and self._is_pressed(pressure_pct):
            # Stalls may be a neighbour's doing: they call for the mild reactions only.
            return Level.ELEVATED, f"memory stalls {pressure_pct:.0f} % of the time"
        return level, f"{fraction:.0%} of the limit in use"

    def _is_calm(self, fraction: float, pressure_pct: float | None) -> bool:
        below = fraction < self._thresholds[self.level - 1] - self._hysteresis
        return below and not (self.level is Level.ELEVATED and self._is_pressed(pressure_pct))

    def _is_pressed(self, pressure_pct: float | None) -> bool:
        return pressure_pct is not None and 0 < self._pressure_pct <= pressure_pct


class CrowdAlarm:
    """Tells when others fill a control group that we are in: the kernel may then end any process of it.

    From the threshold of level critical on, and until the use stayed below it, less the hysteresis, for the
    calm time.
    """

    def __init__(self, settings: MonitorSettings) -> None:
        self._threshold = settings.memory_levels[Level.CRITICAL - 1]
        self._hysteresis = settings.memory_hysteresis
        self._calm_s = settings.memory_calm_s
        self._calm_since_s: float | None = None
        self.alarmed = False

    def update(self, fraction: float, now_s: float) -> bool | None:
        """True when it begins, False when it is over, None otherwise. Args: of the group's limit in use."""
        if fraction >= self._threshold - self._hysteresis:
            self._calm_since_s = None
            if self.alarmed or fraction < self._threshold:
                return None
            self.alarmed = True
            return True
        if not self.alarmed:
            return None
        if self._calm_since_s is None:
            self._calm_since_s = now_s
        if now_s - self._calm_since_s < self._calm_s:
            return None
        self.alarmed = False
        return False


class GrowthAlarm:
    """Tells when memory grows over hours faster than it may.

    One point a minute at most, in a window of hours; the slope is a least-squares line, which a single
    peak does not bend. It speaks once the window is filled, and once more when the growth has halved.
    """

    def __init__(self, limit_mb_per_hour: float, hours: float) -> None:
        """Args: limit_mb_per_hour: 0 never alarms; hours: length of the window."""
        self._limit = limit_mb_per_hour
        self._window_s = hours * _HOUR_S
        self._step_s = max(_GROWTH_STEP_S, self._window_s / _GROWTH_POINTS)
        self._points: deque[tuple[float, float]] = deque()
        self.alarmed = False
        self.slope_mb_per_hour = math.nan  # until the window is filled

    def add(self, now_s: float, used_mb: float) -> bool | None:
        """True when the growth begins to exceed its limit, False when it is over, None otherwise."""
        points = self._points
        if points and now_s - points[-1][0] < self._step_s:
            return None
        points.append((now_s, used_mb))
        while len(points) > 2 and now_s - points[1][0] >= self._window_s:
            points.popleft()
        if not self._limit or now_s - points[0][0] < self._window_s:
            return None
        self.slope_mb_per_hour = slope(list(points)) * _HOUR_S
        if not self.alarmed and self.slope_mb_per_hour > self._limit:
            self.alarmed = True
            return True
        if self.alarmed and self.slope_mb_per_hour < self._limit / 2:
            self.alarmed = False
            return False
        return None


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y); 0 for fewer than two different x."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def needed_mb(analysis: AnalysisSettings, market: MarketSettings) -> float:
    """MB that start-up takes before the first cycle, where the daemon is alone; rounded up to whole MB."""
    workers = _NURSERY_MB + _WORKER_MB * analysis.workers if analysis.workers else 0.0
    symbols = market.symbols * (_SYMBOL_MB + market.candles * _CANDLE_MB)
    return math.ceil(_DAEMON_MB + workers + symbols)


def worker_limit_mb(settings: Settings, limit_mb: float) -> float:
    """MB of its own that a worker may hold: as set, or less where the memory limit leaves less for each.

    Workers that all are as large as this leave the tree at the threshold of level high.
    """
    analysis = settings.analysis
    free = limit_mb * settings.monitor.memory_levels[Level.HIGH - 1] - needed_mb(analysis, settings.market)
    share = _WORKER_OWN_MB + free / max(analysis.workers, 1)
    return min(analysis.worker_memory_limit_mb, max(share, _WORKER_OWN_MB + _WORKER_ROOM_MB))
