"""One seed: a market, a venue with faults, and a daemon that dies now and then."""

import gc
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import msgspec

from service.analysis import worker
from service.exchange.embedded import SIM_KEY, SIM_SECRET
from service.exchange.simulated.engine import Assumptions
from service.exchange.simulated.fault_plan import FaultPlan, frequencies
from service.exchange.simulated.generator import generate
from service.exchange.simulated.server import ServerOptions, Venue
from service.exchange.simulated.tape import STEP_MS
from service.exchange.simulated.troubles import Troubles
from service.settings import Settings
from service.simulation.auditor import Auditor
from service.simulation.daemon import SYMBOLS, Life, settings_of_simulation
from service.simulation.disk import Disk
from service.simulation.process import Process, last_words_unheard
from service.simulation.wire import Wire
from service.simulation.world import Livelock, VirtualClock, World
from service.trading import halting

RESTART_S = 10.0
STORM_S = (600.0, 1_500.0)
CALM_S = 600.0
DEATHS_AN_HOUR = 3.0
RESUME_EVERY_S = 120.0
LOOK_EVERY_S = 5.0  # the kill switch at its values; every second costs a third of the simulation's time
PUSH_EVERY_MS = 30_000  # forming candles; the venue tells them four times a second
DEPOSIT = Decimal(10_000)
ASSUMPTIONS = Assumptions(
    maker_fee_fraction=Decimal("0.0002"),
    taker_fee_fraction=Decimal("0.0005"),
    spread_bps=Decimal(2),
    slippage_bps_per_million=Decimal(5),
)


class SeedResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one seed did. Times of violations are in the text."""

    seed: int
    hours: float
    violations: tuple[str, ...]
    faults: dict[str, int]
    deaths: dict[str, int]
    restarts: dict[str, int]
    unknown: dict[str, int]  # orders whose outcome was unknown, by purpose
    resolved: dict[str, int]  # of those, how many ended known
    totals: dict[str, int]  # requests, orders, fills, positions, decisions
    trace: str


class Simulation:
    """One seed's world. `run` it once.

    Args: usual: how often faults strike, times the table's numbers; 0 is a venue without any.
    """

    def __init__(self, seed: int, directory: Path, settings: Settings, *, usual: float = 1.0) -> None:
        self.seed = seed
        self.settings = settings
        self.world = World(seed)
        self.usual = usual
        random.seed(seed)  # jitter of retries
        tape = generate(seed, SYMBOLS)
        self.start_ms = tape.start_ms
        self.venue = Venue(
            tape,
            ServerOptions(
                speed=1.0,
                keys={SIM_KEY: SIM_SECRET},
                deposit=DEPOSIT,
                assumptions=ASSUMPTIONS,
                stream_messages_per_s=1_000_000,
            ),
            None,
            lambda: self.world.now_s,
        )
        self.plan = FaultPlan(frequencies(usual), random.Random(seed))
        self.plan.active = False
        self.troubles = Troubles(self.plan, self.venue, self.world.later)
        self.venue.disturb_by(self.troubles)
        self.disk = Disk(directory)
        self.deaths: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()
        self.life: Life | None = None
        self.process: Process | None = None
        self.wire: Wire | None = None
        self.auditor = Auditor(self)
        self.venue.on_event = self.auditor.on_event
        self._lives = 0
        self._resume_s = 0.0
        self._stopping = False

    def knows_order(self, client_order_id: str) -> bool:
        """Whether an order of that id is durable."""
        return self.disk.knows_order(client_order_id)

    # The daemon's lives

    def start_daemon(self) -> None:
        if self._stopping:
            return
        self._lives += 1
        process = Process(self.world, f"daemon-{self._lives}", self._on_end, self._on_death)
        wire = Wire(
            self.world,
            process,
            self.venue,
            self.troubles,
            self.auditor,
            request_limit_s=self.settings.exchange.request_limit_s,
        )
        clock = VirtualClock(self.world, self.start_ms, self.world.random.randrange(-2_000, 2_000))
        self.life = Life(self.settings, self.disk, wire, clock)
        self.process, self.wire = process, wire
        self.auditor.restarted()
        if self.plan.active and self.usual:
            self._choose_death(process)
        self.world.note("start", process.name)
        process.start(self.life.run())

    def _choose_death(self, process: Process) -> None:
        """Some deaths between two steps of the first seconds; others are armed while it runs."""
        if self.world.random.random() < 0.25:
            process.die_at_step = self.world.random.randrange(1, 3_000)

    def arm_death(self) -> None:
        """Let the running process die soon: at a step, or around a write."""
        process = self.process
        if process is None or not process.alive:
            return
        draw = self.world.random
        match draw.randrange(4):
            case 0:
                process.die_at_step = process.steps + draw.randrange(1, 4_000)
            case 1:
                process.die_before_write = process.writes + draw.randrange(1, 60)
            case 2:
                process.die_after_write = process.writes + draw.randrange(1, 60)
            case _:
                self.auditor.die_at_order = draw.choice(("order sent", "order answered"))

    def _on_death(self, process: Process, why: str) -> None:
        self.deaths[why] += 1
        self._gone(process, f"died {why}")
        self.restarts["after a crash"] += 1

    def _on_end(self, process: Process, error: BaseException | None) -> None:
        if not self._stopping:
            reason = type(error).__name__ if error else "ended"
            self.restarts[f"after {reason}"] += 1
            self.auditor.ended(error)
        self._gone(process, f"ended with {error!r}")

    def _gone(self, process: Process, how: str) -> None:
        self.world.note("gone", f"{process.name} {how}")
        if self.life is not None:
            for failure in process.failures:
                self.auditor.violate(f"a callback failed: {failure}")
        if self.wire is not None:
            self.wire.close()
        self.life = self.process = self.wire = None
        self.world.later(RESTART_S, self.start_daemon)

    # Time

    def run(self, hours: float) -> SeedResult:
        end_s = hours * 3_600.0
        self._step_market()
        self.start_daemon()
        self.world.later(300.0 if self.usual else 1e12, lambda: self._storm(end_s))
        try:
            self.world.run(end_s)
        except Livelock as error:
            self.auditor.violate(f"livelock: {error}")
        return self._finish(hours)

    def _step_market(self) -> None:
        self.venue.catch_up()
        if self.venue.step_ms % PUSH_EVERY_MS == 0:
            self.venue.streams.push(self.venue.step_ms, self.world.now_s)
        self.venue.streams.flush()
        self.auditor.look()
        self._operate()
        left_ms = self.venue.step_ms + STEP_MS - self.venue.clock.now_ms()
        self.world.later(left_ms / 1_000 + 0.001, self._step_market)

    def _operate(self) -> None:
        """What the person who runs it does: in calm, lift a kill switch that faults have tripped."""
        life, process = self.life, self.process
        due = not self.plan.active and self.world.now_s >= self._resume_s
        if due and life is not None and process is not None and life.halted:
            self._resume_s = self.world.now_s + RESUME_EVERY_S
            self.restarts["trading resumed by hand"] += 1
            process.loop.create_task(life.resume())

    def _storm(self, end_s: float) -> None:
        """Faults and deaths for a while, then calm; none begins that calm could not follow."""
        length_s = self.world.random.uniform(*STORM_S)
        if self.world.now_s + length_s + CALM_S > end_s:
            return
        self.plan.active = True
        self.auditor.storm_began()
        at_s = self.world.now_s
        while (at_s := at_s + self.world.random.expovariate(DEATHS_AN_HOUR / 3_600)) < (
            self.world.now_s + length_s
        ):
            self.world.at(at_s, self.arm_death)
        self.world.later(length_s, self._calm)
        self.world.later(length_s + CALM_S, lambda: self._storm(end_s))

    def _calm(self) -> None:
        self.plan.active = False
        self.auditor.die_at_order = ""
        if self.process is not None:
            self.process.die_at_step = self.process.die_before_write = self.process.die_after_write = 0
        self._resume_s = self.world.now_s + RESUME_EVERY_S / 2
        self.auditor.calm_began()

    def _finish(self, hours: float) -> SeedResult:
        self._stopping = True
        self.auditor.finish()
        for process in tuple(self.world.processes):
            process.bury()
        self.disk.close()
        unknown, resolved = self.auditor.unknown_orders()
        return SeedResult(
            seed=self.seed,
            hours=hours,
            violations=tuple(self.auditor.violations),
            faults=dict(sorted(self.plan.counts.items())),
            deaths=dict(sorted(self.deaths.items())),
            restarts=dict(sorted((+self.restarts).items())),
            unknown=unknown,
            resolved=resolved,
            totals=self.auditor.totals(),
            trace=self.world.trace,
        )


def run_seed(
    seed: int,
    hours: float,
    *,
    usual: float = 1.0,
    settings: Settings | None = None,
    on_note: Callable[[float, str, str], None] | None = None,
    kind: type[Simulation] = Simulation,
) -> SeedResult:
    """Run one seed in a directory of its own. `on_note` is told all that the trace is made of."""
    with tempfile.TemporaryDirectory(prefix="perpd-simulate-", dir=_fast_directory()) as directory:
        worker.forget()
        look_every_s = halting.LOOK_EVERY_S
        halting.LOOK_EVERY_S = LOOK_EVERY_S
        gc.disable()  # cycles are collected once, at the end: when is chance otherwise
        try:
            simulation = kind(seed, Path(directory), settings or settings_of_simulation(), usual=usual)
            simulation.world.on_note = on_note
            return simulation.run(hours)
        finally:
            halting.LOOK_EVERY_S = look_every_s
            worker.forget()
            _collect()


def _collect() -> None:
    """Let go of the dead."""
    with last_words_unheard():
        gc.unfreeze()
        gc.enable()
        gc.collect()


def _fast_directory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
