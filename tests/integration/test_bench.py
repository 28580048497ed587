"""Every benchmark at its smallest: that it measures what it says, not how fast this machine is."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.bench.imports import ROLES, weighed
from service.bench.memory import differing, timeless, uncounted
from service.bench.plot import fit
from service.bench.report import page
from service.bench.result import Figure, quantile, shown

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments, cwd):
    """The JSON object of one benchmark, run as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "bench", *arguments, "--json"],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return json.loads(done.stdout)


def values(result):
    return {name: figure["value"] for name, figure in result["figures"].items()}


@pytest.mark.parametrize("workers", ["2", "0"])
def test_a_cycle_is_measured_beside_the_floor_of_its_own_calls(tmp_path, workers):
    result = bench(
        "cycle", "--symbols", "12", "--candles", "120", "--workers", workers, "--rounds", "3", cwd=tmp_path
    )
    found = values(result)
    assert found["TA-Lib calls of a full computation"] >= 12 * 4  # each symbol's 1h trend at least
    assert 0 < found["TA-Lib calls made a cycle"] < found["TA-Lib calls of a full computation"]
    assert found["series parts reused a cycle"] > 0
    assert set(result["details"]["worst"]["series_reused"]) == {0}
    assert min(result["details"]["worst"]["series_computed"]) > max(
        result["details"]["idle"]["series_computed"]
    )
    assert 0 < found["floor CPU mean"] < found["cycle CPU mean"]
    assert found["CPU over floor"] == pytest.approx(found["cycle CPU mean"] / found["floor CPU mean"])
    assert len(result["details"]["idle"]["wall_s"]) == 3
    assert found["signals a cycle"] > 0
    assert result["machine"]["cores"] >= 1
    assert list(tmp_path.iterdir()) == []


def test_reuse_is_measured_beside_computing_again(tmp_path):
    result = bench("features", "--symbols", "12", "--candles", "120", "--rounds", "3", cwd=tmp_path)
    found = values(result)
    assert found["same signals in every kind"] == 1
    assert {len(times) for times in result["details"]["cycles"].values()} == {3}
    assert (found["scan hits, ours"], found["scan hits, plain LRU"]) == (50, 0)
    assert 0 < found["memory lookup p50"] < found["file lookup, mean of a batch"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", sorted(ROLES))
def test_neither_the_daemon_nor_a_worker_imports_what_is_forbidden(role):
    found = weighed(ROLES[role])
    assert found["forbidden"] == []
    modules = {module["name"]: module for module in found["modules"]}
    assert "service.records" in modules
    own = sum(module["own_bytes"] for module in found["modules"])
    assert 0 < own <= found["resident_bytes"] - found["bare_bytes"] + 1_000_000
    assert all(module["own_s"] <= module["total_s"] + 1e-9 for module in found["modules"])


def test_imports_are_weighed_for_both_roles(tmp_path):
    found = values(bench("imports", "--top", "2", cwd=tmp_path))
    for role in ROLES:
        assert found[f"{role}: resident after imports"] > found[f"{role}: interpreter alone"] > 0


def test_the_archive_benchmark_waits_until_every_record_is_on_disk(tmp_path):
    result = bench("archive", "--records", "1000", "--directory", str(tmp_path), cwd=tmp_path)
    parts = result["details"]
    assert (parts["one stream"]["records"], parts["two streams"]["records"]) == (1000, 1000)
    assert parts["disk"]["syncs"] == 20
    assert values(result)["beats, one stream"] > 0
    assert values(result)["appends to segments, one stream"] >= 20
    assert 0 < values(result)["fsyncs, one stream"] <= values(result)["appends to segments, one stream"] + 1
    assert 0 < values(result)["deepest buffer"] <= 50
    assert list(tmp_path.iterdir()) == []


def test_the_query_benchmark_asks_an_archive_of_lines_and_parquet_in_fresh_processes(tmp_path):
    result = bench("query", "--records", "150000", "--directory", str(tmp_path), cwd=tmp_path)
    found = values(result)
    assert result["details"]["made"]["records"] == 100_000  # compacted; the newest segments stay as lines
    assert 0 < found["Parquet over JSON lines"] < 50
    assert result["details"]["asked"]["ten largest"]["rows"] == 10
    assert result["details"]["asked"]["refusals by reason"]["rows"] > 5
    assert all(value > 0 for value in found.values())
    assert list(tmp_path.iterdir()) == []


def test_a_soak_reports_slopes_and_draws_them(tmp_path):
    plot = tmp_path / "soak.svg"
    result = bench("soak", "--cycles", "12", "--symbols", "6", "--plot", str(plot), cwd=tmp_path)
    found = values(result)
    samples = result["details"]["samples"]
    assert [sample["cycle"] for sample in samples] == list(range(1, 13))
    assert found["cycles"] == 12
    late = [(sample["cycle"], sample["blocks"]) for sample in samples if sample["cycle"] >= 6]
    assert found["slope of blocks, second half"] == pytest.approx(fit(*zip(*late, strict=True)).slope * 1000)
    assert "2,000 cycles and more" in result["notes"][0]
    assert samples[-1]["processes"] == 4  # daemon, nursery, two workers; the exchange is not its own
    assert min(samples[-1][name] for name in ("pss_mb", "uss_mb", "objects", "tasks", "fds")) > 0
    image = ElementTree.parse(plot).getroot()
    assert image.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(image.findall(".//{http://www.w3.org/2000/svg}polyline")) == 16
    assert list(tmp_path.iterdir()) == [plot]


def test_the_nursery_is_compared_with_the_standard_pool_and_with_none(tmp_path):
    found = values(bench("pool", "--symbols", "16", "--candles", "120", "--rounds", "2", cwd=tmp_path))
    assert [found[f"{kind}: processes"] for kind in ("nursery", "forkserver", "inline")] == [4, 5, 1]
    without_files = [found[f"{kind}: PSS without files"] for kind in ("inline", "nursery", "forkserver")]
    assert without_files == sorted(without_files)
    assert found["nursery: start"] > 0
    assert found["forkserver: round CPU mean"] > 0


def test_loop_lag_is_measured_while_streams_update_and_cycles_run(tmp_path):
    result = bench("loop", "--cycles", "4", "--symbols", "6", "--candles", "120", cwd=tmp_path)
    found = values(result)
    assert found["beats"] > 100
    assert found["candle updates received"] > 0
    assert found["symbols followed"] == 6
    assert found["loop lag p50"] <= found["loop lag p99"] <= found["loop lag max"]


def test_a_size_out_of_bounds_is_refused_with_the_bounds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "service", "bench", "cycle", "--symbols", "0"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 78
    assert "1 to 700" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("value", "better", "text"),
    [
        (29.99991, "less", "30.00"),
        (30.000001, "less", "30.01"),
        (49_999.96, "more", "49,999"),
        (0.00123456, "less", "0.001235"),
        (-0.123456, "less", "-0.1234"),
        (3.0, "less", "3"),
        (float("nan"), "less", "nan"),
    ],
)
def test_values_are_rounded_against_us(value, better, text):
    assert shown(Figure("one", value, "ms", better)) == text


