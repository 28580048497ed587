"""A venue that is not there, not ours to use, or a port that is taken: one message and its exit code."""

import http.server
import json
import socket
import sqlite3
import threading
import time

import pytest


class Restricted(http.server.BaseHTTPRequestHandler):
    """Announces a market's clock and answers everything else as Binance answers a restricted place."""

    def do_GET(self):
        now = time.monotonic()
        clock = {"originTime": 1_767_607_650_000, "originMonotonic": now, "speed": 1.0, "endTime": 0}
        body = {
            "code": 0,
            "msg": "Service unavailable from a restricted location according to 'b. Eligibility'",
        }
        restricted = self.path != "/sim/v1/clock"
        payload = json.dumps(body if restricted else clock).encode()
        self.send_response(451 if restricted else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture
def restricted_venue():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Restricted)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_restricted_location_is_named(perpd, restricted_venue):
    run = perpd("run", "--cycles", "1", PERPD_SIM__URL=restricted_venue)
    assert run.finish() == 77
    assert "451" in run.failure["message"]
    assert "region" in run.failure["advice"]


def test_a_misspelt_exclusion_stops_the_start_and_one_that_was_delisted_does_not(perpd, tmp_path):
    small = ("run", "--cycles", "1", "--symbols", "10", "--speed", "600", "--data-dir", "data")
    wrong = perpd(*small, PERPD_MARKET__EXCLUDE='["BTCUSD"]')
    assert wrong.finish() == 78
    assert "'BTCUSD' (is BTCUSDT" in wrong.failure["message"]
    right = perpd(*small, PERPD_MARKET__EXCLUDE='["BTCUSDT", "FARAWAYUSDT"]')
    assert right.finish() == 0
    told = [line for line in right.lines if line["message"] == "excluded symbols are not listed"]
    assert told
    assert "FARAWAYUSDT" in told[0]["reason"]
    with sqlite3.connect(
        tmp_path / "data" / "state.sqlite3"
    ) as state:  # as an earlier run that found it listed
        state.execute("update settings set value = '[\"BTCUSD\"]' where name = 'market.excluded'")
    delisted = perpd(*small, PERPD_MARKET__EXCLUDE='["BTCUSD"]')
    assert delisted.finish() == 0


def test_a_wrong_key_is_named_without_showing_it(perpd):
    sim = perpd("sim", "--port", "0", "--symbols", "10")
    url = sim.read_until("simulated exchange ready")["rest_url"]
    run = perpd(
        "run", "--cycles", "1", PERPD_SIM__URL=url, PERPD_API_KEY="wr0ngkey", PERPD_API_SECRET="s3cret"
    )
    assert run.finish() == 77
    assert "-2015" in run.failure["message"]
    assert "PERPD_API_KEY" in run.failure["advice"]
    assert not any("wr0ngkey" in json.dumps(line) or "s3cret" in json.dumps(line) for line in run.lines)


def test_a_taken_port_is_named(perpd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = perpd("run", "--cycles", "1", "--symbols", "10", PERPD_WEB__PORT=str(port))
        assert run.finish() == 69
    assert f"127.0.0.1:{port}" in run.failure["message"]


def test_paper_mode_trades_a_live_market_without_keys(perpd):
    sim = perpd("sim", "--port", "0", "--symbols", "30", "--speed", "1")
    ready = sim.read_until("simulated exchange ready")
    run = perpd(
        "run",
        "--mode",
        "paper",
        "--symbols",
        "30",
        "--cycles",
        "2",
        PERPD_EXCHANGE__REST_URL=ready["rest_url"],
        PERPD_EXCHANGE__STREAM_URL=ready["stream_url"],
        PERPD_CYCLE__INTERVAL_S="2",
    )
    assert run.finish() == 0
    assert run.summary["fills"] > 0
    assert abs(float(run.summary["equity"]) - float(run.summary["exchange_equity"])) <= 0.01
