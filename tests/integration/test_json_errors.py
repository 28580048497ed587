"""With --json, what fails is one JSON object on standard output, whatever the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
NONE = ["--data-dir", "none"]
FAILURES = {
    "config": ([["config", "--mode", "nope"]], 78),
    "memory": ([["memory", *NONE]], 69),
    "performance": ([["performance", *NONE]], 69),
    "check": ([["check", "--config", "none.toml"]], 78),
    "stop-entries": ([["stop-entries", *NONE]], 69),
    "reduce-only": ([["reduce-only", *NONE]], 69),
    "flatten": ([["flatten", *NONE]], 69),
    "resume": ([["resume", *NONE], ["resume", "--reason", "over", *NONE]], 69),
    "store": (
        [
            ["store", "migrate", *NONE],
            ["store", "backup", *NONE],
            ["store", "restore", "none", *NONE],
            ["store", "copy", "--to", "sqlite:copy", *NONE],
        ],
        73,
    ),
    "archive": ([["archive", "ls", *NONE], ["archive", "verify", *NONE]], 73),
    "dataset": ([["dataset", "describe", "none"]], 65),
    "bench": ([["bench", "query", "--dir", "none"]], 73),
}
WITHOUT_JSON = {"run", "sim", "simulate"}  # they log as they go


def perpd(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PERPD_LOG__FORMAT": "console"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(arguments, code) for commands, code in FAILURES.values() for arguments in commands],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_failure_is_one_object_with_its_kind_and_exit_code(tmp_path: Path, arguments: list[str], code: int):
    done = perpd(tmp_path, *arguments, "--json")
    [line] = done.stdout.splitlines()
    told = json.loads(line)
    assert (done.returncode, told["exit_code"], done.stderr) == (code, code, "")
    assert told["message"]
    assert told["kind"]
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_in_the_table():
    commands = next(action for action in build_parser()._actions if action.choices).choices
    assert {*FAILURES} | WITHOUT_JSON == {*commands}


def test_a_wrong_command_line_is_told_in_words_on_standard_error(tmp_path: Path):
    done = perpd(tmp_path, "config", "--json", "--nothing")
    assert (done.returncode, done.stdout) == (64, "")
    assert "unrecognized arguments: --nothing" in done.stderr
