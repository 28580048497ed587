"""The daemon as a user runs it: a process, real signals, its log lines, a control group around it."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CONTROL_GROUPS = Path("/sys/fs/cgroup")


class ControlGroup:
    """A control group with a memory limit, of version 1 or 2."""

    def __init__(self, directory: Path, limit_name: str, events_name: str) -> None:
        self._directory = directory
        self._limit_name = limit_name
        self._events_name = events_name
        directory.mkdir()

    def limit(self, limit_mb: float) -> None:
        (self._directory / self._limit_name).write_text(str(int(limit_mb * 1024 * 1024)))

    @property
    def entrance(self) -> Path:
        """A process whose id is written here belongs to the group, with all it starts from then on."""
        return self._directory / "cgroup.procs"

    @property
    def kills(self) -> int:
        """Processes the kernel killed because the group was out of memory."""
        for line in (self._directory / self._events_name).read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
        raise AssertionError("the kernel does not count kills")

    def remove(self) -> None:
        """Waits for its last process: a killed one is gone a moment later."""
        for _ in range(500):
            if not self.entrance.read_text().strip():
                break
            time.sleep(0.01)
        self._directory.rmdir()


def _make() -> ControlGroup | None:
    name = f"perpd-test-{uuid.uuid4().hex[:12]}"
    first = CONTROL_GROUPS / "memory"
    if (first / "memory.limit_in_bytes").exists():
        return ControlGroup(first / name, "memory.limit_in_bytes", "memory.oom_control")
    if "memory" in _words(CONTROL_GROUPS / "cgroup.subtree_control"):
        return ControlGroup(CONTROL_GROUPS / name, "memory.max", "memory.events")
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


@contextlib.contextmanager
def control_group(limit_mb: float) -> Iterator[ControlGroup | None]:
    """A group with this limit; None where none may be made. Everything in it must have ended at the end."""
    try:
        group = _make() if os.geteuid() == 0 else None
    except OSError:
        group = None
    if group is None:
        yield None
        return
    try:
        group.limit(limit_mb)
        yield group
    finally:
        group.remove()


class Perpd:
    """One perpd process whose lines are read as they come."""

    def __init__(
        self, *arguments: str, cwd: Path, group: ControlGroup | None = None, **environment: str
    ) -> None:
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        command = [sys.executable, "-m", "service", *arguments]
        if group is not None:  # the shell enters, and so does all that it becomes and starts
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.entrance), *command]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**inherited, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []

    def read_until(self, message: str) -> dict[str, Any]:
        """Lines up to the one with this message; fails when the process ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))
            if self.lines[-1]["message"] == message:
                return self.lines[-1]
        raise AssertionError(f"ended without {message!r}: {self.lines[-5:]}")

    def finish(self, limit_s: float = 120) -> int:
        """Wait for the end; returns the exit code. Every line is JSON, and stderr is silent."""
        stdout, stderr = self.process.communicate(timeout=limit_s)
        self.lines.extend(json.loads(line) for line in stdout.splitlines())
        assert stderr == ""
        return self.process.returncode

    @property
    def summary(self) -> dict[str, Any]:
        assert self.lines[-1]["message"] == "run summary", self.lines[-3:]
        return self.lines[-1]

    @property
    def failure(self) -> dict[str, Any]:
        """The one error line."""
        errors = self.at_level("error")
        assert len(errors) == 1, errors
        return errors[0]

    def at_level(self, level: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["level"] == level]


@pytest.fixture
def control_groups():
    """Make control groups with a limit in MB, None where the machine does not allow it."""
    with contextlib.ExitStack() as stack:
        yield lambda limit_mb: stack.enter_context(control_group(limit_mb))


@pytest.fixture
def perpd(tmp_path, control_groups):
    """Start perpd with arguments; whatever still runs at the end is killed."""
    started: list[Perpd] = []

    def start(*arguments: str, group: ControlGroup | None = None, **environment: str) -> Perpd:
        started.append(Perpd(*arguments, cwd=tmp_path, group=group, **environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()
