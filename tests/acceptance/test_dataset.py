"""A training set of a day of real candles: replayed, archived, built and described as a user does."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.learning.dataset import Dataset
from service.learning.splits import SPLITS
from service.trading.positions import position_id_of

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT.parent / "shared" / "data" / "candles" / "BINANCE_USDM_2025-10"
SPAN = ("--from", "2025-10-10T12:00", "--until", "2025-10-11T12:00")
# The outcomes of a day must lie within it, or its last hours, the test set, would hold next to nothing.
SHADOW_HOURS = "2"


def asked(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def rows(directory: Path, sql: str) -> list[dict[str, Any]]:
    answer = asked(directory, "archive", "query", sql, "--format", "json", "--data-dir", "data")
    return [json.loads(line) for line in answer.splitlines()]


@pytest.mark.slow(about_s=28)
@pytest.mark.skipif(not RECORDED.is_dir(), reason=f"no recorded candles at {RECORDED}")
def test_labels_of_a_replayed_day_are_joined_one_to_one(perpd, tmp_path: Path):
    run = perpd(
        *(
            "run",
            "--replay",
            str(RECORDED),
            *SPAN,
            "--symbols",
            "12",
            "--speed",
            "3600",
            "--data-dir",
            "data",
        ),
        PERPD_TRADING__SHADOW_HOURS=SHADOW_HOURS,
    )
    assert run.finish(240) == 0
    assert run.summary["exit_reason"] == "market ended"
    recorded = run.summary["archived"]

    told = asked(tmp_path, "dataset", "build", "--data-dir", "data", "--out", "set")
    described = asked(tmp_path, "dataset", "describe", "set")
    for text in (told, described):
        assert "labels joined one to one: yes" in text

    # the counts are those of the archive, asked in SQL
    (counts,) = rows(
        tmp_path,
        """SELECT (SELECT count(*) FROM signals) AS signals, count(*) AS outcomes,
                  count(DISTINCT signal_id) AS labelled, count(*) FILTER (traded) AS traded
           FROM shadow_outcomes""",
    )
    (joined,) = rows(tmp_path, "SELECT count(*) AS n FROM signals JOIN shadow_outcomes USING (signal_id)")
    manifest = Dataset(tmp_path / "set").manifest
    assert manifest.read == counts["signals"] == recorded["signals"] > 100
    assert manifest.outcomes == counts["outcomes"] == recorded["shadow_outcomes"] > 100
    assert manifest.joined == counts["labelled"] == joined["n"] == manifest.outcomes
    assert manifest.dropped["no outcome yet"] == counts["signals"] - counts["labelled"]
    assert manifest.kept + sum(manifest.dropped.values()) == manifest.read

    # a label is the outcome of its own signal's position, and a real result that of its own real position
    pairs = rows(
        tmp_path,
        """SELECT s.signal_id, s.symbol, s.candle_close_ms, s.position_side, o.position_id AS shadow_id,
                  o.symbol AS label_symbol, o.opened_ms, o.position_side AS label_side,
                  o.closed_ms, o.outcome_r, o.traded, s.features, p.position_id
           FROM signals s JOIN shadow_outcomes o USING (signal_id)
           LEFT JOIN (SELECT DISTINCT signal_id, position_id FROM positions) p USING (signal_id)""",
    )
    assert len(pairs) == manifest.joined
    for pair in pairs:
        assert pair["shadow_id"] == f"shadow:{pair['signal_id']}"
        assert (pair["label_symbol"], pair["opened_ms"], pair["label_side"]) == (
            pair["symbol"],
            pair["candle_close_ms"],
            pair["position_side"],
        )
        assert pair["position_id"] in (None, position_id_of(pair["signal_id"]))
        assert pair["traded"] or pair["position_id"] is None

    # and the chunks hold those labels with their own signals' features
    kept = Counter(one for split in SPLITS for one in examples(tmp_path / "set", split))
    there = Counter(
        example(pair["features"].values(), pair["opened_ms"], pair["closed_ms"], pair["outcome_r"])
        for pair in pairs
    )
    assert kept.total() == manifest.kept > 50
    assert kept <= there
    assert all(split.records for split in manifest.splits)


def example(features: Iterable[float], opened_ms: int, closed_ms: int, outcome_r: float) -> tuple[Any, ...]:
    """As a chunk holds it: in float32."""
    numbers = np.array([*features, outcome_r], dtype=np.float32)
    return int(opened_ms), int(closed_ms), *numbers.tolist()


def examples(directory: Path, split: str) -> list[tuple[Any, ...]]:
    return [
        example(*one)
        for chunk in Dataset(directory).chunks(split)
        for one in zip(chunk.features, chunk.opened_ms, chunk.closed_ms, chunk.outcome_r, strict=True)
    ]
