"""What strikes two daemons on one account in a storm: deaths, pauses, networks that fail, hand-overs."""

from collections import Counter
from typing import TYPE_CHECKING

from service.simulation.database import Cut
from service.simulation.process import Process

if TYPE_CHECKING:
    from service.simulation.host import Host
    from service.simulation.run import Simulation

STRIKES_AN_HOUR = 12.0
LONGEST_PAUSE_S = 75.0  # two and a half leases
LONGEST_CUT_S = 90.0
LONGEST_OUTAGE_S = 60.0
HELD_SHARE = 0.01  # of the requests that change the account
LONGEST_HELD_S = 40.0
SOON_STEPS = 2_000


class LeaseFaults:
    """Strikes the holder more often than not. `counts` by kind."""

    def __init__(self, simulation: "Simulation") -> None:
        self.counts: Counter[str] = Counter()
        self._simulation = simulation
        self._world = simulation.world
        self._random = simulation.world.random
        self._active = False
        self._storms = 0

    def storm(self, length_s: float) -> None:
        self._active = True
        self._storms += 1
        at_s, end_s, storm = self._world.now_s, self._world.now_s + length_s, self._storms
        while (at_s := at_s + self._random.expovariate(STRIKES_AN_HOUR / 3_600)) < end_s:
            self._world.at(at_s, lambda: self._strike(storm))

    def calm(self) -> None:
        """All is mended at once."""
        self._active = False
        if self._simulation.shared is not None:
            self._simulation.shared.mend()
        for host in self._simulation.hosts:
            host.calm()

    def held_s(self, process: Process, method: str) -> float:
        """How long the network holds a request back that changes the account; mostly not at all."""
        if not self._active or method == "GET" or self._random.random() >= HELD_SHARE:
            return 0.0
        self._note("request held on the wire")
        return self._random.uniform(0.5, LONGEST_HELD_S)

    def _strike(self, storm: int) -> None:
        if not self._active or storm != self._storms:
            return
        hosts = [host for host in self._simulation.hosts if host.process is not None]
        if not hosts:
            return
        leader = self._simulation.leader
        host = leader if leader in hosts and self._random.random() < 0.8 else self._random.choice(hosts)
        assert host is not None
        match self._random.randrange(5):
            case 0:
                self._kill(host)
            case 1:
                self._pause(host)
            case 2:
                self._cut((host,), self._random.uniform(1.0, LONGEST_CUT_S), "database away from one")
            case 3:
                both = tuple(self._simulation.hosts)
                self._cut(both, self._random.uniform(1.0, LONGEST_OUTAGE_S), "database away")
            case _:
                self._hand_over(host)

    def _kill(self, host: "Host") -> None:
        process = host.process
        assert process is not None
        self._note("killed")
        process.doomed = "at a moment of chance"
        process.die(process.doomed)

    def _pause(self, host: "Host") -> None:
        """At a step to come, so that it may be in the middle of anything."""
        process = host.process
        assert process is not None
        self._note("paused")
        process.pause_s = self._random.uniform(1.0, LONGEST_PAUSE_S)
        process.pause_at_step = process.steps + self._random.randrange(1, SOON_STEPS)

    def _cut(self, hosts: tuple["Host", ...], seconds: float, kind: str) -> None:
        shared = self._simulation.shared
        assert shared is not None
        self._note(kind)
        cut = Cut(silent=self._random.random() < 0.5)
        for host in hosts:
            shared.cut(host.name, cut)
        names = [host.name for host in hosts]
        self._world.later(seconds, lambda: shared.mend(*names))

    def _hand_over(self, host: "Host") -> None:
        """As a platform replaces a deployment."""
        assert host.life is not None
        self._note("told to end")
        host.life.end("SIGTERM")

    def _note(self, kind: str) -> None:
        self.counts[kind] += 1
        self._world.note("lease fault", kind)
