"""`perpd run` from start to summary, on its own simulated exchange."""

import json
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

SUMMARY_FIELDS = {
    "cycles",
    "symbols",
    "signals",
    "accepted",
    "refused",
    "orders",
    "fills",
    "positions_open",
    "positions_closed",
    "symbols_cooling",
    "shadow_open",
    "shadow_closed",
    "equity",
    "exchange_equity",
    "archived",
    "cycle_ms_p50",
    "cycle_ms_p99",
    "analysis_ms_p50",
    "close_to_signal_ms_p50",
    "close_to_signal_ms_p95",
    "close_to_signal_ms_max",
    "features_hit_fraction",
    "features_saved_ms",
    "shed",
    "loop_lag_ms_p99",
    "pss_mb_last",
    "pss_mb_peak",
    "exit_reason",
}
SMALL = ("run", "--symbols", "60", "--speed", "120")
REPLAY = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "candles" / "BINANCE_USDM_2025-10"


def archived(directory: Path, stream: str) -> list[dict]:
    files = sorted((directory / "archive" / stream).rglob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_ten_cycles_trade_and_end_with_a_summary(perpd, tmp_path):
    run = perpd(*SMALL, "--cycles", "10", "--data-dir", "data")
    assert run.finish() == 0
    summary = run.summary
    assert set(summary) >= SUMMARY_FIELDS
    assert summary["cycles"] == 10
    assert summary["symbols"] == 60
    assert summary["exit_reason"] == "cycles done"
    assert summary["signals"] > 0
    assert sum(summary["refused"].values()) + summary["accepted"] == summary["signals"]
    assert summary["orders"] > 0
    assert summary["fills"] > 0
    assert abs(float(summary["equity"]) - float(summary["exchange_equity"])) <= 0.01
    assert not run.at_level("error"), run.at_level("error")
    assert all(set(line) >= {"message", "level", "timestamp"} for line in run.lines)


def test_each_signal_is_archived_once_with_its_decision(perpd, tmp_path):
    run = perpd(*SMALL, "--cycles", "8", "--data-dir", "data")
    assert run.finish() == 0
    signals = Counter(row["signal_id"] for row in archived(tmp_path / "data", "signals"))
    decisions = Counter(row["signal_id"] for row in archived(tmp_path / "data", "decisions"))
    assert signals
    assert signals == decisions
    assert set(signals.values()) == {1}
    assert len(signals) == run.summary["archived"]["signals"]
    refused = [row for row in archived(tmp_path / "data", "decisions") if row["outcome"] == "refused"]
    assert refused
    assert all(row["reason"] and row["detail"] for row in refused)


def test_a_stop_signal_drains_and_a_restart_goes_on(perpd, tmp_path):
    first = perpd(*SMALL, "--data-dir", "data")
    for _ in range(3):
        first.read_until("cycle")
    first.process.send_signal(signal.SIGTERM)
    assert first.finish(40) == 0
    assert first.summary["exit_reason"] == "SIGTERM"
    before = open_positions(tmp_path / "data")
    assert before, "no position was open to carry over"

    second = perpd(*SMALL, "--cycles", "2", "--data-dir", "data")
    assert second.finish() == 0
    bootstrap = next(line for line in second.lines if line["message"] == "candles ready")
    assert bootstrap["fetched"] <= 60 * 3 * 5, "a restart fetches only what is missing"
    reconciled = next(line for line in second.lines if line["message"] == "positions agree with the venue")
    assert set(reconciled["symbols"]) == {symbol for _, symbol in before}
    assert second.lines.index(reconciled) < second.lines.index(bootstrap), "positions are looked after first"
    assert abs(float(second.summary["equity"]) - float(second.summary["exchange_equity"])) <= 0.01


def open_positions(directory: Path) -> set[tuple[str, str]]:
    with sqlite3.connect(directory / "state.sqlite3") as database:
        rows = database.execute("SELECT payload FROM positions").fetchall()
    records = [json.loads(row[0]) for row in rows]
    return {(row["position_id"], row["symbol"]) for row in records if not row.get("closed_ms")}


def test_a_second_stop_signal_ends_at_once_with_another_code(perpd):
    run = perpd(*SMALL, "--data-dir", "data", PERPD_SIM__LATENCY_MS="1500")
    run.read_until("daemon starting")
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGINT)
    assert run.finish(20) in (0, 130)


def test_the_same_books_are_not_opened_twice(perpd):
    first = perpd(*SMALL, "--data-dir", "data")
    first.read_until("daemon starting")
    second = perpd(*SMALL, "--data-dir", "data")
    assert second.finish() == 73
    assert "held by another perpd" in second.failure["message"]
    first.process.send_signal(signal.SIGTERM)
    assert first.finish(40) == 0


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"PERPD_MARKET__SYMBOLS": "none"}, 78, "PERPD_MARKET__SYMBOLS is 'none'"),
        ({"PERPD_RUN__MODE": "live"}, 78, "run.live_confirmed"),
        ({"PERPD_RUN__MODE": "live", "PERPD_RUN__LIVE_CONFIRMED": "true"}, 78, "there is no key"),
        ({"PERPD_STRATEGY__NAME": "nowhere.py:Nothing"}, 78, "nowhere.py"),
        ({"PERPD_SIM__URL": "http://127.0.0.1:9"}, 69, "no simulated exchange answers"),
        ({"PERPD_SIM__REPLAY": "nowhere"}, 78, "nowhere"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code_that_says_which_kind(perpd, environment, code, words):
    run = perpd("run", "--cycles", "1", **environment)
    assert run.finish() == code
    assert words in run.failure["message"]
    assert all(line["message"] != "run summary" for line in run.lines)


@pytest.mark.parametrize(
    "flags",
    [
        ("--replay", "nowhere"),
        ("--replay", "."),
        ("--from", "soon"),
        ("--from", "2025-10-11", "--until", "2025-10-10"),
    ],
)
def test_a_mistyped_market_is_refused_before_anything_is_written(perpd, tmp_path, flags):
    run = perpd("run", *flags, "--data-dir", "data")
    assert run.finish() == 78
    assert list(tmp_path.iterdir()) == []


def test_a_market_that_cannot_be_opened_does_not_claim_the_data_directory(perpd, tmp_path):
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "BTCUSDT-5m.csv").write_text("not candles")
    run = perpd("run", "--replay", "recorded", "--data-dir", "data")
    assert run.finish() != 0
    assert run.failure
    again = perpd(*SMALL, "--cycles", "1", "--data-dir", "data")
    assert again.finish() == 0


@pytest.mark.slow(about_s=32)
@pytest.mark.skipif(not REPLAY.is_dir(), reason="the recorded candles are not beside this checkout")
def test_a_replay_lives_through_the_crash_of_2025_10_10(perpd, tmp_path):
    span = ("--from", "2025-10-10T20:30", "--until", "2025-10-10T22:30")
    run = perpd(
        "run", "--replay", str(REPLAY), *span, "--speed", "240", "--symbols", "100", "--data-dir", "data"
    )
    assert run.finish(240) == 0
    assert run.summary["exit_reason"] == "market ended"
    assert not run.at_level("error"), run.at_level("error")
    assert abs(float(run.summary["equity"]) - float(run.summary["exchange_equity"])) <= 0.01
    signals = {row["signal_id"] for row in archived(tmp_path / "data", "signals")}
    assert signals == {row["signal_id"] for row in archived(tmp_path / "data", "decisions")}
    assert len(signals) == run.summary["signals"] > 0
