"""The venue's request weight and order counts, kept so that reads wait instead of being refused.

Windows are fixed: they begin on whole minutes (or ten seconds) of venue time. The venue counts for the
whole address, so its own count, read from each answer's headers, overrides ours when it is higher.
"""

from collections.abc import Iterable, Mapping

import structlog

from service.errors import VenueThrottled
from service.exchange.binance.codec import RateLimit
from service.ports import Clock

log = structlog.get_logger("exchange.binance")

MINUTE_MS = 60_000
TEN_SECONDS_MS = 10_000
DEFAULT_WEIGHT_LIMIT = 2_400
DEFAULT_ORDERS_PER_MINUTE = 1_200
DEFAULT_ORDERS_PER_TEN_SECONDS = 300
WINDOW_MARGIN_MS = 100
"""Waited beyond a window's end, since our idea of the venue's time is that uncertain."""
LONGEST_ENTRY_WAIT_MS = 2_000
"""Later than this an entry is no longer the one that was decided."""
LONGEST_WAIT_MS = 120_000
"""A read waits for a ban that ends sooner; a longer one is the caller's to know."""


class Window:
    """A count that starts again at each multiple of its length."""

    def __init__(self, length_ms: int, limit: int) -> None:
        self.length_ms = length_ms
        self.limit = limit
        self._index = -1
        self._used = 0

    def used(self, now_ms: int) -> int:
        self._turn(now_ms)
        return self._used

    def add(self, amount: int, now_ms: int) -> None:
        self._turn(now_ms)
        self._used += amount

    def observe(self, used: int, asked_ms: int, now_ms: int) -> None:
        """Take the venue's count where it is higher, unless the window it speaks of has passed."""
        self._turn(now_ms)
        if asked_ms // self.length_ms == self._index:
            self._used = max(self._used, used)

    def next_ms(self, now_ms: int) -> int:
        """When the next window has safely begun."""
        return (now_ms // self.length_ms + 1) * self.length_ms + WINDOW_MARGIN_MS

    def wait_until_ms(self, amount: int, limit: int, now_ms: int) -> int:
        """0 when `amount` fits below `limit` now, else when to try again.

        An amount larger than the limit itself passes in an otherwise empty window.
        """
        used = self.used(now_ms)
        return 0 if used == 0 or used + amount <= limit else self.next_ms(now_ms)

    def _turn(self, now_ms: int) -> None:
        index = now_ms // self.length_ms
        if index > self._index:  # a clock set back must not empty the window
            self._index, self._used = index, 0


class WeightBudget:
    """Who may send now: one for the whole process.

    Reads leave `reserve_fraction` of the weight to orders, and entries leave as much of the order counts
    to stops and exits.
    """

    def __init__(self, clock: Clock, reserve_fraction: float) -> None:
        self._clock = clock
        self._reserve_fraction = reserve_fraction
        self._weight = Window(MINUTE_MS, DEFAULT_WEIGHT_LIMIT)
        self._orders = (
            Window(MINUTE_MS, DEFAULT_ORDERS_PER_MINUTE),
            Window(TEN_SECONDS_MS, DEFAULT_ORDERS_PER_TEN_SECONDS),
        )
        self._silent_until_ms = 0
        self._banned_until_ms = 0

    @property
    def used(self) -> int:
        """Request weight used in the running minute."""
        return self._weight.used(self._clock.now_ms())

    @property
    def limit(self) -> int:
        return self._weight.limit

    def set_limits(self, limits: Iterable[RateLimit]) -> None:
        """Adopt the venue's limits (exchangeInfo.rateLimits); kinds and intervals unknown to us are left."""
        lengths = {"SECOND": 1_000, "MINUTE": MINUTE_MS}
        for limit in limits:
            length_ms = lengths.get(limit.interval, 0) * limit.interval_count
            windows = (self._weight,) if limit.kind == "REQUEST_WEIGHT" else self._orders
            for window in windows:
                if window.length_ms == length_ms and limit.limit > 0:
                    window.limit = limit.limit

    async def take(self, weight: int, *, priority: bool = False, urgent: bool = False) -> None:
        """Wait for room, then count `weight`. Priority may use the reserve.

        Raises VenueThrottled when the venue has asked for silence: at once for priority, for a read
        when it lasts too long to wait. Urgent is what takes risk away, at no weight: only a ban stops it.
        """
        while until_ms := self._weight_wait_ms(weight, priority, urgent):
            await self._clock.sleep_until(until_ms)
        self._weight.add(weight, self._clock.now_ms())

    async def take_order(self, *, urgent: bool = False) -> None:
        """Wait for room in the order counts, then count one order.

        The reserve is left to urgent orders: stops, targets and exits. Raises VenueThrottled when the venue
        asked for silence, and where an order that opens would have to wait longer than a moment.
        """
        while until_ms := self._order_wait_ms(urgent):
            if not urgent and until_ms - self._clock.now_ms() > LONGEST_ENTRY_WAIT_MS:
                raise VenueThrottled(
                    "too many orders were sent, the rest is kept for exits; nothing was sent",
                    retry_at_ms=until_ms,
                )
            await self._clock.sleep_until(until_ms)
        now_ms = self._clock.now_ms()
        for window in self._orders:
            window.add(1, now_ms)

    def observe(self, used_weight: int, asked_ms: int) -> None:
        """Take over the venue's count from the answer to a request sent at `asked_ms`."""
        self._weight.observe(used_weight, asked_ms, self._clock.now_ms())

    def observe_orders(self, counts: Mapping[int, int], asked_ms: int) -> None:
        """Take over the venue's order counts. Args: counts: window length in ms to orders sent in it."""
        for window in self._orders:
            if window.length_ms in counts:
                window.observe(counts[window.length_ms], asked_ms, self._clock.now_ms())

    def silence_until(self, at_ms: int, *, banned: bool = True) -> None:
        """The venue asked for silence. Args: banned: nothing at all may be sent until then."""
        self._silent_until_ms = max(self._silent_until_ms, at_ms)
        if banned:
            self._banned_until_ms = max(self._banned_until_ms, at_ms)

    async def silence_over(self) -> None:
        """Returns once a silence that was asked for is over."""
        if self._silent_until_ms > self._clock.now_ms():
            log.warning("waiting: the venue asked for silence", until_ms=self._silent_until_ms)
            await self._clock.sleep_until(self._silent_until_ms)

    def _weight_wait_ms(self, weight: int, priority: bool, urgent: bool) -> int:
        now_ms = self._clock.now_ms()
        if now_ms < (self._banned_until_ms if urgent else self._silent_until_ms):
            if priority or self._silent_until_ms - now_ms > LONGEST_WAIT_MS:
                raise self._silence()
            return self._silent_until_ms
        share = 1.0 if priority else 1.0 - self._reserve_fraction
        return self._weight.wait_until_ms(weight, int(self._weight.limit * share), now_ms) if weight else 0

    def _order_wait_ms(self, urgent: bool) -> int:
        now_ms = self._clock.now_ms()
        if now_ms < (self._banned_until_ms if urgent else self._silent_until_ms):
            raise self._silence()
        share = 1.0 if urgent else 1.0 - self._reserve_fraction
        return max(window.wait_until_ms(1, int(window.limit * share), now_ms) for window in self._orders)

    def _silence(self) -> VenueThrottled:
        return VenueThrottled(
            "the venue asked for silence; nothing was sent", retry_at_ms=self._silent_until_ms
        )
