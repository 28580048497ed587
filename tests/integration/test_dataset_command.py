"""`perpd dataset` on archives on disk: a made-up one, and one that is hot and compacted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from service.archive.archiver import archiving
from service.bench.archive import example_signal
from service.cli import run_command
from service.clock import ManualClock
from service.errors import EXIT_DATA, EXIT_DATA_DIRECTORY, EXIT_SETTINGS
from service.learning import dataset
from service.learning.dataset import Dataset
from service.settings import ArchiveSettings

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
        (["build", "--data-dir", "data", "--out", "/proc/x"], EXIT_DATA_DIRECTORY, "/proc/x: cannot be"),
        (["generate", "--records", "2000", "--out", "/proc/x"], EXIT_DATA_DIRECTORY, "/proc/x: cannot be"),
        (["describe", "data", "--image", "nowhere/x.svg"], EXIT_DATA_DIRECTORY, "no directory nowhere"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(
    tmp_path: Path, arguments: list[str], code: int, words: str
):
    made(tmp_path / "data", 2_000)
    assert words in refusal(tmp_path, arguments, code)


def refusal(directory: Path, arguments: list[str], code: int) -> str:
    """The message of a command that ends with this code, run in a directory."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "dataset", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, "")
    message: str = json.loads(done.stdout)["message"]
    return message


async def test_a_history_that_needs_more_memory_is_one_message_with_what_to_do(tmp_path: Path) -> None:
    """Lines want buffers for the longest one: more than the least that is left for them here."""
    signal = example_signal()
    async with archiving(
        tmp_path / "data" / "archive", ArchiveSettings(), ManualClock(86_400_000), drain_limit_s=5
    ) as archive:
        for number in range(10):
            changed = {"signal_id": f"{signal.strategy}:{number}", "candle_close_ms": number}
            await archive.put("signals", msgspec.structs.replace(signal, **changed))
    build = ["build", "--data-dir", "data", "--out", "set", "--memory-mb", "100"]
    message = refusal(tmp_path, build, EXIT_DATA)
    assert "64 MB, which --memory-mb 100 leaves" in message
    assert "--chunk-records" in message


def test_a_damaged_file_is_one_message_with_what_to_do(tmp_path: Path):
    data = made(tmp_path / "data", 2_000)
    next((data / "archive" / "signals").rglob("*.parquet")).write_bytes(b"PAR1 and no more PAR1")
    build = ["build", "--data-dir", "data", "--out", "set"]
    assert "perpd archive verify" in refusal(tmp_path, build, EXIT_DATA)


def test_no_segment_goes_while_a_dataset_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = made(tmp_path / "data", 2_000)
    compact = ["archive", "compact", "--data-dir", str(data)]
    codes = []
    original = dataset.build

    def meanwhile(*arguments, **named):
        codes.append(run_command(compact))
        return original(*arguments, **named)

    monkeypatch.setattr(dataset, "build", meanwhile)
    build = ["dataset", "build", "--data-dir", str(data), "--out", str(tmp_path / "set")]
    assert run_command(build) == 0
    assert codes == [EXIT_DATA_DIRECTORY]
    assert run_command(compact) == 0
