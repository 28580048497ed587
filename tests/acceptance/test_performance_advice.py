"""`perpd performance` against a running daemon."""

import json
import signal
from pathlib import Path

from service.errors import EXIT_UNAVAILABLE


def test_the_command_shows_where_the_time_of_a_running_daemon_goes(perpd, tmp_path: Path) -> None:
    run = perpd("run", "--symbols", "30", "--speed", "120", "--data-dir", "data", PERPD_CYCLE__INTERVAL_S="2")
    for _ in range(30):  # the parts of a cycle under way are counted before it is
        run.read_until("cycle")
    asked = perpd("performance", "--data-dir", "data", "--json")
    stdout, stderr = asked.process.communicate(timeout=60)
    assert stderr == ""
    answer = json.loads(stdout)
    assert answer["operations"]["cycle"]["count"] >= 1
    assert 0 < sum(answer["cycle_shares"].values()) <= 1.05
    assert answer["interval_s"] == 2 / 120
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(40) == 0
    # 30 symbols take longer than the 17 ms that two market seconds last here.
    assert "limit" in run.summary["advice"]
    assert "performance advice" not in {line["message"] for line in run.lines}, "told once a minute at most"


def test_without_a_daemon_it_says_so(perpd, tmp_path: Path) -> None:
    asked = perpd("performance", "--data-dir", "nowhere")
    assert asked.finish() == EXIT_UNAVAILABLE
    assert "is it running?" in asked.failure["message"]
