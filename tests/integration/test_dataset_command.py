"""`perpd dataset` on archives on disk: a made-up one, and one that is hot and compacted."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from service.archive.archiver import archiving
from service.archive.catalog import catalog, seen_by_training
from service.bench.archive import example_signal
from service.cli import run_command
from service.clock import ManualClock
from service.errors import EXIT_DATA, EXIT_DATA_DIRECTORY, EXIT_SETTINGS
from service.learning import dataset
from service.learning.dataset import Dataset
from service.records import ShadowPosition, Signal
from service.settings import ArchiveSettings

ROOT = Path(__file__).resolve().parents[2]
DAY_MS = 86_400_000


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


def archived_days(directory: Path, days: int = 10, each: int = 40) -> Path:
    """A data directory: each day a segment of signals and one of outcomes, the last signal still open."""
    signal = example_signal()

    async def fill() -> None:
        for day in range(1, days + 1):
            clock = ManualClock(day * DAY_MS)
            async with archiving(directory / "archive", ArchiveSettings(), clock, drain_limit_s=5) as archive:
                for number in range(each):
                    at_ms = day * DAY_MS - (each - number) * 300_000
                    name = f"{signal.strategy}:{at_ms}"
                    await archive.put(
                        "signals", msgspec.structs.replace(signal, signal_id=name, candle_close_ms=at_ms)
                    )
                    if (day, number) == (days, each - 1):
                        continue  # the last one is open
                    await archive.put("shadow_outcomes", outcome(signal, name, at_ms))

    asyncio.run(fill())
    return directory


def outcome(signal: Signal, signal_id: str, at_ms: int) -> ShadowPosition:
    return ShadowPosition(
        position_id=f"shadow:{signal_id}",
        signal_id=signal_id,
        symbol=signal.symbol,
        position_side=signal.position_side,
        entry=100.0,
        stop=99.0,
        target=102.0,
        opened_ms=at_ms,
        checked_ms=at_ms + 300_000,
        closed_ms=at_ms + 300_000,
        outcome_r=1.0,
    )


def perpd(capsys, *arguments: str, code: int = 0) -> str:
    assert run_command(list(arguments)) == code
    text: str = capsys.readouterr().out
    return text


def firsts(data: Path, stream: str) -> list[int]:
    return [segment.first for segment in catalog(data / "archive", stream)]


def test_what_a_dataset_took_in_and_was_told_to_mark_may_be_pruned_and_nothing_else(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    data = archived_days(tmp_path / "data")
    where = ("--data-dir", str(data))
    monkeypatch.setenv("PERPD_ARCHIVE__KEEP_DAYS", "{ default = 0.5 }")
    perpd(capsys, "archive", "compact", *where)
    kept = perpd(capsys, "archive", "prune", "--dry-run", *where)
    assert "would remove 0 segments" in kept
    assert "signals: 8 segments" in kept
    assert "training has seen nothing of this stream" in kept
    assert "perpd dataset build --out DIR --mark-seen" in kept

    perpd(capsys, "dataset", "build", *where, "--out", str(tmp_path / "unmarked"))
    assert "removed 0 segments" in perpd(capsys, "archive", "prune", *where)

    build = ("dataset", "build", *where, "--embargo-hours", "0", "--mark-seen")
    told = perpd(capsys, *build, "--out", str(tmp_path / "set"))
    seen = seen_by_training(data / "archive")
    assert f"signals: {seen['signals']} of 400, before 0; the next is left out: outcome known after" in told
    (train, *_) = Dataset(tmp_path / "set").manifest.splits
    assert seen["signals"] == seen["shadow_outcomes"] == train.records == 279
    listed = [json.loads(line) for line in perpd(capsys, "archive", "ls", "--json", *where).splitlines()]
    assert {row["stream"]: row["seen"] for row in listed}["signals"] == 279
    assert {row["stream"]: row["seen"] for row in listed}["fills"] is None

    kept = perpd(capsys, "archive", "prune", "--dry-run", *where)
    assert "would remove 12 segments" in kept
    assert "signals: 2 segments" in kept
    assert "training has seen up to 279 of this stream" in kept
    perpd(capsys, "archive", "prune", *where)
    assert firsts(data, "signals") == firsts(data, "shadow_outcomes") == [241, 281, 321, 361]
    assert "the archive is whole" in perpd(capsys, "archive", "verify", *where)

    again = perpd(capsys, *build, "--out", str(tmp_path / "later"))
    assert "labels joined one to one: yes (159 signals, 159 outcomes)" in again
    assert seen_by_training(data / "archive")["signals"] > 279


def test_a_dataset_that_cannot_be_read_back_marks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = archived_days(tmp_path / "data", days=3)
    original = dataset.build

    def damaged(processor, directory, **named):
        manifest = original(processor, directory, **named)
        (directory / "train-00000.npz").write_bytes(b"PK and no more")
        return manifest

    monkeypatch.setattr(dataset, "build", damaged)
    build = ["dataset", "build", "--data-dir", str(data), "--out", str(tmp_path / "set"), "--mark-seen"]
    assert run_command(build) == EXIT_DATA
    assert seen_by_training(data / "archive") == {}


def test_a_dataset_of_a_span_marks_nothing_behind_it_and_waits_for_what_came_before(tmp_path: Path, capsys):
    data = archived_days(tmp_path / "data", days=6)
    build = ("dataset", "build", "--data-dir", str(data), "--mark-seen", "--embargo-hours", "0")
    told = perpd(capsys, *build, "--out", str(tmp_path / "later"), "--from", "1970-01-03")
    assert "signals: 0 of 240, before 0; the next is left out: outside --from and --until" in told
    perpd(capsys, *build, "--out", str(tmp_path / "first"), "--until", "1970-01-03")
    assert seen_by_training(data / "archive")["signals"] == 55
    perpd(capsys, *build, "--out", str(tmp_path / "again"), "--from", "1970-01-01T21:00")
    assert seen_by_training(data / "archive")["signals"] > 100


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--give-up-hours", "200"], "give both"),
        (["--mark-seen", "--give-up-hours", "96"], "found 96, allowed is 97 or more"),
        (["--mark-seen", "--give-up-hours", "nan"], "found nan, allowed is 97 or more"),
    ],
)
def test_a_time_to_give_up_that_could_lose_an_outcome_is_refused(
    tmp_path: Path, flags: list[str], words: str
):
    archived_days(tmp_path / "data", days=1)
    build = ["build", "--data-dir", "data", "--out", "set", *flags]
    assert words in refusal(tmp_path, build, EXIT_SETTINGS)


def test_a_daemon_goes_on_archiving_while_a_dataset_is_made_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = archived_days(tmp_path / "data", days=4)
    original, signal = dataset.build, example_signal()

    def meanwhile(processor, directory, **named):
        async def more() -> None:
            clock = ManualClock(4 * DAY_MS + 1)
            async with archiving(data / "archive", ArchiveSettings(), clock, drain_limit_s=5) as archive:
                for number in range(60):
                    name, at_ms = f"{signal.strategy}:new{number}", 4 * DAY_MS - 900_000
                    changed = {"signal_id": name, "candle_close_ms": at_ms}
                    await archive.put("signals", msgspec.structs.replace(signal, **changed))
                    await archive.put("shadow_outcomes", outcome(signal, name, at_ms))

        asyncio.run(more())
        assert run_command(["archive", "prune", "--data-dir", str(data)]) == EXIT_DATA_DIRECTORY
        return original(processor, directory, **named)

    monkeypatch.setattr(dataset, "build", meanwhile)
    build = ["dataset", "build", "--data-dir", str(data), "--out", str(tmp_path / "set")]
    assert run_command([*build, "--embargo-hours", "0", "--mark-seen"]) == 0
    seen = seen_by_training(data / "archive")
    assert 0 < seen["signals"] < 160
    assert seen["shadow_outcomes"] <= seen["signals"]
