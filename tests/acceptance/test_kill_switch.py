"""The kill switch by hand: commands and HTTP against the running daemon, and over a restart."""

import json
import signal
import urllib.request
from typing import Any

import pytest

SMALL = ("--symbols", "60", "--speed", "120", "--data-dir", "data")
TOKEN = "t0ken"


def asked(port: int, action: str, reason: str) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/v1/{action}",
        data=json.dumps({"reason": reason}).encode(),
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
        return json.load(answer)


@pytest.mark.slow(about_s=11)
def test_flatten_closes_all_stays_over_a_restart_and_is_resumed_with_a_reason(perpd):
    daemon = perpd("run", *SMALL, PERPD_API_TOKEN=TOKEN)
    daemon.read_until("serving health, readiness and metrics")
    daemon.read_until("position opened")
    command = perpd("flatten", *SMALL, "--reason", "a test", "--json")
    assert command.finish() == 0
    assert command.lines[-1]["level"] == "flatten"
    daemon.read_until("flattening")
    assert command.lines[-1]["open"]["positions"] >= 1
    daemon.read_until("position closed")
    daemon.read_until("flat")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.finish(40) == 0
    assert daemon.summary["exchange_equity"] == daemon.summary["equity"]
    assert TOKEN not in json.dumps(daemon.lines)

    without_reason = perpd("resume", *SMALL, "--reason", "")
    stdout, _ = without_reason.process.communicate(timeout=60)
    assert without_reason.process.returncode == 64
    assert "a test" in stdout

    again = perpd("run", *SMALL, PERPD_API_TOKEN=TOKEN)
    port = again.read_until("serving health, readiness and metrics")["port"]
    assert "a test" in again.read_until("kill switch is tripped since an earlier run")["why"]
    while (cycle := again.read_until("cycle"))["signals"] == 0:
        pass
    assert cycle["accepted"] == 0
    assert cycle["positions"] == 0
    milder = asked(port, "stop-entries", "cron")
    assert milder["level"] == "flatten"
    assert "a test) and stays; resume first to lower it" in milder["answer"]
    assert milder["open"] == {"positions": 0, "orders": 0}
    assert asked(port, "resume", "looked at it")["level"] == "free"
    again.read_until("position opened")
    again.process.send_signal(signal.SIGTERM)
    assert again.finish(40) == 0
