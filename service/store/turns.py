"""Turns on the store's one thread: what waits when the thread is free shares a transaction and its sync.

A sync of the disk takes most of a write's time, and a second one no less. So calls that wait do not queue for
a sync each: they are done in the order made, in one transaction, and each is answered once that is durable. A
turn that fails as a whole, for whatever reason, is undone and its calls are made one by one, so that each has
its own outcome.

Nobody's order waits for some calls: they can be put off until nothing else was asked for in a while, and
so can upkeep of the file.
"""

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import takewhile
from typing import Any, TypeVar

import msgspec

Result = TypeVar("Result")
Work = Callable[[sqlite3.Connection], Result]

QUIET_S = 0.05  # the writes of one order follow each other faster, with an answer of the venue in between
LATEST_S = 0.5  # what was put off waits no longer, however busy the store is
IDLE_S = 0.25  # longer than from one entry of a cycle to the next


class Call(msgspec.Struct, frozen=True):
    """Work on the connection, and who waits for it. It may be undone and begun again."""

    work: Work[Any]
    writes: bool
    answer: asyncio.Future[Any]


class Answer(msgspec.Struct, frozen=True):
    """What became of a call."""

    result: Any = None
    error: BaseException | None = None


class Turns:
    """Makes calls on a connection that this thread owns, in the order made.

    Args: upkeep: work for idle moments, at the earliest after `upkeep_after` turns that wrote; it must not
    raise.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        thread: Executor,
        *,
        upkeep: Callable[[sqlite3.Connection], None] | None = None,
        upkeep_after: int = 1,
    ) -> None:
        self._connection = connection
        self._thread = thread
        self._upkeep = upkeep
        self._upkeep_after = upkeep_after
        self._lock = threading.Lock()  # of the next two: the loop adds, the thread takes
        self._calls: deque[Call] = deque()
        self._working = False
        self._put_off: list[Call] = []
        self._put_off_s = 0.0  # loop time of the first of them
        self._asked_s = 0.0  # loop time of the newest call that was not put off
        self._timer: asyncio.TimerHandle | None = None
        self._written = 0  # turns that wrote since the last upkeep
        self._finished = False

    async def make(self, work: Work[Result], *, writes: bool, put_off: bool = False) -> Result:
        """Do the work in its turn. Raises what it raises, and sqlite3.Error where nothing could be written.

        A call that is cancelled before its turn is not made, later it is made whole. Args: put_off: it can
        wait until all is quiet, for at most LATEST_S; of these, too, none overtakes another.
        """
        loop = asyncio.get_running_loop()
        call = Call(work, writes, loop.create_future())
        if not put_off:
            self._asked_s = loop.time()
        if put_off and not self._finished and (self._put_off or (writes and self._quiet_s(loop) < QUIET_S)):
            if not self._put_off:
                self._put_off_s = loop.time()
            self._put_off.append(call)
            self._look_again(loop, QUIET_S)
        else:
            self._add((call,), loop)
        result: Result = await call.answer
        return result

    def finish(self) -> None:
        """Put nothing off any longer: all that was asked for is made before what the thread is given next."""
        if self._timer is not None:
            self._timer.cancel()
        self._upkeep = None
        self._finished = True
        calls, self._put_off = self._put_off, []
        self._add(calls, asyncio.get_running_loop())

    def _add(self, calls: Sequence[Call], loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._calls.extend(calls)
            if self._working or not self._calls:
                return
            self._working = True
        loop.run_in_executor(self._thread, self._work_off, loop)

    def _quiet_s(self, loop: asyncio.AbstractEventLoop) -> float:
        """For how long nothing was asked for that cannot wait; 0 while the thread works."""
        return 0.0 if self._working else loop.time() - self._asked_s

    def _look_again(self, loop: asyncio.AbstractEventLoop, after_s: float) -> None:
        """Look whether all is quiet, after a while; sooner when that was asked for before."""
        if self._timer is None:
            self._timer = loop.call_later(after_s, self._when_quiet, loop)

    def _when_quiet(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        quiet_s = self._quiet_s(loop)
        if self._put_off and (quiet_s >= QUIET_S or loop.time() - self._put_off_s >= LATEST_S):
            calls, self._put_off = self._put_off, []
            self._add(calls, loop)
        if self._put_off:
            self._look_again(loop, QUIET_S)
        elif self._upkeep is not None and self._written >= self._upkeep_after:
            if quiet_s >= IDLE_S:
                self._written = 0
                loop.run_in_executor(self._thread, self._upkeep, self._connection)
            else:
                self._look_again(loop, IDLE_S)

    # -- on the thread

    def _work_off(self, loop: asyncio.AbstractEventLoop) -> None:
        while taken := self._next():
            calls = [call for call in taken if not call.answer.cancelled()]
            for made, answers in together(self._connection, calls):
                loop.call_soon_threadsafe(self._answer, loop, made, answers)

    def _next(self) -> list[Call]:
        """All that waits; reads that came before the first write are a turn of their own."""
        with self._lock:
            reads = list(takewhile(lambda call: not call.writes, self._calls))
            taken = reads or list(self._calls)
            for _ in taken:
                self._calls.popleft()
            self._working = bool(taken)
        return taken

    # -- on the loop

    def _answer(
        self, loop: asyncio.AbstractEventLoop, calls: Sequence[Call], answers: Sequence[Answer]
    ) -> None:
        for call, answer in zip(calls, answers, strict=True):
            if call.answer.done():  # whoever asked is gone
                continue
            if answer.error is not None:
                call.answer.set_exception(answer.error)
            else:
                call.answer.set_result(answer.result)
        self._written += any(call.writes for call in calls)
        if self._upkeep is not None and self._written >= self._upkeep_after:
            self._look_again(loop, IDLE_S)


def together(
    db: sqlite3.Connection, calls: Sequence[Call]
) -> Iterator[tuple[Sequence[Call], Sequence[Answer]]]:
    """Make calls in one transaction, and one by one when that fails; each with its answer, once made."""
    if len(calls) > 1 and any(call.writes for call in calls):
        try:
            db.execute("begin immediate")
        except BaseException as error:  # noqa: BLE001  an executor hands every error to its caller
            # Nobody can write now: trying each alone would take each of them as long.
            for call in calls:
                yield (call,), (Answer(error=error) if call.writes else _alone(db, call),)
            return
        if (answers := _shared(db, calls)) is not None:
            yield calls, answers
            return
    for call in calls:
        yield (call,), (_alone(db, call),)


def _shared(db: sqlite3.Connection, calls: Sequence[Call]) -> list[Answer] | None:
    """The answers of a transaction that has begun; None when it failed and was undone."""
    try:
        return [Answer(result) for result in _committed(db, calls)]
    except BaseException:  # noqa: BLE001  whose fault it is shows when each is made alone
        return None


def _alone(db: sqlite3.Connection, call: Call) -> Answer:
    try:
        if call.writes:
            return Answer(_in_transaction(db, (call,))[0])
        return Answer(call.work(db))
    except BaseException as error:  # noqa: BLE001  an executor hands every error to its caller
        return Answer(error=error)


def _in_transaction(db: sqlite3.Connection, calls: Sequence[Call]) -> list[Any]:
    """The results, all durable."""
    db.execute("begin immediate")
    return _committed(db, calls)


def _committed(db: sqlite3.Connection, calls: Sequence[Call]) -> list[Any]:
    """The results of a transaction that has begun, all durable."""
    try:
        results = [call.work(db) for call in calls]
        db.execute("commit")
    except BaseException:
        if db.in_transaction:  # a full disk may have ended it already
            db.execute("rollback")
        raise
    return results
