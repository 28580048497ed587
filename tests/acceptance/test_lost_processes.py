"""Processes around the daemon die: a worker costs a batch, the exchange costs the run one clear message."""

import signal

import psutil
import pytest


def children_named(run, name: str) -> list[psutil.Process]:
    """The daemon's descendants that go by this name."""
    daemon = psutil.Process(run.process.pid)
    return [child for child in daemon.children(recursive=True) if child.name() == name]


def test_a_killed_worker_costs_no_signal_and_not_the_daemon(perpd):
    run = perpd("run", "--symbols", "40", "--speed", "120")
    run.read_until("cycle")
    workers = children_named(run, "perpd-worker")
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    for _ in range(8):  # beyond the next candle close, so that there is something to analyse
        run.read_until("cycle")
    assert len(children_named(run, "perpd-worker")) == 2
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(40) == 0
    cycles = [line for line in run.lines if line["message"] == "cycle"]
    assert all(line["failed"] == 0 and line["analysed"] == 40 for line in cycles)


def test_no_process_outlives_a_killed_daemon(perpd):
    run = perpd("run", "--symbols", "20", "--speed", "120")
    run.read_until("cycle")
    descendants = psutil.Process(run.process.pid).children(recursive=True)
    assert len(descendants) == 4  # the nursery, two workers, the simulated exchange
    run.process.kill()
    _, alive = psutil.wait_procs(descendants, timeout=20)
    assert not alive


@pytest.mark.slow(about_s=10)
def test_a_lost_exchange_ends_the_run_with_a_clear_message(perpd, tmp_path):
    run = perpd("run", "--symbols", "20", "--speed", "120", "--data-dir", "data")
    run.read_until("cycle")
    daemon = psutil.Process(run.process.pid)
    [exchange] = [child for child in daemon.children() if "sim" in child.cmdline()]
    exchange.kill()
    assert run.finish(60) == 69
    assert "the simulated exchange ended with exit code -9" in run.at_level("error")[-1]["message"]
    again = perpd("run", "--symbols", "20", "--speed", "120", "--data-dir", "data", "--cycles", "2")
    assert again.finish() == 0
