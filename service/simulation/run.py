"""One seed: a market, a venue with faults, and a daemon that dies now and then."""

import gc
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import msgspec

from service import daemon
from service.analysis import worker
from service.exchange.embedded import SIM_KEY, SIM_SECRET
from service.exchange.simulated.engine import Assumptions
from service.exchange.simulated.fault_plan import FaultPlan, frequencies
from service.exchange.simulated.generator import generate
from service.exchange.simulated.server import ServerOptions, Venue
from service.exchange.simulated.tape import STEP_MS
from service.exchange.simulated.troubles import Troubles
from service.records import Record
from service.settings import Settings
from service.simulation.auditor import Auditor
from service.simulation.daemon import SYMBOLS, Life, settings_of_simulation
from service.simulation.database import SharedDatabase
from service.simulation.disk import Disk
from service.simulation.host import Host
from service.simulation.lease_faults import LeaseFaults
from service.simulation.process import Process, last_words_unheard
from service.simulation.state import SharedState, own_state
from service.simulation.world import Livelock, World
from service.trading import halting

PAIR_EVERY, PAIR_AT = 8, 1  # one seed in so many has two daemons on the account
HOSTS = {"one": "198.51.100.7", "two": "198.51.100.8"}
SECOND_AFTER_S = 60.0
STORM_S = (600.0, 1_500.0)
CALM_S = 600.0
DEATHS_AN_HOUR = 3.0
RESUME_EVERY_S = 120.0
STORE_RETRY_S = 5.0  # of a database that was away, for the same reason as the next
LOOK_EVERY_S = 10.0  # the kill switch at its values; every second costs a third of the simulation's time
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
    lease: dict[str, int]  # of two daemons that share the account; empty for one
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
        self.deaths: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()
        self.lease_counts: Counter[str] = Counter()
        self.auditor = Auditor(self)
        self.venue.on_event = self.auditor.on_event
        self.lease_faults = LeaseFaults(self)
        self.shared: SharedDatabase | None = None
        self.hosts: list[Host] = []
        self.set_up(directory)
        self.disk = self.hosts[0].disk
        self._resume_s = 0.0
        self.stopping = False

    def shares_account(self) -> bool:
        """Whether two daemons share the account: in some seeds."""
        return self.seed % PAIR_EVERY == PAIR_AT

    def set_up(self, directory: Path) -> None:
        """One host with a state of its own, or two that share a database and have archives of their own."""
        if not self.shares_account():
            self.hosts.append(Host(self, "daemon", Disk(directory), own_state))
            return
        self.shared = shared = SharedDatabase(self.world)
        shared.on_write = self.auditor.lease.wrote
        for name, address in HOSTS.items():
            (directory / name).mkdir()
            disk = Disk(directory / name, shared.connection)
            self.hosts.append(Host(self, name, disk, SharedState(shared, name).open, address))

    def knows_order(self, client_order_id: str) -> bool:
        """Whether an order of that id is durable."""
        return self.disk.knows_order(client_order_id)

    # Who runs

    @property
    def leader(self) -> Host | None:
        """The host whose daemon holds the lease, or held it last."""
        if self.shared is None:
            return self.hosts[0]
        return next((h for h in self.hosts if h.process and h.process.epoch == self.shared.epoch), None)

    @property
    def life(self) -> Life | None:
        return self.leader.life if self.leader is not None else None

    @property
    def process(self) -> Process | None:
        return self.leader.process if self.leader is not None else None

    @property
    def leading_since_s(self) -> float:
        """Since when the one that trades may; now, where none does."""
        process = self.process
        if process is None:
            return self.world.now_s
        return process.started_s if self.shared is None else self.shared.taken_s

    def held_s(self, process: Process, method: str) -> float:
        """How long the network holds a request back."""
        return self.lease_faults.held_s(process, method)

    def records(self, stream: str) -> list[Record]:
        """What the archives of all hosts hold, host after host."""
        return [record for host in self.hosts for record in host.disk.records.get(stream, ())]

    # Time

    def run(self, hours: float) -> SeedResult:
        end_s = hours * 3_600.0
        self._step_market()
        for number, host in enumerate(self.hosts):
            if number:
                self.world.later(number * SECOND_AFTER_S, host.start)
            else:
                host.start()
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
            self.world.at(at_s, self._arm_death)
        if self.shared is not None:
            self.lease_faults.storm(length_s)
        self.world.later(length_s, self._calm)
        self.world.later(length_s + CALM_S, lambda: self._storm(end_s))

    def _arm_death(self) -> None:
        if self.leader is not None:
            self.leader.arm_death()

    def _calm(self) -> None:
        self.plan.active = False
        self.auditor.die_at_order = ""
        self.lease_faults.calm()
        self._resume_s = self.world.now_s + RESUME_EVERY_S / 2
        self.auditor.calm_began()

    def _finish(self, hours: float) -> SeedResult:
        self.stopping = True
        self.auditor.finish()
        for process in tuple(self.world.processes):
            process.bury()
        for host in self.hosts:
            host.disk.close()
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
            lease=self._lease_table(),
            totals=self.auditor.totals(),
            trace=self.world.trace,
        )

    def _lease_table(self) -> dict[str, int]:
        if self.shared is None:
            return {}
        refused = sum(host.life.refused_sends for host in self.hosts if host.life is not None)
        counts = self.lease_counts + self.lease_faults.counts
        counts["refused sends"] += refused
        counts["refused writes"] += self.shared.fenced
        counts["takeovers"] += max(self.shared.epoch - 1, 0)
        counts["seeds with two daemons"] = 1
        return dict(sorted((+counts).items()))


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
        look_every_s, keep_loaded = halting.LOOK_EVERY_S, worker.keep_loaded
        store_retry_s, daemon.STORE_RETRY_S = daemon.STORE_RETRY_S, STORE_RETRY_S
        halting.LOOK_EVERY_S = LOOK_EVERY_S
        worker.keep_loaded = lambda: None  # two daemons take turns: the dead would be collected each time
        gc.disable()  # cycles are collected once, at the end: when is chance otherwise
        simulation = kind(seed, Path(directory), settings or settings_of_simulation(), usual=usual)
        try:
            simulation.world.on_note = on_note
            return simulation.run(hours)
        finally:
            halting.LOOK_EVERY_S, worker.keep_loaded = look_every_s, keep_loaded
            daemon.STORE_RETRY_S = store_retry_s
            worker.forget()
            _collect(simulation)


def _collect(simulation: Simulation) -> None:
    """Let go of the dead."""
    with last_words_unheard():
        simulation.world.end()
        for host in simulation.hosts:
            host.life = host.process = host.wire = None
        gc.unfreeze()
        gc.enable()
        gc.collect()


def _fast_directory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
