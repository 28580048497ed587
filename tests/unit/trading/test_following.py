import pytest

from service.clock import ManualClock
from service.errors import RequestRejected, VenueUnavailable
from service.market.funding import HOUR_MS, FundingHistory
from service.records import FundingRate
from service.store.sqlite import open_sqlite
from service.trading.following import ShadowFollower
from service.trading.outcomes import CANDLE_MS
from service.trading.shadow import ShadowBook
from tests.samples import signal

OPENED_MS = 12 * HOUR_MS - CANDLE_MS


class World:
    """The venue as the follower meets it: candles, minutes and funding, each of which may be away."""

    def __init__(self) -> None:
        self.candles: list[tuple] | Exception = []
        self.minutes: list[tuple] | Exception = []
        self.minutes_asked = 0
        self.candles_asked = 0
        self.gone_when_minutes_are_read = False
        self.funding: list[FundingRate] | Exception = []

    async def candles_since(self, symbol: str, since_ms: int) -> list[tuple]:
        self.candles_asked += 1
        if isinstance(self.candles, Exception):
            raise self.candles
        return [row for row in self.candles if row[0] >= since_ms][:1_500]

    async def funding_rates(self, start_ms: int, end_ms: int) -> list[FundingRate]:
        if isinstance(self.funding, Exception):
            raise self.funding
        return [rate for rate in self.funding if start_ms <= rate.at_ms <= end_ms]

    async def _minutes(self, symbol: str, timeframe: str, *, limit: int, start_ms: int | None = None):
        assert (timeframe, limit) == ("1m", 5)
        self.minutes_asked += 1
        if self.gone_when_minutes_are_read:
            self.candles = []
        if isinstance(self.minutes, Exception):
            raise self.minutes
        return self.minutes


class Market:
    def __init__(self, world: World) -> None:
        self.candles = world._minutes
        self.funding_rates = world.funding_rates


class Nothing:
    writable = True

    def __init__(self) -> None:
        self.records: list[object] = []

    async def put(self, stream: str, record: object) -> None:
        self.records.append(record)

    def record(self, operation: str, seconds: float) -> None: ...

    def count(self, name: str, amount: int = 1) -> None: ...


class Following:
    def __init__(self, store) -> None:
        self.world, self.kept = World(), Nothing()
        self.clock = ManualClock(OPENED_MS)
        self.book = ShadowBook(store, self.kept, self.kept, fee_fraction=0.0, life_hours=96, max_shadows=10)
        market = Market(self.world)
        self.funding = FundingHistory(market, self.clock)
        self.follower = ShadowFollower(self.book, self.world, market, self.funding, self.kept)
        self.open("s1", OPENED_MS)

    def open(self, name: str, at_ms: int) -> None:
        self.book.open(signal(name, close_ms=at_ms))

    async def cycle(self, candles_later: int) -> None:
        """A cycle two minutes after that many candles have closed."""
        self.clock.advance_to(OPENED_MS + candles_later * CANDLE_MS + 120_000)
        await self.follower.follow(self.clock.now_ms())


@pytest.fixture
async def following(tmp_path):
    async with open_sqlite(tmp_path / "s") as store:
        yield Following(store)


def candle(n: int, open_: float, high: float, low: float, close: float) -> tuple:
    return (OPENED_MS + n * CANDLE_MS, open_, high, low, close, 1.0)


async def test_funding_settled_while_it_is_held_is_part_of_the_outcome(following: Following):
    world = following.world
    world.candles = [candle(0, 100, 100.5, 99.5, 100), candle(1, 100, 102.5, 99.5, 102)]
    world.funding = [FundingRate(symbol="AUSDT", at_ms=12 * HOUR_MS, rate=0.001, mark_price=100.0)]
    await following.cycle(1)
    await following.cycle(2)
    (outcome,) = following.kept.records
    assert (outcome.close_reason, outcome.funding_fraction) == ("target", pytest.approx(-0.001))


async def test_a_shadow_waits_while_its_funding_is_not_told(following: Following):
    world = following.world
    world.candles = [candle(0, 100, 100.5, 99.5, 100), candle(1, 100, 102.5, 99.5, 102)]
    world.funding = VenueUnavailable("away")
    await following.cycle(2)
    assert following.kept.records == []
    world.funding = [FundingRate(symbol="AUSDT", at_ms=12 * HOUR_MS, rate=0.001, mark_price=100.0)]
    await following.cycle(3)
    assert [outcome.close_reason for outcome in following.kept.records] == ["target"]


async def test_a_candle_that_touches_both_is_read_again_in_minutes(following: Following):
    world = following.world
    world.candles = [candle(0, 100, 102.5, 98.5, 101)]
    world.minutes = [(OPENED_MS, 100.0, 102.5, 99.5, 102.0, 1.0)]
    await following.cycle(1)
    assert [o.close_reason for o in following.kept.records] == ["target"]
    assert world.minutes_asked == 1


