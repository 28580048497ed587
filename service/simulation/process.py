"""A simulated process: an asyncio loop in virtual time that can die between any two steps.

Death is not cancellation: nothing is drained, no handler runs to its end, and what a dying coroutine still
does on its way out reaches nobody. What was durable is all that a restart finds.
"""

import asyncio
import contextlib
import heapq
import sys
import warnings
from asyncio import events
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from typing import Any

from service.simulation.world import World

MOST_CLOSES = 30
EARLY_S = 1e-9  # a timer this much before its time is due: time is a sum of floats


@contextlib.contextmanager
def last_words_unheard() -> Iterator[None]:
    """What dies in mid-air cannot end properly and Python says so; that is no news here."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook = hook


class Gone(BaseException):
    """What a process that died asks for on its way out: nothing."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without selector, sockets or threads. `Process` turns it."""

    _ready: Any
    _scheduled: Any

    def __init__(self, process: "Process") -> None:
        super().__init__()
        self._process = process
        self.set_debug(False)
        self.set_exception_handler(process.failed_callback)

    def time(self) -> float:
        return self._process.world.now_s

    def _write_to_self(self) -> None:
        """There is no selector to wake."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """A blocking call: asked for, done in a later step, known in a third; death may come between."""
        future: asyncio.Future[Any] = self.create_future()
        self.call_soon(self._execute, future, func, args)
        return future

    def _execute(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        process = self._process
        process.writes += 1
        if process.writes == process.die_before_write:
            process.doomed = "before a write"
            return
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001  an executor hands every error to its caller
            self.call_soon(_settle, future, None, error)
            return
        if process.writes == process.die_after_write:
            process.doomed = "after a write"
        self.call_soon(_settle, future, result, None)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class Process:
    """Runs one coroutine until it ends or dies.

    Args: on_end(process, error): the coroutine ended; on_death(process, why).
    """

    def __init__(
        self,
        world: World,
        name: str,
        on_end: Callable[["Process", BaseException | None], None],
        on_death: Callable[["Process", str], None],
    ) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.doomed = ""
        self.started_s = world.now_s
        self.steps = 0  # callbacks run: each await that waits is one more
        self.writes = 0
        self.die_at_step = self.die_before_write = self.die_after_write = 0
        self.paused = False
        self.pause_at_step = 0
        self.pause_s = 0.0
        self.failures: list[str] = []
        self.epoch = 0  # of the lease it took, if it shares one
        self._on_end = on_end
        self._on_death = on_death
        self.loop = VirtualLoop(self)
        self._main: asyncio.Task[None] | None = None

    def start(self, main: Coroutine[Any, Any, None]) -> None:
        self._main = self.loop.create_task(main)
        self.world.processes.append(self)

    def failed_callback(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if self.alive:
            self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    def pause(self, seconds: float) -> None:
        """Stand still for so long: time passes, what arrives waits, and nothing is noticed."""
        self.pause_at_step = 0
        if not self.paused:
            self.paused = True
            self.world.note("pause", f"{self.name} {seconds:.3f}")
            self.world.later(seconds, self.go_on)

    def go_on(self) -> None:
        if self.paused:
            self.paused = False
            self.world.note("go on", self.name)

    def next_s(self) -> float:
        if self.paused:
            return float("inf")
        if self.loop._ready:
            return self.world.now_s
        scheduled = self.loop._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        return float(scheduled[0]._when) if scheduled else float("inf")

    def turn(self) -> bool:
        """Run what is ready now; dies or stands still when its step has come."""
        if self.paused:
            return False
        loop = self.loop
        ready, scheduled = loop._ready, loop._scheduled
        due_s = self.world.now_s + EARLY_S
        while scheduled and scheduled[0]._when <= due_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
        if not ready:
            return False
        before = events._get_running_loop()
        events._set_running_loop(loop)
        try:
            for _ in range(len(ready)):
                if self.steps + 1 == self.pause_at_step:
                    self.pause(self.pause_s)
                    return True
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                self.steps += 1
                if self.steps == self.die_at_step:
                    self.doomed = "between two steps"
                if self.doomed:
                    break
                handle._run()
        finally:
            events._set_running_loop(before)
        if self.doomed:
            self.die(self.doomed)
        elif self._main is not None and self._main.done():
            self._ended()
        return True

    def _ended(self) -> None:
        main = self._main
        assert main is not None
        error: BaseException | None = asyncio.CancelledError() if main.cancelled() else main.exception()
        self.bury()
        self._on_end(self, error)

    def cancel(self) -> None:
        """Ask what it runs to end."""
        if self._main is not None:
            self._main.cancel()

    def die(self, why: str) -> None:
        """Die at once. Call it outside the process's own steps."""
        self.bury()
        self._on_death(self, why)

    def bury(self) -> None:
        """Leave the world; coroutines are closed here, deterministically, and reach nobody."""
        self.alive = False
        if self in self.world.processes:
            self.world.processes.remove(self)
        with last_words_unheard():
            self._close_all()
            self.loop.close()
            self._main = None

    def _close_all(self) -> None:
        """What awaits on its way out is closed there too, and so is what it began."""
        for _ in range(MOST_CLOSES):
            alive = [task for task in asyncio.all_tasks(self.loop) if _running(task)]
            if not alive:
                return
            for task in alive:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = task.get_coro()
                with contextlib.suppress(BaseException):
                    if coroutine is not None:
                        coroutine.close()


def _running(task: "asyncio.Task[Any]") -> bool:
    return getattr(task.get_coro(), "cr_frame", None) is not None
