"""`perpd check` as a user meets it, and live trading that does not start without it."""

import json


def test_the_simulated_exchange_passes_and_the_table_says_so(perpd):
    run = perpd("check", "--symbols", "10", "--data-dir", "data")
    stdout, stderr = run.process.communicate(timeout=60)
    assert run.process.returncode == 0, stdout
    assert stderr == ""
    assert "pass  order route" in stdout
    assert "a fresh simulated exchange; a running daemon's own is not looked at" in stdout
    assert "fail" not in stdout


def test_a_failure_is_an_exit_code_and_a_row_that_says_what_to_do(perpd):
    run = perpd(
        "check", "--json", "--symbols", "10", "--data-dir", "data", PERPD_MONITOR__MEMORY_LIMIT_MB="20"
    )
    stdout, _ = run.process.communicate(timeout=60)
    assert run.process.returncode == 1
    answer = json.loads(stdout)
    assert not answer["ready"]
    (failed,) = [check for check in answer["checks"] if check["verdict"] == "fail"]
    assert failed["name"] == "memory"
    assert "analysis.workers" in failed["advice"]


LIVE = {"PERPD_RUN__LIVE_CONFIRMED": "true", "PERPD_API_KEY": "sim-key", "PERPD_API_SECRET": "sim-secret"}
AWAY = {
    "PERPD_EXCHANGE__REST_URL": "http://127.0.0.1:9",
    "PERPD_EXCHANGE__STREAM_URL": "ws://127.0.0.1:9",
    "PERPD_EXCHANGE__WALLET_URL": "http://127.0.0.1:9",
}


def test_a_venue_out_of_reach_ends_live_trading_so_that_it_is_started_again(perpd):
    run = perpd("run", "--mode", "live", "--symbols", "10", "--data-dir", "data", **LIVE, **AWAY)
    assert run.finish(60) == 69
    assert "venue reachable" in run.failure["message"]
    check = perpd("check", "--mode", "live", "--symbols", "10", "--data-dir", "data", **LIVE, **AWAY)
    stdout, _ = check.process.communicate(timeout=60)
    assert check.process.returncode == 69, stdout
    assert "(may pass by itself)" in stdout


def test_live_trading_does_not_start_on_a_clock_that_check_fails(perpd):
    sim = perpd("sim", "--port", "0", "--symbols", "10", "--speed", "1")  # its market is of another day
    ready = sim.read_until("simulated exchange ready")
    venue = {
        "PERPD_EXCHANGE__REST_URL": ready["rest_url"],
        "PERPD_EXCHANGE__STREAM_URL": ready["stream_url"],
        "PERPD_EXCHANGE__WALLET_URL": ready["rest_url"],
    }
    run = perpd("run", "--mode", "live", "--symbols", "10", "--cycles", "1", **LIVE, **venue)
    assert run.finish(60) == 69
    assert run.failure["message"].startswith("clock: the venue's clock is ")


def test_live_trading_does_not_start_on_a_failed_check(perpd):
    sim = perpd("sim", "--port", "0", "--symbols", "10", "--speed", "1")
    ready = sim.read_until("simulated exchange ready")
    run = perpd(
        "run",
        "--mode",
        "live",
        "--symbols",
        "10",
        PERPD_RUN__LIVE_CONFIRMED="true",
        PERPD_API_KEY="sim-key",
        PERPD_API_SECRET="sim-secret",
        PERPD_EXCHANGE__REST_URL=ready["rest_url"],
        PERPD_EXCHANGE__STREAM_URL=ready["stream_url"],
        PERPD_EXCHANGE__WALLET_URL=f"{ready['rest_url']}/nowhere",
    )
    assert run.finish(60) == 77
    assert "key permissions" in run.failure["message"]
    assert "perpd check" in run.failure["advice"]
    assert not {line["message"] for line in run.lines} & {
        "serving health, readiness and metrics",
        "run summary",
    }
