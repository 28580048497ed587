"""`perpd sim` as a process: its ready line, its end, its state file and what it refuses."""

import asyncio
import hashlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest

LIMIT_S = 60.0
RECORDED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "candles" / "BINANCE_USDM_2025-10"
FLAGS = ("--symbols", "2", "--seed", "5", "--speed", "60")


async def start(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "service", "sim", *flags),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1_048_576,
    )


async def ready(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        line = json.loads(await process.stdout.readline())
    assert line["message"] == "simulated exchange ready", line
    return dict(line)


async def end(process: asyncio.subprocess.Process) -> tuple[int, list[dict[str, Any]], bytes]:
    """(exit code, log lines, stderr) once the process is gone."""
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


async def refused(*flags: str) -> tuple[int, str]:
    """(exit code, the one line it printed) of a command that must not start."""
    code, lines, err = await end(await start(*flags))
    assert err == b""
    assert len(lines) == 1
    return code, lines[0]["message"]


async def signed(line: dict[str, Any], method: str, path: str, **params: object) -> Any:
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{line['rest_url']}/fapi/v1/time") as response:
            now_ms = (await response.json())["serverTime"]
        query = urlencode({**params, "timestamp": now_ms})
        signature = hmac.new(b"sim-secret", query.encode(), hashlib.sha256).hexdigest()
        url = f"{line['rest_url']}{path}?{query}&signature={signature}"
        async with http.request(method, url, headers={"X-MBX-APIKEY": "sim-key"}) as response:
            return await response.json()


async def test_it_says_in_one_line_that_it_is_ready_and_ends_with_0_on_sigterm() -> None:
    process = await start(*FLAGS)
    line = await ready(process)
    assert line["level"] == "info"
    assert line["rest_url"] == f"http://127.0.0.1:{line['port']}"
    assert line["stream_url"] == f"ws://127.0.0.1:{line['port']}"
    assert line["speed"] == 60.0
    assert line["symbols"] == 2
    assert {"originTime", "originMonotonic", "taker_fee_fraction", "spread_bps"} <= set(line)
    process.send_signal(signal.SIGTERM)
    code, lines, err = await end(process)
    assert code == 0
    assert err == b""
    assert lines[-1]["message"] == "simulated exchange stopped"


async def test_a_client_that_is_connected_does_not_hold_up_the_end() -> None:
    process = await start(*FLAGS)
    line = await ready(process)
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{line['stream_url']}/market/ws/btcusdt@kline_5m") as client,
    ):
        await client.receive()
        process.send_signal(signal.SIGINT)
        code, _, _ = await end(process)
    assert code == 0


def test_a_parent_without_a_pipe_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "service", "sim", *FLAGS, "--parent"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 78
    assert "--parent" in json.loads(run.stdout)["message"]


async def test_it_does_not_outlive_its_parent() -> None:
    process = await start(*FLAGS, "--parent")
    await ready(process)
    assert process.stdin is not None
    process.stdin.close()
    code, _, _ = await end(process)
    assert code == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_accounts_and_market_time_survive_a_restart(tmp_path: Path, how: signal.Signals) -> None:
    state = tmp_path / "sim.json"
    process = await start(*FLAGS, "--state", str(state))
    line = await ready(process)
    order = await signed(
        line, "POST", "/fapi/v1/order", symbol="BTCUSDT", side="BUY", type="MARKET", quantity="0.01"
    )
    assert "orderId" in order, order
    async with asyncio.timeout(LIMIT_S):  # saved within a second of the change, without being asked
        while b'"symbol":"BTCUSDT"' not in (state.read_bytes() if state.exists() else b""):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    before = await signed(line, "GET", "/fapi/v3/account")
    process.send_signal(how)
    await end(process)
    saved_ms = json.loads(state.read_bytes())["market_ms"]

    process = await start(*FLAGS, "--state", str(state))
    line = await ready(process)
    after = await signed(line, "GET", "/fapi/v3/account")
    process.send_signal(signal.SIGTERM)
    assert (await end(process))[0] == 0
    assert line["originTime"] == saved_ms > line["startTime"]
    assert [p["positionAmt"] for p in after["positions"]] == ["0.010"]
    assert after["totalWalletBalance"] == before["totalWalletBalance"]
    assert os.listdir(tmp_path) == [state.name]


