"""The kill switch at work on an in-memory venue, over its control socket, and as commands."""

import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from service.clock import WallClock
from service.directory import claim, data_directory, locked
from service.errors import DaemonUnreachable, DataDirectoryUnusable, OrderRejected, VenueUnavailable
from service.monitor.by_hand import answer_by_hand
from service.monitor.control import SOCKET_NAME, BadQuestion, controlling
from service.records import Adjustment, OrderPurpose, Position, RefusalReason
from service.settings import KillSettings, Loaded, RiskSettings, RunSettings, Secrets, Settings, SimSettings
from service.store.schema import SQLITE
from service.store.sqlite import open_sqlite
from service.trading import equity, halting, kill_command
from service.trading.equity import MARKS, EquityWatch
from service.trading.foreign import GUEST
from service.trading.halting import KEY, KillSwitch, Surroundings, read_switch
from service.trading.kill_command import run
from service.trading.killswitch import Level, Rule, Switch, tripped
from tests.integration.trading_desk import (
    Desk,
    Venue,
    approved,
    desk_at,
    full_disk,
    opened,
    quiet,
    refusal,
    signal,
    until,
)


class Halted(msgspec.Struct, kw_only=True):
    desk: Desk
    kill: KillSwitch
    equity: EquityWatch


@asynccontextmanager
async def halting_at(
    path: Path, venue: Venue, kill: KillSettings | None = None, **words: object
) -> AsyncIterator[Halted]:
    known: list[KillSwitch] = []
    async with desk_at(path, venue, halted=lambda: known[0].words if known else "") as desk:
        equity = EquityWatch(venue, desk.store, desk.ledger, WallClock(), desk.counts)
        equity.reconciliation = desk.executor
        await equity.open()
        switch = KillSwitch(
            desk.store,
            equity,
            WallClock(),
            desk.counts,
            kill or KillSettings(),
            RiskSettings(),
            Surroundings(**words),
        )
        await switch.open()
        known.append(switch)
        yield Halted(desk=desk, kill=switch, equity=equity)


@pytest.fixture
async def halted(tmp_path: Path) -> AsyncIterator[Halted]:
    async with halting_at(tmp_path, Venue()) as found:
        yield found


async def by_hand(halted: Halted, action: str, reason: str = "because"):
    return await answer_by_hand(halted.kill, {"do": action, "reason": reason, "by": "test"})


@pytest.mark.parametrize("level", list(Level))
async def test_no_level_lets_an_entry_through_and_all_survive_a_restart(tmp_path: Path, level: Level):
    venue = Venue()
    async with halting_at(tmp_path, venue) as before:
        await by_hand(before, level.value)
        assert refusal(await before.desk.executor.open(signal(), approved())) is RefusalReason.ENTRIES_OFF
    async with halting_at(tmp_path, venue) as after:
        assert after.kill.level is level
        assert "because" in after.kill.words
        assert refusal(await after.desk.executor.open(signal(), approved())) is RefusalReason.ENTRIES_OFF
        await by_hand(after, "resume", "it is over")
        assert isinstance(await after.desk.executor.open(signal(), approved()), Position)
    async with halting_at(tmp_path, venue) as third:
        assert third.kill.words == ""
        assert third.kill.switch.resumed_reason == "it is over"
    assert len([r for r in venue.sent if r.purpose is OrderPurpose.ENTRY]) == 1


async def test_an_entry_that_is_about_to_leave_is_stopped_at_the_seam(halted: Halted):
    leverage = halted.desk.venue.set_leverage

    async def tripped_meanwhile(*words: object) -> None:
        await leverage(*words)
        await by_hand(halted, "no_entries")

    halted.desk.venue.set_leverage = tripped_meanwhile
    answer = await halted.desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_REJECTED
    assert "kill switch" in answer.detail
    assert halted.desk.venue.sent == []
    assert halted.desk.executor.held_symbols() == frozenset()


