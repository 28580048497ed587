"""The daemon as a user runs it: a process, real signals, its log lines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


class Perpd:
    """One perpd process whose lines are read as they come."""

    def __init__(self, *arguments: str, cwd: Path, **environment: str) -> None:
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
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
def perpd(tmp_path):
    """Start perpd with arguments; whatever still runs at the end is killed."""
    started: list[Perpd] = []

    def start(*arguments: str, **environment: str) -> Perpd:
        started.append(Perpd(*arguments, cwd=tmp_path, **environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()