async def test_a_state_of_another_market_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "sim.json"
    process = await start(*FLAGS, "--state", str(state))
    await ready(process)
    process.send_signal(signal.SIGTERM)
    assert (await end(process))[0] == 0
    code, message = await refused("--symbols", "2", "--seed", "6", "--state", str(state))
    assert code == 78
    assert "another market" in message
    assert "seed is '5' there, '6' here" in message


async def test_a_state_file_in_no_folder_is_refused(tmp_path: Path) -> None:
    code, message = await refused(*FLAGS, "--state", str(tmp_path / "missing" / "sim.json"))
    assert code == 78
    assert "missing" in message


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version":1}'])
async def test_a_state_file_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    state = tmp_path / "sim.json"
    state.write_text(content)
    code, message = await refused(*FLAGS, "--state", str(state))
    assert code == 78
    assert str(state) in message


async def test_a_port_in_use_ends_it_with_69_and_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = await refused(*FLAGS, "--port", str(port))
    assert code == 69
    assert str(port) in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--speed", "0"), "--speed"),
        (("--symbols", "701"), "--symbols"),
        (("--port", "65536"), "--port"),
        (("--from", "yesterday"), "--from"),
        (("--from", "2026-02-01", "--until", "2026-01-01"), "--until"),
        (("--key", "no-colon"), "--key"),
        (("--replay", "/nowhere"), "/nowhere"),
        (("--stream-messages", "0"), "--stream-messages"),
    ],
)
async def test_a_wrong_flag_is_named(flags: tuple[str, ...], named: str) -> None:
    code, message = await refused(*flags)
    assert code == 78
    assert named in message


async def test_the_market_can_be_placed_in_time_and_freezes_at_its_end() -> None:
    flags = (
        "--from",
        "2026-03-01T00:00",
        "--until",
        "2026-03-01T00:05+00:00",
        "--symbols",
        "1",
        "--speed",
        "5000",
    )
    process = await start(*flags)
    line = await ready(process)
    async with aiohttp.ClientSession() as http, asyncio.timeout(LIMIT_S):
        ended = False
        while not ended:
            async with http.get(f"{line['rest_url']}/sim/v1/clock") as response:
                clock = await response.json()
            ended = clock["ended"]
        address = f"{line['rest_url']}/fapi/v1/klines?symbol=BTCUSDT&interval=5m&limit=2"
        async with http.get(address) as response:
            rows = await response.json()
    process.send_signal(signal.SIGTERM)
    assert (await end(process))[0] == 0
    assert clock["endTime"] - clock["startTime"] == 300_000
    assert clock["serverTime"] == clock["endTime"]
    assert rows[-1][0] in (clock["startTime"], clock["endTime"])


async def test_recorded_candles_are_replayed() -> None:
    if not RECORDED.is_dir():
        pytest.skip(f"no recorded candles at {RECORDED}")
    flags = (
        "--replay",
        str(RECORDED),
        "--from",
        "2025-10-10T12:00",
        "--until",
        "2025-10-10T13:00",
        "--symbols",
        "3",
    )
    process = await start(*flags, "--speed", "1")
    line = await ready(process)
    async with aiohttp.ClientSession() as http:
        query = f"symbol=BTCUSDT&interval=15m&limit=1&endTime={line['startTime'] - 1}"
        address = f"{line['rest_url']}/fapi/v1/klines?{query}"
        async with http.get(address) as response:
            rows = await response.json()
    process.send_signal(signal.SIGTERM)
    assert (await end(process))[0] == 0
    assert line["startTime"] == 1_760_097_600_000
    assert rows[0][0] == line["startTime"] - 900_000
    assert float(rows[0][4]) > 100_000  # that morning's bitcoin


def test_help_names_every_flag() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "service", "sim", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    for flag in (
        "--port",
        "--replay",
        "--seed",
        "--from",
        "--until",
        "--speed",
        "--state",
        "--key",
        "--parent",
    ):
        assert flag in run.stdout
