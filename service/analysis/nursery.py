"""A small parent for the workers, forked from the daemon before it imports anything heavy.

daemon --control socket--> nursery --fork--> worker --task socket--> daemon

The nursery imports numpy, TA-Lib and the strategies once, freezes that heap and forks a worker whenever the
daemon sends it one end of a socket pair; the pages are shared by all workers. It ends when the daemon does
(its control socket reaches the end of file), and each worker ends with its own socket or with the nursery,
even in the middle of a hung strategy. Neither writes to the daemon's stdout or stderr, nor hears Ctrl-C.
"""

import functools
import gc
import os
import pickle
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import NoReturn

HEADER = struct.Struct("=I")
_FORK = b"f"
_READ_BYTES = 1 << 15
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_KNOWN_PACKAGES = ("builtins", "service")


@dataclass(frozen=True)
class Nursery:
    """The daemon's end of a nursery process."""

    pid: int
    control: socket.socket

    def fork_worker(self, task_socket: socket.socket) -> None:
        """Ask for a worker that serves the other end of `task_socket`; returns at once.

        The worker's first frame is its process id. Raises OSError when the nursery is gone.
        """
        socket.send_fds(self.control, [_FORK], [task_socket.fileno()])

    def failure(self) -> str:
        """Why the nursery could not start, in words; "" when it said nothing."""
        try:
            return self.control.recv(65_536, socket.MSG_DONTWAIT).decode("utf-8", "replace")
        except OSError:
            return ""

    def close(self) -> None:
        """End the nursery and whatever workers are left, and wait until it is gone."""
        self.control.close()
        try:
            os.kill(self.pid, signal.SIGKILL)  # its workers die with it, hung ones too
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return  # already gone, and reaped by somebody else


def start_nursery() -> Nursery:
    """Fork a nursery from this process. Call it first of all: before heavy imports, threads and the loop."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        serve(theirs)
    theirs.close()
    return Nursery(pid, ours)


def spawn_nursery() -> Nursery:
    """Start a nursery in a fresh interpreter: safe at any time, for a daemon whose first nursery died.

    It costs a bare interpreter more memory than a forked one.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.set_inheritable(True)
        program = f"from service.analysis.nursery import serve_descriptor as s; s({theirs.fileno()})"
        arguments = [sys.executable, "-c", program]
        pid = os.posix_spawn(
            sys.executable, arguments, {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
    return Nursery(pid, ours)


def serve_descriptor(descriptor: int) -> NoReturn:
    """Be a nursery on an inherited control socket."""
    os.set_inheritable(descriptor, False)
    serve(socket.socket(fileno=descriptor))


def serve(control: socket.socket) -> NoReturn:
    """Be the nursery: import, freeze, fork on request; never returns."""
    try:
        _leave_the_daemon()
        preload()
        while True:
            word, descriptors, _, _ = socket.recv_fds(control, len(_FORK), 1)
            if not word:
                os._exit(0)
            nursery_pid = os.getpid()
            if os.fork() == 0:
                control.close()
                _work(socket.socket(fileno=descriptors[0]), nursery_pid)
            for descriptor in descriptors:
                os.close(descriptor)
    except BaseException as error:  # noqa: BLE001  the last handler of this process: the daemon hears it
        try:
            control.sendall(f"{type(error).__name__}: {error}"[:4000].encode())
        finally:
            os._exit(1)


def _leave_the_daemon() -> None:
    os.setsid()  # out of reach of the terminal's signals
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the daemon decides when its workers end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a strategy that prints must not break the daemon's log
        os.dup2(nowhere, stream)
    os.close(nowhere)
    _name_process("perpd-nursery")


def preload() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read by numpy on import; a thread must not be forked
    import service.analysis.worker
    import service.strategies.ict_smc  # noqa: F401

    gc.collect()
    gc.freeze()


def _work(tasks: socket.socket, nursery_pid: int) -> NoReturn:
    """Serve one task after the other until the daemon closes the socket."""
    _die_with(nursery_pid)
    _name_process("perpd-worker")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        tasks.sendall(frame(os.getpid()))
        inbox, statm = _Inbox(tasks), _open_statm()
        while (task := inbox.receive()) is not None:
            tasks.sendall(_answer(task, statm))
    finally:
        os._exit(0)  # also on a broken socket: nobody listens any more


_received = functools.lru_cache(maxsize=4)(pickle.loads)
"""The function that was sent, mostly that of the task before: finding it anew takes longer than all else."""


def _answer(task: bytes, statm: int) -> bytes:
    """(succeeded, value or error, bytes of memory of our own) as a frame."""
    try:
        function, arguments = pickle.loads(task)
        answer: tuple[bool, object] = (True, _received(function)(*arguments))
    except Exception as error:  # noqa: BLE001  it travels to the daemon as data
        answer = (False, _portable(error))
    try:
        return frame((*answer, own_memory_bytes(statm)))
    except Exception as error:  # noqa: BLE001  what cannot be pickled is the function's mistake
        return frame((False, TypeError(f"the result cannot be sent: {error}"), own_memory_bytes(statm)))


def _portable(error: Exception) -> Exception:
    """An error the daemon can decode without importing a strategy's modules."""
    if type(error).__module__.partition(".")[0] in _KNOWN_PACKAGES:
        try:
            if type(pickle.loads(pickle.dumps(error))) is type(error):
                return error
        except Exception:  # noqa: BLE001  falls through to the plain text below
            return RuntimeError(f"{type(error).__name__}: {error}")
    return RuntimeError(f"{type(error).__name__}: {error}")


def frame(value: object) -> bytes:
    """A pickled value behind its length."""
    body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class _Inbox:
    """The frames of a connection, each read with as few calls as it takes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._held = bytearray()

    def receive(self) -> bytes | None:
        """One frame's body; None at the end of the connection."""
        held = self._held
        while True:
            if len(held) >= HEADER.size:
                end = HEADER.size + HEADER.unpack_from(held)[0]
                if len(held) >= end:
                    body = bytes(held[HEADER.size : end])
                    del held[:end]
                    return body
            part = self._connection.recv(_READ_BYTES)
            if not part:
                return None
            held += part


def _open_statm() -> int:
    """A descriptor for `own_memory_bytes`; kept open, because opening costs ten times the reading."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return -1  # not on Linux: workers are then not replaced by size


def own_memory_bytes(statm: int) -> int:
    """Resident memory of this process without file pages (the candle store's are everybody's)."""
    if statm < 0:
        return 0
    _, resident, shared, _ = os.pread(statm, 256, 0).split(None, 3)
    return (int(resident) - int(shared)) * PAGESIZE


def _die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, even inside a hung strategy."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)  # it ended before we asked


def _name_process(name: str) -> None:
    _prctl(_PR_SET_NAME, name.encode())


def _prctl(option: int, argument: object) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)