async def test_minutes_that_cannot_be_had_now_are_asked_for_again(following: Following):
    world = following.world
    world.candles = [candle(0, 100, 102.5, 98.5, 101)]
    world.minutes = VenueUnavailable("away")
    await following.cycle(1)
    assert following.kept.records == []
    world.minutes = [(OPENED_MS, 100.0, 102.5, 99.5, 102.0, 1.0)]
    await following.cycle(2)
    assert [o.resolution for o in following.kept.records] == ["1m"]


async def test_where_the_venue_has_no_minutes_the_stop_counts(following: Following):
    world = following.world
    world.candles = [candle(0, 100, 102.5, 98.5, 101)]
    world.minutes = RequestRejected("-1121 Invalid symbol.")
    await following.cycle(1)
    assert [(o.close_reason, o.resolution) for o in following.kept.records] == [("stop", "assumed")]


HOURS = HOUR_MS // CANDLE_MS  # candles in an hour


def quiet(hours: int) -> list[tuple]:
    """Candles that touch nothing."""
    return [candle(n, 100, 100.5, 99.5, 100) for n in range(hours * HOURS)]


async def test_an_outage_longer_than_its_life_does_not_end_a_shadow(following: Following):
    following.world.candles = VenueUnavailable("away")
    await following.cycle(98 * HOURS)
    assert following.kept.records == []
    following.world.candles = [candle(0, 100, 100.5, 99.5, 100), candle(1, 100, 102.5, 99.5, 102)]
    await following.cycle(98 * HOURS + 1)
    assert [o.close_reason for o in following.kept.records] == ["target"]


async def test_a_candle_that_cannot_be_read_in_minutes_yet_does_not_end_an_old_shadow(following: Following):
    world = following.world
    world.candles = [candle(0, 100, 102.5, 98.5, 101)]
    world.minutes = VenueUnavailable("away")
    await following.cycle(98 * HOURS)
    assert following.kept.records == []
    world.minutes = [(OPENED_MS, 100.0, 102.5, 99.5, 102.0, 1.0)]
    await following.cycle(98 * HOURS + 1)
    assert [(o.close_reason, o.resolution) for o in following.kept.records] == [("target", "1m")]


async def test_more_candles_than_one_request_gives_end_no_shadow_that_they_did_not_reach(
    following: Following,
):
    young_ms = OPENED_MS + 40 * HOUR_MS
    following.open("s2", young_ms)
    target = (OPENED_MS + 130 * HOUR_MS, 100.0, 102.5, 99.5, 102.0, 1.0)
    following.world.candles = [row for row in quiet(150) if row[0] != target[0]] + [target]
    following.world.candles.sort()
    await following.cycle(150 * HOURS)
    await following.cycle(150 * HOURS + 1)
    outcomes = {o.signal_id: (o.close_reason, o.closed_ms) for o in following.kept.records}
    assert outcomes == {
        "s1": ("expired", OPENED_MS + 96 * HOUR_MS),
        "s2": ("target", target[0] + CANDLE_MS),
    }


@pytest.mark.parametrize("answer", [[], RequestRejected("-1121 Invalid symbol.")])
async def test_a_delisted_symbols_shadow_ends_without_an_outcome(following: Following, answer):
    following.world.candles = answer
    await following.cycle(96 * HOURS)
    assert following.kept.records == []
    await following.cycle(97 * HOURS)
    assert [o.close_reason for o in following.kept.records] == ["no_candles"]


async def test_funding_is_forgotten_when_nothing_is_followed_any_more(following: Following):
    world = following.world
    world.candles = [candle(0, 100, 102.5, 99.5, 102)]
    await following.cycle(1)
    assert following.book.open_count == 0
    world.funding = [
        FundingRate(symbol="AUSDT", at_ms=hour * HOUR_MS, rate=0.001, mark_price=100.0)
        for hour in range(13, 513)
    ]
    for hour in range(1, 500):
        await following.cycle(hour * 12)
    assert len(following.funding.of("AUSDT")) <= 1


async def test_minutes_of_a_symbol_without_candles_since_are_let_go(following: Following):
    """It would be asked for its candles in each cycle for ever."""
    world = following.world
    world.candles = [candle(0, 100, 102.5, 98.5, 101)]
    world.minutes = [(OPENED_MS, 100.0, 102.5, 99.5, 102.0, 1.0)]
    world.gone_when_minutes_are_read = True
    await following.cycle(1)
    world.candles_asked = 0
    following.book.expire(OPENED_MS + 200 * HOUR_MS, ["AUSDT"])
    assert following.book.open_count == 0
    for later in range(2, 5):
        await following.cycle(later)
    assert world.candles_asked == 0
