"""What must hold of two daemons on one account: one of them sends and writes, and one is always there."""

from typing import TYPE_CHECKING

import msgspec

from service.exchange.simulated.rest import Answer, Request
from service.simulation.process import Process

if TYPE_CHECKING:
    from service.simulation.run import Simulation

TIMESTAMP_REFUSED = -1021
STORE_BACK_S = 15.0  # a write that failed when the database came back may leave its order this much later


class LeaseAuditor:
    """Judges by the database's clock and row. There is nothing to judge where one host trades alone."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._written = 0  # the newest epoch that wrote
        self.unwritten: set[str] = set()  # orders that were sent while their database was away

    def answered(self, process: Process, request: Request, answer: Answer) -> None:
        """A request that changes the account arrived: its sender must hold the lease at this moment.

        One that the venue refuses for its age did nothing: a network may hold a request for any time, and
        the last third of the lease is longer than a request stays valid.
        """
        shared = self._simulation.shared
        if shared is None or request.method == "GET" or "signature=" not in request.query:
            return
        if shared.holds(process.epoch):
            return
        if answer.status == 400 and code_of(answer) == TIMESTAMP_REFUSED:
            self._simulation.lease_counts["late requests refused for their age"] += 1
            return
        self._simulation.auditor.violate(
            f"sent without the lease: {process.name} of epoch {process.epoch}, the row's is {shared.epoch} "
            f"until {shared.expires_s:.3f} s: {request.method} {request.path}"
        )

    def wrote(self, epoch: int) -> None:
        """A transaction wrote under this epoch."""
        shared = self._simulation.shared
        if shared is not None and (epoch < self._written or epoch != shared.epoch):
            self._simulation.auditor.violate(f"a deposed daemon wrote: epoch {epoch} after {self._written}")
        self._written = max(epoch, self._written)

    def may_be_unwritten(self, process: Process, name: str) -> bool:
        """Stops and exits go on while the database is away, and are written later. Entries do not."""
        shared = self._simulation.shared
        host = process.name.rpartition("-")[0]
        leg = name.rpartition("-")[2]
        if shared is None or leg.startswith("e") or not shared.was_away(host, STORE_BACK_S):
            return False
        self.unwritten.add(name)
        return True

    def troubled(self) -> bool:
        """Whether nobody can send just now, for want of a holder, of its database or of its time."""
        simulation = self._simulation
        if simulation.shared is None:
            return False
        leader = simulation.leader
        if leader is None or leader.process is None or leader.process.paused:
            return True
        return (
            simulation.shared.cut_from(leader.name) is not None
            or not simulation.shared.holds(leader.process.epoch)
            or bool(leader.life is not None and leader.life.barred)
        )

    def ailments(self) -> dict[str, str]:
        """What is not as it should be in calm: one holds the lease, and the other stands by."""
        simulation = self._simulation
        if simulation.shared is None:
            return {}
        wrong = {}
        for host in simulation.hosts:
            if host is not simulation.leader and (host.life is None or not host.life.waits):
                wrong["nobody stands by"] = host.name
        leader = simulation.leader
        if leader is None or leader.process is None or not simulation.shared.holds(leader.process.epoch):
            wrong["nobody holds the lease"] = f"the last one ran out at {simulation.shared.expires_s:.3f} s"
        return wrong


def code_of(answer: Answer) -> int:
    """The venue's error code."""
    return int(msgspec.json.decode(answer.body)["code"])
