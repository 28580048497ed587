"""`perpd dataset` on archives on disk: a made-up one, and one that is hot and compacted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli import run_command
from service.errors import EXIT_DATA, EXIT_DATA_DIRECTORY, EXIT_SETTINGS
from service.learning.dataset import Dataset

ROOT = Path(__file__).resolve().parents[2]


def made(directory: Path, records: int = 20_000) -> Path:
    code = run_command(
        ["dataset", "generate", "--records", str(records), "--symbols", "20", "--out", str(directory)]
    )
    assert code == 0
    return directory


def test_a_made_up_history_becomes_a_dataset_and_a_description(tmp_path: Path, capsys):
    data = made(tmp_path / "data")
    build = ["dataset", "build", "--data-dir", str(data), "--out", str(tmp_path / "set")]
    assert run_command([*build, "--chunk-records", "3000"]) == 0
    assert "labels joined one to one: yes (20,000 signals, 20,000 outcomes)" in capsys.readouterr().out
    assert run_command(["dataset", "describe", str(tmp_path / "set"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["one_to_one"]
    assert len(described["features"]) == 29
    assert sum(split["records"] for split in described["splits"]) == described["kept"]
    image = tmp_path / "set.svg"
    assert run_command(["dataset", "describe", str(tmp_path / "set"), "--image", str(image)]) == 0
    assert image.read_text().startswith("<svg")


def test_the_same_seed_gives_the_same_dataset(tmp_path: Path):
    chunks = []
    for name in ("a", "b"):
        data = made(tmp_path / name, 6_000)
        assert (
            run_command(["dataset", "build", "--data-dir", str(data), "--out", str(tmp_path / f"set-{name}")])
            == 0
        )
        chunks.append(
            [chunk.features.tobytes() for chunk in Dataset(tmp_path / f"set-{name}").chunks("train")]
        )
    assert chunks[0] == chunks[1]


def test_a_span_cuts_the_history(tmp_path: Path, capsys):
    data = made(tmp_path / "data")
    out = tmp_path / "set"
    span = ["--from", "2025-01-01T12:00", "--until", "2025-01-02T12:00"]
    assert run_command(["dataset", "build", "--data-dir", str(data), "--out", str(out), *span]) == 0
    manifest = Dataset(out).manifest
    assert manifest.read == 20 * (24 * 12 + 1)
    assert manifest.one_to_one


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["build", "--data-dir", "nowhere", "--out", "set"], EXIT_DATA_DIRECTORY, "there is no archive"),
        (
            ["build", "--data-dir", "data", "--out", "set", "--from", "soon"],
            EXIT_SETTINGS,
            "--from: found 'soon'",
        ),
        (
            ["build", "--data-dir", "data", "--out", "set", "--from", "2031-01-01"],
            EXIT_DATA,
            "no signal in this span",
        ),
        (["build", "--data-dir", "data", "--out", "data"], EXIT_DATA, "is not empty"),
        (["describe", "data"], EXIT_DATA, "is no dataset"),
        (["generate", "--out", "data"], EXIT_DATA, "is not empty"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(
    tmp_path: Path, arguments: list[str], code: int, words: str
):
    made(tmp_path / "data", 2_000)
    done = subprocess.run(
        [sys.executable, "-m", "service", "dataset", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert words in json.loads(done.stdout)["message"]
    assert done.stderr == ""