async def test_reduce_only_keeps_positions_and_their_stops(halted: Halted):
    await opened(halted.desk)
    async with halted.kill.running(halted.desk.executor):
        await by_hand(halted, "reduce_only")
        await halted.kill.look(halted.desk.executor)
        await quiet(halted.desk)
    assert len(halted.desk.executor.positions()) == 1
    assert len(await halted.desk.venue.open_orders()) == 2


async def test_flatten_closes_everything_and_stays_tripped(halted: Halted, monkeypatch):
    monkeypatch.setattr(halting, "LOOK_EVERY_S", 0.01)
    desk = halted.desk
    await opened(desk)
    await desk.executor.open(signal("s2", "BUSDT"), approved())
    desk.venue.before = {OrderPurpose.EXIT: [VenueUnavailable("away"), OrderRejected("no", code=-2010)]}
    async with halted.kill.running(desk.executor):
        await by_hand(halted, "flatten")
        await until(lambda: not desk.executor.positions())
        await quiet(desk)
    assert desk.venue.held == {}
    assert await desk.venue.open_orders() == []
    assert halted.kill.level is Level.FLATTEN
    assert {p.close_reason for p in await desk.store.closed_positions(9)} == {"exit"}
    assert await desk.equal()


async def test_a_flatten_names_what_is_open_and_tells_once_that_all_of_it_is_closed(
    halted: Halted, monkeypatch
):
    monkeypatch.setattr(halting, "LOOK_EVERY_S", 0.01)
    desk = halted.desk
    await opened(desk)
    desk.venue.before = {OrderPurpose.EXIT: [VenueUnavailable("away")] * 2}
    with capture_logs() as logs:
        async with halted.kill.running(desk.executor):
            await halted.kill.look(desk.executor)
            answer = await by_hand(halted, "flatten")
            assert answer["open"] == {"positions": 1, "orders": 2}
            assert "1 positions (AUSDT), closed at market, and 2 orders" in answer["answer"]
            await until(lambda: "flat" in [line["event"] for line in logs])
            await asyncio.sleep(0.05)
            assert "flat: no position" in (await by_hand(halted, "flatten"))["answer"]
    assert (desk.executor.positions(), desk.executor.working_orders()) == ((), ())
    events = [line["event"] for line in logs]
    assert events.count("flat") == 1
    assert events.count("not closed yet, trying again") == 2
    assert events.index("flat") > max(n for n, event in enumerate(events) if event == "flattening")


async def test_a_flatten_that_is_only_protecting_a_guest_is_flat(halted: Halted):
    desk = halted.desk
    guest = msgspec.structs.replace(await opened(desk), signal_id=f"{GUEST}AUSDT")
    desk.executor._books.positions[guest.position_id] = guest
    assert halting.ours(desk.executor) == ([], [])
    assert len(desk.executor.working_orders()) == 2


@pytest.mark.parametrize("weaker", [Level.NO_ENTRIES, Level.REDUCE_ONLY])
async def test_a_milder_command_does_not_call_a_flatten_off(halted: Halted, monkeypatch, weaker: Level):
    monkeypatch.setattr(halting, "LOOK_EVERY_S", 0.01)
    desk = halted.desk
    await opened(desk)
    desk.venue.before = {OrderPurpose.EXIT: [VenueUnavailable("away")] * 3}
    async with halted.kill.running(desk.executor):
        await by_hand(halted, "flatten", "emergency")
        answer = await by_hand(halted, weaker, "cron")
        assert answer["level"] == "flatten"
        assert "flatten is set since" in answer["answer"]
        assert "emergency) and stays; resume first to lower it" in answer["answer"]
        await until(lambda: not desk.executor.positions())
        await quiet(desk)
    [trip] = (await read_switch(desk.store, 1)).trips
    assert (trip.level, "emergency" in trip.words) == (Level.FLATTEN, True)


