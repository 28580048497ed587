"""A machine on which a daemon runs, dies and is started again. In most seeds there is one, in some two."""

from asyncio import CancelledError
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from service.errors import LeaseLost
from service.simulation.daemon import Life
from service.simulation.disk import Disk
from service.simulation.process import Process
from service.simulation.wire import ADDRESS, Wire
from service.simulation.world import VirtualClock
from service.store.opening import State

if TYPE_CHECKING:
    from service.simulation.run import Simulation

RESTART_S = 10.0

Opening = Callable[[Life], AbstractAsyncContextManager[State]]


class Host:
    """`life`, `process` and `wire` are None while no daemon runs on it."""

    def __init__(
        self, simulation: "Simulation", name: str, disk: Disk, opening: Opening, address: str = ADDRESS
    ) -> None:
        self.name = name
        self.disk = disk
        self.lives = 0
        self.life: Life | None = None
        self.process: Process | None = None
        self.wire: Wire | None = None
        self._simulation = simulation
        self._world = simulation.world
        self._opening = opening
        self._address = address

    def start(self) -> None:
        simulation = self._simulation
        if simulation.stopping:
            return
        self.lives += 1
        process = Process(self._world, f"{self.name}-{self.lives}", self._on_end, self._on_death)
        wire = Wire(
            self._world,
            process,
            simulation.venue,
            simulation.troubles,
            simulation.auditor,
            request_limit_s=simulation.settings.exchange.request_limit_s,
            address=self._address,
            held_s=simulation.held_s,
        )
        clock = VirtualClock(self._world, simulation.start_ms, self._world.random.randrange(-2_000, 2_000))
        self.life = Life(simulation.settings, self.disk, wire, clock, process, self._opening)
        self.process, self.wire = process, wire
        if simulation.shared is None:
            simulation.auditor.restarted()
        if simulation.plan.active and simulation.usual:
            self._choose_death(process)
        self._world.note("start", process.name)
        process.start(self.life.run())

    def _choose_death(self, process: Process) -> None:
        """Some deaths between two steps of the first seconds; others are armed while it runs."""
        if self._world.random.random() < 0.25:
            process.die_at_step = self._world.random.randrange(1, 3_000)

    def arm_death(self) -> None:
        """Let the running process die soon: at a step, or around a write."""
        process = self.process
        if process is None or not process.alive:
            return
        draw = self._world.random
        match draw.randrange(4):
            case 0:
                process.die_at_step = process.steps + draw.randrange(1, 4_000)
            case 1:
                process.die_before_write = process.writes + draw.randrange(1, 60)
            case 2:
                process.die_after_write = process.writes + draw.randrange(1, 60)
            case _:
                self._simulation.auditor.die_at_order = draw.choice(("order sent", "order answered"))

    def calm(self) -> None:
        """Nothing more is to happen to it."""
        if self.process is not None:
            self.process.die_at_step = self.process.die_before_write = self.process.die_after_write = 0
            self.process.pause_at_step = 0
            self.process.go_on()

    def _on_death(self, process: Process, why: str) -> None:
        self._simulation.deaths[why] += 1
        self._simulation.restarts["after a crash"] += 1
        self._gone(process, f"died {why}")

    def _on_end(self, process: Process, error: BaseException | None) -> None:
        simulation = self._simulation
        if not simulation.stopping:
            reason = type(error).__name__ if error else "ended"
            simulation.restarts[f"after {reason}"] += 1
            if isinstance(error, LeaseLost):
                simulation.lease_counts["deposed"] += 1
            asked = self.life is not None and bool(self.life.stop)
            if not (asked and (error is None or isinstance(error, CancelledError))):
                simulation.auditor.ended(error)
        self._gone(process, f"ended with {error!r}")

    def _gone(self, process: Process, how: str) -> None:
        simulation = self._simulation
        self._world.note("gone", f"{process.name} {how}")
        if self.life is not None:
            for failure in process.failures:
                simulation.auditor.violate(f"a callback failed: {failure}")
            simulation.lease_counts["refused sends"] += self.life.refused_sends
        if self.wire is not None:
            self.wire.close()
        self.life = self.process = self.wire = None
        self._world.later(RESTART_S, self.start)
