"""What a stranger may type, and what comes of it: one message and an exit code, never a traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--data-dir", "file"], 73, "data directory file: a file is in its place"),
        (["dataset", "describe", "none"], 65, "none is no dataset: manifest.json: No such file or directory"),
        (["archive", "query", "SELECT 1", "--memory-mb", "-5"], 64, "is -5, allowed is 1 or more"),
        (["archive", "compact", "--memory-mb", "0"], 64, "is 0, allowed is 1 or more"),
        (["archive", "tail", "-n", "-3"], 64, "is -3, allowed is 0 or more"),
        (["archive", "tail", "-n", "ten"], 64, "is ten, allowed is 0 or more"),
        (["archive", "torture", "--kills", "0"], 64, "is 0, allowed is 1 or more"),
    ],
)
def test_a_wrong_value_is_one_message(tmp_path: Path, arguments: list[str], code: int, words: str):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def raising(error: type[BaseException]) -> Callable[[object], int]:
    def command(args: object) -> int:
        raise error

    return command


def test_ctrl_c_ends_a_command_that_answers_with_130(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_config", raising(KeyboardInterrupt))
    assert cli.run_command(["config"]) == 130