async def test_the_same_level_again_keeps_the_first_reason_and_says_so(halted: Halted):
    await by_hand(halted, "reduce_only", "first")
    before = halted.kill.switch
    answer = await by_hand(halted, "reduce_only", "second")
    assert answer["answer"].startswith("reduce_only is set already since ")
    assert answer["answer"].endswith("first); that reason and time stay")
    assert halted.kill.switch == before
    await by_hand(halted, "resume", "over")
    assert "answer" not in await by_hand(halted, "no_entries", "third")
    assert halted.kill.level is Level.NO_ENTRIES


async def test_resuming_with_nothing_tripped_changes_nothing_and_says_so(halted: Halted):
    await by_hand(halted, "no_entries")
    await by_hand(halted, "resume", "the first")
    before = halted.kill.switch
    with capture_logs() as logs:
        answer = await by_hand(halted, "resume", "the second")
    assert "nothing was tripped" in answer["answer"]
    assert (halted.kill.switch, answer["resumed"]["reason"]) == (before, "the first")
    assert logs == []


async def test_losses_with_open_positions_trip_it_and_resuming_measures_anew(halted: Halted):
    desk = halted.desk
    await halted.equity.look()
    await opened(desk)
    desk.venue.mark = Decimal(10)  # 180 of 1,000 are lost, unrealised
    await halted.equity.look()
    await halted.kill.look(desk.executor)
    [trip] = halted.kill.switch.trips
    assert (trip.rule, trip.limit) == (Rule.DAY_LOSS, 0.15)
    assert 0.17 < trip.value < 0.19
    refused = halted.kill.refusal()
    assert refused is not None
    assert refused.reason is RefusalReason.DAILY_LOSS
    saved = desk.store.set_value

    async def looked_at_meanwhile(key: str, value: str) -> None:
        await saved(key, value)
        if key == MARKS:
            await halted.kill.look(desk.executor)

    desk.store.set_value = looked_at_meanwhile  # type: ignore[method-assign]
    await by_hand(halted, "resume")
    desk.store.set_value = saved  # type: ignore[method-assign]
    await halted.equity.look()
    await halted.kill.look(desk.executor)
    assert halted.kill.words == ""


async def look(halted: Halted) -> None:
    await halted.equity.look(attempts=1)
    await halted.kill.look(halted.desk.executor)


def moved(venue: Venue, amount: int) -> Adjustment:
    """Money comes or goes; the income history tells it when the test lets it."""
    venue.wallet += amount
    return Adjustment(
        adjustment_id="t1", kind="deposit", symbol="", amount=Decimal(amount), reason="TRANSFER",
        at_ms=venue._now(),
    )  # fmt: skip


@pytest.mark.parametrize("amount", [-400, 1000])
async def test_a_transfer_is_neither_a_loss_nor_a_peak_before_the_books_have_it(tmp_path: Path, amount: int):
    venue = Venue()
    venue.time_ms = WallClock().now_ms()
    async with halting_at(tmp_path, venue) as halted:
        desk = halted.desk
        await opened(desk)
        await look(halted)
        before = halted.equity.marks
        assert before is not None
        transfer = moved(venue, amount)
        for _ in range(2):  # the history lags behind the first reconciliation
            await look(halted)
            assert halted.equity.account is None
            assert halted.equity.marks == before
            assert halted.kill.words == ""
            assert refusal(await desk.executor.open(signal("s9"), approved())) is RefusalReason.ENTRIES_OFF
            assert desk.executor.reconcile_wanted.is_set()
            await desk.reconciler.reconcile()
            desk.executor.reconcile_wanted.clear()
        venue.income.append(transfer)
        await desk.reconciler.reconcile()
        await look(halted)
        assert halted.kill.words == ""
        assert halted.equity.account is not None
        assert halted.equity.marks is not None
        assert halted.equity.marks.peak == pytest.approx(before.peak + amount, abs=0.2)


