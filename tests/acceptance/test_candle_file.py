"""`perpd run` with a candle file that is not the one of its last run."""

import shutil
from typing import Any

BUSY = ("run", "--symbols", "20", "--speed", "120", "--cycles", "2", "--data-dir", "data")


def fetched(run: Any) -> int:
    [line] = [line for line in run.lines if line["message"] == "candles ready"]
    return line["requests"]


def test_an_older_copy_of_the_candles_is_told_in_one_line_and_fetched_again(perpd, tmp_path):
    candles, copy = tmp_path / "data" / "candles.mmap", tmp_path / "copy"
    runs = []
    for _ in range(3):
        runs.append(perpd(*BUSY))
        assert runs[-1].finish() == 0
        if len(runs) == 1:
            shutil.copy(candles, copy)
        if len(runs) == 2:
            shutil.copy(copy, candles)
    first, second, third = runs
    told = [[line for line in run.lines if "candle file" in line["message"]] for run in runs]
    assert [len(lines) for lines in told] == [0, 0, 1]
    assert "an older copy" in told[2][0]["reason"]
    assert fetched(third) == fetched(first) == 60
    assert fetched(second) < 60
    assert not third.at_level("error")
