"""The kill switch as `perpd check` finds it in a real store."""

from pathlib import Path

import pytest

from service.check.command import _check as check_all
from service.check.kill import kill_switch
from service.check.result import Check, Verdict
from service.settings import Loaded, load
from service.store.opening import STATE_FILE, open_state
from service.store.sqlite import open_sqlite
from service.trading.halting import KEY, lift, read_switch, write_switch
from service.trading.kill_request import REQUEST, encoded_request
from service.trading.killswitch import Level, Switch, tripped
from tests.market_seeds import MARKET_SEEDS

SINCE_MS = 1_700_000_000_000  # 2023-11-14 22:13:20 UTC


async def found(loaded: Loaded, path: Path) -> Check:
    return await kill_switch(loaded, path / STATE_FILE, SINCE_MS + 60_000)


async def test_a_tripped_switch_is_a_warning_until_it_is_lifted(tmp_path: Path) -> None:
    loaded = load(None, {})
    assert (await found(loaded, tmp_path)).found == "no state yet"
    async with open_sqlite(tmp_path / STATE_FILE) as store:  # open all the while, as by a daemon
        assert await found(loaded, tmp_path) == Check("kill switch", Verdict.PASS, "free")
        switch = tripped(
            await read_switch(store, SINCE_MS), Level.REDUCE_ONLY, "fed day", "a person", SINCE_MS
        )
        await write_switch(store, switch)
        assert await found(loaded, tmp_path) == Check(
            "kill switch",
            Verdict.WARN,
            "tripped, nothing is opened: "
            "reduce_only since 2023-11-14 22:13:20 UTC: by hand (a person): fed day",
            "lift with perpd resume --reason TEXT",
        )
        await lift(store, "it is over", "a person", SINCE_MS + 1)
        assert (await found(loaded, tmp_path)).verdict is Verdict.PASS


async def test_a_flatten_that_waits_says_what_the_next_start_does(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / STATE_FILE) as store:
        await write_switch(store, tripped(Switch(), Level.FLATTEN, "fed day", "me", SINCE_MS))
    check = await found(load(None, {}), tmp_path)
    assert check.verdict is Verdict.WARN
    assert "the next start closes every position of ours at market: flatten since" in check.found


@pytest.mark.parametrize("key", [KEY, REQUEST])
async def test_a_record_that_cannot_be_read_counts_as_tripped(tmp_path: Path, key: str) -> None:
    async with open_sqlite(tmp_path / STATE_FILE) as store:
        await store.set_value(key, "{")
    check = await found(load(None, {}), tmp_path)
    assert check.verdict is Verdict.WARN
    assert "cannot be read" in check.found


async def test_a_state_that_cannot_be_read_is_not_called_free(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"no database" * 1_000)
    assert (await found(load(None, {}), tmp_path)).verdict is Verdict.SKIP


async def test_the_switch_of_a_state_in_a_database_is_found_with_what_was_asked_for(
    postgres, tmp_path: Path
) -> None:
    loaded = load(None, {"DATABASE_URL": postgres.url, "PERPD_SIM__SEED": str(next(MARKET_SEEDS))})
    assert (await found(loaded, tmp_path)).found == "no state yet"
    async with open_state(loaded, tmp_path) as state:
        assert (await found(loaded, tmp_path)).found == "free"
        asked = encoded_request(Level.FLATTEN, "power cut", "a person", SINCE_MS)
        await state.store.set_value(REQUEST, asked)
        check = await found(loaded, tmp_path)
    assert check.verdict is Verdict.WARN
    assert "flatten since" in check.found
    assert "power cut" in check.found


async def test_the_command_has_a_row_for_it(tmp_path: Path) -> None:
    flags = {"run.mode": "paper", "run.data_dir": str(tmp_path), "exchange.rest_url": "http://127.0.0.1:9"}
    async with open_sqlite(tmp_path / STATE_FILE) as store:
        await write_switch(
            store, tripped(await read_switch(store, 1), Level.NO_ENTRIES, "fed day", "me", SINCE_MS)
        )
    rows = [check for check in await check_all(load(None, {}, flags), {}) if check.name == "kill switch"]
    assert [row.verdict for row in rows] == [Verdict.WARN]