async def test_what_no_reconciliation_explains_is_measured_as_the_venue_has_it(halted: Halted, monkeypatch):
    monkeypatch.setattr(equity, "HISTORY_LAG_S", 0.0)
    desk = halted.desk
    await look(halted)
    desk.venue.wallet -= 400  # and nothing will ever tell why
    await look(halted)
    await look(halted)
    assert halted.kill.words == ""
    await desk.reconciler.reconcile()
    await look(halted)
    assert Rule.DAY_LOSS in {trip.rule for trip in halted.kill.switch.trips}
    await look(halted)
    assert halted.equity.account is not None


async def unexplained(halted: Halted, amount: str) -> None:
    """The wallet moves, and a complete reconciliation does not find out why."""
    await look(halted)
    halted.desk.venue.wallet += Decimal(amount)
    await look(halted)
    await halted.desk.reconciler.reconcile()
    await look(halted)


async def test_an_equity_that_stays_unexplained_stops_entries_until_a_person_has_it_booked(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(equity, "HISTORY_LAG_S", 0.0)
    venue = Venue()
    async with halting_at(tmp_path, venue) as halted:
        desk = halted.desk
        await opened(desk)
        await unexplained(halted, "-37.02")
        assert [trip.rule for trip in halted.kill.switch.trips] == [Rule.UNEXPLAINED]
        assert halted.kill.level is Level.NO_ENTRIES
        assert "37.02" in halted.equity.words
        assert "perpd resume" in halted.kill.words
        for _ in range(3):  # and no time makes it known
            await desk.reconciler.reconcile()
            await look(halted)
            answer = await desk.executor.open(signal("s9"), approved())
            assert refusal(answer) is RefusalReason.ENTRIES_OFF

        state = await by_hand(halted, "resume", "the fees of a week by hand")
        assert state["level"] == "free"
        assert await desk.equal()
        await look(halted)
        assert (halted.kill.words, halted.equity.words) == ("", "")
        assert halted.equity.account is not None
        await desk.executor._outbox.written()
        [booked] = [r for s, r in desk.archive.records if s == "adjustments"]
        assert (booked.kind, booked.amount, booked.symbol) == ("settlement", Decimal("-37.02"), "")
        assert "the fees of a week by hand" in booked.reason
        assert isinstance(await desk.executor.open(signal("s2", "BUSDT"), approved()), Position)
    async with halting_at(tmp_path, venue) as again:  # the next run has it in its books
        await look(again)
        assert await again.desk.equal()
        assert again.kill.words == ""


async def test_an_equity_that_is_explained_late_frees_entries_by_itself(halted: Halted, monkeypatch):
    monkeypatch.setattr(equity, "HISTORY_LAG_S", 0.0)
    halted.desk.venue.time_ms = WallClock().now_ms()
    await unexplained(halted, "-3")
    assert halted.kill.level is Level.NO_ENTRIES
    late = moved(halted.desk.venue, 0)
    halted.desk.venue.income.append(msgspec.structs.replace(late, kind="commission", amount=Decimal(-3)))
    await halted.desk.reconciler.reconcile()
    await look(halted)
    assert (halted.kill.words, halted.equity.words) == ("", "")


async def test_what_is_unexplained_is_not_forgotten_by_a_resume_that_cannot_book_it(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(equity, "HISTORY_LAG_S", 0.0)
    venue = Venue()
    async with halting_at(tmp_path, venue) as halted:
        await unexplained(halted, "-37.02")
        monkeypatch.setattr(venue, "account", away)
        assert (await by_hand(halted, "resume"))["level"] == "no_entries"
        monkeypatch.undo()
        lifted = await halting.lift(halted.desk.store, "while it is down", "test", 9)
        assert [trip.rule for trip in lifted.trips] == [Rule.UNEXPLAINED]
    async with halting_at(tmp_path, venue) as after:  # nothing is known of the equity yet
        await after.kill.look(after.desk.executor)
        assert after.kill.level is Level.NO_ENTRIES
        assert (await by_hand(after, "resume"))["level"] == "no_entries"


async def test_a_trifle_that_rounding_leaves_stops_nothing(halted: Halted, monkeypatch):
    monkeypatch.setattr(equity, "HISTORY_LAG_S", 0.0)
    halted.desk.venue.wallet = Decimal(10_000)
    await by_hand(halted, "no_entries")
    await unexplained(halted, "0")
    await by_hand(halted, "resume")
    await look(halted)
    assert halted.kill.words == ""
    await unexplained(halted, "0.09")
    assert (halted.kill.words, halted.equity.words) == ("", "")
    assert halted.equity.account is not None


async def away() -> None:
    raise VenueUnavailable("away")


async def test_failing_orders_trip_it(tmp_path: Path):
    async with halting_at(tmp_path, Venue(), KillSettings(order_window=4)) as halted:
        desk = halted.desk
        desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("no", code=-2010)] * 20}
        for n in range(20):
            await desk.executor.open(signal(f"s{n}"), approved())
        await halted.kill.look(desk.executor)
        assert [trip.rule for trip in halted.kill.switch.trips] == [Rule.ORDER_ERRORS]
        await by_hand(halted, "resume")
        await halted.kill.look(desk.executor)
        assert halted.kill.words == ""


