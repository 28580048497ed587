"""The pool of worker processes, forked from a nursery."""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

import structlog

from service.analysis.executor import AnalysisExecutor
from service.analysis.inline import InlineExecutor
from service.analysis.nursery import HEADER, Nursery, frame, spawn_nursery
from service.errors import WorkerLost
from service.settings import AnalysisSettings

P = ParamSpec("P")
T = TypeVar("T")

_IN_FLIGHT = 2  # tasks per worker: the second waits in its socket, so that it never waits for the daemon
_READ_BYTES = 1 << 16
_MAX_STILLBORN = 3  # workers in a row that ended before they said their process id
_FORK_PAUSE_S, _MAX_FORK_PAUSE_S = (
    0.2,
    5.0,
)  # after a worker that died early: a broken start must not become a fork storm

log = structlog.get_logger("analysis.pool")


class WorkersUnavailable(WorkerLost):
    """No worker can be started: what was asked is not the cause."""


class _Task:
    __slots__ = ("future", "payload", "prefers")

    def __init__(self, payload: bytes, prefers: int | None) -> None:
        self.payload = payload
        self.prefers = prefers  # a place among the workers
        self.future: Future[Any] = Future()

    def begin(self) -> bool:
        """Mark it as running (a lost worker's already is); False when it was cancelled."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def fail(self, error: WorkerLost) -> None:
        if self.begin():
            self.future.set_exception(error)


class _Worker:
    """One worker as the daemon sees it. `tasks` are in its hands, the first is being worked on."""

    __slots__ = (
        "answered",
        "incoming",
        "outgoing",
        "pid",
        "retired",
        "socket",
        "started_s",
        "tasks",
        "timer",
    )

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.pid = 0  # until its first frame
        self.tasks: deque[_Task] = deque()
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.timer: asyncio.TimerHandle | None = None
        self.answered = 0
        self.retired = ""  # why it gets no more tasks
        self.started_s = 0.0


class NurseryPool(AnalysisExecutor):
    """Worker processes behind the standard Executor interface, driven by the running event loop.

    A task is a module-level function or a partial of one, which must not change between two tasks, with small
    arguments. Tasks start in the order given; each worker holds at most two. A worker that dies or exceeds
    `limit_s` fails the task it was at with WorkerLost, the other one moves to another worker, and a new one
    takes its place. A worker whose own memory exceeds `memory_limit_bytes` after a task is replaced at once,
    one that did `max_tasks` (0 is never) once idle.
    """

    def __init__(
        self,
        nursery: Nursery,
        workers: int,
        *,
        limit_s: float,
        memory_limit_bytes: int,
        max_tasks: int = 0,
        respawn: Callable[[], Nursery] = spawn_nursery,
    ) -> None:
        """Must be called inside the running loop. The nursery becomes the pool's to close."""
        self._loop = asyncio.get_running_loop()
        self._nursery = nursery
        self._respawn = respawn
        self._limit_s = limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._max_tasks = max_tasks
        self._wanted = workers
        self._workers: list[_Worker] = []
        self._pending: deque[_Task] = deque()
        self._function: Callable[..., Any] | None = None  # the last one, and what is sent for it
        self._sent_function = b""
        self._received = memoryview(bytearray(_READ_BYTES))  # one for all: a new one a read costs its pages
        self._stillborn = 0
        self._closed = False
        self._refill_timer: asyncio.TimerHandle | None = None
        self.lost = 0
        self.replaced = 0
        self._refill()

    # -- what callers use

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call; keyword arguments are not supported."""
        return self._submit(fn, args, kwargs, None)

    def submit_to(self, number: int, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `submit`. A number is a place among the workers; it changes hands when a worker is replaced."""
        return self._submit(fn, args, kwargs, number)

    def _submit(
        self, fn: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any], prefers: int | None
    ) -> Future[T]:
        if self._closed:
            raise RuntimeError("the pool is closed")
        if kwargs:
            raise TypeError("tasks take positional arguments only")
        if fn is not self._function:
            self._function, self._sent_function = fn, pickle.dumps(fn)
        task = _Task(frame((self._sent_function, args)), prefers)
        self._pending.append(task)
        self._hand_out()
        return task.future

    def kill(self, future: "Future[Any]") -> bool:
        """Kill the worker that is at this task; False when the task is not being worked on."""
        for worker in self._workers:
            if worker.tasks and worker.tasks[0].future is future:
                self._kill(worker, "killed on request")
                return True
        return False

    def replace_workers(self, reason: str) -> None:
        """Replace every worker once it is idle, to give its memory back."""
        for worker in list(self._workers):
            self._retire(worker, reason)

    def resize(self, workers: int) -> None:
        """Keep this many workers from now on; those too many end once they are idle."""
        self._wanted = workers
        serving = [worker for worker in self._workers if not worker.retired]
        for worker in serving[workers:]:
            self._retire(worker, f"{workers} workers are enough")
        self._refill_later()

    @property
    def workers(self) -> int:
        return self._wanted

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in self._workers if worker.pid]

    @property
    def nursery_pid(self) -> int:
        return self._nursery.pid

    @property
    def depth(self) -> int:
        """Tasks waiting or being worked on."""
        return len(self._pending) + sum(len(worker.tasks) for worker in self._workers)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all workers and the nursery; unfinished tasks fail with WorkerLost. Never waits for them."""
        if self._closed:
            return
        self._closed = True
        if self._refill_timer is not None:
            self._refill_timer.cancel()
        for worker in list(self._workers):
            self._drop(worker)
            for task in worker.tasks:
                task.fail(WorkerLost("the pool was closed"))
        self._fail_pending(WorkerLost("the pool was closed"))
        self._nursery.close()

    # -- workers come and go

    def _refill(self) -> None:
        self._refill_timer = None
        while not self._closed and len(self._workers) < self._wanted:
            self._workers.append(self._fork())
        self._hand_out()

    def _refill_later(self) -> None:
        if self._refill_timer is None and not self._closed:
            pause = min(_FORK_PAUSE_S * self._stillborn, _MAX_FORK_PAUSE_S)
            self._refill_timer = self._loop.call_later(pause, self._refill)

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._nursery.fork_worker(theirs)
            except OSError:
                self._renew_nursery()
                try:
                    self._nursery.fork_worker(theirs)
                except OSError as error:
                    log.error("nursery does not take requests", reason=str(error))
        ours.setblocking(False)
        worker = _Worker(ours)
        self._loop.add_reader(ours, self._on_readable, worker)
        return worker

    def _renew_nursery(self) -> None:
        failure = self._nursery.failure()
        log.error("nursery lost; starting another", reason=failure or "it ended without a word")
        self._nursery.close()
        self._nursery = self._respawn()

    def _drop(self, worker: _Worker) -> None:
        self._loop.remove_reader(worker.socket)
        self._loop.remove_writer(worker.socket)
        worker.socket.close()
        if worker.timer is not None:
            worker.timer.cancel()
        self._workers.remove(worker)

    def _on_lost(self, worker: _Worker, reason: str) -> None:
        """A worker is gone: fail what it was at, hand on what it had not begun, replace it."""
        if worker not in self._workers:
            return
        self._drop(worker)
        self.lost += 1
        if worker.pid:
            self._stillborn = 0
        else:
            self._stillborn += 1
        log.warning("worker lost", pid=worker.pid, reason=reason, tasks=len(worker.tasks))
        if worker.tasks and worker.pid:
            worker.tasks.popleft().fail(WorkerLost(f"worker {worker.pid} {reason}"))
        self._pending.extendleft(reversed(worker.tasks))
        if self._stillborn >= _MAX_STILLBORN:
            cause = self._nursery.failure() or "workers end as soon as they start"
            log.error("workers cannot be started", reason=cause)
            self._fail_pending(WorkersUnavailable(f"workers cannot be started: {cause}"))
        self._refill_later()

    def _fail_pending(self, error: WorkerLost) -> None:
        while self._pending:
            self._pending.popleft().fail(error)

    def _kill(self, worker: _Worker, reason: str) -> None:
        if worker.pid:
            try:
                os.kill(worker.pid, signal.SIGKILL)  # its socket is open, so the id is still its own
            except ProcessLookupError:
                reason = "ended"
        self._on_lost(worker, reason)

    def _retire(self, worker: _Worker, reason: str) -> None:
        worker.retired = worker.retired or reason
        if not worker.tasks and worker.pid:
            self._drop(worker)  # it ends when it reads the end of its socket
            self.replaced += 1
            log.info("worker replaced", pid=worker.pid, reason=worker.retired)
            self._refill_later()

    def _replace_now(self, worker: _Worker, reason: str) -> None:
        """End a worker that is too large; the task that waits beside it begins elsewhere."""
        if worker not in self._workers:
            return
        self._drop(worker)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)  # what it leaks next would come on top
        self.replaced += 1
        log.info("worker replaced", pid=worker.pid, reason=reason)
        self._pending.extendleft(reversed(worker.tasks))
        worker.tasks.clear()
        self._refill_later()

    # -- tasks go out

    def _hand_out(self) -> None:
        while self._pending:
            if self._pending[0].future.cancelled():
                self._pending.popleft().begin()  # also while no worker is free: nobody waits for it
                continue
            free = [w for w in self._workers if len(w.tasks) < _IN_FLIGHT and not w.retired]
            if not free:
                return
            task = self._pending.popleft()
            if task.begin():
                self._give(self._chosen(free, task.prefers), task)

    def _chosen(self, free: list[_Worker], prefers: int | None) -> _Worker:
        if prefers is not None:
            preferred = self._workers[prefers % len(self._workers)]
            if preferred in free:
                return preferred
        return min(free, key=lambda w: len(w.tasks))

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.tasks.append(task)
        if len(worker.tasks) == 1:
            self._watch(worker)
        idle = not worker.outgoing
        worker.outgoing += task.payload
        if idle:
            self._write(worker)
            if worker.outgoing:
                self._loop.add_writer(worker.socket, self._write_on, worker)

    def _write_on(self, worker: _Worker) -> None:
        self._write(worker)
        if not worker.outgoing:
            self._loop.remove_writer(worker.socket)

    def _write(self, worker: _Worker) -> None:
        try:
            sent = worker.socket.send(worker.outgoing)
        except BlockingIOError:
            return
        except OSError:
            sent = len(worker.outgoing)  # it ended: its readable side reports the end of file
        del worker.outgoing[:sent]

    def _watch(self, worker: _Worker) -> None:
        """The time limit of the task the worker is at begins; a worker still starting has none yet.

        A timer outlives the tasks it was not needed for: setting one for each would cost more than most take.
        """
        worker.started_s = self._loop.time()
        if worker.timer is None and worker.tasks and worker.pid:
            worker.timer = self._loop.call_later(self._limit_s, self._look_after, worker)

    def _look_after(self, worker: _Worker) -> None:
        worker.timer = None
        if not worker.tasks:
            return  # the next task sets another timer
        left_s = worker.started_s + self._limit_s - self._loop.time()
        if left_s <= 0.0:
            self._kill(worker, f"was killed at its time limit of {self._limit_s:g} s")
        else:
            worker.timer = self._loop.call_later(left_s, self._look_after, worker)

    # -- answers come in

    def _on_readable(self, worker: _Worker) -> None:
        try:
            size = worker.socket.recv_into(self._received)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._on_lost(worker, "ended")
            return
        worker.incoming += self._received[:size]
        buffer = worker.incoming
        while len(buffer) >= HEADER.size and worker in self._workers:
            end = HEADER.size + HEADER.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            answer = pickle.loads(memoryview(buffer)[HEADER.size : end])
            del buffer[:end]
            self._on_answer(worker, answer)

    def _on_answer(self, worker: _Worker, answer: Any) -> None:
        if not worker.pid:
            worker.pid = answer
            self._stillborn = 0
            self._watch(worker)
            if worker.retired:  # while it was starting, when nobody could tell it to go
                self._retire(worker, worker.retired)
            return
        succeeded, value, own_bytes = answer
        future = worker.tasks.popleft().future
        worker.answered += 1
        self._watch(worker)
        if own_bytes > self._memory_limit_bytes:
            self._replace_now(worker, f"{own_bytes / 1e6:.0f} MB of its own")
        elif 0 < self._max_tasks <= worker.answered:
            self._retire(worker, f"{worker.answered} tasks")
        elif worker.retired:
            self._retire(worker, worker.retired)
        self._hand_out()
        if succeeded:
            future.set_result(value)
        else:
            future.set_exception(value)


@asynccontextmanager
async def open_pool(
    settings: AnalysisSettings, nursery: Nursery | None
) -> AsyncIterator[NurseryPool | InlineExecutor]:
    """The executor the settings ask for; its processes are gone when the block ends.

    `nursery`: from `start_nursery`; it is closed with the pool. None: one is started when workers are wanted.
    """
    pool: NurseryPool | InlineExecutor
    if settings.workers == 0:
        if nursery is not None:
            nursery.close()
        pool = InlineExecutor(limit_s=settings.batch_limit_s)
    else:
        pool = NurseryPool(
            nursery or spawn_nursery(),
            settings.workers,
            limit_s=settings.batch_limit_s,
            memory_limit_bytes=int(settings.worker_memory_limit_mb * 1_000_000),
            max_tasks=settings.worker_max_batches,
        )
    try:
        yield pool
    finally:
        pool.shutdown()
