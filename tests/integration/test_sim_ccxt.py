"""A client written for Binance, ccxt, trades on the simulated exchange by changing base addresses only."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ccxt.async_support
import ccxt.pro
import pytest

READY_S = 60.0
WAIT_S = 30.0


@asynccontextmanager
async def perpd_sim(*flags: str) -> AsyncIterator[dict[str, Any]]:
    """A running `perpd sim`; gives its ready line and checks that SIGTERM ends it with 0."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "service", "sim", "--symbols", "3", "--seed", "3", *flags),
        stdout=asyncio.subprocess.PIPE,
        limit=1_048_576,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_S):
            ready = json.loads(await process.stdout.readline())
        assert ready["message"] == "simulated exchange ready", ready
        yield ready
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(READY_S):
            await process.communicate()
    assert process.returncode == 0


def options(ready: dict[str, Any]) -> dict[str, Any]:
    """ccxt's settings for our base addresses."""
    rest = ready["rest_url"]
    return {
        "apiKey": "sim-key",
        "secret": "sim-secret",
        "enableRateLimit": False,
        "options": {"fetchCurrencies": False, "adjustForTimeDifference": True},
        "urls": {
            "api": {
                "fapiPublic": f"{rest}/fapi/v1",
                "fapiPublicV2": f"{rest}/fapi/v2",
                "fapiPublicV3": f"{rest}/fapi/v3",
                "fapiPrivate": f"{rest}/fapi/v1",
                "fapiPrivateV2": f"{rest}/fapi/v2",
                "fapiPrivateV3": f"{rest}/fapi/v3",
                "fapiData": f"{rest}/futures/data",
                "ws": {"linear": f"{ready['stream_url']}/ws"},
            }
        },
    }


@pytest.mark.filterwarnings("default")  # warnings of ccxt's own are not ours to mend
async def test_ccxt_trades_from_markets_to_cancel() -> None:
    async with perpd_sim("--speed", "1") as ready:
        client = ccxt.async_support.binanceusdm(options(ready))
        try:
            markets = await client.load_markets()
            symbol = "BTC/USDT:USDT"
            assert len(markets) == 3
            assert markets[symbol]["linear"]
            assert markets[symbol]["active"]
            assert markets[symbol]["precision"]["price"] == 0.1

            candles = await client.fetch_ohlcv(symbol, "15m", limit=50)
            assert len(candles) == 50
            assert candles[-1][0] - candles[0][0] == 49 * 900_000

            balance = await client.fetch_balance()
            assert balance["USDT"]["total"] == 10_000.0

            ticker = await client.fetch_ticker(symbol)
            last = ticker["last"]
            amount = float(client.amount_to_precision(symbol, 500 / last))
            entry = await client.create_order(symbol, "market", "buy", amount)
            filled = await client.fetch_order(entry["id"], symbol)
            assert filled["status"] == "closed"
            assert filled["filled"] == amount
            assert filled["average"] == pytest.approx(last, rel=0.01)

            [position] = await client.fetch_positions([symbol])
            assert position["side"] == "long"
            assert position["contracts"] == amount
            assert position["entryPrice"] == filled["average"]

            stop = await client.create_order(
                symbol,
                "market",
                "sell",
                amount,
                None,
                {"stopLossPrice": last * 0.9, "reduceOnly": True, "clientOrderId": "stop-1"},
            )
            resting = await client.create_order(symbol, "limit", "sell", amount, last * 1.04)
            assert [order["id"] for order in await client.fetch_open_orders(symbol)] == [resting["id"]]
            [trigger] = await client.fetch_open_orders(symbol, params={"trigger": True})
            assert trigger["id"] == stop["id"]
            assert trigger["triggerPrice"] == pytest.approx(last * 0.9, rel=0.001)
            assert trigger["clientOrderId"] == "stop-1"

            await client.cancel_order(resting["id"], symbol)
            await client.cancel_order(stop["id"], symbol, {"trigger": True})
            assert await client.fetch_open_orders(symbol) == []
            assert await client.fetch_open_orders(symbol, params={"trigger": True}) == []

            trades = await client.fetch_my_trades(symbol)
            assert [trade["order"] for trade in trades] == [entry["id"]]
            with pytest.raises(ccxt.async_support.OrderNotFound):
                await client.cancel_order(resting["id"], symbol)
            # ccxt knows the derivatives' codes by the host name only, so here it keeps the plain error
            with pytest.raises(ccxt.async_support.ExchangeError, match="-2019"):
                await client.create_order(symbol, "market", "buy", 100_000 / last * 8)
        finally:
            await client.close()


@pytest.mark.filterwarnings("default")
async def test_ccxt_listens_to_the_kline_stream_and_to_its_orders() -> None:
    async with perpd_sim("--speed", "60") as ready:
        client = ccxt.pro.binanceusdm(options(ready))
        try:
            await client.load_markets()
            opens: set[int] = set()
            async with asyncio.timeout(WAIT_S):
                while len(opens) < 2:
                    for candle in await client.watch_ohlcv("ETH/USDT:USDT", "1m"):
                        opens.add(candle[0])
            assert max(opens) - min(opens) == 60_000

            watching = asyncio.create_task(client.watch_orders("BTC/USDT:USDT"))
            async with asyncio.timeout(WAIT_S):
                listening = False
                while not listening:  # ccxt does not say when its listen key is connected
                    await client.load_time_difference()
                    await client.create_order("BTC/USDT:USDT", "market", "buy", 0.002)
                    done, _ = await asyncio.wait({watching}, timeout=0.2)
                    listening = bool(done)
                orders = await watching
            assert orders[-1]["symbol"] == "BTC/USDT:USDT"
        finally:
            await client.close()
