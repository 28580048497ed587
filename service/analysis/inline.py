"""The executor without workers: each task at once, in the calling process."""

import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from service.analysis.executor import AnalysisExecutor
from service.analysis.limit import LimitReached
from service.errors import WorkerLost

P = ParamSpec("P")
T = TypeVar("T")


class InlineExecutor(AnalysisExecutor):
    """Runs each task at once in the calling process: the smallest box, no process but the daemon.

    A task that exceeds `limit_s` on the main thread is interrupted and fails with WorkerLost, unless it
    sits in native code. The caller's loop stands still while a task runs.
    """

    def __init__(self, *, limit_s: float) -> None:
        self._limit_s = limit_s
        self._working = False  # only then may the limit interrupt: anywhere else it would end the daemon

    workers = 0
    lost = replaced = 0
    pids: tuple[int, ...] = ()

    def resize(self, workers: int) -> None:
        """There are none."""

    def replace_workers(self, reason: str) -> None:
        """There are none."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        previous = self._start_timer()
        try:
            result = self._work(fn, args, kwargs)
        except LimitReached:
            future.set_exception(WorkerLost(f"interrupted at its time limit of {self._limit_s:g} s"))
        except Exception as error:  # noqa: BLE001  an executor hands every error to its caller
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            if previous is not None:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                signal.signal(signal.SIGALRM, previous)
        return future

    def _work(self, fn: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
        try:
            self._working = True
            return fn(*args, **kwargs)
        finally:
            self._working = False

    def _start_timer(self) -> Any:
        try:
            previous = signal.signal(signal.SIGALRM, self._interrupt)
        except ValueError:
            return None  # not the main thread: no limit there
        signal.setitimer(signal.ITIMER_REAL, self._limit_s)
        return previous

    def _interrupt(self, number: int, where: FrameType | None) -> None:
        if self._working:
            self._working = False  # at most once a task
            raise LimitReached

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let go of the candle store and the strategy."""
        from service.analysis.worker import forget  # numpy and TA-Lib, only where they are used

        forget()