async def test_losses_in_a_row_trip_it(tmp_path: Path):
    async with halting_at(tmp_path, Venue(), KillSettings(loss_streak=2)) as halted:
        desk = halted.desk
        for n in range(2):
            await desk.executor.open(signal(f"s{n}"), approved())
            await quiet(desk)
            desk.venue.trigger(OrderPurpose.STOP, "99")
            await quiet(desk)
            desk.venue.mark = Decimal(100)
            await halted.kill.look(desk.executor)
        assert [trip.rule for trip in halted.kill.switch.trips] == [Rule.LOSS_STREAK]
        await by_hand(halted, "resume")
        await halted.kill.look(desk.executor)
        assert halted.kill.words == ""


async def test_stale_data_must_last_before_it_trips(tmp_path: Path):
    stale = 0.9
    kill = KillSettings(stale_s=0.05)
    async with halting_at(tmp_path, Venue(), kill, stale_fraction=lambda: stale) as halted:
        executor = halted.desk.executor
        await halted.kill.look(executor)
        stale = 0.1
        await halted.kill.look(executor)
        stale = 0.9
        await halted.kill.look(executor)
        assert halted.kill.words == ""
        await asyncio.sleep(0.06)
        await halted.kill.look(executor)
        assert [trip.rule for trip in halted.kill.switch.trips] == [Rule.STALE_DATA]


async def test_clock_and_memory_are_asked_of_their_owners(tmp_path: Path):
    words = {"clock_moved_ms": lambda: 31_000.0, "memory_critical": lambda: True}
    async with halting_at(tmp_path, Venue(), **words) as halted:
        await halted.kill.look(halted.desk.executor)
        assert {trip.rule for trip in halted.kill.switch.trips} == {Rule.CLOCK_OFFSET, Rule.MEMORY}
        await by_hand(halted, "resume")
        await halted.kill.look(halted.desk.executor)
        [trip] = halted.kill.switch.trips  # what lasts trips again, what was measured once does not
        assert trip.rule is Rule.MEMORY


async def test_a_run_that_ends_for_critical_memory_is_latched_however_soon_it_ends(tmp_path: Path):
    critical = False
    async with halting_at(tmp_path, Venue(), memory_critical=lambda: critical) as halted:
        async with halted.kill.running(halted.desk.executor):
            while halted.kill._losses_of == (-1, -1):  # noqa: ASYNC110  until the first look was taken
                await asyncio.sleep(0.001)
            critical = True
        [trip] = (await read_switch(halted.desk.store, 1)).trips
    assert trip.rule is Rule.MEMORY