def test_a_goal_is_judged_by_the_unrounded_value():
    assert Figure("slope", 0.500001, "MB", "less", 0.5).verdict == "missed"
    assert Figure("rate", 50_000.0, "1/s", "more", 50_000.0).verdict == "met"
    assert Figure("lag", float("nan"), "ms", "less", 5.0).verdict == "missed"


def test_quantiles_are_values_that_were_measured_and_lean_to_the_worse():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert quantile([5.0], 0.99) == 5.0


def test_a_line_is_fitted_by_least_squares():
    assert fit([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == (2.0, 1.0)
    with pytest.raises(ValueError, match="two different"):
        fit([1.0, 1.0], [1.0, 2.0])


def test_the_page_holds_date_machine_command_and_missed_goals():
    figure = {"value": 31.0, "unit": "ms", "goal": 30.0, "better": "less", "verdict": "missed"}
    result = {
        "benchmark": "cycle",
        "measures": "One thing.",
        "machine": {"cpu": "Some CPU", "load_average_1m": 0.5},
        "figures": {"cycle wall p50": figure},
    }
    text = page([(["cycle", "--rounds", "3"], result)], datetime(2026, 11, 24, 10, 0, tzinfo=UTC), "soak.svg")
    assert "2026-11-24 10:00 UTC" in text
    assert "| cpu | Some CPU |" in text
    assert "## `perpd bench cycle --rounds 3`" in text
    assert "Load average before it: 0.5." in text
    assert "| cycle wall p50 | 31 | ms | <= 30 | missed |" in text


def test_the_way_of_orders_is_measured_for_entries_and_stops(tmp_path):
    result = bench(
        "orders", "--symbols", "40", "--candles", "120", "--cycles", "12", "--speed", "120", cwd=tmp_path
    )
    found = values(result)
    assert found["entries measured"] >= 3
    assert found["stops measured"] >= 3
    assert 0 < found["entry, without the state store, p50"] < found["entry, decision to wire, p99"]
    assert found["entry, decision to wire, p50"] <= found["entry, with the venue's leverage, p50"]
    assert result["figures"]["entry, decision to wire, p99"]["goal"] == 5.0
    assert list(tmp_path.iterdir()) == []


def test_the_founding_table_compares_two_runs_that_decided_the_same(tmp_path):
    result = bench("memory", "--symbols", "70", "--candles", "120", "--cycles", "7", cwd=tmp_path)
    assert result["details"]["differences"] == []
    assert result["notes"][0].startswith("identical: yes, ")
    before, after = (result["details"][name] for name in ("before", "after"))
    assert max(map(int, before["batch_symbols"])) == 12  # 2 workers x 2 x 3
    assert max(map(int, after["batch_symbols"])) == 8
    assert before["put"]["signals"] > 0
    assert before["put"]["fills"] > 0, "real entries were decided, not only shadows"
    assert after["stream_records"] <= 50
    for seen in (before, after):
        assert len(seen["cycle_s"]) == len(seen["pss_mb"]) == 7
        assert min(seen[f"{part}_bytes"] for part in ("batch", "buffer", "history", "cache")) > 0
    found = values(result)
    saving = found["ParallelAnalyzer, results of a batch, mean, saving"]
    assert saving == pytest.approx((1 - after["batch_mean_bytes"] / before["batch_mean_bytes"]) * 100)
    assert list(tmp_path.iterdir()) == []


def test_records_that_differ_in_more_than_their_times_are_named():
    record = {"seq": 1, "signal_id": "a", "candle_close_ms": 5, "decided_ms": 7}
    assert timeless(record) == {"seq": 1, "signal_id": "a", "candle_close_ms": 5}
    same = {"signals": [timeless(record)]}
    assert list(differing(same, same)) == []
    other = {"signals": [timeless({**record, "signal_id": "b"})], "fills": [{"seq": 1}]}
    assert list(differing(same, other)) == ["fills: 0 records before, 1 after", "signals 1: signal_id"]


def test_a_record_or_an_operation_that_was_lost_is_named():
    seen = {"put": {"signals": 2}, "recorded": {"cycle": 3}, "kept": {"cycle": 3}}
    archive = {"signals": [{}, {}], "fills": []}
    assert list(uncounted(seen, seen, [archive, archive])) == []
    lost = {**seen, "kept": {"cycle": 2}}
    words = list(uncounted(seen, lost, [archive, {"signals": [{}]}]))
    assert words == [
        "after: records put {'signals': 2}, kept {'signals': 1}",
        "after: operations recorded and not counted {'cycle': 1}",
        "operation cycle: 3 before, 2 after",
    ]


@pytest.mark.parametrize(
    ("name", "number"), [("query", signal.SIGTERM), ("query", signal.SIGINT), ("dataset", signal.SIGTERM)]
)
def test_a_benchmark_that_is_ended_leaves_nothing_behind(tmp_path, name, number):
    """The signal comes while a process of the benchmark writes; it goes to the benchmark alone."""
    work, here = tmp_path / "work", tmp_path / "here"
    work.mkdir()
    here.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "bench", name, "--records", "2000000"],
        cwd=here,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TMPDIR": str(work)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        until_s = time.monotonic() + 60
        while not list(work.rglob("signals-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until_s
            time.sleep(0.05)
        started = children.read_text().split()
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, output) == (128 + number, "")
    assert errors == f"ended by {number.name}, removing what was written\n"
    assert started
    assert not [pid for pid in started if os.path.exists(f"/proc/{pid}")]
    assert [list(work.iterdir()), list(here.iterdir())] == [[], []]


@pytest.mark.parametrize("name", ["query", "dataset"])
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ((), "MB are needed; name a larger directory with --dir"),
        (("--dir", "nowhere"), "--dir nowhere: No such file or directory"),
    ],
)
def test_a_benchmark_without_room_says_so_before_it_begins(tmp_path, name, where, words):
    done = subprocess.run(
        [sys.executable, "-m", "service", "bench", name, "--records", "100000000", *where],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TMPDIR": "/dev/shm"},
        capture_output=True,
        text=True,
    )
    if not where and os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize > 30e9:
        pytest.skip("there is room for 100,000,000 records in /dev/shm")
    assert (done.returncode, done.stderr) == (73, "")
    assert words in json.loads(done.stdout)["message"]
    assert list(tmp_path.iterdir()) == []
