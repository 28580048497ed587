"""What we tell systemd: readiness, status, life after each finished cycle, and the stop (see sd_notify(3)).

The protocol is one datagram to the socket named by NOTIFY_SOCKET; without it nothing is sent.
"""

import socket
from collections.abc import Mapping
from typing import Self

import structlog

log = structlog.get_logger("monitor.watchdog")


class Notifier:
    """Tells the service manager how we are. Never raises, never waits."""

    def __init__(self, address: str = "") -> None:
        """Args: address: a path, or "@name" in the abstract namespace; empty for nobody."""
        self._address = b"\0" + address[1:].encode() if address.startswith("@") else address.encode()
        self._socket: socket.socket | None = None
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        return cls(environ.get("NOTIFY_SOCKET", ""))

    @property
    def active(self) -> bool:
        return self._socket is not None

    def ready(self, status: str) -> None:
        """Start-up is over; from now on the manager expects `cycle_finished` in time."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={_one_line(status)}")

    def cycle_finished(self, status: str) -> None:
        """A trading cycle ended: the only proof of life there is. A loop that merely turns is not one."""
        self._send(f"WATCHDOG=1\nSTATUS={_one_line(status)}")

    def extend(self, seconds: float) -> None:
        """Ask for more time while starting or stopping."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={_one_line(status)}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            log.warning("the service manager could not be told", error=str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def watchdog_limit_s(environ: Mapping[str, str], pid: int) -> float:
    """Seconds within which systemd wants a sign of life from this process; 0 when it wants none."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1_000_000 if text.isdigit() else 0.0