async def test_a_full_disk_delays_the_latch_and_not_the_effect(halted: Halted, monkeypatch):
    monkeypatch.setattr(halted.desk.store, "set_value", full_disk)
    await by_hand(halted, "no_entries")
    assert refusal(await halted.desk.executor.open(signal(), approved())) is RefusalReason.ENTRIES_OFF
    monkeypatch.undo()
    assert (await read_switch(halted.desk.store, 1)).trips == ()
    await halted.kill.look(halted.desk.executor)
    assert (await read_switch(halted.desk.store, 1)).level is Level.NO_ENTRIES


async def test_a_record_that_cannot_be_read_stays_tripped(halted: Halted):
    await halted.desk.store.set_value(KEY, "{broken")
    await halted.kill.open()
    assert halted.kill.level is Level.NO_ENTRIES


async def test_what_another_process_wrote_into_the_store_is_obeyed(halted: Halted, monkeypatch):
    monkeypatch.setattr(halting, "READ_EVERY_S", 0.0)
    store, executor = halted.desk.store, halted.desk.executor
    await halting.write_switch(store, tripped(Switch(), Level.REDUCE_ONLY, "elsewhere", "command", 5))
    await halted.kill.look(executor)
    assert halted.kill.level is Level.REDUCE_ONLY
    await by_hand(halted, "flatten")
    await halted.kill.look(executor)
    assert halted.kill.level is Level.FLATTEN
    await halting.lift(store, "over", "command", 6)
    await halted.kill.look(executor)
    assert halted.kill.words == ""


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"do": "resume"}, "reason"),
        ({"do": "resume", "reason": "  "}, "reason"),
        ({"do": "explode"}, "do is"),
    ],
)
async def test_what_makes_no_sense_is_refused_in_words(halted: Halted, question, words):
    with pytest.raises(BadQuestion, match=words):
        await answer_by_hand(halted.kill, question)


def command(path: Path, action: str, reason: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    settings = Settings(run=RunSettings(data_dir=str(path)))
    loaded = Loaded(settings=settings, sources={}, secrets=Secrets())
    code = run(loaded, argparse.Namespace(reason=reason, json=True), action)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return code, json.loads(printed[-1])


async def kept_state(path: Path) -> None:
    async with open_sqlite(path / "state.sqlite3"):
        pass


def test_without_a_daemon_the_commands_write_the_store(tmp_path: Path, capsys):
    asyncio.run(kept_state(tmp_path))
    code, state = command(tmp_path, "flatten", "holiday", capsys)
    assert (code, state["level"]) == (0, "flatten")
    assert "nothing was closed and nothing was sent to the venue" in state["daemon"]
    assert f"written to {tmp_path / 'state.sqlite3'}" in state["daemon"]
    assert "this machine's clock" in state["daemon"]
    assert "at its next start" in state["daemon"]

    async def stored() -> tuple[Level | None, str | None]:
        async with open_sqlite(tmp_path / "state.sqlite3") as store:
            return (await read_switch(store, 1)).level, await store.get_value(MARKS)

    assert asyncio.run(stored())[0] is Level.FLATTEN
    code, state = command(tmp_path, "resume", "", capsys)
    assert (code, state["level"]) == (64, "flatten")
    assert "nothing was changed" in state["daemon"]
    code, state = command(tmp_path, "resume", "back", capsys)
    assert (code, state["level"], state["resumed"]["reason"]) == (0, "free", "back")
    assert asyncio.run(stored())[0] is None


@pytest.mark.parametrize("stronger", [Level.FLATTEN, Level.REDUCE_ONLY])
def test_without_a_daemon_a_milder_command_lowers_nothing(tmp_path: Path, capsys, stronger: Level):
    asyncio.run(kept_state(tmp_path))
    _, first = command(tmp_path, stronger, "emergency", capsys)
    code, state = command(tmp_path, "no_entries", "cron", capsys)
    assert (code, state["level"], state["trips"]) == (0, stronger, first["trips"])
    assert f"{stronger} is set since" in state["answer"]
    assert "resume first" in state["answer"]
    assert "nothing was changed" in state["daemon"]
    assert ("at its next start" in state["daemon"]) is (stronger is Level.FLATTEN)
    _, state = command(tmp_path, stronger, "again", capsys)
    assert state["trips"] == first["trips"]
    assert "already" in state["answer"]
    assert command(tmp_path, "resume", "over", capsys)[1]["level"] == "free"
    code, state = command(tmp_path, "resume", "twice", capsys)
    assert (code, state["resumed"]["reason"]) == (0, "over")
    assert "nothing was tripped" in state["answer"]
    assert command(tmp_path, "no_entries", "cron", capsys)[1]["level"] == "no_entries"


def test_a_resume_without_a_reason_leaves_an_older_state_as_it_is(tmp_path: Path, capsys, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr("service.store.sqlite.SQLITE", SQLITE[:-1])
        asyncio.run(kept_state(tmp_path))
        assert command(tmp_path, "no_entries", "news", capsys)[0] == 0
    before = (tmp_path / "state.sqlite3").read_bytes()
    code, state = command(tmp_path, "resume", "", capsys)
    assert (code, state["level"], state["answer"]) == (64, "no_entries", kill_command.NO_REASON)
    assert state["daemon"].endswith("state.sqlite3, nothing was changed")
    assert (tmp_path / "state.sqlite3").read_bytes() == before


def test_the_socket_of_a_killed_daemon_is_no_daemon(tmp_path: Path, capsys):
    asyncio.run(kept_state(tmp_path))
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / SOCKET_NAME))
    code, state = command(tmp_path, "flatten", "it was killed", capsys)
    assert (code, state["level"]) == (0, "flatten")
    assert "at its next start" in state["daemon"]


