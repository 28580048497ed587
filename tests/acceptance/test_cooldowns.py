"""Two runs on one directory: what a stop bars in the first stays barred in the second, and is told."""

import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from service.records import Position
from tests.acceptance.test_run import archived

HOUR_MS = 3_600_000
BUSY = ("run", "--symbols", "40", "--speed", "600")
MANY = {"PERPD_TRADING__MAX_POSITIONS": "30", "PERPD_TRADING__TOP_SIGNALS": "10"}


def positions(directory: Path) -> list[Position]:
    with closing(sqlite3.connect(directory / "state.sqlite3")) as db:
        rows = db.execute("select payload from positions where traded = 1").fetchall()
    return [msgspec.json.decode(payload, type=Position) for (payload,) in rows]


@pytest.mark.slow(about_s=14)
def test_no_entry_follows_a_stop_on_its_symbol_within_the_hour_over_a_restart(perpd, tmp_path):
    refused = 0
    for _ in range(2):
        run = perpd(*BUSY, "--cycles", "45", "--data-dir", "data", **MANY)
        assert run.finish() == 0
        refused += run.summary["refused"].get("cooldown", 0)
    assert refused > 0
    assert [line["message"] for line in run.lines].count("symbols cool down") == 1

    of_symbol: dict[str, list[Position]] = defaultdict(list)
    for position in positions(tmp_path / "data"):
        of_symbol[position.symbol].append(position)
    for trades in of_symbol.values():
        for stopped in (p for p in trades if p.close_reason == "stop"):
            after = [p.opened_ms - stopped.closed_ms for p in trades if p.opened_ms > stopped.closed_ms]
            assert all(ms >= HOUR_MS for ms in after), (stopped.symbol, after)

    decisions = [row for row in archived(tmp_path / "data", "decisions") if row["reason"] == "cooldown"]
    assert len(decisions) == refused, "each is a decision of its own"
    assert all("(risk.cooldown_minutes 60)" in row["detail"] for row in decisions)
    with closing(sqlite3.connect(tmp_path / "data" / "state.sqlite3")) as db:
        followed = {row[0] for row in db.execute("select json_extract(payload, '$.signal_id') from shadows")}
        running = db.execute("select count(*) from cooldowns").fetchone()
    assert {row["signal_id"] for row in decisions} <= followed, "and followed as a shadow"
    assert running[0] > 0
