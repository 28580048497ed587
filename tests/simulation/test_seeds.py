"""The simulation itself: the same seed is the same story, and a calm venue is no trouble."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from service.errors import SettingsInvalid
from service.exchange.simulated.fault_plan import read_fault_file
from service.simulation.run import run_seed

ROOT = Path(__file__).resolve().parents[2]


ONE, TWO = 11, 17
"""A seed with one daemon, and one with two on one account."""


def traces(hash_seed: str) -> str:
    """The traces of two seeds in a fresh interpreter, whose sets and dicts hash words differently."""
    code = (
        "from service.simulation.command import _one\n"
        f"print([_one((seed, 1.2, 1.0, 0)).trace for seed in ({ONE}, {TWO})])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("seed", [ONE, TWO])
def test_the_same_seed_gives_the_same_trace_in_one_process(seed: int):
    first, second = run_seed(seed, 1.2), run_seed(seed, 1.2)
    assert first == second
    assert first.faults
    assert bool(first.lease) == (seed == TWO)


def test_the_same_seed_gives_the_same_trace_however_words_are_hashed():
    assert len({traces(hash_seed) for hash_seed in ("0", "1", "2")}) == 1


def test_another_seed_gives_another_trace():
    assert run_seed(1, 0.5).trace != run_seed(2, 0.5).trace


def test_without_faults_nothing_is_violated_and_trades_are_made():
    result = run_seed(3, 3.0, usual=0.0)
    assert result.violations == ()
    assert result.faults == {}
    assert result.totals["positions"] > 0


@pytest.mark.slow(about_s=20)
def test_fifty_seeds_violate_nothing():
    """Each has a storm of faults and crashes and the calm that follows it."""
    results = [run_seed(seed, 0.75) for seed in range(1, 51)]
    assert [(result.seed, result.violations) for result in results if result.violations] == []
    assert sum(sum(result.faults.values()) for result in results) > 500
    assert sum(sum(result.deaths.values()) for result in results) > 20
    lease = Counter[str]()
    for result in results:
        lease.update(result.lease)
    assert lease["seeds with two daemons"] == 7
    assert lease["takeovers"] > 10
    assert min(lease["deposed"], lease["refused writes"]) > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", "sed"),
        ("[faults]\nlost_anwser = 0.1", "no fault 'lost_anwser'"),
        ("[faults]\nlost_answer = 2.0", "0 to 1"),
        ("seed = ", "faults.toml"),
    ],
)
def test_a_wrong_file_of_faults_says_what_is_wrong(tmp_path: Path, text: str, words: str):
    (tmp_path / "faults.toml").write_text(text)
    with pytest.raises(SettingsInvalid, match=words):
        read_fault_file(tmp_path / "faults.toml")