def test_stopping_needs_no_flag_of_the_run_but_the_data_directory(tmp_path: Path, capsys):
    other = Settings(run=RunSettings(data_dir=str(tmp_path)), sim=SimSettings(seed=77))
    with data_directory(other) as directory:
        claim(other, directory)
    asyncio.run(kept_state(tmp_path))
    code, state = command(tmp_path, "no_entries", "now", capsys)
    assert (code, state["level"]) == (0, "no_entries")
    assert "orders that rest there stay" in state["daemon"]


def test_a_live_daemon_whose_socket_is_gone_is_not_written_behind(tmp_path: Path, capsys):
    asyncio.run(kept_state(tmp_path))
    with locked(tmp_path), pytest.raises(DataDirectoryUnusable, match="held by another perpd"):
        command(tmp_path, "flatten", "now", capsys)


def test_one_that_accepts_and_does_not_answer_is_told_as_such(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(kill_command, "_ANSWER_LIMIT_S", 0.05)
    asyncio.run(kept_state(tmp_path))
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / SOCKET_NAME))
        mute.listen()
        with pytest.raises(DaemonUnreachable, match="no daemon answers"):
            command(tmp_path, "flatten", "now", capsys)


def test_a_directory_where_nothing_is_kept_is_an_error_and_stays_as_it_is(tmp_path: Path, capsys):
    with pytest.raises(DaemonUnreachable, match="--data-dir"):
        command(tmp_path / "typo", "flatten", "now", capsys)
    assert list(tmp_path.iterdir()) == []


async def test_with_a_daemon_the_commands_ask_it(halted: Halted, tmp_path: Path, capsys):
    async def answer(question):
        return await answer_by_hand(halted.kill, question)

    directory = tmp_path / "running"
    directory.mkdir()
    async with controlling(directory, {"kill": answer}):
        code, state = await asyncio.to_thread(command, directory, "no_entries", "news", capsys)
    assert (code, state["level"]) == (0, "no_entries")
    assert "daemon" not in state
    assert halted.kill.level is Level.NO_ENTRIES
    assert not (directory / "state.sqlite3").exists()
