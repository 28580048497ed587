"""Where the loop's thread stands while it is held up, noted by a thread beside it.

The lag itself is known only once the loop runs again, when what held it is gone. So a thread looks twice in
each alarm time whether the lag sampler missed its beat, and notes the stack once when it did. It costs a
few microseconds a look and 40 KB. A call that keeps the GIL is seen when it lets go of it.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from service.monitor.lag import LoopLag

_SHORTEST_LOOK_S = 0.01
_FRAMES = 12  # the innermost: what is further out is the loop and the task
_STACK_BYTES = 256 * 1024


class HeldStack:
    """The innermost frames of the loop's thread when it last missed its beat."""

    def __init__(self, lag: LoopLag, *, alarm_ms: float) -> None:
        self._lag = lag
        self._look_s = max(alarm_ms / 2_000, _SHORTEST_LOOK_S)
        self._beat_s = 0.0  # the beat after which the noted stack stood
        self._stack: list[str] = []
        self._end = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calling thread while the block runs."""
        before = threading.stack_size(_STACK_BYTES)  # its frames are few, and address space counts too
        try:
            thread = threading.Thread(
                target=self._watch, args=(threading.get_ident(),), name="loop-stack", daemon=True
            )
            thread.start()
        finally:
            threading.stack_size(before)
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def take(self) -> list[str]:
        """What was noted since the last beat, the innermost last, as "file:line function"; else empty.

        Meant for the lag sampler's alarm, which comes before its next beat.
        """
        return self._stack if self._beat_s == self._lag.beat_s else []

    def _watch(self, thread_id: int) -> None:
        while not self._end.wait(self._look_s):
            beat_s = self._lag.beat_s
            missed = beat_s and time.monotonic() - beat_s > self._lag.interval_s + self._look_s
            if missed and beat_s != self._beat_s:
                frame = sys._current_frames().get(thread_id)
                self._stack, self._beat_s = frames(frame), beat_s
                del frame  # it would keep the locals of whoever held the loop


def frames(frame: FrameType | None) -> list[str]:
    """The innermost frames, the outermost of them first. Reads no source file."""
    found: list[str] = []
    while frame is not None and len(found) < _FRAMES:
        code = frame.f_code
        found.append(f"{_below(code.co_filename)}:{frame.f_lineno} {code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


def _below(path: str) -> str:
    """The file's name with its package: enough to find it, and no machine's own directories."""
    return "/".join(path.rsplit("/", 3)[1:]) if path.count("/") > 2 else path
