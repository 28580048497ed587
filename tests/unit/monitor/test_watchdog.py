import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.monitor.watchdog import Notifier, watchdog_limit_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket and its name as NOTIFY_SOCKET has it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@perpd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        receiver.bind("\0" + name[1:] if name.startswith("@") else name)
        yield receiver, name


def test_each_state_is_one_datagram(manager: tuple[socket.socket, str]) -> None:
    receiver, name = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": name})
    notifier.ready("200 symbols")
    notifier.status("bootstrapping\nBTCUSDT")
    notifier.cycle_finished("cycle 3")
    notifier.extend(1.5)
    notifier.stopping("draining")
    notifier.close()
    assert [receiver.recv(4_096) for _ in range(5)] == [
        b"READY=1\nSTATUS=200 symbols",
        b"STATUS=bootstrapping BTCUSDT",  # a status is one line, or it could state more than itself
        b"WATCHDOG=1\nSTATUS=cycle 3",
        b"EXTEND_TIMEOUT_USEC=1500000",
        b"STOPPING=1\nSTATUS=draining",
    ]


def test_without_a_manager_nothing_is_sent() -> None:
    notifier = Notifier.from_environment({})
    assert not notifier.active
    notifier.ready("up")
    notifier.close()


def test_a_manager_that_went_away_is_no_error(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "gone"))
    notifier.cycle_finished("cycle 1")
    notifier.close()


def test_a_manager_that_does_not_read_does_not_block(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"))
        for number in range(5_000):
            notifier.status(f"cycle {number}")
        notifier.close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "300000000"}, 300.0),
        ({"WATCHDOG_USEC": "300000000", "WATCHDOG_PID": "7"}, 300.0),
        ({"WATCHDOG_USEC": "300000000", "WATCHDOG_PID": "8"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdog_limit_is_ours_only(environ: dict[str, str], expected: float) -> None:
    assert watchdog_limit_s(environ, pid=7) == expected
