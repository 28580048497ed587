"""The kill switch by hand beside a perpd that trades on the same PostgreSQL: two real processes."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.clock import WallClock
from service.directory import locked
from service.errors import DaemonUnreachable
from service.settings import KillSettings, RiskSettings, load
from service.store.opening import open_state
from service.trading import halting, kill_command
from service.trading.equity import EquityWatch
from service.trading.halting import KillSwitch, Surroundings, read_switch
from service.trading.kill_request import REQUEST, encoded_request
from service.trading.killswitch import Level
from tests.integration.trading_desk import Desk, Venue, desk_at, opened, quiet, until
from tests.market_seeds import MARKET_SEEDS


class Holder:
    """A perpd that trades on the database, and the command of another host."""

    def __init__(self, kill: KillSwitch, desk: Desk, environment: dict[str, str], apart: Path) -> None:
        self.kill = kill
        self.desk = desk
        self.apart = apart
        self._environment = environment

    async def command(self, action: str, *more: str) -> tuple[int, str, str]:
        words = ["-m", "service", action, "--json", "--data-dir", str(self.apart), *more]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words,
            env={**os.environ, **self._environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.communicate()
            raise
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def holding(environment: dict[str, str], path: Path) -> AsyncIterator[Holder]:
    loaded = load(None, environment)
    os.makedirs(path, exist_ok=True)
    async with open_state(loaded, path) as state, desk_at(path, Venue()) as desk:
        kill = KillSwitch(
            state.store,
            EquityWatch(desk.venue, state.store, desk.ledger, WallClock(), desk.counts),
            WallClock(),
            desk.counts,
            KillSettings(),
            RiskSettings(),
            Surroundings(),
        )
        await kill.open()
        yield Holder(kill, desk, environment, path.parent / "another host")


@pytest.fixture
def environment(postgres) -> dict[str, str]:
    return {"DATABASE_URL": postgres.url, "PERPD_SIM__SEED": str(next(MARKET_SEEDS))}


async def test_the_holder_takes_up_what_is_asked_beside_it_and_says_so(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(halting, "READ_EVERY_S", 0.05)
    monkeypatch.setattr(halting, "LOOK_EVERY_S", 0.05)
    async with holding(environment, tmp_path / "holder") as holder:
        await opened(holder.desk)
        async with holder.kill.running(holder.desk.executor):
            code, out, err = await holder.command("flatten", "--reason", "news")
            assert code == 0, err
            state = json.loads(out)
            assert (state["level"], state["daemon"].startswith("taken up by ")) == ("flatten", True)
            await until(lambda: not holder.desk.executor.positions())
            await quiet(holder.desk)
        assert holder.desk.venue.held == {}
        assert "news" in holder.kill.words

        code, out, _ = await holder.command("stop-entries", "--reason", "cron")
        assert (code, json.loads(out)["level"]) == (0, "flatten")
        assert "news) and stays; resume first" in json.loads(out)["answer"]
        code, out, _ = await holder.command("resume", "--reason", "over")
        assert code == 69
        assert "resume there" in out
        assert holder.kill.level is Level.FLATTEN
        await holder.kill.resume("over", "me")
        holder.kill._read_at_s = 0.0
        await holder.kill.look(holder.desk.executor)
        assert holder.kill.level is None


async def test_a_milder_request_does_not_take_the_place_of_one_that_waits(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(kill_command, "TAKEN_LIMIT_S", 0.3)
    flatten = encoded_request(Level.FLATTEN, "emergency", "perpd, me", 5)
    async with holding(environment, tmp_path / "holder") as holder:
        store = holder.kill._store
        await store.set_value(REQUEST, flatten)
        for waits in ("no_entries", "reduce_only", "flatten"):
            with pytest.raises(DaemonUnreachable):
                await kill_command._beside_a_holder(load(None, environment), waits, "cron", "you", 9)
            assert await store.get_value(REQUEST) == flatten
    async with holding(environment, tmp_path / "holder") as successor:
        assert successor.kill.level is Level.FLATTEN


async def test_what_a_holder_has_not_taken_up_is_kept_for_the_next_start(environment, tmp_path):
    """It hangs, or it was killed and its lease has not run out; one that stands by holds our directory."""
    async with holding(environment, tmp_path / "holder") as holder:
        os.mkdir(holder.apart)
        with locked(holder.apart):
            asking = asyncio.create_task(holder.command("stop-entries", "--reason", "it hangs"))
            while not (await read_switch(holder.kill._store, 1)).trips:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert holder.kill.level is None
            await holder.kill.trip(Level.REDUCE_ONLY, "what it writes meanwhile loses nothing", "me")
            await holder.kill.resume("and lifts only what it knew", "me")
            asking.cancel()
            await asyncio.wait([asking])
    async with holding(environment, tmp_path / "holder") as successor:
        assert successor.kill.level is Level.NO_ENTRIES
        assert "it hangs" in successor.kill.words
        await successor.kill.look(successor.desk.executor)
        assert (await read_switch(successor.kill._store, 1)).asked
